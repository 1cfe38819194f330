"""`label.input`: a parquet or JSONL file of several responses per row, without votes on them.

    user_id, context, responses     as in data=pairs; two responses or more
    history                         optional: earlier votes, [{query, chosen, rejected}]
    ratings                         optional: the user's rating per response, to compare the labels with
    pair_id, criteria, scenario …   optional, as in data=pairs

A row without `history` takes the user's votes from the run's data.  Of equal responses the first counts.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_builders.sources import hub
from data_builders.sources.several_responses import texts_of, values_of
from pgenrm_train.errors import DataError
from pgenrm_train.records import shards
from pgenrm_train.records.json_texts import JsonTexts
from pgenrm_train.records.pairs import HistoryItem
from pgenrm_train.records.raw_rows import read_rows
from pgenrm_train.records.rows import row_to_pair
from pgenrm_train.records.slates import Slate

ITEM = ("query", "chosen", "rejected")


def read_slates(path: Path) -> list[Slate]:
    """All rows of a file, or of a folder of files; a slate may have one distinct response only.

    Raises DataError with file, row, field and expectation, for a file without rows, and for an id that a user
    has twice.
    """
    if not path.exists():
        raise DataError(f"label.input={path} does not exist; expected a parquet or JSONL file")
    slates = [slate for file in shards.parts(path) for slate in _slates(file)]
    if not slates:
        raise DataError(f"label.input={path} holds no rows; expected at least one prompt with candidates")
    seen: set[str] = set()
    for slate in slates:
        if slate.key in seen:
            raise DataError(
                f"label.input={path}: user {slate.prompt.user_id[:60]!r} has two rows with pair_id "
                f"{slate.prompt.pair_id[:60]!r}; expected a name for each row, or no such column"
            )
        seen.add(slate.key)
    return slates


def _slates(file: Path) -> Iterator[Slate]:
    decoded = JsonTexts()
    for number, raw in enumerate(read_rows(file), start=1):
        where = f"{file}, row {number}"
        row = decoded.read(raw, where)
        texts = texts_of(row, where)
        rated = any(row.get(name) is not None for name in ("ratings", "ranking"))
        values = values_of(row, where, len(texts)) if rated else [None] * len(texts)
        distinct = dict(reversed(list(zip(texts, values, strict=True))))
        named = {"pair_id": f"{file.stem}-{number}"} if row.get("pair_id") is None else {}
        pair = row_to_pair({**row, **named, "chosen": texts[0], "rejected": texts[1]}, file, number)
        prompt = replace(pair, chosen="", rejected="")
        texts = list(dict.fromkeys(texts))
        yield Slate(prompt, tuple(texts), _history(row, where), tuple(distinct[text] for text in texts))


def _history(row: hub.Row, where: str) -> tuple[HistoryItem, ...] | None:
    items = row.get("history")
    if items is None:
        return None
    if not isinstance(items, list):
        raise DataError(
            f"{where}, field 'history': expected a list of {{query, chosen, rejected}}, "
            f"got {str(items)[:60]!r}"
        )
    history = []
    for place, item in enumerate(items):
        texts = [item.get(name) if isinstance(item, dict) else None for name in ITEM]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(
                f"{where}, field 'history[{place}]': expected {{query, chosen, rejected}} with three texts, "
                f"got {str(item)[:60]!r}"
            )
        history.append(HistoryItem(*map(str, texts)))
    return tuple(history)
