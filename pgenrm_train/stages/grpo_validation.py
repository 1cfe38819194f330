"""The fixed slice on which a GRPO stage is validated while it trains, with probes for unwanted lessons.

Every pair of the slice is shown in both presentation orders, with the history of its own user, with that of
another user, and with none (`extra_info.probe`).  A model that reads whose votes it is shown loses accuracy
with another user's.  A model that has learnt general taste does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from pgenrm_train.config import GrpoConfig, masking_of
from pgenrm_train.files import write_table
from pgenrm_train.prompts.masking import apply_masking, present
from pgenrm_train.prompts.writer import histories, pairs_of_split
from pgenrm_train.records.pairs import ExplicitSignals, HistoryItem, PreferencePair
from pgenrm_train.rewards.hacking_signs import EMPTY, OWN, SWAPPED
from pgenrm_train.rewards.judging import signals
from pgenrm_train.rewards.training_rows import Row
from pgenrm_train.stages.grpo import RowBuilder

VALIDATION = "validation.parquet"
History = tuple[HistoryItem, ...]


def write_validation(builder: RowBuilder, folder: Path, pairs: Sequence[PreferencePair]) -> int:
    """Write the rows of at most `validate_pairs` validation pairs; returns their number, 0 without a file."""
    config, stage = builder.config, builder.stage
    settings: GrpoConfig = getattr(config, stage)
    some = pairs_of_split(pairs, "val", settings.validate_pairs) if settings.validate_every else []
    # The stage's masking, without its draws.
    policy = "full" if masking_of(config, stage) == "full" else "masked"
    rows: list[Row] = []
    for pair, probe, history in _questions(some, histories(config, pairs)):
        for order in (0, 1):
            view, withheld = apply_masking(present(pair, history, order), policy, Random(0))
            row = builder.assemble(len(rows), pair, order, builder.write(view), withheld.explicit)
            row["extra_info"]["probe"] = probe
            if probe != OWN:  # a history that is not the user's is not judged
                row["extra_info"]["explicit"] = json.dumps(signals(ExplicitSignals()))
            rows.append(row)
    if rows:
        write_table(folder / VALIDATION, rows)
    return len(rows)


def _questions(
    pairs: Sequence[PreferencePair], history_of: Callable[[PreferencePair], History]
) -> Iterator[tuple[PreferencePair, str, History]]:
    """(pair, probe, history).

    The other user is that of the next pair of the slice whose user has a history; there may be none.
    """
    with_history = [(pair, history_of(pair)) for pair in pairs]
    for place, (pair, history) in enumerate(with_history):
        yield pair, OWN, history
        yield pair, EMPTY, ()
        others = (
            h for p, h in with_history[place + 1 :] + with_history[:place] if p.user_id != pair.user_id and h
        )
        if (swapped := next(others, None)) is not None:
            yield pair, SWAPPED, swapped
