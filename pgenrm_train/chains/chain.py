"""Evaluation chains: parse a text, verify its scores, and write the chain of a teacher.

Format (METHOD §2): free analysis, `<JSON_START>`, one JSON object with `rationale` and `better_response`,
`<JSON_END>`.

    verified score of response i = Σ_c w_c · s_ic / Σ_c w_c

    w: weights in percent, s: scores from 1 to 10, both read from the rubric

The paper trusts the declared numbers, though its showcase chain adds them wrongly.  Recomputing them is *our
choice*, and so is the optional `rubric` object.  A chain that cannot be used is data (`ParseFailure`); one
that is flawed but usable carries `issues`.  Time is linear in the length of any text: a policy under training
writes anything.

`rubric` reads and recomputes rubrics.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pgenrm_train.chains.reasoning import strip_reasoning
from pgenrm_train.chains.rubric import number, read_rubric, response_index, verify
from pgenrm_train.chains.rubric_free_text import MAX_CRITERIA, Criteria, CriterionScores
from pgenrm_train.prompts.messages import JSON_END, JSON_START

__all__ = ["FORMAT_STRINGS", "JSON_END", "JSON_START", "Chain", "ParseFailure", "parse_chain", "write_chain"]

NO_MARKERS = "no_markers"
BAD_JSON = "bad_json"
SCORES_MISSING = "scores_missing"
SCORES_COUNT = "scores_count"
SCORES_NOT_NUMBERS = "scores_not_numbers"
SCORES_NOT_FINITE = "scores_not_finite"
FAILURE_KINDS = (NO_MARKERS, BAD_JSON, SCORES_MISSING, SCORES_COUNT, SCORES_NOT_NUMBERS, SCORES_NOT_FINITE)

NO_RUBRIC = "no_rubric"
WEIGHTS = "weights"
SCORE_RANGE = "score_range"
DECLARED_DIFFERS = "declared_differs"
TRAILING_TEXT = "trailing_text"
ISSUES = (NO_RUBRIC, WEIGHTS, SCORE_RANGE, DECLARED_DIFFERS, TRAILING_TEXT)

OPEN = f'{JSON_START}{{"rationale": "'
_SCORES = '", "better_response": {"response_1": '
_CLOSE = f"}}}}{JSON_END}"
# The writer's fixed strings for two responses; a small vocabulary holds each as one token.
FORMAT_STRINGS = (OPEN, ". Response 1: ", ". Response 2: ", _SCORES, ', "response_2": ', _CLOSE)

_MAX_OBJECTS = 16  # places in a block at which a JSON object is tried; each costs one pass over the block
_ROUNDING = 0.05 + 1e-6  # a total given to one decimal is off by at most this much


@dataclass(frozen=True, slots=True)
class Chain:
    """One usable evaluation chain.

    `criteria` are (name, weight in percent).  `declared` and `scores` are the declared totals per response;
    `totals.read_chain` makes `scores` the totals that count.  `criterion_scores` is responses × criteria, and
    `verified_scores` the totals recomputed from it; both are None if no complete rubric can be read. `issues`
    is a subset of `ISSUES` in that order.
    """

    analysis: str
    criteria: Criteria
    scores: tuple[float, ...]
    criterion_scores: CriterionScores | None
    verified_scores: tuple[float, ...] | None
    issues: tuple[str, ...]
    declared: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ParseFailure:
    """The reason why a text is no usable chain: one of `FAILURE_KINDS`, and one line for a person."""

    kind: str
    detail: str


def parse_chain(text: str, n_responses: int = 2) -> Chain | ParseFailure:
    """Read the last valid block of `text`; without one, return the failure of the last complete block.

    Never raises on a string.  Reasoning in `<think>…</think>` is no part of the chain.

    >>> text = write_chain("Wants it short.", [("short", 60), ("clear", 40)], [[9, 8], [4, 7]])
    >>> parse_chain(text).scores
    (8.6, 5.2)
    >>> parse_chain("Response 1 is better.").kind
    'no_markers'
    """
    text = strip_reasoning(text)
    starts = [match.end() for match in _START.finditer(text)]
    limits = [start - len(JSON_START) for start in starts[1:]] + [len(text)]
    spans = list(zip(starts, limits, strict=False))[::-1]
    if len(starts) > 1:
        # The last resort: the markers between may be part of a JSON string.
        spans.append((starts[0], len(text)))
    failure: ParseFailure | None = None
    for start, limit in spans:
        block = _read_block(text[start:limit], n_responses)
        if isinstance(block, _Block):
            trailing = bool(text[start + block.end :].strip())
            return _build_chain(_outside_blocks(text[: start - len(JSON_START)]), block, trailing)
        failure = failure or block
    return failure or ParseFailure(NO_MARKERS, f"no {JSON_START} with a {JSON_END} after it")


def write_chain(
    analysis: str,
    criteria: Sequence[tuple[str, float]],
    scores: Sequence[Sequence[float]],
    notes: Sequence[str] | None = None,
) -> str:
    """Write the chain of a teacher; it has no issues if weights sum to 100 and scores are in 1..10.

    `scores` is responses × criteria, `notes` one text per response; an empty note is left out.  Totals are
    the verified scores, rounded half up to one decimal.  Raises ValueError for shapes that do not fit,
    numbers that are not finite, weights without a positive sum, and criterion names that are empty, repeated
    or hold one of `,;%=` or a line break.
    """
    _check_rubric(criteria, scores, notes)
    weights = [weight for _, weight in criteria]
    totals = [_half_up(weights, row) for row in scores]
    rationale = rationale_of(criteria, scores, [f" = {total}" for total in totals], notes)
    escaped = escape(json.dumps(rationale, ensure_ascii=False)[1:-1])
    declared = totals[0] + "".join(
        f', "response_{i}": {total}' for i, total in enumerate(totals[1:], start=2)
    )
    return f"{analysis}\n{OPEN}{escaped}{_SCORES}{declared}{_CLOSE}"


def rationale_of(
    criteria: Sequence[tuple[str, float]],
    scores: Sequence[Sequence[float]],
    totals: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
) -> str:
    """The rubric in the writer's grammar; `totals` are the ends of the score lines, by default nothing."""
    rationale = ", ".join(f"{name} {_plain(weight)}%" for name, weight in criteria)
    for i, row in enumerate(scores):
        note = f"{notes[i]}; " if notes and notes[i] else ""
        marks = ", ".join(f"{name} {_plain(score)}" for (name, _), score in zip(criteria, row, strict=True))
        rationale += f". Response {i + 1}: {note}{marks}{totals[i] if totals else ''}"
    return f"{rationale}."


