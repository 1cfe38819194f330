"""data=pairs: anybody's votes from a parquet or JSONL file in PersonalRewardBench's schema.

`data.only={column: value}` keeps the rows whose raw column equals the value (compared as text).  `data.on_bad_row=skip` passes
over rows that do not fit, counted and listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.config import DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.records import PreferencePair, read_rows, row_to_pair

LISTED = 20  # skipped rows that are named one by one


def build(data: DataConfig, seed: int) -> Iterator[PreferencePair]:
    """Stream the file's pairs.  Raises DataError with file, row, field and expectation."""
    assert data.path is not None
    yield from read(read_rows(Path(data.path)), Path(data.path), data)


def read(rows: Iterable[Mapping[str, Any]], source: Path, data: DataConfig) -> Iterator[PreferencePair]:
    """Raw rows → pairs; `source` is what messages name.  Raises DataError at a bad row, or when none is left."""
    skipped, kept = [], 0
    for number, row in enumerate(rows, start=1):
        if missing := [column for column in data.only if column not in row]:
            raise DataError(f"{source}: data.only names the column '{missing[0]}', which the file does not have")
        if any(str(row[column]) != str(value) for column, value in data.only.items()):
            continue
        try:
            pair = row_to_pair(row, source, number)
        except DataError as error:
            if data.on_bad_row == "fail":
                raise
            skipped.append(str(error))
            continue
        kept += 1
        yield pair
    for sentence in skipped[:LISTED]:
        print(f"skipped: {sentence}", flush=True)
    if skipped:
        print(f"skipped {len(skipped)} rows of {source} in all", flush=True)
    if not kept:
        raise DataError(f"{source} holds no usable rows; expected at least one preference pair")
