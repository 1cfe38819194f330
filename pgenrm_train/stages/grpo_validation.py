"""The fixed slice on which a GRPO stage is validated while it trains, and probed for what it should not learn.

Every pair of the slice is asked in both presentation orders, with the history of its own user, with that of another user, and with none
(`extra_info.probe`).  A model that reads whose votes it is shown loses accuracy with another's; one that has learnt what people like
in general does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from pgenrm_train.config import Config, masking_of
from pgenrm_train.files import write_table
from pgenrm_train.prompts.masking import FullView, MaskedView, apply_masking, present
from pgenrm_train.prompts.writer import Messages, asked, histories
from pgenrm_train.records.pairs import HistoryItem, PreferencePair
from pgenrm_train.rewards.hacking_signs import EMPTY, OWN, SWAPPED
from pgenrm_train.stages.grpo_rows import row_of

VALIDATION = "validation.parquet"
History = tuple[HistoryItem, ...]


def write_validation(
    config: Config,
    section: str,
    path: Path,
    pairs: Sequence[PreferencePair],
    writer: Callable[[MaskedView | FullView], Messages],
) -> int:
    """Write the rows of at most `validate_pairs` pairs of the validation split; returns their number, 0 where there is no file."""
    settings = getattr(config, section)
    some = asked(pairs, "val", settings.validate_pairs) if settings.validate_every else []
    policy = (
        "full" if masking_of(config, section) == "full" else "masked"
    )  # what the stage hides, without its draws
    rows: list[dict[str, Any]] = []
    for pair, probe, history in _questions(some, histories(config, pairs)):
        for order in (0, 1):
            view, withheld = apply_masking(present(pair, history, order), policy, Random(0))
            row = row_of(config, len(rows), pair, order, writer(view), withheld.explicit)
            row["extra_info"]["probe"] = probe
            if probe != OWN:
                row["extra_info"]["explicit"] = (
                    "{}"  # no judge is asked about a history that is not the user's
                )
            rows.append(row)
    if rows:
        write_table(path, rows)
    return len(rows)


def _questions(
    pairs: Sequence[PreferencePair], history_of: Callable[[PreferencePair], History]
) -> Iterator[tuple[PreferencePair, str, History]]:
    """(pair, probe, history).  The other user is that of the next pair of the slice whose user has a history; there may be none."""
    known = [(pair, history_of(pair)) for pair in pairs]
    for place, (pair, history) in enumerate(known):
        yield pair, OWN, history
        yield pair, EMPTY, ()
        others = (h for p, h in known[place + 1 :] + known[:place] if p.user_id != pair.user_id and h)
        if (swapped := next(others, None)) is not None:
            yield pair, SWAPPED, swapped
