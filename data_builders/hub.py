"""Tables from the Hugging Face hub, or from a copy of them on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.errors import DataError
from pgenrm_train.records import read_rows

SUFFIXES = (".parquet", ".jsonl", ".json")


def rows(source: str, table: str | None = None) -> Iterator[Mapping[str, Any]]:
    """Rows of all splits of a data set, in their order.

    source: hub id, a file, or a folder that holds files of the hub repository; table: the configuration of a hub data set, in a
    folder the files whose names begin with it.  Raises DataError with one sentence.
    """
    path = Path(source)
    if path.is_file():
        yield from read_rows(path)
    elif path.is_dir():
        files = sorted(f for f in path.rglob(f"{table or ''}*") if f.suffix in SUFFIXES)
        if not files:
            raise DataError(
                f"{source} holds no {table or ''}*.parquet or {table or ''}*.jsonl; expected a copy of the data set's files"
            )
        for file in files:
            yield from read_rows(file)
    elif source.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        raise DataError(f"{source} does not exist; expected a file, a folder, or the id of a data set on the Hugging Face hub")
    else:
        yield from _from_hub(source, table)


def _from_hub(name: str, table: str | None) -> Iterator[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        splits = load_dataset(name, table)
    except Exception as error:  # the hub, the network and the cache fail in many ways; none of them is worth a traceback
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} cannot be loaded from the Hugging Face hub ({reason}); give data.path= for a copy on disk"
        ) from None
    for split in splits.values():
        yield from split
