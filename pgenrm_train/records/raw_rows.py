"""Raw rows of a parquet or JSON file, for the readers that validate them and turn them into records."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.errors import DataError
from pgenrm_train.files import write_text
from pgenrm_train.records import shards

SKIPPED = "skipped_rows.txt"
UTF8 = "utf-8-sig"  # Windows writes a mark before the text
_EXACT = {"halffloat": 2**11, "float": 2**24}  # whole numbers below are exact in Arrow's short floats
_POINTER = b"version https://git-lfs"
_HALF = re.compile("[\ud800-\udfff]")


class LeftOut(Counter[str]):
    """Rows of its source that a builder left out: reason → count.

    `rows` has one sentence per row that did not fit, and `normalised` counts values that are read in another
    spelling: what → count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[str] = []
        self.normalised: Counter[str] = Counter()

    def write(self, folder: Path) -> None:
        """Write `skipped_rows.txt`, one sentence per line; no file if every row fitted."""
        (folder / SKIPPED).unlink(missing_ok=True)
        if self.rows:
            write_text(folder / SKIPPED, "".join(f"{sentence}\n" for sentence in self.rows))


def read_rows(path: Path) -> Iterator[Mapping[str, object]]:
    """Stream rows from a parquet file or from JSON: one object per line, or one array held in memory.

    Raises DataError if the file is missing or cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a parquet or JSONL file")
    if _is_pointer(path):
        raise DataError(
            f"{path} is a pointer of Git LFS in place of the file; `git lfs pull` fetches the file"
        )
    if path.suffix.lower() in (".parquet", ".arrow"):
        yield from _arrow_rows(path)
    elif path.suffix.lower() not in shards.SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix!r}; expected .parquet or .jsonl")
    else:
        yield from _array_rows(path) if path.is_file() and _is_array(path) else _jsonl_rows(path)


def _is_pointer(path: Path) -> bool:
    """Whether Git wrote a short text in place of a large file, as it does without Git LFS."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def check_texts(row: Mapping[str, object], where: str, columns: Iterable[str] | None = None) -> None:
    """Raise DataError if a text cannot be encoded as UTF-8 (default: all columns).

    JSON can spell half of a surrogate pair, as a text cut within an emoji has it; UTF-8 cannot.
    """
    for column in row if columns is None else columns:
        if not _writable(row.get(column)):
            raise DataError(
                f"{where}, field '{column}': expected text that UTF-8 can hold, got half of a surrogate "
                "pair, as in a cut emoji"
            )


def _writable(value: object) -> bool:
    if isinstance(value, str):
        return value.isascii() or not _HALF.search(value)
    if value is None or isinstance(value, float | int):  # before the slow test of a protocol
        return True
    if isinstance(value, Mapping):
        return all(_writable(part) for part in value.values())
    return not isinstance(value, list) or all(_writable(part) for part in value)


def _arrow_rows(path: Path) -> Iterator[Mapping[str, object]]:
    number = 0
    for batch in shards.tables(path):
        where = f"{path}, rows {number + 1} to {number + batch.num_rows}"
        if twice := [name for name, count in Counter(batch.schema.names).items() if count > 1]:
            raise DataError(f"{path} has the column '{twice[0]}' twice; expected one of each name")
        try:
            rows = batch.to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: expected UTF-8 text, got other bytes ({error.reason})") from None
        except (ValueError, OverflowError, KeyError, NotImplementedError):
            raise _unreadable(batch, where) from None
        _check_float_ids(batch, where)
        yield from rows
        number += len(rows)


def _check_float_ids(batch: Any, where: str) -> None:
    """Raise DataError for ids in a column of short floats that are too large for it: several would be one."""
    for field, column in zip(batch.schema, batch.columns, strict=True):
        limit = _EXACT.get(str(field.type), math.inf) if field.name.endswith("id") else math.inf
        if limit < math.inf and any(abs(value or 0) >= limit for value in column.to_pylist()):
            raise DataError(
                f"{where}, field '{field.name}': expected numbers below {limit}, which the type "
                f"{field.type} distinguishes"
            )


def _unreadable(batch: Any, where: str) -> DataError:
    """The column of a batch that Python cannot hold, such as a date in the year 300000."""
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            column.to_pylist(maps_as_pydicts="strict")
        except (ValueError, OverflowError, KeyError, NotImplementedError) as error:
            return DataError(
                f"{where}, field '{field.name}': a value of type {field.type} cannot be read ({error})"
            )
    return DataError(f"{where}: values cannot be read")


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, object]]:
    number = 0
    try:
        with path.open(encoding=UTF8) as lines:
            for line in lines:
                if line.strip():
                    number += 1
                    yield _jsonl_row(line, path, number)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, after row {number}: expected UTF-8 text, got other bytes ({error.reason})"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected a JSONL file") from None


def _is_array(path: Path) -> bool:
    with path.open(encoding=UTF8, errors="replace") as stream:
        return stream.read(64).lstrip().startswith("[")


def _array_rows(path: Path) -> Iterator[Mapping[str, object]]:
    try:
        rows = json.loads(path.read_text(encoding=UTF8), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: expected a JSON array of objects, got something that is not JSON ({error})"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield _object(row, path, number)


def _jsonl_row(line: str, path: Path, number: int) -> Mapping[str, object]:
    try:
        row = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        got = "an object on several lines" if line.strip() == "{" else f"a line that is not JSON ({error})"
        raise DataError(
            f"{path}, row {number}: expected one JSON object per line, or one array of them, got {got}"
        ) from None
    return _object(row, path, number)


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON.  Raises ValueError for a key that it has twice, of which one value would be lost."""
    if len(row := dict(pairs)) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key '{twice}' twice")
    return row


def _object(row: object, path: Path, number: int) -> Mapping[str, object]:
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}")
    return row
