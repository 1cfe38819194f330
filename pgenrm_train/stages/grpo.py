"""CRE and the curriculum (METHOD §4, §5): the rows that GRPO samples from, explicit criteria withheld.

Needs `build_data/pairs.parquet` and a checkpoint.  Writes `rows.parquet`.  A curriculum with a schedule also
gets `signals.parquet`: model-free signals and origin of each row.  To mine hardness it gets `mirror.parquet`:
the rows in the other presentation order.  The engine makes `checkpoint/` and `metrics.jsonl`.

Anything that the policy of masking keeps out of the prompt is in `extra_info` only.  So are synthetic
criteria (`criteria` stage) of users who stated none: they are added after the prompt is written.

A fixed slice (`validation.parquet`) validates the stage while it trains, with probes for unwanted lessons.
Every pair of the slice is shown in both presentation orders, with the history of its own user, with that of
another user, and with none (`extra_info.probe`).  A model that reads whose votes it is shown loses accuracy
with another user's.  A model that has learnt general taste does not.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from pgenrm_train.config import Config, CurriculumConfig, GrpoConfig, StageName, masking_of, seed_of
from pgenrm_train.config.setting import known
from pgenrm_train.curriculum.hard_negatives import GIVEN, HardNegative, hard_negatives
from pgenrm_train.curriculum.hardness import Embed, Votes
from pgenrm_train.curriculum.hardness import signals as model_free_signals
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_table
from pgenrm_train.prompts.masking import FullView, MaskedView, apply_masking, present
from pgenrm_train.prompts.writer import Messages, histories, pairs_of_split
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem, PreferencePair
from pgenrm_train.rewards.hacking_signs import EMPTY, OWN, SWAPPED
from pgenrm_train.rewards.judging import signals
from pgenrm_train.rewards.training_rows import GrpoRow
from pgenrm_train.run.concurrency import progress

ROWS, MIRROR, SIGNALS = "rows.parquet", "mirror.parquet", "signals.parquet"
VALIDATION = "validation.parquet"
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

    def row(self, index: int, pair: PreferencePair, example: Example) -> GrpoRow:
        """A row under the stage's policy of masking, with a seeded draw per pair."""
        view, withheld = apply_masking(
            example,
            masking_of(self.config, self.stage),
            random.Random(f"{seed_of(self.config, self.stage)}/{self.stage}/mask/{pair.pair_id}"),
            show_probability=self.config.masking.show_probability,
        )
        explicit = withheld.explicit
        if not signals(explicit):
            explicit = self.synthetic.get(pair.user_id, explicit)
        return self.assemble(index, pair, withheld.chosen_index, self.write(view), explicit)

    def assemble(
        self, index: int, pair: PreferencePair, order: int, prompt: Messages, explicit: ExplicitSignals
    ) -> GrpoRow:
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


def write_rows(builder: RowBuilder, folder: Path, pairs: Sequence[PreferencePair]) -> int:
    """Write the rows that the stage's steps can use; returns their number.

    Presentation orders alternate, so that both are equally frequent.
    """
    config, stage = builder.config, builder.stage
    settings: GrpoConfig = getattr(config, stage)
    train, origins = training_pairs(config, stage, pairs, builder.prototype_of)
    if len(train) < known(settings.prompts_per_step):
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
    limit = max(settings.rows, settings.prompts_per_step or 0)
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


def write_validation(builder: RowBuilder, folder: Path, pairs: Sequence[PreferencePair]) -> int:
    """Write the rows of at most `validate_pairs` validation pairs; returns their number, 0 without a file."""
    config, stage = builder.config, builder.stage
    settings: GrpoConfig = getattr(config, stage)
    some = pairs_of_split(pairs, "val", settings.validate_pairs) if settings.validate_every else []
    # The stage's masking, without its draws.
    policy = "full" if masking_of(config, stage) == "full" else "masked"
    rows: list[GrpoRow] = []
    for pair, probe, history in _questions(some, histories(config, pairs)):
        for order in (0, 1):
            view, withheld = apply_masking(present(pair, history, order), policy, random.Random(0))
            row = builder.assemble(len(rows), pair, order, builder.write(view), withheld.explicit)
            row["extra_info"]["probe"] = probe
            if probe != OWN:  # a history that is not the user's is not judged
                row["extra_info"]["explicit"] = json.dumps(signals(ExplicitSignals()))
            rows.append(row)
    if rows:
        write_table(folder / VALIDATION, rows)
    return len(rows)


def _questions(
    pairs: Sequence[PreferencePair], history_of: Callable[[PreferencePair], tuple[HistoryItem, ...]]
) -> Iterator[tuple[PreferencePair, str, tuple[HistoryItem, ...]]]:
    """(pair, probe, history).

    The other user is that of the next pair of the slice whose user has a history; there may be none.
    """
    with_history = [(pair, history_of(pair)) for pair in pairs]
    swapped = _next_histories(with_history)
    for (pair, history), other in zip(with_history, swapped, strict=True):
        yield pair, OWN, history
        yield pair, EMPTY, ()
        if other is not None:
            yield pair, SWAPPED, other


def _next_histories(
    pairs: Sequence[tuple[PreferencePair, tuple[HistoryItem, ...]]],
) -> list[tuple[HistoryItem, ...] | None]:
    """Per pair the history of the next one on the ring that is another user's and not empty, in linear time.

    The ring is walked backwards, twice.  Two histories are known: the nearest, and the nearest of any user
    but that one's.
    """
    found: list[tuple[HistoryItem, ...] | None] = [None] * len(pairs)
    nearest: tuple[str, tuple[HistoryItem, ...]] | None = None
    other: tuple[str, tuple[HistoryItem, ...]] | None = None
    for place in (*reversed(range(len(pairs))), *reversed(range(len(pairs)))):
        user, history = pairs[place][0].user_id, pairs[place][1]
        known = other if nearest is not None and nearest[0] == user else nearest
        found[place] = known[1] if known else None
        if history:
            other, nearest = known, (user, history)
    return found
