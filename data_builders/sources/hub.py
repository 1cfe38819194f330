"""Tables from the Hugging Face hub, or from a copy of them on disk."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pgenrm_train.errors import DataError
from pgenrm_train.records.raw_rows import read_rows
from pgenrm_train.records.shards import SUFFIXES, check_complete, data_files

# Formats of tables that are not read.
OTHER = (
    ".csv",
    ".tsv",
    ".gz",
    ".zip",
    ".zst",
    ".bz2",
    ".xz",
    ".xlsx",
    ".ndjson",
    ".feather",
    ".avro",
    ".orc",
)
Row = Mapping[str, object]
Rows = Iterator[Row]


def tables(source: str, table: str | None = None, split: str | None = None) -> Iterator[tuple[str, Rows]]:
    """Yield (name for messages, rows) for each file or split of a data set, in their order.

    `source`: a hub id, a file, or a folder with files of the hub repository.
    `table`: the configuration of a hub data set; in a folder, the files with a path part that begins with it.
    `split`: only this one, if the source has separate splits.
    Raises DataError with one sentence.
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


def numbered(source: str, table: str | None = None, split: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield (file and row number from 1, row) of all tables of a data set."""
    for name, rows in tables(source, table, split):
        for number, row in enumerate(rows, start=1):
            yield f"{name}, row {number}", row


def _files(folder: Path, table: str, split: str | None) -> list[Path]:
    files = [
        file
        for file in data_files(folder)
        if any(part.startswith(table) for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(
            f"{folder} holds no {table}*.parquet or {table}*.jsonl; expected a copy of the data set's files"
        )
    check_complete(files)
    if others := data_files(folder, OTHER):
        print(f"skipped {len(others)} files of other formats in {folder}, e.g. {others[0].name}", flush=True)
    names = re.compile(rf"{re.escape(split or '')}(-.*)?|.*_{re.escape(split or '')}", re.DOTALL)
    places = {file: (file.stem, *file.relative_to(folder).parts[:-1]) for file in files}
    return [file for file in files if split and any(map(names.fullmatch, places[file]))] or files


def _from_hub(name: str, table: str | None, split: str | None = None) -> Iterator[tuple[str, Rows]]:
    from datasets import load_dataset

    try:
        splits = load_dataset(name, table)
    except Exception as error:  # the hub, the network and the cache fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} cannot be loaded from the Hugging Face hub ({reason}); give data.path= for a copy on "
            "disk"
        ) from None
    for of_split in [split] if split in splits else splits:
        yield f"{name}/{of_split}", iter(splits[of_split])
