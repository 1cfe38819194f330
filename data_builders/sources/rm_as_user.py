"""data=rm_as_user: eight reward models as users (Barreto et al. 2025, arXiv 2503.17338).

Source: google/rfm-rm-as-user-dataset, two CSV files over UltraFeedback's prompts (60,819 to train, 985 to
test), or `data.path` for a copy.  One row holds a prompt, its responses and all models' scores:

    prompt                        the user turn; `prompt_id` names it
    chosen, rejected | response_… two or more: texts, or (the first two) conversations as JSON
    MODEL_RESPONSE[_score]        per reward model and response, in either order of the two names

Each reward model becomes a user who rates the responses; the rules of `several_responses` make the votes.
Columns with ranks repeat the scores and are not read.
"""

import csv
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data_builders.sources import hub
from pgenrm_train.errors import DataError
from pgenrm_train.records.ids import read_id, shown
from pgenrm_train.records.raw_rows import UTF8
from pgenrm_train.records.shards import data_files

HUB = "google/rfm-rm-as-user-dataset"
_PROMPTS = ("prompt", "instruction", "context")
_RESPONSE = re.compile(r"chosen|rejected|response[_-]?\w{1,2}", re.IGNORECASE)
_SCORE = re.compile(r"^scores?[ _-]|[ _-]*scores?$", re.IGNORECASE)


def tables(source: str) -> Iterator[tuple[str, hub.Rows]]:
    """(name for messages, raw rows) of the CSV files of a copy, else of the hub or of other formats."""
    path = Path(source)
    files = data_files(path, (".csv",)) if path.is_dir() else [path] if path.suffix == ".csv" else []
    if not files:
        yield from hub.tables(source)
    for file in files:
        yield str(file), _csv_rows(file)


def _csv_rows(path: Path) -> hub.Rows:
    csv.field_size_limit(sys.maxsize)
    number = 0
    try:
        with path.open(encoding=UTF8, newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            names = Counter(reader.fieldnames or ())
            if not names or max(names.values()) > 1:
                got = f"'{names.most_common(1)[0][0]}' twice" if names else "an empty file"
                raise DataError(f"{path}: expected a head line with one of each name, got {got}")
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, row {number}: expected a value for each column of the head line"
                    )
                yield row
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}, after row {number}: expected complete CSV in UTF-8 ({error})") from None


@dataclass(frozen=True)
class Layout:
    """Names of the columns: the prompt's, the responses', and per rater its scores' in their order."""

    prompt: str
    responses: tuple[str, ...]
    raters: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Rated:
    """A row without its responses, their texts, and the score of each per reward model."""

    row: hub.Row
    texts: Sequence[str]
    scores: Mapping[str, Sequence[float | None]]


@lru_cache(maxsize=8)
def _layout(columns: tuple[str, ...]) -> Layout | None:
    prompt = next((name for name in _PROMPTS if name in columns), None)
    responses = tuple(name for name in columns if _RESPONSE.fullmatch(name))
    found: dict[str, dict[str, str]] = {}
    for column in set(columns) - {*responses}:
        for response in responses:
            part = re.search(rf"(?:^|[_-])({re.escape(response)})(?=$|[_-])", column)
            if part and "rank" not in column.lower():
                rest = f"{column[: part.start()]} {column[part.end() :]}".strip(" _-")
                found.setdefault(_SCORE.sub("", rest), {})[response] = column
    raters = {
        rater: tuple(of[response] for response in responses)
        for rater, of in sorted(found.items())
        if read_id(rater) and len(of) == len(responses)
    }
    return Layout(prompt, responses, raters) if prompt and len(responses) > 1 and raters else None


def rated(row: hub.Row, where: str) -> Rated:
    """Read one row of the table.  DataError names the columns or the field."""
    layout = _layout(tuple(row))
    if layout is None:
        raise DataError(
            f"{where}: expected the columns prompt, response_1, response_2 … (or chosen, rejected), and "
            f"MODEL_RESPONSE with a score per reward model and response; got {', '.join(row)[:200]}"
        )
    return Rated(
        {
            "context": row[layout.prompt],
            "pair_id": row.get("prompt_id"),
            "split": row.get("split"),
        },
        [_response(row, name, where) for name in layout.responses],
        {rater: [_score(row, name, where) for name in columns] for rater, columns in layout.raters.items()},
    )


def _response(row: hub.Row, name: str, where: str) -> str:
    """A text, or that of the last message, as UltraFeedback writes a response."""
    value = row[name]
    last = value[-1] if isinstance(value, list) and value else value
    text = last.get("content") if isinstance(last, Mapping) else last
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{where}, field '{name}': expected a non-empty text or {{role, content}}, got {shown(text)}"
        )
    return text


def _score(row: hub.Row, name: str, where: str) -> float | None:
    """A number, also from a text of CSV; None if empty or NaN."""
    value = row[name]
    if value is None or value == "":
        return None
    try:
        number = math.inf if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.inf if str(value).strip() else math.nan
    if math.isinf(number):
        raise DataError(f"{where}, field '{name}': expected a number, got {str(value)[:60]!r}")
    return number if number == number else None
