"""CRE and the curriculum (METHOD §4, §5): the rows that GRPO samples from, explicit criteria withheld.

Needs `build_data/pairs.parquet` and a checkpoint.  Writes `rows.parquet`.  A curriculum with a schedule also
gets `signals.parquet` (model-free signals and origin of each row) and, to mine hardness from,
`mirror.parquet` (the rows in the other presentation order).  The engine makes `checkpoint/` and
`metrics.jsonl`.

Anything that the policy of masking keeps out of the prompt is in `extra_info` only.  So are synthetic
criteria (`criteria` stage) of users who stated none: they are added after the prompt is written.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from pgenrm_train.config import Config, CurriculumConfig, GrpoConfig, StageName, masking_of, seed_of
from pgenrm_train.curriculum.hard_negatives import GIVEN, HardNegative, hard_negatives
from pgenrm_train.curriculum.hardness import Embed, Votes
from pgenrm_train.curriculum.hardness import signals as model_free_signals
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_table
from pgenrm_train.prompts.masking import FullView, MaskedView, apply_masking, present
from pgenrm_train.prompts.writer import Messages, histories, pairs_of_split
from pgenrm_train.records.pairs import Example, ExplicitSignals, PreferencePair
from pgenrm_train.rewards.judging import signals
from pgenrm_train.rewards.training_rows import Row
from pgenrm_train.run.progress import progress

ROWS, MIRROR, SIGNALS = "rows.parquet", "mirror.parquet", "signals.parquet"
WritePrompt = Callable[[MaskedView | FullView], Messages]


@dataclass(frozen=True)
class RowBuilder:
    """Builder of a stage's rows, with the inputs of their hardness.

    `synthetic`: user → criteria to judge by if the user stated nothing.  `embed`: for the similarity of
    responses; None compares trigrams.  `prototype_of`: user → prototype, for hard negatives.
    """

    config: Config
    stage: StageName
    write: WritePrompt
    synthetic: Mapping[str, ExplicitSignals] = field(default_factory=dict)
    embed: Embed | None = None
    prototype_of: Mapping[str, int] = field(default_factory=dict)

    def row(self, index: int, pair: PreferencePair, example: Example) -> Row:
        """A row under the stage's policy of masking, with a seeded draw per pair."""
        policy, show = masking_of(self.config, self.stage), self.config.masking.show_probability
        rng = random.Random(f"{seed_of(self.config, self.stage)}/{self.stage}/mask/{pair.pair_id}")
        view, withheld = apply_masking(example, policy, rng, show_probability=show)
        explicit = withheld.explicit
        if not signals(explicit):
            explicit = self.synthetic.get(pair.user_id, explicit)
        return self.assemble(index, pair, withheld.chosen_index, self.write(view), explicit)

    def assemble(
        self, index: int, pair: PreferencePair, order: int, prompt: Messages, explicit: ExplicitSignals
    ) -> Row:
        """A row; `order` is the place of the chosen response, `explicit` all that a judge may use."""
        return {
            "data_source": self.config.data.name,
            "prompt": prompt,
            "reward_model": {"style": "rule", "ground_truth": str(order)},
            "extra_info": {
                "index": index,
                "pair_id": pair.pair_id,
                "user_id": pair.user_id,
                "order": order,
                "kind": pair.kind,
                "n_responses": 2,
                "criteria": explicit.criteria,
                "explicit": json.dumps(signals(explicit), ensure_ascii=False),
                "synthetic": explicit.synthetic,
            },
        }


def write_rows(
    builder: RowBuilder,
    folder: Path,
    pairs: Sequence[PreferencePair],
) -> int:
    """Write the rows that the stage's steps can use; returns their number.

    Presentation orders alternate, so that both are equally frequent.
    """
    config, stage = builder.config, builder.stage
    settings: GrpoConfig = getattr(config, stage)
    train, origins = training_pairs(config, stage, pairs, builder.prototype_of)
    if len(train) < settings.prompts_per_step:
        raise DataError(
            f"{len(train)} training pairs are fewer than {stage}.prompts_per_step={settings.prompts_per_step}"
        )
    sampler = histories(config, pairs)
    scheduled = isinstance(settings, CurriculumConfig) and settings.schedule != "uniform"
    mirrored = scheduled and mines(config)
    rows, mirror, lengths = [], [], []
    for index, pair in enumerate(progress(train, f"{stage} prompts", len(train))):
        history, order = sampler(pair), index % 2
        rows.append(builder.row(index, pair, present(pair, history, order)))
        lengths.append(len(history))
        if mirrored:
            mirror.append(builder.row(index, pair, present(pair, history, 1 - order)))
    if scheduled:
        scenarios = Counter(pair.scenario for pair in train)
        columns = {
            "pair_id": [pair.pair_id for pair in train],
            "origin": origins,
            "history": lengths,
            "scenario": [scenarios[pair.scenario] / len(train) for pair in train],
            **model_free_signals(train, Votes(pair for pair in pairs if pair.trains), builder.embed),
        }
        table = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        write_table(folder / SIGNALS, table)
    if mirror:
        write_table(folder / MIRROR, mirror)
    write_table(folder / ROWS, rows)  # the last: if it exists, the others do
    return len(rows)


def mines(config: Config) -> bool:
    """Whether the curriculum measures hardness with the model."""
    settings = config.curriculum
    return settings.mine and settings.hard_by == "hardness" and settings.schedule != "uniform"


def training_pairs(
    config: Config,
    stage: str,
    pairs: Sequence[PreferencePair],
    prototype_of: Mapping[str, int] = MappingProxyType({}),
) -> tuple[list[PreferencePair], list[str]]:
    """The pairs to train on in a seeded order, at most as many as are drawn, and the origin of each.

    With `curriculum.construct` up to half of them are hard negatives (see `hard_negatives`), the rest a plain
    draw.
    """
    settings, rng = getattr(config, stage), random.Random(f"{seed_of(config, stage)}/{stage}")
    train = pairs_of_split(pairs, "train")
    rng.shuffle(train)
    limit = max(settings.rows, settings.prompts_per_step)
    if not getattr(settings, "construct", False):
        return train[:limit], [GIVEN] * len(train[:limit])
    negatives = hard_negatives(pairs, near=config.data.min_rating_gap, prototype_of=prototype_of)
    rng.shuffle(negatives)
    first = negatives[: limit // 2]
    taken = {negative.pair.pair_id for negative in first}
    rest = [HardNegative(pair, GIVEN) for pair in train if pair.pair_id not in taken]
    drawn = first + rest[: limit - len(first)]
    rng.shuffle(drawn)
    print(f"{stage}: {len(first)} of {len(negatives)} hard negatives among {len(drawn)} rows", flush=True)
    return [negative.pair for negative in drawn], [negative.origin for negative in drawn]
