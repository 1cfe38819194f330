"""Rows of a GRPO stage: a prompt, and apart from it the fields that only rewards and judges may read.

The layout is veRL's.  Anything that masking keeps out of the prompt is in `extra_info` alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict


class RowExtra(TypedDict):
    """Fields beyond the prompt.

    `order` is the place of the chosen response.  `explicit` is the JSON of `judging.signals`.  `probe` names
    the history that a validation row shows.
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


class GrpoRow(TypedDict):
    """One row of rows.parquet; `reward_model.ground_truth` is the index of the chosen response, as text."""

    data_source: str
    prompt: list[dict[str, str]]
    reward_model: dict[str, str]
    extra_info: RowExtra


def withheld_signals(extra: RowExtra) -> Mapping[str, object]:
    """The user's signals that the prompt withholds; empty if there is nothing to judge a chain by."""
    return dict(json.loads(extra["explicit"]))


def read_extras(path: Path) -> list[RowExtra]:
    """The `extra_info` of every row of a parquet file."""
    import pyarrow.parquet as pq

    return list(pq.read_table(path, columns=["extra_info"])["extra_info"].to_pylist())
