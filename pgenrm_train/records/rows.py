"""Validate raw rows of votes; read built pairs; write the flat row of a pair.

Schema read: PersonalRewardBench (`chatbot_arena_personalized_0125`, `prism_personalized_0125`) plus optional
columns.
"""

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, time
from decimal import Decimal
from itertools import accumulate, islice, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeGuard

from pgenrm_train.errors import DataError
from pgenrm_train.records import shards
from pgenrm_train.records.file_columns import file_columns, missing_columns
from pgenrm_train.records.ids import ID, WHOLE, read_id
from pgenrm_train.records.json_texts import JsonTexts
from pgenrm_train.records.pairs import ExplicitSignals, Message, PreferencePair
from pgenrm_train.records.raw_rows import check_texts, read_rows

SPLITS = ("train", "val", "test")
_REQUIRED = ("user_id", "context", "chosen", "rejected")
_TEXTS = (  # columns whose texts are kept
    *_REQUIRED,
    "pair_id",
    "conversation_id",
    "type",
    "scenario",
    "user_split",
    "cohort",
    "criteria",
    "self_description",
    "style",
    "attributes",
)
_COLUMNS = {  # all columns that are read, by their letters
    re.sub(r"\W|_", "", name): name
    for name in (
        *_TEXTS,
        *("chosen_score", "rejected_score", "turn", "turns", "split", "time", "timestamp", "position"),
        *("position_of_chosen", "n_other_agree", "n_other_disagree", "n_other_judges", "n_other_tie"),
        "synthetic_criteria",
    )
}
_POSITIONS = {"left": 0, "first": 0, "a": 0, "a1": 0, "right": 1, "second": 1, "b": 1, "a2": 1}
_DATE = "seconds since 1970 or a date in ISO 8601"
_MAX_SHOWN = 80  # characters of a bad value in an error


def read_pairs(path: str | Path) -> Iterator[PreferencePair]:
    """Stream pairs from a parquet or JSONL file, or from a folder of them in the order of their names.

    Raises DataError with file, row, field and expectation at the first row that does not fit.  Also raises it
    for a missing, empty or truncated file.  Rows are counted from 1 in each file.

    >>> import tempfile
    >>> row = {"user_id": "ann", "context": "Fix my garden?", "chosen": "Gladly.", "rejected": "No."}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "votes.jsonl")
    ...     _ = path.write_text(json.dumps(row))
    ...     [pair.chosen for pair in read_pairs(path)]
    ['Gladly.']
    """
    path = Path(path)
    empty, texts = True, JsonTexts()
    for file in shards.parts(path):
        columns = file_columns(file, path)
        for number, row in enumerate(read_rows(file), start=1):
            empty = False
            row = texts.read({**row, **missing_columns(row, columns)}, f"{file}, row {number}")
            yield row_to_pair(row, file, number)
    if empty:
        raise DataError(f"{path} holds no rows; expected at least one preference pair")


def pair_to_row(pair: PreferencePair) -> dict[str, object]:
    """The flat row of a pair, as `read_pairs` reads it back."""
    return {name: of(pair) for name, of in _FIELDS.items()}


def _stated(name: str) -> Callable[[PreferencePair], object]:
    return attrgetter(f"explicit.{name}")


_FIELDS: Mapping[str, Callable[[PreferencePair], object]] = {  # of the flat row, by column
    "pair_id": attrgetter("pair_id"),
    "conversation_id": attrgetter("conversation_id"),
    "user_id": attrgetter("user_id"),
    "context": lambda pair: [{"role": m.role, "content": m.content} for m in pair.context],
    "chosen": lambda pair: {"role": "assistant", "content": pair.chosen},
    "rejected": lambda pair: {"role": "assistant", "content": pair.rejected},
    "chosen_score": attrgetter("chosen_score"),
    "rejected_score": attrgetter("rejected_score"),
    "turn": attrgetter("turn"),
    "type": attrgetter("kind"),
    "scenario": attrgetter("scenario"),
    "split": attrgetter("split"),
    "user_split": attrgetter("user_split"),
    "cohort": attrgetter("cohort"),
    "time": attrgetter("time"),
    "position": attrgetter("position"),
    "n_other_agree": lambda pair: pair.others[0] if pair.others else None,
    "n_other_disagree": lambda pair: pair.others[1] if pair.others else None,
    "criteria": _stated("criteria"),
    "self_description": _stated("self_description"),
    "style": _stated("style"),
    "attributes": lambda pair: (
        json.dumps(dict(pair.explicit.attributes)) if pair.explicit.attributes else None
    ),
    "synthetic_criteria": _stated("synthetic"),
}