def escape(encoded: str) -> str:
    """JSON in which no marker is quoted as it is, and which can be written as UTF-8."""
    return _LONE.sub(lambda match: f"\\u{ord(match[0]):04x}", encoded.replace("<JSON_", "\\u003cJSON_"))


# ---- writing -----------------------------------------------------------------------------------------------


def _check_rubric(
    criteria: Sequence[tuple[str, float]], scores: Sequence[Sequence[float]], notes: Sequence[str] | None
) -> None:
    names, weights = [name for name, _ in criteria], [weight for _, weight in criteria]
    unreadable = [name for name in names if not name.strip() or re.search(r"[,;%=\n]", name)]
    rules = [
        (
            not 1 <= len(names) <= MAX_CRITERIA or len(set(names)) != len(names),
            f"criteria: expected 1 to {MAX_CRITERIA} different names, got {names}",
        ),
        (
            bool(unreadable),
            f"criteria: {', '.join(map(repr, unreadable))} cannot be read back; use names without "
            "line breaks and without , ; % =",
        ),
        (
            not scores or any(len(row) != len(names) for row in scores),
            f"scores: expected {len(names)} numbers per response, got {[len(row) for row in scores]}",
        ),
        (
            bool(notes) and len(notes or ()) != len(scores),
            f"notes: expected {len(scores)}, one per response, got {len(notes or ())}",
        ),
        (
            not all(
                math.isfinite(number) for number in (*weights, *(mark for row in scores for mark in row))
            ),
            "criteria, scores: every weight and score must be finite",
        ),
        (
            min(weights, default=0) < 0 or sum(weights) <= 0,
            "criteria: weights must not be negative and need a positive sum",
        ),
    ]
    for broken, sentence in rules:
        if broken:
            raise ValueError(sentence)


def _plain(number: float) -> str:
    number = float(number)
    return str(int(number)) if number.is_integer() else repr(number)


def _half_up(weights: Sequence[float], scores: Sequence[float]) -> str:
    """Σ w·s / Σ w to one decimal, half up, in fractions: 5.65 has no exact binary form."""
    exact = [Fraction(_plain(weight)) for weight in weights]
    weighted = sum((w * Fraction(_plain(s)) for w, s in zip(exact, scores, strict=True)), start=Fraction(0))
    return f"{math.floor(weighted / sum(exact) * 10 + Fraction(1, 2)) / 10:.1f}"


