"""data=prism: PRISM (Kirk et al. 2024), from its survey and conversations to pairs with everything that a user stated.

Each turn shows a user several responses, which they rate 1–100.  Every two responses of a turn whose ratings lie at least
`data.min_rating_gap` apart are a pair; the conversation so far is its context, with the response that the user went on from.  What the
user stated rides in typed fields: the system string as style, the self-description, and as attributes the weights that they gave for
the choices of this conversation, else those of the survey.  The open feedback on a conversation speaks of single responses, so
it would tell the label and is left out.

The source has no split.  `data.split_by`: `within_user` gives each user's conversations to train, val and test (70/10/20 %);
`user_disjoint` holds out a tenth of the users, of whose conversations a half is history and a half is asked.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from data_builders import hub
from pgenrm_train.config import DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.records import ExplicitSignals, Message, PreferencePair

HUB = "HannahRoseKirk/prism-alignment"
EMPTY = "EMPTY STRING"  # PRISM's word for a response or a field without text
HELDOUT_SHARE, SHARES = 0.1, (("train", 0.7), ("val", 0.1), ("test", 0.2))


@dataclass(frozen=True)
class _Response:
    text: str
    score: float | None
    went_on: bool


def build(data: DataConfig, seed: int) -> Iterator[PreferencePair]:
    """Stream the pairs.  Raises DataError naming table, row, field and expectation; what is dropped is counted and told."""
    source = data.path or HUB
    survey = {str(row["user_id"]): row for row in _required(hub.rows(source, "survey"), "survey", ("user_id",))}
    conversations = list(
        _required(hub.rows(source, "conversations"), "conversations", ("conversation_id", "user_id", "conversation_history"))
    )
    places = _places(conversations, data.split_by, seed)
    dropped: Counter[str] = Counter()
    for number, row in enumerate(conversations, start=1):
        user = survey.get(str(row["user_id"]))
        if user is None:
            dropped["conversations whose user is not in the survey"] += 1
            continue
        yield from _pairs(row, number, _explicit(user, row), places[str(row["conversation_id"])], data.min_rating_gap, dropped)
    for what, count in (+dropped).most_common():
        print(f"prism: left out {count} {what}", flush=True)


def _required(rows: Iterator[Mapping[str, Any]], table: str, fields: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    number = 0
    for number, row in enumerate(rows, start=1):
        for name in fields:
            if row.get(name) is None:
                raise DataError(f"prism {table}, row {number}, field '{name}': expected a value, got nothing (missing or null)")
        yield row
    if not number:
        raise DataError(f"prism {table} holds no rows")


def _pairs(
    row: Mapping[str, Any], number: int, explicit: ExplicitSignals, place: tuple[str, str], gap: float, dropped: Counter[str]
) -> Iterator[PreferencePair]:
    """The pairs of one conversation, turn by turn."""
    context: list[Message] = []
    split, user_split = place
    conversation, user = str(row["conversation_id"]), str(row["user_id"])
    for turn, (asked, responses) in enumerate(_turns(row, number)):
        context.append(Message("user", asked))
        usable = [r for r in responses if r.text and r.score is not None]
        dropped["responses without text or rating"] += len(responses) - len(usable)
        for place_of, (one, other) in enumerate(combinations(usable, 2)):
            better, worse = (one, other) if (one.score or 0) >= (other.score or 0) else (other, one)
            if better.text == worse.text:
                dropped["pairs of equal texts"] += 1
            elif (better.score or 0) - (worse.score or 0) < max(gap, 1e-9):
                dropped[f"pairs rated less than {gap:g} points apart"] += 1
            else:
                yield PreferencePair(
                    pair_id=f"{conversation}/{turn}/{place_of}", user_id=user, context=tuple(context), chosen=better.text,
                    rejected=worse.text, conversation_id=conversation, chosen_score=better.score, rejected_score=worse.score,
                    turn=turn, kind=_text(row.get("conversation_type")), split=split, user_split=user_split, explicit=explicit,
                )  # fmt: skip
        following = next((r for r in responses if r.went_on and r.text), None)
        if following is None:  # nothing that the next turn could have answered to
            return
        context.append(Message("assistant", following.text))


def _turns(row: Mapping[str, Any], number: int) -> list[tuple[str, list[_Response]]]:
    """(what the user said, the responses shown) for each turn."""
    turns: dict[int, tuple[str | None, list[_Response]]] = {}
    for place, message in enumerate(row["conversation_history"]):
        where = f"prism conversations, row {number}, field 'conversation_history[{place}]'"
        if not isinstance(message, Mapping) or message.get("role") not in ("user", "model") or message.get("turn") is None:
            raise DataError(f"{where}: expected {{turn, role: user|model, content, …}}, got {str(message)[:80]}")
        _, responses = turns.setdefault(int(message["turn"]), (None, []))
        content = message["content"] if _text(message.get("content")) else ""
        if message["role"] == "user":
            turns[int(message["turn"])] = (content, responses)
        else:
            score = message.get("score")
            if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
                raise DataError(f"{where}.score: expected a number or null, got {score!r}")
            responses.append(_Response(content, None if score is None else float(score), bool(message.get("if_chosen"))))
    ordered = [turns[turn] for turn in sorted(turns)]
    until = next((i for i, (said, _) in enumerate(ordered) if not said), len(ordered))  # a turn without words ends it
    return [(said or "", responses) for said, responses in ordered[:until]]


def _explicit(user: Mapping[str, Any], row: Mapping[str, Any]) -> ExplicitSignals:
    weights = _weights(row.get("choice_attributes")) or _weights(user.get("stated_prefs"))
    return ExplicitSignals(
        self_description=_text(user.get("self_description")), style=_text(user.get("system_string")), attributes=weights
    )


def _weights(value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping):
        return ()
    return tuple(
        (str(k), float(v)) for k, v in value.items() if isinstance(v, int | float) and not isinstance(v, bool) and v == v
    )


def _text(value: Any) -> str | None:
    """A text that says something, else None."""
    return value.strip() if isinstance(value, str) and value.strip() and value.strip() != EMPTY else None


def _places(conversations: Sequence[Mapping[str, Any]], split_by: str, seed: int) -> dict[str, tuple[str, str]]:
    """conversation → (split, user_split); whole conversations, so that no turn of one is in two splits."""
    by_user: dict[str, list[str]] = {}
    for row in conversations:
        by_user.setdefault(str(row["user_id"]), []).append(str(row["conversation_id"]))
    users = sorted(by_user)
    random.Random(f"{seed}/prism/users").shuffle(users)
    held_out = set(users[: round(HELDOUT_SHARE * len(users))]) if split_by == "user_disjoint" else set()
    places = {}
    for user, names in by_user.items():
        names = sorted(names)
        random.Random(f"{seed}/prism/{user}").shuffle(names)
        for i, name in enumerate(names):
            if user in held_out:
                places[name] = ("train" if i < (len(names) + 1) // 2 else "test", "test")
            else:
                places[name] = ("train" if split_by == "user_disjoint" else _within(i, len(names)), "train")
    return places


def _within(place: int, total: int) -> str:
    """The split of a user's n-th conversation; the first is always train, so that everybody has a history."""
    position, end = place / total, 0.0
    for split, share in SHARES:
        end += share
        if position < end - 1e-9:
            return split
    return SHARES[-1][0]
