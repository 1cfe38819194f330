"""build_data: a raw source → preference pairs of one schema, with a card of counts and hashes.

Needs a builder.  Makes `pairs.parquet` and `card.json`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pgenrm_train.artifacts import StageFolder, sha256_file, write_json, write_table
from pgenrm_train.config import Config
from pgenrm_train.errors import DataError
from pgenrm_train.records import PreferencePair, pair_to_row
from pgenrm_train.stages.inputs import PAIRS

READS = ("data", "seed")


def run(config: Config, folder: StageFolder, build: Callable[..., Iterable[PreferencePair]]) -> dict[str, Any]:
    """Build, check and write; returns the card.  Raises DataError for an empty split or overlapping ids."""
    pairs = _limited(list(build(config.data, config.seed)), config)
    _refuse_overlap(pairs)
    write_table(folder.path / PAIRS, [pair_to_row(p) for p in pairs])
    card = _card(pairs) | {"sha256": sha256_file(folder.path / PAIRS)}
    write_json(folder.path / "card.json", card)
    return card


def _limited(pairs: list[PreferencePair], config: Config) -> list[PreferencePair]:
    """Keep at most `data.max_train_pairs` train rows, whole users at a time; held-out limits are applied where they are asked."""
    limit = config.data.max_train_pairs
    if limit is None:
        return pairs
    counts = Counter(p.user_id for p in pairs if p.trains)
    kept, total = set(), 0
    for user, rows in counts.items():
        if total >= limit:
            break
        kept.add(user)
        total += rows
    return [p for p in pairs if not p.trains or p.user_id in kept]


def _refuse_overlap(pairs: Sequence[PreferencePair]) -> None:
    """No id twice, and no vote of a user in two splits: the same question and the same two texts, whichever was chosen."""
    seen_ids: set[str] = set()
    split_of: dict[tuple[str, str, frozenset[str]], tuple[str, str]] = {}
    for pair in pairs:
        if pair.pair_id in seen_ids:
            raise DataError(f"pair_id {pair.pair_id!r} occurs twice; ids must be unique")
        seen_ids.add(pair.pair_id)
        content = (pair.user_id, "\n".join(m.content for m in pair.context), frozenset((pair.chosen, pair.rejected)))
        split, first = split_of.setdefault(content, (pair.split, pair.pair_id))
        if split != pair.split:
            raise DataError(
                f"pairs {first!r} ({split}) and {pair.pair_id!r} ({pair.split}) are the same vote of user {pair.user_id!r} in two splits"
            )


def _card(pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    if not any(p.trains for p in pairs):
        raise DataError("the data holds no pair with split=train of a training user; nothing could be learnt")
    splits = Counter(p.split for p in pairs)
    return {
        "pairs": len(pairs),
        "users": len({p.user_id for p in pairs}),
        "pairs_by_split": dict(splits),
        "users_by_user_split": dict(Counter(split for _, split in {(p.user_id, p.user_split) for p in pairs})),
        "pairs_by_kind": dict(Counter(p.kind or "(none)" for p in pairs)),
        "with_stated_criteria": sum(p.explicit.criteria is not None for p in pairs),
        "chosen_longer_share": round(sum(len(p.chosen) > len(p.rejected) for p in pairs) / len(pairs), 4),
        "identical_responses": sum(p.chosen == p.rejected for p in pairs),
    }
