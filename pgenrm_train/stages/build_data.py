"""build_data: a raw source → preference pairs of one schema, with a card of counts and hashes.

Needs a builder.  Makes `pairs.parquet` and `card.json`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from pgenrm_train.artifacts import StageFolder, sha256_file, write_json, write_table
from pgenrm_train.config import Config
from pgenrm_train.errors import DataError
from pgenrm_train.records import PreferencePair, pair_to_row
from pgenrm_train.stages.inputs import PAIRS

READS = ("data", "seed")


def run(config: Config, folder: StageFolder, build: Callable[..., Iterable[PreferencePair]]) -> dict[str, Any]:
    """Build, check and write; returns the card.  Raises DataError when nothing is left to learn from."""
    pairs = _limited(_with_unique_ids(build(config.data, config.seed)), config)
    kept = without_overlap(pairs)
    write_table(folder.path / PAIRS, [pair_to_row(p) for p in kept])
    card = _card(kept) | {"train_votes_dropped_as_repeated_in_val_or_test": len(pairs) - len(kept)}
    card["sha256"] = sha256_file(folder.path / PAIRS)
    write_json(folder.path / "card.json", card)
    return card


def _with_unique_ids(pairs: Iterable[PreferencePair]) -> list[PreferencePair]:
    """Many sources name the *question*, which several users voted on; here an id names one vote."""
    found = list(pairs)
    times = Counter(p.pair_id for p in found)
    used = {name for name, count in times.items() if count == 1}
    seen: Counter[str] = Counter()
    unique = []
    for pair in found:
        name = pair.pair_id
        if times[name] > 1:
            base = name = f"{pair.pair_id}/{pair.user_id}"
            while name in used or seen[base] == 0:
                seen[base] += 1
                name = base if seen[base] == 1 else f"{base}/{seen[base]}"
            used.add(name)
        unique.append(replace(pair, pair_id=name))
    return unique


def without_overlap(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Drop train votes that the same user also casts in val or test: same conversation, same two texts, whichever was chosen.

    The same question put to *other* users is normal in votes and stays.
    """
    held_out = {_content(p) for p in pairs if p.split != "train"}
    return [p for p in pairs if p.split != "train" or _content(p) not in held_out]


def _content(pair: PreferencePair) -> tuple[str, tuple[str, ...], frozenset[str]]:
    return pair.user_id, tuple(m.content for m in pair.context), frozenset((pair.chosen, pair.rejected))


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
