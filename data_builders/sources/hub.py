"""Tables from the Hugging Face hub, or from a copy of them on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.errors import DataError
from pgenrm_train.records.raw_rows import read_rows
from pgenrm_train.records.shards import SUFFIXES, check_complete, data_files

Rows = Iterator[Mapping[str, Any]]


def tables(source: str, table: str | None = None, split: str | None = None) -> Iterator[tuple[str, Rows]]:
    """(what messages call it, its rows) for each file or split of a data set, in their order.

    source: hub id, a file, or a folder that holds files of the hub repository; table: the configuration of a
    hub data set, in a folder the files whose names, or whose folders' names, begin with it; split: only this
    one, where a source tells splits apart.  Raises DataError with one sentence.
    """
    path = Path(source)
    if path.is_file():
        yield str(path), read_rows(path)
    elif path.is_dir():
        for file in _files(path, table or "", split):
            yield str(file), read_rows(file)
    elif source.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        raise DataError(
            f"{source} does not exist; expected a file, a folder, or the id of a data set on the Hugging "
            "Face hub"
        )
    else:
        yield from _from_hub(source, table, split)


def numbered(
    source: str, table: str | None = None, split: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and row, counted from 1; the row) of all of a data set's tables."""
    for name, rows in tables(source, table, split):
        for number, row in enumerate(rows, start=1):
            yield f"{name}, row {number}", row


def _files(folder: Path, table: str, split: str | None) -> list[Path]:
    files = [
        f for f in data_files(folder) if any(part.startswith(table) for part in f.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(
            f"{folder} holds no {table}*.parquet or {table}*.jsonl; expected a copy of the data set's files"
        )
    check_complete(files)
    if split and (
        of_split := [
            f
            for f in files
            if f.stem == split or f.stem.startswith(f"{split}-") or f.stem.endswith(f"_{split}")
        ]
    ):
        return of_split
    return files


def _from_hub(name: str, table: str | None, split: str | None = None) -> Iterator[tuple[str, Rows]]:
    from datasets import load_dataset

    try:
        splits = load_dataset(name, table)
    except (
        Exception
    ) as error:  # the hub, the network and the cache fail in many ways; none of them is worth a traceback
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} cannot be loaded from the Hugging Face hub ({reason}); give data.path= for a copy on "
            "disk"
        ) from None
    for of_split in [split] if split in splits else splits:
        yield f"{name}/{of_split}", iter(splits[of_split])
