"""Frozen records that travel through every stage, and the one reader of preference pairs.

A *pair* is one vote of one user: conversation so far, the response chosen and the response rejected.  An *example* is what a
reward model is asked: a user's history, a query and b ≥ 2 responses in presentation order.  Explicit signals (stated criteria,
style, self-description) ride beside, in a field of their own, so that masking is a matter of type (see `masking`).

Schema read: PersonalRewardBench (`chatbot_arena_personalized_0125`, `prism_personalized_0125`) plus optional columns.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

from pgenrm_train.errors import DataError
from pgenrm_train.records import shards
from pgenrm_train.records.raw_rows import check_texts, read_rows

SPLITS = ("train", "val", "test")
_TEXTS = (  # columns of which texts are kept
    "pair_id", "conversation_id", "user_id", "context", "chosen", "rejected", "type", "scenario", "user_split", "cohort",
    "criteria", "self_description", "style", "attributes",
)  # fmt: skip
_POSITIONS = {"left": 0, "first": 0, "a": 0, "a1": 0, "right": 1, "second": 1, "b": 1, "a2": 1}
WHOLE = 2**53  # whole numbers below it are exact in every file format
ContentKey = tuple[tuple[tuple[str, str], ...], frozenset[str]]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is `user`, `assistant` or `system` (the datasets' `model` is read as `assistant`)."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ExplicitSignals:
    """What a user *said* about their preferences (METHOD §1, `E`).  All optional; empty strings are read as absent."""

    criteria: str | None = None
    self_description: str | None = None
    style: str | None = None
    attributes: tuple[tuple[str, float], ...] = ()
    synthetic: bool = False  # inferred by an LLM from the history rather than stated

    def texts(self) -> tuple[str, ...]:
        """Every free text held here; what masking must keep out of a prompt."""
        return tuple(t for t in (self.criteria, self.self_description, self.style) if t)


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One earlier vote of the user, as a prompt may show it: no scores, no attributes.

    `query` alone, both responses empty, is something the user wrote (LaMP-QA's profiles).
    """

    query: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One vote: `chosen` was preferred to `rejected` by `user_id` after `context` (which ends with a user turn)."""

    pair_id: str
    user_id: str
    context: tuple[Message, ...]
    chosen: str
    rejected: str
    conversation_id: str = ""
    chosen_score: float | None = None
    rejected_score: float | None = None
    turn: int = 0
    kind: str | None = (
        None  # slice label of the pair: easy | medium | hard | rival in PersonaWorld, `type` elsewhere
    )
    scenario: str | None = None
    split: str = "train"  # within the user
    user_split: str = (
        "train"  # across users; val and test mark held-out users, any other word a training user
    )
    cohort: str | None = None  # group of users a report tells apart, e.g. seen_persona | unseen_persona
    time: float | None = None  # of the vote, seconds since 1970 (UTC); a history then comes from before it
    position: int | None = None  # place at which the user saw the chosen response, from 0; never in a prompt
    others: tuple[int, int] | None = (
        None  # the source's count of everybody else's votes on it: for chosen, for rejected
    )
    explicit: ExplicitSignals = field(default_factory=ExplicitSignals)

    @property
    def query(self) -> str:
        """Text of the last user turn."""
        return self.context[-1].content

    @property
    def trains(self) -> bool:
        """True for a pair that may be learnt from: the train part of a user who is not held out."""
        return self.split == "train" and self.user_split not in ("val", "test")

    def as_history(self) -> HistoryItem:
        return HistoryItem(self.query, self.chosen, self.rejected)


@dataclass(frozen=True, slots=True)
class Example:
    """One question to a reward model: `responses[chosen_index]` is the one that the user preferred."""

    pair_id: str
    user_id: str
    context: tuple[Message, ...]
    responses: tuple[str, ...]
    chosen_index: int
    history: tuple[HistoryItem, ...] = ()
    explicit: ExplicitSignals = field(default_factory=ExplicitSignals)
    kind: str | None = None
    scenario: str | None = None

    @property
    def query(self) -> str:
        return self.context[-1].content


def content_key(context: Iterable[Message], responses: Iterable[str]) -> ContentKey:
    """What was judged, whoever judged it and whichever won: the conversation and the unordered responses."""
    return tuple((m.role, m.content) for m in context), frozenset(responses)


def read_pairs(path: str | Path) -> Iterator[PreferencePair]:
    """Stream `PreferencePair`s from a parquet or JSONL file, or from a folder of them in the order of their names.

    Raises DataError with file, row, field and expectation at the first row that does not fit; also for a missing, empty or
    truncated file.  Rows are counted from 1 in each file.
    """
    path = Path(path)
    seen = False
    for file in shards.parts(path):
        for row_number, row in enumerate(read_rows(file), start=1):
            seen = True
            yield row_to_pair(row, file, row_number)
    if not seen:
        raise DataError(f"{path} holds no rows; expected at least one preference pair")


def pair_to_row(pair: PreferencePair) -> dict[str, Any]:
    """The flat row of a pair, as `read_pairs` reads it back."""
    return {
        "pair_id": pair.pair_id,
        "conversation_id": pair.conversation_id,
        "user_id": pair.user_id,
        "context": [{"role": m.role, "content": m.content} for m in pair.context],
        "chosen": {"role": "assistant", "content": pair.chosen},
        "rejected": {"role": "assistant", "content": pair.rejected},
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
        "turn": pair.turn,
        "type": pair.kind,
        "scenario": pair.scenario,
        "split": pair.split,
        "user_split": pair.user_split,
        "cohort": pair.cohort,
        "time": pair.time,
        "position": pair.position,
        "n_other_agree": pair.others[0] if pair.others else None,
        "n_other_disagree": pair.others[1] if pair.others else None,
        "criteria": pair.explicit.criteria,
        "self_description": pair.explicit.self_description,
        "style": pair.explicit.style,
        "attributes": json.dumps(dict(pair.explicit.attributes)) if pair.explicit.attributes else None,
        "synthetic_criteria": pair.explicit.synthetic,
    }


def pair_schema() -> Any:
    """The Arrow schema of `pair_to_row`'s rows."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    kinds = {"context": pa.list_(message), "chosen": message, "rejected": message, "turn": pa.int64()}
    kinds |= dict.fromkeys(("position", "n_other_agree", "n_other_disagree"), pa.int64())
    kinds |= dict.fromkeys(("chosen_score", "rejected_score", "time"), pa.float64()) | {
        "synthetic_criteria": pa.bool_()
    }
    example = PreferencePair("", "", (Message("user", ""),), "", "")
    return pa.schema([(name, kinds.get(name, pa.string())) for name in pair_to_row(example)])


