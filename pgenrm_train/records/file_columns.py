"""Columns from the path of a file: partitions (`split=test/`) and splits (`test-00000.parquet`).

pandas, Spark and DuckDB leave a partition's column out of its files, and the Hugging Face hub names splits by
files or folders.  A value in the row itself comes first.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote

from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import read_json
from pgenrm_train.records.raw_rows import read_rows
from pgenrm_train.records.shards import parts

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Columns of votes that are not texts; a folder's name has their values as text.
_NO_TEXTS = {
    *(
        "chosen_score",
        "rejected_score",
        "turn",
        "turns",
        "time",
        "timestamp",
        "position",
        "position_of_chosen",
    ),
    *("n_other_agree", "n_other_disagree", "n_other_judges", "n_other_tie", "synthetic_criteria"),
}
_NULL = "__HIVE_DEFAULT_PARTITION__"


def file_columns(file: Path, source: Path) -> dict[str, object]:
    """Columns of all rows of a file of `source`, which is the file itself or a folder above it.

    >>> file_columns(Path("votes/split=test/0.parquet"), Path("votes"))
    {'split': 'test'}
    >>> file_columns(Path("votes/data/validation-00000-of-00001.parquet"), Path("votes"))
    {'split': 'val'}
    """
    folders = file.relative_to(source).parts[:-1]
    names = [*_partitions_above(source if folders or file != source else source.parent), *folders]
    columns = {column: value for name in names for column, value in _partition(name).items()}
    splits = (_split(name) for name in (file.stem, *reversed(folders)) if not _partition(name))
    split = next(filter(None, splits), None) or _split_of_saved(file)
    return ({"split": split} if split else {}) | columns


def missing_columns(row: Mapping[str, object], columns: Mapping[str, object]) -> dict[str, object]:
    """Those of `columns` for which the row has no value: null, NaN or an empty text."""
    return {name: value for name, value in columns.items() if _is_absent(row.get(name))}


def named_columns(source: Path) -> dict[str, dict[str, object]]:
    """Columns from the path by file, without those that the file's first row has."""
    named: dict[str, dict[str, object]] = {}
    for file in parts(source):
        with suppress(DataError):  # the build reports it
            row = next(read_rows(file), {})
            columns = {name: value for name, value in file_columns(file, source).items() if name not in row}
            named |= {str(file.relative_to(source)): columns} if columns else {}
    return named


def _is_absent(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _partitions_above(folder: Path) -> list[str]:
    """Names of this folder and those above it, as long as they are partitions."""
    line = takewhile(_partition, (place.name for place in (folder.absolute(), *folder.absolute().parents)))
    return list(line)[::-1]


def _partition(name: str) -> dict[str, object]:
    """Column and value of a partition's folder; empty for another name or for null.

    Raises DataError for escapes that are not UTF-8, since with a replacement several values would be one.
    """
    try:
        column, equals, value = (unquote(part, errors="strict") for part in name.partition("="))
    except UnicodeDecodeError:
        raise DataError(
            f"folder {name}: expected column=value with percent escapes of UTF-8, such as %C3%BC for ü"
        ) from None
    if not column or not equals or value == _NULL:
        return {}
    if column in _NO_TEXTS:
        with suppress(ValueError):
            return {column: json.loads(value.lower())}
    return {column: value}


def _split(name: str) -> str | None:
    """The split that a name has among its words; None for none or several."""
    splits = {_SPLITS[word] for word in re.split(r"[\W\d_]+", name.lower()) if word in _SPLITS}
    return splits.pop() if len(splits) == 1 else None


def _split_of_saved(file: Path) -> str | None:
    """The split of a file of `Dataset.save_to_disk`: from its state, or from the name of its folder."""
    state: object = None
    with suppress(ArtifactError):  # no such file, or none of `datasets`
        state = read_json(file.parent / "state.json") if file.suffix == ".arrow" else None
    if not isinstance(state, dict) or "_data_files" not in state:
        return None
    return _split(str(state.get("_split") or "")) or _split(file.parent.absolute().name)