# ---- blocks and declared scores ----------------------------------------------------------------------------

# Integers are read as floats: Python refuses to convert very long ones.
_START = re.compile(JSON_START)
_LONE = re.compile("[\ud800-\udfff]")


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object without repeated keys: of two weights, scores or totals of one name, neither is certain."""
    if len(data := dict(pairs)) != len(pairs):
        raise ValueError("an object has a key twice")
    return data


DECODER = json.JSONDecoder(strict=False, parse_int=float, object_pairs_hook=_distinct)
OBJECT = re.compile(r'\{[ \t\r\n]*+["}]')


@dataclass(frozen=True, slots=True)
class _Block:
    data: Mapping[str, object]
    scores: tuple[float, ...]
    end: int  # just after the end marker, counted from the start of the block's body


def _outside_blocks(text: str) -> str:
    """The analysis without earlier blocks, so that no score is read or embedded with it."""
    head, *pieces = text.split(JSON_START)
    return "".join(
        [head, *(piece.partition(JSON_END)[2] if JSON_END in piece else piece for piece in pieces)]
    ).strip()


def _read_block(body: str, n_responses: int) -> _Block | ParseFailure | None:
    """The object of one block and its declared scores; None if no end marker follows."""
    data: Mapping[str, object] | None = None
    problem, has_object, end = "", False, 0
    for _ in range(_MAX_OBJECTS):
        brace, marker = OBJECT.search(body, end), body.find(JSON_END, end)
        if brace is None or brace.start() > marker:
            break
        try:
            value, end = DECODER.raw_decode(body, brace.start())
        except RecursionError:
            problem = "the JSON is nested too deeply"
            break
        except ValueError as error:
            problem, end = str(error), brace.start() + 1
            continue
        has_object = True
        data = value if "better_response" in value else data
    marker = body.find(JSON_END, end)
    if marker < 0:
        return None
    if data is not None:
        scores = _declared_scores(data["better_response"], n_responses)
        return scores if isinstance(scores, ParseFailure) else _Block(data, scores, marker + len(JSON_END))
    if problem or not has_object:
        return ParseFailure(BAD_JSON, problem or "no JSON object between the markers")
    return ParseFailure(SCORES_MISSING, "the JSON object has no key better_response")


def _declared_scores(declared: object, n_responses: int) -> tuple[float, ...] | ParseFailure:
    if not isinstance(declared, dict):
        return ParseFailure(
            SCORES_MISSING, f"better_response: expected an object, got {type(declared).__name__}"
        )
    by_index = {response_index(key): value for key, value in declared.items()}
    expected = list(range(1, n_responses + 1))
    if len(by_index) != len(declared) or set(by_index) != set(expected):
        names = _short(list(declared))
        return ParseFailure(
            SCORES_COUNT, f"better_response: expected response_1..response_{n_responses}, got {names}"
        )
    scores = [number(by_index[i]) for i in expected]
    for i, score in zip(expected, scores, strict=True):
        if score is None:
            return ParseFailure(SCORES_NOT_NUMBERS, f"response_{i}: {_short(by_index[i])} is not a number")
    values = tuple(score for score in scores if score is not None)
    if not all(map(math.isfinite, values)):
        return ParseFailure(
            SCORES_NOT_FINITE, f"better_response: not every score is finite: {_short(values)}"
        )
    return values


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _build_chain(analysis: str, block: _Block, trailing: bool) -> Chain:
    scores = block.scores
    criteria, rows = read_rubric(block.data, len(scores))
    verified = verify(criteria, rows) if rows else None
    marks = [*scores, *(score for row in rows or () for score in row)]
    issues = {
        NO_RUBRIC: verified is None,
        WEIGHTS: bool(criteria) and not abs(sum(weight for _, weight in criteria) - 100) <= 1 + 1e-9,
        SCORE_RANGE: not all(1 <= mark <= 10 for mark in marks),
        DECLARED_DIFFERS: any(
            abs(s - v) > _ROUNDING for s, v in zip(scores, verified or scores, strict=True)
        ),
        TRAILING_TEXT: trailing,
    }
    return Chain(
        analysis,
        criteria,
        scores,
        rows if verified else None,
        verified,
        tuple(name for name in ISSUES if issues[name]),
        scores,
    )