def row_to_pair(row: Mapping[str, Any], path: Path, number: int) -> PreferencePair:
    """One raw row → a pair.  Raises DataError naming file, row, field and expectation."""

    def bad(name: str, expected: str, got: object) -> DataError:
        return DataError(f"{path}, row {number}, field '{name}': expected {expected}, got {_short(got)}")

    def text(name: str, value: object) -> str:
        if isinstance(value, Mapping):
            value = value.get("content")
        if not isinstance(value, str) or not value.strip():
            raise bad(name, "a non-empty text or {role, content}", value)
        return value

    def number_or_none(name: str, kind: str = "a number") -> float | None:
        value = row.get(name)
        if _absent(value):
            return None
        if not _finite(value):
            raise bad(name, f"{kind} or null", value)
        return float(value)

    def turn() -> int:
        value = number_or_none("turn", "a whole number") or number_or_none("turns", "a whole number") or 0.0
        if not value.is_integer() or abs(value) >= WHOLE:
            raise bad("turn", "a whole number or null", value)
        return int(value)

    def name_of(column: str) -> str:
        value = row.get(column)
        if _absent(value):
            return ""
        if isinstance(value, bytes | bool) or not isinstance(value, str | int | float):
            raise bad(column, "a text or a number", value)
        return str(value)

    for name in ("user_id", "context", "chosen", "rejected"):
        if _absent(row.get(name)):
            raise bad(name, "a value", "nothing (missing or null)")
    check_texts(row, f"{path}, row {number}", _TEXTS)
    if not name_of("user_id").strip():
        raise bad("user_id", "a value", row["user_id"])
    split = _choice(row, "split", bad)
    return PreferencePair(
        pair_id=name_of("pair_id") or name_of("conversation_id") or f"{path.stem}-{number}",
        user_id=name_of("user_id"),
        context=_context(row["context"], bad),
        chosen=text("chosen", row["chosen"]),
        rejected=text("rejected", row["rejected"]),
        conversation_id=name_of("conversation_id"),
        chosen_score=number_or_none("chosen_score"),
        rejected_score=number_or_none("rejected_score"),
        turn=turn(),
        kind=_optional_text(row, "type", bad),
        scenario=_optional_text(row, "scenario", bad),
        split=split,
        user_split=_optional_text(row, "user_split", bad) or "train",
        cohort=_optional_text(row, "cohort", bad),
        time=_time(row, bad),
        position=_position(row),
        others=_others(row, bad),
        explicit=ExplicitSignals(
            criteria=_optional_text(row, "criteria", bad),
            self_description=_optional_text(row, "self_description", bad),
            style=_optional_text(row, "style", bad),
            attributes=_attributes(row, bad),
            synthetic=_flag(row, "synthetic_criteria", bad),
        ),
    )