def pair_table(pairs: Sequence[PreferencePair]) -> Any:
    """The Arrow table of `pair_to_row`'s rows, made by columns, which is much quicker."""
    import pyarrow as pa

    def messages(*columns: list[str]) -> Any:
        # the type is given, because pyarrow guesses it slowly
        return pa.StructArray.from_arrays([pa.array(of, pa.string()) for of in columns], ["role", "content"])

    turns = [message for pair in pairs for message in pair.context]
    said = messages([turn.role for turn in turns], [turn.content for turn in turns])
    starts = [0, *accumulate(len(pair.context) for pair in pairs)]
    replies = ["assistant"] * len(pairs)
    nested = {
        "context": pa.ListArray.from_arrays(pa.array(starts, pa.int32()), said),
        "chosen": messages(replies, [pair.chosen for pair in pairs]),
        "rejected": messages(replies, [pair.rejected for pair in pairs]),
    }
    schema = pair_schema()
    columns = [
        nested[field.name] if field.name in nested else _column(map(_FIELDS[field.name], pairs), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: Iterable[object], kind: Any) -> Any:
    import pyarrow as pa

    listed = list(values)
    empty = listed.count(None) == len(listed)
    return pa.nulls(len(listed), kind) if empty else pa.array(listed, kind)


def pair_tables(pairs: Iterable[PreferencePair]) -> Iterator[Any]:
    """Arrow tables of at most `shards.BATCH` pairs, in their order."""
    stream = iter(pairs)
    while batch := list(islice(stream, shards.BATCH)):
        yield pair_table(batch)


def read_built(path: Path) -> Iterator[PreferencePair]:
    """Stream the pairs of a table that this package wrote from pairs: nothing is checked again.

    Equal texts of a batch are one object, so that caches find them quickly.
    """
    for batch in shards.tables(path):
        yield from _of_built({name: batch.column(name) for name in batch.schema.names})


def _of_built(table: Mapping[str, Any]) -> Iterator[PreferencePair]:
    nested = ("context", "chosen", "rejected")
    of = {name: _objects(column) for name, column in table.items() if name not in nested}
    turns = table["context"].flatten()
    said = list(map(_message, _objects(turns.field("role")), _objects(turns.field("content"))))
    ends = [0, *accumulate(table["context"].value_lengths().to_pylist())]
    of["context"] = [tuple(said[start:end]) for start, end in pairwise(ends)]
    of |= {name: _objects(table[name].field("content")) for name in ("chosen", "rejected")}
    stated = ("criteria", "self_description", "style", "attributes", "synthetic_criteria")
    of["explicit"] = list(map(_signals, *(of[name] for name in stated)))
    counts = zip(of["n_other_agree"], of["n_other_disagree"], strict=True)
    of |= {"kind": of["type"], "others": [None if each[0] is None else each for each in counts]}
    return map(PreferencePair, *(of[field.name] for field in fields(PreferencePair)))


def _objects(column: Any) -> list[Any]:
    """Python objects of an Arrow column of texts, numbers or booleans."""
    import pyarrow as pa

    if column.null_count == len(column):
        return [None] * len(column)
    if not pa.types.is_string(column.type):
        return list(
            column.to_pylist() if column.null_count else column.to_numpy(zero_copy_only=False).tolist()
        )
    encoded = column.dictionary_encode()
    texts = [*encoded.dictionary.to_numpy(zero_copy_only=False).tolist(), None]
    return [texts[place] for place in encoded.indices.fill_null(-1).to_numpy().tolist()]


_message = functools.lru_cache(maxsize=1024)(Message)


@functools.lru_cache(maxsize=1024)
def _signals(
    criteria: str | None, description: str | None, style: str | None, attributes: str | None, synthetic: bool
) -> ExplicitSignals:
    weights = tuple(json.loads(attributes or "{}").items())
    return ExplicitSignals(criteria, description, style, weights, synthetic)


def pair_schema() -> Any:
    """The Arrow schema of `pair_to_row`'s rows."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    kinds = {
        "context": pa.list_(message),
        "chosen": message,
        "rejected": message,
        "synthetic_criteria": pa.bool_(),
        **dict.fromkeys(("turn", "position", "n_other_agree", "n_other_disagree"), pa.int64()),
        **dict.fromkeys(("chosen_score", "rejected_score", "time"), pa.float64()),
    }
    return pa.schema([(name, kinds.get(name, pa.string())) for name in _FIELDS])


def row_to_pair(row: Mapping[str, object], path: Path, number: int) -> PreferencePair:
    """One raw row → a pair.  Raises DataError naming file, row, field and expectation."""
    fields = _Fields(row, f"{path}, row {number}")
    if misnamed := _misnamed(tuple(row)):
        name, expected = misnamed
        raise DataError(f"{fields.where}: rename the column '{name}' to '{expected}', or else remove it")
    for name in _REQUIRED:
        if name not in row:
            raise fields.error(name, f"a value (the row has only {', '.join(map(repr, row))[:200]})", None)
        if fields.value(name) is None:
            raise fields.error(name, "a value", None)
    check_texts(row, fields.where, _TEXTS)
    if not (user_id := fields.identifier("user_id")):
        raise fields.error("user_id", "a value", row["user_id"])
    conversation_id = fields.identifier("conversation_id")
    return PreferencePair(
        pair_id=fields.identifier("pair_id") or conversation_id or f"{path.stem}-{number}",
        user_id=user_id,
        context=fields.context(),
        chosen=fields.response("chosen"),
        rejected=fields.response("rejected"),
        conversation_id=conversation_id,
        chosen_score=fields.number("chosen_score"),
        rejected_score=fields.number("rejected_score"),
        turn=fields.turn(),
        kind=fields.text("type"),
        scenario=fields.text("scenario"),
        split=fields.split(),
        user_split=fields.text("user_split") or "train",
        cohort=fields.text("cohort"),
        time=fields.time(),
        position=fields.position(),
        others=fields.others(),
        explicit=ExplicitSignals(
            criteria=fields.text("criteria"),
            self_description=fields.text("self_description"),
            style=fields.text("style"),
            attributes=fields.attributes(),
            synthetic=fields.flag("synthetic_criteria"),
        ),
    )


@functools.lru_cache(maxsize=64)
def _misnamed(names: tuple[str, ...]) -> tuple[str, str] | None:
    """A column like `Split` or `userId` that would be ignored, and the missing one that it resembles."""
    for name in names:
        expected = _COLUMNS.get(re.sub(r"\W|_", "", name).lower(), name)
        if expected not in names:
            return name, expected
    return None


@dataclass(frozen=True, slots=True)
class _Fields:
    """Readers of a raw row's fields; each raises DataError for a value that does not fit."""

    row: Mapping[str, object]
    where: str  # file and row number

    def error(self, name: str, expected: str, value: object) -> DataError:
        got = "nothing (missing or null)" if value is None else repr(value)
        got = got if len(got) <= _MAX_SHOWN else f"{got[: _MAX_SHOWN - 3]}…"
        return DataError(f"{self.where}, field '{name}': expected {expected}, got {got}")

    def value(self, name: str) -> object:
        """The raw value; None for null and for the NaN that pandas writes in its place."""
        value = self.row.get(name)
        if value is None or isinstance(value, str):  # most fields; the other tests are slow
            return value
        if isinstance(value, Decimal):
            return int(value) if value == value.to_integral_value() else float(value)
        return None if isinstance(value, float) and math.isnan(value) else value

    def identifier(self, name: str) -> str:
        """An identifier as `read_id` spells it; empty if absent."""
        value = self.value(name)
        if value is None:
            return ""
        if (text := read_id(value)) is None:
            raise self.error(name, ID, value)
        return text

    def text(self, name: str) -> str | None:
        """A text that may be absent, stripped; None if empty."""
        value = self.value(name)
        if not isinstance(value, str | None):
            raise self.error(name, "a text or null", value)
        return value.strip() or None if value else None

    def number(self, name: str, expected: str = "a number or null") -> float | None:
        """A finite number that may be absent."""
        value = self.value(name)
        if value is not None and not _finite(value):
            raise self.error(name, expected, value)
        return None if value is None else float(value)

    def flag(self, name: str) -> bool:
        """A boolean; False if absent."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true, false or null", value)
        return value is True

    def response(self, name: str) -> str:
        """A response: a text, or a message whose content is one."""
        value = self.value(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(text, str) or not text.strip():
            raise self.error(name, "a non-empty text or {role, content}", text)
        return text

    def context(self) -> tuple[Message, ...]:
        """The conversation; a text alone is one user turn, and the role `model` is read as `assistant`."""
        value = self.value("context")
        if isinstance(value, str):
            value = [{"role": "user", "content": value}]
        if not isinstance(value, list) or not value:
            raise self.error("context", "a non-empty list of {role, content}", value)
        messages = tuple(self._message(f"context[{i}]", turn) for i, turn in enumerate(value))
        if (last := messages[-1].role) != "user":
            raise self.error(
                "context", "a conversation that ends with a user turn", f"a last turn of role {last}"
            )
        return messages

    def _message(self, name: str, turn: object) -> Message:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise self.error(name, "{role, content} with two texts", turn)
        role = "assistant" if role == "model" else role
        if role not in ("user", "assistant", "system"):
            raise self.error(f"{name}.role", "user, assistant, model or system", role)
        return Message(role, content)

    def split(self) -> str:
        """The split within the user; `validation` is read as `val`, and an absent one as `train`."""
        value = self.value("split")
        value = "train" if value in (None, "") else "val" if value == "validation" else value
        if value not in SPLITS:
            raise self.error("split", "train, val or test", value)
        return str(value)

    def turn(self) -> int:
        """The number of the turn, from the column `turn` or `turns`; 0 if absent."""
        expected = "a whole number or null"
        turn = self.number("turn", expected) or self.number("turns", expected) or 0.0
        if not turn.is_integer() or abs(turn) >= WHOLE:
            raise self.error("turn", expected, turn)
        return int(turn)

    def others(self) -> tuple[int, int] | None:
        """Votes of all other users, for chosen and for rejected; None where a column is absent.

        Columns are `n_other_agree` and `n_other_disagree`; `n_other_judges` and `n_other_tie` may replace the
        second.
        """
        stated = self.value("n_other_disagree") is not None
        names = ("n_other_agree", *(("n_other_disagree",) if stated else ("n_other_judges", "n_other_tie")))
        values = [self.value(name) for name in names]
        if None in values:
            return None
        counts = [self._count(name, value) for name, value in zip(names, values, strict=True)]
        disagree = counts[1] if stated else counts[1] - counts[2] - counts[0]
        if disagree < 0:
            raise self.error("n_other_judges", "at least n_other_agree + n_other_tie", counts[1])
        return counts[0], disagree

    def _count(self, name: str, value: object) -> int:
        if not _finite(value) or not 0 <= value < WHOLE or not float(value).is_integer():
            raise self.error(name, "a whole number from 0 or null", value)
        return int(value)

    def attributes(self) -> tuple[tuple[str, float], ...]:
        """Attributes of a user and their weights, from an object or its JSON text, without null weights."""
        value = self.value("attributes")
        if value is None or (isinstance(value, str) and not value.strip()):
            return ()
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise self.error("attributes", "a JSON object of name → weight", value) from None
        if not isinstance(value, Mapping):
            raise self.error("attributes", "an object of name → weight", value)
        weights = _Fields(value, self.where)
        stated = [(str(name), weights.value(name)) for name in value]
        if not all(_finite(weight) for _, weight in stated if weight is not None):
            raise self.error("attributes", "numbers as weights", value)
        return tuple((name, float(weight)) for name, weight in stated if _finite(weight))

    def time(self) -> float | None:
        """Time of the vote, from `time` or `timestamp`: seconds, a date or ISO 8601, by default in UTC."""
        name = "timestamp" if self.value("time") is None else "time"
        value = self.value(name)
        if isinstance(value, str) and value.strip():
            try:
                if re.fullmatch(r"\d{9,}", value.strip()):  # seconds as text, which ISO reads as 17101214
                    raise ValueError
                value = datetime.fromisoformat(value.strip())
            except ValueError:
                raise self.error(name, _DATE, value) from None
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime.combine(value, time())
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        return None if value == "" else self.number(name, _DATE)

    def position(self) -> int | None:
        """Where the user saw the chosen response; None for words of other meaning in `position_of_chosen`."""
        value = self.value("position_of_chosen" if self.value("position") is None else "position")
        if isinstance(value, float) and value.is_integer():  # pandas turns integers with nulls into floats
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value if 0 <= value < WHOLE else None
        return _POSITIONS.get(value.lower()) if isinstance(value, str) else None


def _finite(value: object) -> TypeGuard[int | float]:
    """Whether a file can hold the number; JSON knows Infinity and integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
