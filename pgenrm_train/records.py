"""Frozen records that travel through every stage, and the one reader of preference pairs.

A *pair* is one vote of one user: conversation so far, the response chosen and the response rejected.  An *example* is what a
reward model is asked: a user's history, a query and b ≥ 2 responses in presentation order.  Explicit signals (stated criteria,
style, self-description) ride beside, in a field of their own, so that masking is a matter of type (see `masking`).

Schema read: PersonalRewardBench (`chatbot_arena_personalized_0125`, `prism_personalized_0125`) plus optional columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgenrm_train.errors import DataError

SPLITS = ("train", "val", "test")


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
    """One earlier vote of the user, as a prompt may show it: no scores, no attributes."""

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
    kind: str | None = None  # slice label of the pair: easy | medium | hard | rival in PersonaWorld, `type` elsewhere
    scenario: str | None = None
    split: str = "train"  # within the user
    user_split: str = "train"  # across users; val and test mark held-out users, any other word a training user
    cohort: str | None = None  # group of users a report tells apart, e.g. seen_persona | unseen_persona
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


def read_pairs(path: str | Path) -> Iterator[PreferencePair]:
    """Stream `PreferencePair`s from a parquet or JSONL file.

    Raises DataError with file, row, field and expectation at the first row that does not fit; also for a missing, empty or
    truncated file.  Rows are counted from 1.
    """
    path = Path(path)
    seen = False
    for row_number, row in enumerate(read_rows(path), start=1):
        seen = True
        yield row_to_pair(row, path, row_number)
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
        "criteria": pair.explicit.criteria,
        "self_description": pair.explicit.self_description,
        "style": pair.explicit.style,
        "attributes": json.dumps(dict(pair.explicit.attributes)) if pair.explicit.attributes else None,
        "synthetic_criteria": pair.explicit.synthetic,
    }


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Raw rows of a parquet or JSONL file.  Raises DataError when it is missing or cannot be read."""
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a parquet or JSONL file of preference pairs")
    if path.suffix in (".jsonl", ".json"):
        yield from _jsonl_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise DataError(f"{path} ends in {path.suffix!r}; expected .parquet or .jsonl")


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    number += 1
                    yield _jsonl_row(line, path, number)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after row {number}: expected UTF-8 text, got other bytes ({error.reason})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected a JSONL file") from None


def _jsonl_row(line: str, path: Path, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, row {number}: expected one JSON object a line, got a line that is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


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

    def number_or_none(name: str) -> float | None:
        value = row.get(name)
        if _absent(value):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad(name, "a number or null", value)
        return float(value)

    def turn() -> int:
        value = number_or_none("turn") or number_or_none("turns") or 0.0
        if not value.is_integer():
            raise bad("turn", "a whole number or null", value)
        return int(value)

    for name in ("user_id", "context", "chosen", "rejected"):
        if _absent(row.get(name)):
            raise bad(name, "a value", "nothing (missing or null)")
    if not str(row["user_id"]).strip():
        raise bad("user_id", "a value", row["user_id"])
    split = _choice(row, "split", bad)
    return PreferencePair(
        pair_id=str(row.get("pair_id") or row.get("conversation_id") or f"{path.stem}-{number}"),
        user_id=str(row["user_id"]),
        context=_context(row["context"], bad),
        chosen=text("chosen", row["chosen"]),
        rejected=text("rejected", row["rejected"]),
        conversation_id=str(row.get("conversation_id") or ""),
        chosen_score=number_or_none("chosen_score"),
        rejected_score=number_or_none("rejected_score"),
        turn=turn(),
        kind=_optional_text(row, "type", bad),
        scenario=_optional_text(row, "scenario", bad),
        split=split,
        user_split=_optional_text(row, "user_split", bad) or "train",
        cohort=_optional_text(row, "cohort", bad),
        explicit=ExplicitSignals(
            criteria=_optional_text(row, "criteria", bad),
            self_description=_optional_text(row, "self_description", bad),
            style=_optional_text(row, "style", bad),
            attributes=_attributes(row, bad),
            synthetic=bool(row.get("synthetic_criteria")),
        ),
    )


def _context(value: object, bad: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise bad("context", "a non-empty list of {role, content}", value)
    turns = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise bad(f"context[{i}]", "{role, content} with two texts", turn)
        role = "assistant" if turn["role"] == "model" else turn["role"]
        if role not in ("user", "assistant", "system"):
            raise bad(f"context[{i}].role", "user, assistant, model or system", role)
        turns.append(Message(role, turn["content"]))
    if turns[-1].role != "user":
        raise bad("context", "a conversation that ends with a user turn", f"a last turn of role {turns[-1].role!r}")
    return tuple(turns)


def _choice(row: Mapping[str, Any], name: str, bad: Any) -> str:
    value = row.get(name)
    value = "train" if value is None or value == "" else "val" if value == "validation" else value
    if value not in SPLITS:
        raise bad(name, "train, val or test", value)
    return str(value)


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
    try:
        return tuple((str(k), float(v)) for k, v in value.items() if v is not None)
    except (TypeError, ValueError):
        raise bad("attributes", "numbers as weights", value) from None


def _absent(value: object) -> bool:
    """Null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _short(value: object) -> str:
    text = value if isinstance(value, str) and value.startswith("nothing") else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