def _context(value: object, bad: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise bad("context", "a non-empty list of {role, content}", value)
    turns = []
    for i, turn in enumerate(value):
        if (
            not isinstance(turn, Mapping)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise bad(f"context[{i}]", "{role, content} with two texts", turn)
        role = "assistant" if turn["role"] == "model" else turn["role"]
        if role not in ("user", "assistant", "system"):
            raise bad(f"context[{i}].role", "user, assistant, model or system", role)
        turns.append(Message(role, turn["content"]))
    if turns[-1].role != "user":
        raise bad(
            "context", "a conversation that ends with a user turn", f"a last turn of role {turns[-1].role!r}"
        )
    return tuple(turns)


def _choice(row: Mapping[str, Any], name: str, bad: Any) -> str:
    value = row.get(name)
    value = "train" if _absent(value) or value == "" else "val" if value == "validation" else value
    if value not in SPLITS:
        raise bad(name, "train, val or test", value)
    return str(value)


def _others(row: Mapping[str, Any], bad: Any) -> tuple[int, int] | None:
    """`n_other_agree` and `n_other_disagree`; a source may give `n_other_judges` and `n_other_tie` in place of the second."""
    rest = (
        ("n_other_disagree",)
        if not _absent(row.get("n_other_disagree"))
        else ("n_other_judges", "n_other_tie")
    )
    columns = ("n_other_agree", *rest)
    if any(_absent(row.get(name)) for name in columns):
        return None
    counts = []
    for name in columns:
        value = row.get(name)
        if not _finite(value) or not 0 <= value < WHOLE or not float(value).is_integer():
            raise bad(name, "a whole number from 0 or null", value)
        counts.append(int(value))
    agree, disagree = counts[0], counts[1] if len(counts) == 2 else counts[1] - counts[2] - counts[0]
    if disagree < 0:
        raise bad("n_other_judges", "at least n_other_agree + n_other_tie", row["n_other_judges"])
    return agree, disagree


def _optional_text(row: Mapping[str, Any], name: str, bad: Any) -> str | None:
    value = row.get(name)
    if _absent(value):
        return None
    if not isinstance(value, str):
        raise bad(name, "a text or null", value)
    return value.strip() or None


def _attributes(row: Mapping[str, Any], bad: Any) -> tuple[tuple[str, float], ...]:
    value = row.get("attributes")
    if _absent(value) or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise bad("attributes", "a JSON object of name → weight", value) from None
    if not isinstance(value, Mapping):
        raise bad("attributes", "an object of name → weight", value)
    weights = {str(name): weight for name, weight in value.items() if not _absent(weight)}
    if not all(_finite(weight) for weight in weights.values()):
        raise bad("attributes", "numbers as weights", value)
    return tuple((name, float(weight)) for name, weight in weights.items())


def _time(row: Mapping[str, Any], bad: Any) -> float | None:
    """When the vote was cast: the column `time` or `timestamp`, in seconds, as a date or in ISO 8601; without a zone it is UTC."""
    name = "timestamp" if _absent(row.get("time")) else "time"
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            raise bad(name, "seconds since 1970 or a date in ISO 8601", value) from None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if _absent(value) or value == "":
        return None
    if not _finite(value):
        raise bad(name, "seconds since 1970 or a date in ISO 8601", value)
    return float(value)


def _position(row: Mapping[str, Any]) -> int | None:
    """Where the user saw the chosen response; a column `position_of_chosen` in words other than these is somebody else's."""
    value = row.get("position_of_chosen") if _absent(row.get("position")) else row.get("position")
    if isinstance(value, float) and value.is_integer():  # what pandas makes of whole numbers beside nulls
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < WHOLE else None
    return _POSITIONS.get(value.lower()) if isinstance(value, str) else None


def _flag(row: Mapping[str, Any], name: str, bad: Any) -> bool:
    value = row.get(name)
    if not (_absent(value) or isinstance(value, bool)):
        raise bad(name, "true, false or null", value)
    return value is True


def _finite(value: object) -> TypeGuard[int | float]:
    """A number that a file can hold; JSON knows Infinity, and whole numbers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _absent(value: object) -> bool:
    """Null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _short(value: object) -> str:
    text = value if isinstance(value, str) and value.startswith("nothing") else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
