"""CRE and the curriculum (METHOD §4, §5): the rows that GRPO samples from, with the explicit criteria withheld.

Needs `build_data/pairs.parquet` and a checkpoint.  Makes `rows.parquet`; for a curriculum with a schedule also `mirror.parquet` (the
rows in the other presentation order, to mine hardness from) and `signals.parquet` (the model-free signals and origin of each row);
the engine makes `checkpoint/` and `metrics.jsonl`.
What the policy of masking keeps out of the prompt rides in `extra_info` only (`grpo_rows`).  So do synthetic criteria (`criteria`
stage) of users who stated nothing: they come in after the prompt is written.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pgenrm_train.config import Config, masking_of, seed_of
from pgenrm_train.curriculum.hard_negatives import GIVEN, HardNegative, hard_negatives
from pgenrm_train.curriculum.hardness import Embed, Votes
from pgenrm_train.curriculum.hardness import signals as signals_of
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_table
from pgenrm_train.prompts.masking import FullView, MaskedView, apply_masking, present
from pgenrm_train.prompts.writer import Messages, asked, histories
from pgenrm_train.records.pairs import Example, ExplicitSignals, PreferencePair
from pgenrm_train.rewards.judging import signals
from pgenrm_train.stages.grpo_rows import row_of

ROWS, MIRROR, SIGNALS = "rows.parquet", "mirror.parquet", "signals.parquet"


def write_rows(
    config: Config,
    section: str,
    path: Path,
    pairs: Sequence[PreferencePair],
    writer: Callable[[MaskedView | FullView], Messages],
    progress: Callable[..., Iterable[Any]],
    synthetic: Mapping[str, ExplicitSignals] = MappingProxyType({}),
    embed: Embed | None = None,
    prototype_of: Mapping[str, int] = MappingProxyType({}),
) -> int:
    """Write the rows that the stage's steps can use; returns their number.

    Presentation orders alternate, so that both are equally frequent.  `synthetic`: user → criteria to judge by where the user stated
    nothing.  `embed`: for the similarity of responses, None compares trigrams.  `prototype_of`: user → prototype, for hard negatives.
    """
    settings = getattr(config, section)
    train, origins = training_pairs(config, section, pairs, prototype_of)
    if len(train) < settings.prompts_per_step:
        raise DataError(
            f"{len(train)} training pairs are fewer than {section}.prompts_per_step={settings.prompts_per_step}"
        )
    sampler = histories(config, pairs)
    scheduled = section == "curriculum" and settings.schedule != "uniform"
    rows, mirror, known = [], [], []
    for index, pair in enumerate(progress(train, f"{section} prompts", len(train))):
        history, order = sampler(pair), index % 2
        rows.append(_row(config, section, index, pair, present(pair, history, order), writer, synthetic))
        known.append(len(history))
        if scheduled and mines(config):
            mirror.append(
                _row(config, section, index, pair, present(pair, history, 1 - order), writer, synthetic)
            )
    if scheduled:
        found = signals_of(train, Votes(pair for pair in pairs if pair.trains), embed)
        common = Counter(pair.scenario for pair in train)
        columns = {"pair_id": [pair.pair_id for pair in train], "origin": origins, "history": known,
                   "scenario": [common[pair.scenario] / len(train) for pair in train]} | found  # fmt: skip
        write_table(
            path.with_name(SIGNALS),
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        )
    if mirror:
        write_table(path.with_name(MIRROR), mirror)
    write_table(path, rows)  # the last: where it stands, the others do
    return len(rows)


def mines(config: Config) -> bool:
    """Whether the curriculum's schedule asks the model how hard the pairs are."""
    settings = config.curriculum
    return settings.mine and settings.hard_by == "hardness" and settings.schedule != "uniform"


def training_pairs(
    config: Config,
    section: str,
    pairs: Sequence[PreferencePair],
    prototype_of: Mapping[str, int] = MappingProxyType({}),
) -> tuple[list[PreferencePair], list[str]]:
    """The pairs to train on in a seeded order, at most as many as are drawn, and the origin of each.

    With `curriculum.construct` up to half of them are hard negatives (see `hard_negatives`), the rest a plain draw.
    """
    settings, rng = getattr(config, section), random.Random(f"{seed_of(config, section)}/{section}")
    train = asked(pairs, "train")
    rng.shuffle(train)
    limit = max(settings.rows, settings.prompts_per_step)
    if not getattr(settings, "construct", False):
        return train[:limit], [GIVEN] * len(train[:limit])
    made = hard_negatives(pairs, near=config.data.min_rating_gap, prototype_of=prototype_of)
    rng.shuffle(made)
    first = made[: limit // 2]
    taken = {negative.pair.pair_id for negative in first}
    rest = [HardNegative(pair, GIVEN) for pair in train if pair.pair_id not in taken]
    drawn = first + rest[: limit - len(first)]
    rng.shuffle(drawn)
    print(f"{section}: {len(first)} of {len(made)} hard negatives among {len(drawn)} rows", flush=True)
    return [negative.pair for negative in drawn], [negative.origin for negative in drawn]


def _row(
    config: Config,
    section: str,
    index: int,
    pair: PreferencePair,
    example: Example,
    writer: Callable[[MaskedView | FullView], Messages],
    synthetic: Mapping[str, ExplicitSignals],
) -> dict[str, Any]:
    rng = random.Random(f"{seed_of(config, section)}/{section}/mask/{pair.pair_id}")
    view, withheld = apply_masking(
        example, masking_of(config, section), rng, show_probability=config.masking.show_probability
    )
    explicit = (
        withheld.explicit if signals(withheld.explicit) else synthetic.get(pair.user_id, withheld.explicit)
    )
    return row_of(config, index, pair, withheld.chosen_index, writer(view), explicit)
