"""data=prism: PRISM (Kirk et al. 2024), from its survey and conversations to pairs with all stated signals.

Each turn shows a user several responses, which they rate 1–100.  Every two responses of a turn whose ratings
are at least `data.min_rating_gap` apart are a pair.  Its context is the conversation so far, with the
responses with which the user continued.  Statements of the user go to typed fields: the system string as
style, the self-description, and as attributes the weights of this conversation's choices, filled up with
those of the survey.  The open feedback on a conversation describes single responses, so it would give the
label away and is left out.

The source has no split: `data.split_by` makes one, of complete conversations (`within_user`) or of users.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations, takewhile
from typing import TypeGuard

from data_builders.sources import hub
from data_builders.sources.pairs import BadRows
from pgenrm_train.config import DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.records.ids import WHOLE, id_of
from pgenrm_train.records.pairs import ExplicitSignals, Message, PreferencePair
from pgenrm_train.records.raw_rows import LeftOut, check_texts

HUB = "HannahRoseKirk/prism-alignment"
EMPTY = "EMPTY STRING"  # PRISM's word for a response or a field without text


@dataclass(frozen=True)
class _Response:
    text: str
    score: float | None
    continued: bool


def build(data: DataConfig, seed: int, left_out: LeftOut) -> Iterator[PreferencePair]:
    """Stream the pairs and count the left-out rows.  DataError names file, row, field and expectation."""
    source, bad = data.path or HUB, BadRows(data.on_bad_row, left_out)
    survey = _survey(source, bad)
    for where, row in _required(
        source, "conversations", ("conversation_id", "user_id", "conversation_history"), bad
    ):
        try:
            user = survey.get(id_of(row, "user_id", where))
            if user is None:
                left_out["conversations whose user is not in the survey"] += 1
                continue
            pairs = list(_pairs(row, where, _explicit(user, row), data.min_rating_gap, left_out))
        except DataError as error:
            bad.take(error)
            continue
        yield from pairs
    bad.report(source)


def _survey(source: str, bad: BadRows) -> dict[str, hub.Row]:
    """User → their answers; a second answer of a user is a bad row."""
    survey: dict[str, hub.Row] = {}
    for where, row in _required(source, "survey", ("user_id",), bad):
        try:
            if (user := id_of(row, "user_id", where)) in survey:
                raise DataError(
                    f"{where}, field 'user_id': expected one row per user, got {user[:60]!r} again"
                )
            survey[user] = row
        except DataError as error:
            bad.take(error)
    return survey


def _required(source: str, table: str, fields: Sequence[str], bad: BadRows) -> Iterator[tuple[str, hub.Row]]:
    """Yield (file and row, row) of a table; a row without a value in each of `fields` is bad."""
    where = None
    for where, row in hub.numbered(source, table):
        try:
            check_texts(row, where)
            if missing := [name for name in fields if row.get(name) is None]:
                raise DataError(
                    f"{where}, field '{missing[0]}': expected a value, got nothing (missing or null)"
                )
        except DataError as error:
            bad.take(error)
        else:
            yield where, row
    if where is None:
        raise DataError(f"prism {table} holds no rows")


def _pairs(
    row: hub.Row, where: str, explicit: ExplicitSignals, gap: float, dropped: LeftOut
) -> Iterator[PreferencePair]:
    context: list[Message] = []
    conversation, user = id_of(row, "conversation_id", where), id_of(row, "user_id", where)
    for turn, (query, responses) in enumerate(_turns(row, where)):
        context.append(Message("user", query))
        usable = [r for r in responses if r.text and r.score is not None]
        dropped["responses without text or rating"] += len(responses) - len(usable)
        for number, (one, other) in enumerate(combinations(usable, 2)):
            position = int((other.score or 0) > (one.score or 0))
            better, worse = (other, one) if position else (one, other)
            if better.text == worse.text:
                dropped["pairs of equal texts"] += 1
            elif (better.score or 0) - (worse.score or 0) < max(gap, 1e-9):
                dropped[f"pairs rated less than {gap:g} points apart"] += 1
            else:
                yield PreferencePair(
                    pair_id=f"{conversation}/{turn}/{number}",
                    user_id=user,
                    context=tuple(context),
                    chosen=better.text,
                    rejected=worse.text,
                    conversation_id=conversation,
                    chosen_score=better.score,
                    rejected_score=worse.score,
                    turn=turn,
                    kind=_text(row.get("conversation_type")),
                    explicit=explicit,
                    position=position,
                )
        following = next((r for r in responses if r.continued and r.text), None)
        if following is None:  # the next turn has no context
            return
        context.append(Message("assistant", following.text))


def _turns(row: hub.Row, row_name: str) -> list[tuple[str, list[_Response]]]:
    """Per turn the user's text and the responses."""
    turns: dict[int, tuple[str | None, list[_Response]]] = {}
    messages = row["conversation_history"]
    if not isinstance(messages, list):
        raise DataError(
            f"{row_name}, field 'conversation_history': expected a list of messages, got {str(messages)[:80]}"
        )
    for place, message in enumerate(messages):
        where = f"{row_name}, field 'conversation_history[{place}]'"
        if not isinstance(message, Mapping) or message.get("role") not in ("user", "model"):
            raise DataError(
                f"{where}: expected {{turn, role: user|model, content, …}}, got {str(message)[:80]}"
            )
        if not _number(message.get("turn")):
            raise DataError(f"{where}.turn: expected a number, got {message.get('turn')!r}")
        turn = int(message["turn"])
        _, responses = turns.setdefault(turn, (None, []))
        content = message["content"] if _text(message.get("content")) else ""
        if message["role"] == "user":
            turns[turn] = (content, responses)
        else:
            score = message.get("score")
            if (
                score is not None and score == score and not _number(score)
            ):  # NaN is what pandas writes for null
                raise DataError(f"{where}.score: expected a number or null, got {score!r}")
            responses.append(
                _Response(content, float(score) if _number(score) else None, bool(message.get("if_chosen")))
            )
    # A turn without words ends the conversation.
    ordered = takewhile(lambda item: item[0], (turns[turn] for turn in sorted(turns)))
    return [(text or "", responses) for text, responses in ordered]


def _explicit(user: hub.Row, row: hub.Row) -> ExplicitSignals:
    return ExplicitSignals(
        self_description=_text(user.get("self_description")),
        style=_text(user.get("system_string")),
        attributes=tuple(
            (_weights(user.get("stated_prefs")) | _weights(row.get("choice_attributes"))).items()
        ),
    )


def _weights(value: object) -> dict[str, float]:
    return {str(k): float(v) for k, v in value.items() if _number(v)} if isinstance(value, Mapping) else {}


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool) and -WHOLE < value < WHOLE


def _text(value: object) -> str | None:
    """A text with content, else None."""
    return value.strip() if isinstance(value, str) and value.strip() and value.strip() != EMPTY else None
