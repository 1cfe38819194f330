"""One table as a folder of parquet files, written and read as a stream: memory holds a shard, never the table.

    pairs.parquet/part-00000-of-00002.parquet
    pairs.parquet/part-00001-of-00002.parquet

The folder appears under its name only when every shard is whole, and the names say how many belong together, so that a copy that
lost one is noticed.  pandas, pyarrow and `datasets` read such a folder like a file.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pgenrm_train.errors import DataError
from pgenrm_train.files import publish_folder

ROWS = 16_384  # of a shard
BATCH = 1024  # rows that are Python objects at a time
SUFFIXES = (".parquet", ".jsonl", ".json")
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.\w+")


class ShardWriter:
    """Collects rows (dicts) or Arrow tables of one `schema`; as a context manager it publishes the folder when the block ends well."""

    def __init__(self, path: Path, schema: Any, rows: int = ROWS) -> None:
        self.path, self.schema, self.rows = path, schema, rows
        self._staging = path.with_name(f".{path.name}.tmp")
        self._waiting: list[Mapping[str, Any]] = []
        self._file: Any = None
        self._in_file = self._shards = 0

    def __enter__(self) -> ShardWriter:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
            self._publish()
        elif self._file is not None:
            self._file.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def row(self, row: Mapping[str, Any]) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= BATCH:
            self._flush()

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

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self.table(pa.Table.from_pylist(self._waiting, schema=self.schema))
            self._waiting.clear()

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
        if self.path.is_file():  # made by an older version
            self.path.unlink()
        publish_folder(self._staging, self.path)


def parts(path: Path) -> list[Path]:
    """The files of a table: `path` itself, or those of the folder in the order of their names.

    Raises DataError when there is none, or when names say `-of-N` and some of the N are missing.
    """
    if not path.is_dir():
        return [path]
    if not (files := data_files(path)):
        raise DataError(f"{path} holds no parquet or JSONL file; expected at least one")
    check_complete(files)
    return files


def data_files(folder: Path) -> list[Path]:
    """Parquet and JSON files below a folder, in the order of their paths; nothing hidden, such as a downloader's cache."""
    found = (f for f in folder.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def check_complete(files: list[Path]) -> None:
    """Raises DataError when the files' names tell that some of their set are missing."""
    found: dict[tuple[Path, str, int], int] = {}
    for file in files:
        if match := _PART.fullmatch(file.name):
            name = (file.parent, match[1], int(match[2]))
            found[name] = found.get(name, 0) + 1
    for (folder, stem, expected), count in found.items():
        if count != expected:
            raise DataError(
                f"{folder} holds {count} of the {expected} files {stem}-*-of-{expected:05d}; copy it again whole"
            )


def digest(path: Path) -> str:
    """sha256 over the bytes of all parts in their order; of a single file, its own."""
    total = hashlib.sha256()
    for file in parts(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def tables(path: Path, batch: int = BATCH) -> Iterator[Any]:
    """Arrow record batches of a parquet file or of a folder of them.  Raises DataError for one that is not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in parts(path):
        try:
            with pq.ParquetFile(file) as table:
                yield from table.iter_batches(batch_size=batch)
        except (pa.ArrowException, OSError):
            raise DataError(
                f"{file} cannot be read as parquet: it was cut off while written or copied, or is something else"
            ) from None
