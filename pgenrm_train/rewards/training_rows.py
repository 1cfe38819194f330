"""Rows of a GRPO stage: a prompt, and fields for rewards and judges alone.

The layout is veRL's.  What masking withholds from the prompt is in `extra_info` alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from pgenrm_train.rewards.rubric_dropout import RubricDropout


class RowExtra(TypedDict):
    """Fields beyond the prompt.

    `order` is the place of the chosen response.  `explicit` is the JSON of `judging.signals`.  `probe` names
    the history that a validation row shows.  `dropout` hides criteria from the judge; no file holds it.
    """

    index: int
    pair_id: str
    user_id: str
    order: int
    kind: str | None
    n_responses: int
    criteria: str | None
    explicit: str
    synthetic: bool
    probe: NotRequired[str]
    dropout: NotRequired[RubricDropout]


class GrpoRow(TypedDict):
    """One row of rows.parquet; `reward_model.ground_truth` is the index of the chosen response, as text."""

    data_source: str
    prompt: list[dict[str, str]]
    reward_model: dict[str, str]
    extra_info: RowExtra


def withheld_signals(extra: RowExtra) -> Mapping[str, object]:
    """The user's signals that the prompt withholds; empty if there are none."""
    signals, dropout = dict(json.loads(extra["explicit"])), extra.get("dropout")
    return dropout.signals(signals) if dropout else signals


def with_dropout(row: GrpoRow, share: float, step: int) -> GrpoRow:
    """The row as the judge sees it in a training step."""
    extra = row["extra_info"]
    return {**row, "extra_info": {**extra, "dropout": RubricDropout(share, extra["pair_id"], step)}}


def read_extras(path: Path) -> list[RowExtra]:
    """The `extra_info` of every row of a parquet file."""
    import pyarrow.parquet as pq

    return list(pq.read_table(path, columns=["extra_info"])["extra_info"].to_pylist())
