"""A table as a folder of parquet files, written and read as a stream: memory holds a shard, never the table.

    pairs.parquet/part-00000-of-00002.parquet
    pairs.parquet/part-00001-of-00002.parquet

The folder appears under its name only once every shard is complete.  Each name holds the number of shards, so
that a copy that lost one is noticed.  pandas, pyarrow and `datasets` read such a folder like a file.
"""

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pgenrm_train.errors import DataError
from pgenrm_train.files import replace_folder

ROWS = 16_384  # of a shard
BATCH = 1024  # rows that are Python objects at a time
SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json")
# Files of the Hugging Face hub and of `Dataset.save_to_disk` next to the data.
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
MANIFEST = "manifest.json"  # next to config.yaml, in the folder of a run's stage
# Folders of Spark and the archiver of macOS next to the data.
_NO_DATA = {"_change_data", "_spark_metadata", "_temporary", "__MACOSX"}
# Folders of logs: only files that the log names count, and others hold deleted rows and older versions.
_LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata": "Iceberg"}
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.\w+")


class ShardWriter:
    """A writer of Arrow tables of one `schema`.

    It is a context manager, which publishes the folder unless its block raises.
    """

    def __init__(self, path: Path, schema: Any, rows: int = ROWS) -> None:
        self.path, self.schema, self.rows = path, schema, rows
        self._staging = path.with_name(f".{path.name}.tmp")
        self._file: Any = None
        self._in_file = self._shards = 0

    def __enter__(self) -> Self:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._publish()
        elif self._file is not None:
            self._file.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def table(self, table: Any) -> None:
        """Append an Arrow table of the schema; it is never split over two shards."""
        import pyarrow.parquet as pq

        if self._file is None:
            self._file = pq.ParquetWriter(self._staging / f"part-{self._shards:05d}.parquet", self.schema)
            self._shards += 1
        self._file.write_table(table)
        self._in_file += table.num_rows
        if self._in_file >= self.rows:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._in_file = None, 0

    def _publish(self) -> None:
        if not self._shards:  # a table without rows is still a table
            self.table(self.schema.empty_table())
        self._close()
        for number in range(self._shards):
            part = self._staging / f"part-{number:05d}.parquet"
            part.rename(part.with_name(f"part-{number:05d}-of-{self._shards:05d}.parquet"))
        if self.path.is_file():  # of an older version
            self.path.unlink()
        replace_folder(self._staging, self.path)


def parts(path: Path) -> list[Path]:
    """The files of a table: `path` itself, or those of the folder in the order of their names.

    A folder of CSV files alone counts, too: one builder reads them.
    Raises DataError if there is none, if names end in `-of-N` and some of the N are missing, and for a pipe.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(
            f"{path} is a pipe or a device, and data are read more than once; save them to a file"
        )
    if not path.is_dir():
        return [path]
    if not (files := data_files(path) or data_files(path, (".csv",))):
        raise DataError(f"{path} holds no parquet or JSONL file; expected at least one")
    check_complete(files)
    return files


def data_files(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Parquet, Arrow and JSON files, or those of other suffixes, below a folder, by path.

    Left out are hidden files such as a downloader's cache, metadata, and results of `Dataset.map`.  Raises
    DataError for a link that leads to no file, because its rows would be missing, for a table with a log, and
    for a run below the folder, whose files hold no raw votes.
    """
    found, entries = [], sorted(folder.rglob("*"))
    _check_for_log([*entries, *(place / name for place in folder.absolute().parents for name in _LOGS)])
    for path in entries:
        parts = path.relative_to(folder).parts
        if _NO_DATA.intersection(parts) or any(part.startswith(".") for part in parts):
            continue
        if path.name == MANIFEST and (path.parent / "config.yaml").exists():
            raise DataError(f"{path.parent} is of a run, not of votes; give the votes a folder of their own")
        fits = path.suffix.lower() in suffixes
        if path.is_symlink() and not path.is_file() and (fits or path.is_dir() or not path.suffix):
            kind = "a folder; links to folders are not followed" if path.is_dir() else "nothing"
            raise DataError(f"{path} is a link to {kind}; put the files themselves in its place")
        is_cache = path.suffix == ".arrow" and path.name.startswith("cache-")
        if fits and path.is_file() and path.name not in _METADATA and not is_cache:
            found.append(path)
    return found


def _check_for_log(paths: Iterable[Path]) -> None:
    """Raise DataError if one of these is the log of a table that keeps the files of deleted rows."""
    for path in paths:
        kind = _LOGS.get(path.name)
        if kind and path.is_dir() and (kind != "Iceberg" or any(path.glob("*.metadata.json"))):
            raise DataError(
                f"{path.parent} is a table of {kind}, which keeps files of deleted rows; save the rows of "
                "its current version as parquet, and give that file or folder"
            )


def check_complete(files: list[Path]) -> None:
    """Raise DataError if by the files' names some of their set are missing."""
    counts = Counter(
        (file.parent, match[1], int(match[2])) for file in files if (match := _PART.fullmatch(file.name))
    )
    for (folder, stem, expected), count in counts.items():
        if count != expected:
            raise DataError(
                f"{folder} holds {count} of the {expected} files {stem}-*-of-{expected:05d}; copy all "
                "of them again"
            )


def digest(path: Path) -> str:
    """The sha256 of all parts in their order; of a single file, its own."""
    total = hashlib.sha256()
    for file in parts(path):
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: total)  # adds the file to the same hash
    return total.hexdigest()


def tables(path: Path, batch: int = BATCH) -> Iterator[Any]:
    """Stream Arrow record batches from a parquet or Arrow file, or from a folder of them.

    Raises DataError for an incomplete file.
    """
    import pyarrow

    for file in parts(path):
        try:
            read = _arrow_batches if file.suffix.lower() == ".arrow" else _parquet_batches
            yield from read(file, batch)
        except (pyarrow.ArrowException, OSError):
            raise DataError(
                f"{file} cannot be read as {file.suffix[1:]}: it was cut off while written or copied, or has "
                "another format"
            ) from None


def _parquet_batches(file: Path, batch: int) -> Iterator[Any]:
    import pyarrow.parquet

    # Arrow takes a relative path such as a:b for a URL.
    with pyarrow.parquet.ParquetFile(file.absolute()) as table:
        yield from table.iter_batches(batch_size=batch)


def _arrow_batches(file: Path, batch: int) -> Iterator[Any]:
    """Batches of a stream, as `Dataset.save_to_disk` writes it, or of a Feather file."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            stream = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source)
            stream = map(table.get_batch, range(table.num_record_batches))
        for rows in stream:
            yield from (rows.slice(start, batch) for start in range(0, rows.num_rows, batch))
