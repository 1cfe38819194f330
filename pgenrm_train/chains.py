"""Evaluation chains: text → Chain | ParseFailure, the recomputed (verified) scores, and the one writer that all teachers use.

Format (METHOD §2): free analysis, `<JSON_START>`, one JSON object with `rationale` and `better_response`, `<JSON_END>`.

    verified score of response i = Σ_c w_c · s_ic / Σ_c w_c        (w: percent weights, s: 1–10 scores, both read from the rubric)

The paper takes the declared numbers on trust, though its showcase chain mis-adds them; recomputing them is *our choice*, and so
is the optional `rubric` object.  A chain that cannot be used is data (`ParseFailure`); one that can be used but is flawed carries
`issues`.  Everything runs in time linear in the text, whatever the text is: a policy under training writes anything.

A rubric is looked for in this order: the `rubric` object, the writer's own grammar, the free forms that language models write.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pgenrm_train.prompts import JSON_END, JSON_START

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

_OPEN = f'{JSON_START}{{"rationale": "'
_SCORES = '", "better_response": {"response_1": '
_CLOSE = f"}}}}{JSON_END}"
FORMAT_STRINGS = (_OPEN, ". Response 1: ", ". Response 2: ", _SCORES, ', "response_2": ', _CLOSE)
"""The writer's fixed strings for two responses; a small vocabulary holds each as one token."""

Criteria = tuple[tuple[str, float], ...]
CriterionScores = tuple[tuple[float, ...], ...]
Rubric = tuple[Criteria, CriterionScores | None]

_MAX_OBJECTS = 16  # places in a block at which a JSON object is tried; each costs one pass over the block
_MAX_CRITERIA = 32
_MAX_FREE_RATIONALE = 20_000  # characters; a longer rationale is not read as free text
_MAX_NAME = 60
_ROUNDING = 0.05 + 1e-6  # a total given to one decimal is off by at most this much


@dataclass(frozen=True, slots=True)
class Chain:
    """One usable evaluation chain.

    `criteria` are (name, weight in percent); `scores` the declared totals by response; `criterion_scores` is responses × criteria
    and `verified_scores` the totals recomputed from it, both None when no complete rubric can be read; `issues` is a subset of
    `ISSUES` in that order.
    """

    analysis: str
    criteria: Criteria
    scores: tuple[float, ...]
    criterion_scores: CriterionScores | None
    verified_scores: tuple[float, ...] | None
    issues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ParseFailure:
    """Why a text is no usable chain: `kind` is one of `FAILURE_KINDS`, `detail` one line for a person."""

    kind: str
    detail: str


def parse_chain(text: str, n_responses: int = 2) -> Chain | ParseFailure:
    """Read the last valid block of `text`; never raises on any string.

    Without a valid block, the failure of the last complete one is returned.
    """
    starts = [match.end() for match in re.finditer(JSON_START, text)]
    limits = [start - len(JSON_START) for start in starts[1:]] + [len(text)]
    spans = list(zip(starts, limits, strict=False))[::-1]
    if len(starts) > 1:
        spans.append((starts[0], len(text)))  # last resort: the markers between may stand inside a JSON string
    failure: ParseFailure | None = None
    for start, limit in spans:
        block = _read_block(text[start:limit], n_responses)
        if isinstance(block, _Block):
            trailing = bool(text[start + block.end :].strip())
            return _build_chain(text[: start - len(JSON_START)].strip(), block, trailing)
        failure = failure or block
    return failure or ParseFailure(NO_MARKERS, f"no {JSON_START} with a {JSON_END} after it")


def write_chain(
    analysis: str,
    criteria: Sequence[tuple[str, float]],
    scores: Sequence[Sequence[float]],
    notes: Sequence[str] | None = None,
) -> str:
    """The chain that every teacher writes; read back without issues if weights sum to 100 and scores lie in 1..10.

    `scores` is responses × criteria, `notes` one text a response (an empty one is left out).  Totals are the verified scores
    rounded half up to one decimal.  Raises ValueError for shapes that do not fit, numbers that are not finite, weights without a
    positive sum, and criterion names that are empty, repeated or hold one of `,;%=` or a line break.
    """
    _check_rubric(criteria, scores, notes)
    weights = [weight for _, weight in criteria]
    totals = [_half_up(weights, row) for row in scores]
    rationale = ", ".join(f"{name} {_plain(weight)}%" for name, weight in criteria)
    for i, (row, total) in enumerate(zip(scores, totals, strict=True), start=1):
        note = f"{notes[i - 1]}; " if notes and notes[i - 1] else ""
        marks = ", ".join(f"{name} {_plain(score)}" for (name, _), score in zip(criteria, row, strict=True))
        rationale += f". Response {i}: {note}{marks} = {total}"
    # A marker quoted in a note must not look like one of ours.
    escaped = json.dumps(f"{rationale}.", ensure_ascii=False)[1:-1].replace("<JSON_", "\\u003cJSON_")
    declared = totals[0] + "".join(f', "response_{i}": {total}' for i, total in enumerate(totals[1:], start=2))
    return f"{analysis}\n{_OPEN}{escaped}{_SCORES}{declared}{_CLOSE}"


# ---- writing ------------------------------------------------------------------------------------------------------------------


def _check_rubric(criteria: Sequence[tuple[str, float]], scores: Sequence[Sequence[float]], notes: Sequence[str] | None) -> None:
    names = [name for name, _ in criteria]
    if not 1 <= len(names) <= _MAX_CRITERIA or len(set(names)) != len(names):
        raise ValueError(f"criteria: expected 1 to {_MAX_CRITERIA} different names, got {names}")
    for name in names:
        if not name.strip() or re.search(r"[,;%=\n]", name):
            raise ValueError(
                f"criteria: {name!r} cannot be read back; a name is not empty and has no line break and none of , ; % ="
            )
    if not scores or any(len(row) != len(names) for row in scores):
        raise ValueError(f"scores: expected a row of {len(names)} a response, got rows of {[len(row) for row in scores]}")
    if notes and len(notes) != len(scores):
        raise ValueError(f"notes: expected {len(scores)}, one a response, got {len(notes)}")
    numbers = [weight for _, weight in criteria] + [score for row in scores for score in row]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("criteria, scores: every weight and score must be finite")
    if min(weight for _, weight in criteria) < 0 or sum(weight for _, weight in criteria) <= 0:
        raise ValueError("criteria: weights must not be negative and need a positive sum")


def _plain(number: float) -> str:
    number = float(number)
    return str(int(number)) if number.is_integer() else repr(number)


def _half_up(weights: Sequence[float], scores: Sequence[float]) -> str:
    """Σ w·s / Σ w to one decimal, half up; in fractions of the printed digits, since 5.65 has no exact binary form."""
    exact = [Fraction(_plain(weight)) for weight in weights]
    weighted = sum((w * Fraction(_plain(s)) for w, s in zip(exact, scores, strict=True)), start=Fraction(0))
    return f"{math.floor(weighted / sum(exact) * 10 + Fraction(1, 2)) / 10:.1f}"


# ---- blocks and declared scores -----------------------------------------------------------------------------------------------

# Integers are read as floats: Python refuses to convert very long ones.
_DECODER = json.JSONDecoder(strict=False, parse_int=float)
_OBJECT = re.compile(r'\{[ \t\r\n]*+["}]')
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")
_NON_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_RESPONSE_KEY = re.compile(r"\s*response[\s_]*+0*+([0-9]{1,4})\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Block:
    data: Mapping[str, Any]
    scores: tuple[float, ...]
    end: int  # just after the end marker, counted from the start of the block's body


def _read_block(body: str, n_responses: int) -> _Block | ParseFailure | None:
    """The object of one block and its declared scores; None when no end marker follows."""
    found: Mapping[str, Any] | None = None
    problem, seen, end = "", False, 0
    for _ in range(_MAX_OBJECTS):
        brace, marker = _OBJECT.search(body, end), body.find(JSON_END, end)
        if brace is None or brace.start() > marker:
            break
        try:
            value, end = _DECODER.raw_decode(body, brace.start())
        except RecursionError:
            problem = "the JSON is nested too deeply"
            break
        except ValueError as error:
            problem, end = str(error), brace.start() + 1
            continue
        seen = True
        found = value if "better_response" in value else found
    marker = body.find(JSON_END, end)
    if marker < 0:
        return None
    if found is not None:
        scores = _declared_scores(found["better_response"], n_responses)
        return scores if isinstance(scores, ParseFailure) else _Block(found, scores, marker + len(JSON_END))
    if problem or not seen:
        return ParseFailure(BAD_JSON, problem or "no JSON object between the markers")
    return ParseFailure(SCORES_MISSING, "the JSON object has no key better_response")


def _declared_scores(declared: object, n_responses: int) -> tuple[float, ...] | ParseFailure:
    if not isinstance(declared, dict):
        return ParseFailure(SCORES_MISSING, f"better_response: expected an object, got {type(declared).__name__}")
    by_index = {_response_index(key): value for key, value in declared.items()}
    expected = list(range(1, n_responses + 1))
    if len(by_index) != len(declared) or set(by_index) != set(expected):
        names = _short(list(declared))
        return ParseFailure(SCORES_COUNT, f"better_response: expected response_1..response_{n_responses}, got {names}")
    scores = [_number(by_index[i]) for i in expected]
    for i, score in zip(expected, scores, strict=True):
        if score is None:
            return ParseFailure(SCORES_NOT_NUMBERS, f"response_{i}: {_short(by_index[i])} is not a number")
    values = tuple(score for score in scores if score is not None)
    if not all(map(math.isfinite, values)):
        return ParseFailure(SCORES_NOT_FINITE, f"better_response: not every score is finite: {_short(values)}")
    return values


def _response_index(key: str) -> int | None:
    match = _RESPONSE_KEY.fullmatch(key)
    return int(match[1]) if match else None


def _number(value: object) -> float | None:
    """A JSON number, or a string that is one ("10.0", " 7 "); booleans and "7/10" are not."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if _NUMBER.fullmatch(text) or _NON_FINITE.fullmatch(text) else None
    return value if isinstance(value, float) else None


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _build_chain(analysis: str, block: _Block, trailing: bool) -> Chain:
    scores = block.scores
    criteria, rows = _read_rubric(block.data, len(scores))
    verified = _verify(criteria, rows) if rows else None
    marks = [*scores, *(score for row in rows or () for score in row)]
    found = {
        NO_RUBRIC: verified is None,
        WEIGHTS: bool(criteria) and not abs(sum(weight for _, weight in criteria) - 100) <= 1 + 1e-9,
        SCORE_RANGE: not all(1 <= mark <= 10 for mark in marks),
        DECLARED_DIFFERS: any(abs(s - v) > _ROUNDING for s, v in zip(scores, verified or scores, strict=True)),
        TRAILING_TEXT: trailing,
    }
    return Chain(analysis, criteria, scores, rows if verified else None, verified, tuple(name for name in ISSUES if found[name]))


# ---- rubric -------------------------------------------------------------------------------------------------------------------


def _verify(criteria: Criteria, rows: CriterionScores) -> tuple[float, ...] | None:
    total = sum(weight for _, weight in criteria)
    if not total > 0:
        return None
    verified = tuple(sum(w * s for (_, w), s in zip(criteria, row, strict=True)) / total for row in rows)
    return verified if all(map(math.isfinite, verified)) else None


def _read_rubric(data: Mapping[str, Any], n_responses: int) -> Rubric:
    """The first complete rubric, or else the criteria of the first reading that found any."""
    partial: Criteria = ()
    for criteria, rows in _readings(data, n_responses):
        if rows is not None:
            return criteria, rows
        partial = partial or criteria
    return partial, None


def _readings(data: Mapping[str, Any], n_responses: int) -> Iterator[Rubric]:
    yield _structured_rubric(data.get("rubric"), n_responses)
    rationale = data.get("rationale")
    if isinstance(rationale, str):
        yield _written_rubric(rationale, n_responses)
        yield _free_rubric(rationale, n_responses)


def _weight(text: object) -> float | None:
    """A criterion's weight in percent, `45`, "45" or "45%"; negative and non-finite ones are none."""
    weight = _number(text.rstrip("% ") if isinstance(text, str) else text)
    return weight if weight is not None and 0 <= weight < math.inf else None


def _structured_rubric(rubric: Any, n_responses: int) -> Rubric:
    """`{"criteria": {name: weight}, "scores": {"response_1": {name: score} or [score]}}`."""
    listed = rubric.get("criteria") if isinstance(rubric, dict) else None
    if not isinstance(listed, dict) or not 1 <= len(listed) <= _MAX_CRITERIA:
        return (), None
    weights = [_weight(value) for value in listed.values()]
    criteria = tuple((name, weight) for name, weight in zip(listed, weights, strict=True) if weight is not None)
    table = rubric.get("scores")
    if len(criteria) != len(listed) or not isinstance(table, dict):
        return (), None
    by_index = {_response_index(key): row for key, row in table.items()}
    rows = [_structured_row(by_index.get(i), criteria) for i in range(1, n_responses + 1)]
    complete = tuple(row for row in rows if row is not None)
    return criteria, complete if len(complete) == n_responses else None


def _structured_row(row: object, criteria: Criteria) -> tuple[float, ...] | None:
    if isinstance(row, dict):
        by_name = {name.strip().casefold(): score for name, score in row.items()}
        row = [by_name.get(name.strip().casefold()) for name, _ in criteria]
    if not isinstance(row, list) or len(row) != len(criteria):
        return None
    scores = tuple(score for score in map(_number, row) if score is not None and math.isfinite(score))
    return scores if len(scores) == len(criteria) else None


def _written_rubric(rationale: str, n_responses: int) -> Rubric:
    """The grammar of `write_chain`, read exactly, so that nothing in a note is taken for a score."""
    head, found, rest = rationale.partition(". Response 1: ")
    items = [item.rpartition(" ") for item in head.split(", ", _MAX_CRITERIA)]
    weights = [_weight(value) if value.endswith("%") else None for _, _, value in items]
    criteria = tuple((name, weight) for (name, _, _), weight in zip(items, weights, strict=True) if name and weight is not None)
    if not found or len(criteria) != len(items) or len(criteria) > _MAX_CRITERIA or not rest.endswith("."):
        return (), None
    names = [name for name, _ in criteria]
    reach = sum(map(len, names)) + 40 * (len(names) + 2)  # longest score line; what stands before it is a note
    rows: list[tuple[float, ...]] = []
    at = 0
    for i in range(1, n_responses + 1):
        ending = f". Response {i + 1}: "
        row, end = None, at
        for _ in range(_MAX_OBJECTS):  # a note may quote the ending
            end = rest.find(ending, end + 1) if i < n_responses else len(rest) - 1
            row = _score_line(rest[max(at, end - reach) : end], names) if end >= 0 else None
            if row is not None or end < 0 or i == n_responses:
                break
        if row is None:
            return (), None
        rows.append(row)
        at = end + len(ending)
    return criteria, tuple(rows)


def _score_line(text: str, names: Sequence[str]) -> tuple[float, ...] | None:
    """The scores of `…; name s, name s = total` at the end of `text`."""
    marks, _, total = text.rpartition(" = ")
    items = marks.rsplit(", ", len(names) - 1)
    items[0] = items[0].rpartition("; ")[2]
    parts = [item.rpartition(" ") for item in items]
    scores = tuple(score for score in (_number(value) for _, _, value in parts) if score is not None and math.isfinite(score))
    fits = [name for name, _, _ in parts] == list(names) and len(scores) == len(names) and _number(total) is not None
    return scores if fits else None


# ---- rubric in free text: every pattern is bounded, so that no text makes it backtrack far -------------------------------------

_DIGITS = r"(?:[0-9]{1,3}(?:\.[0-9]{1,4})?|\.[0-9]{1,4})(?![0-9])"
_PERCENT = re.compile(rf"(?<![0-9.])({_DIGITS})\s?%")
_MENTION = re.compile(r"\bresponse[ _#*-]{0,3}([0-9]{1,2})(?![0-9])(?P<heads>[*_\"'`)\]]{0,3}\s?[:=–—-])?", re.IGNORECASE)
_FACTORS = rf"({_DIGITS})(\s?%)?(?:\s?/\s?10(?![0-9]))?[\s)]{{0,3}}[*×x·][\s(]{{0,3}}({_DIGITS})(\s?%)?"
_PRODUCT = re.compile(rf"(?<![0-9.]){_FACTORS}")
_LEAD_IN = (  # between a criterion's name and its score: markup, its weight again, a verb
    rf"[\s*_`\"']{{0,4}}(?:[(\[][^()\[\]\n]{{0,40}}%[^()\[\]\n]{{0,10}}[)\]]|[:=–—-]?\s?{_DIGITS}\s?%)?"
    r"[\s*_`\"':=–—\-(\[]{0,8}(?:(?:scores?|gets|is|rated|earns)\s{1,2})?"
)
_MARKUP = " \t\n*_`\"'#+&-–—("
_WEIGHT_WORDS = re.compile(  # what may stand between a name and its weight
    r"(?:[\s:=(–—-]{0,4}\b(?:weight(?:ed|ing|s)?|at|is|of)|[\s:=(]{0,4}[0-9.]{1,6}(?:/10)?\s?[*×x·])[\s:=(*]{0,4}$"
)


def _free_rubric(rationale: str, n_responses: int) -> Rubric:
    """Criteria and scores as language models write them: `Accuracy (40%)`, then `Accuracy: 8/10` or `8*0.4` by response."""
    if len(rationale) > _MAX_FREE_RATIONALE:
        return (), None
    head, segments = _segments(rationale, n_responses)
    criteria = _free_criteria(head) or _free_criteria(segments[0] if segments else "")
    if not criteria:
        return (), None
    rows = [_named_scores(segment, criteria) or _product_scores(segment, criteria) for segment in segments]
    complete = tuple(row for row in rows if row)
    return criteria, complete if len(complete) == n_responses else None


def _segments(rationale: str, n_responses: int) -> tuple[str, list[str]]:
    """What stands before the first response, and what is said about each; a mention in passing does not end a segment."""
    mentions = [m for m in _MENTION.finditer(rationale) if 1 <= int(m[1]) <= n_responses]
    headings = [m for m in mentions if m["heads"]]
    if len({int(m[1]) for m in headings}) == n_responses:
        mentions = headings
    segments = [""] * n_responses
    ends = [m.start() for m in mentions[1:]] + [len(rationale)]
    for mention, end in zip(mentions, ends, strict=False):
        segments[int(mention[1]) - 1] += rationale[mention.end() : end] + "\n"
    return rationale[: mentions[0].start()] if mentions else rationale, segments


def _free_criteria(text: str) -> Criteria:
    tokens = list(_PERCENT.finditer(text))
    weights = [float(token[1]) for token in tokens]
    if len(weights) > 2 and abs(sum(weights[:-1]) - weights[-1]) <= 1:  # "… = 100%"
        tokens, weights = tokens[:-1], weights[:-1]
    if not 1 <= len(tokens) <= _MAX_CRITERIA:
        return ()
    starts, ends = [token.start() for token in tokens], [token.end() for token in tokens]
    names = [_name_before(text[begin:end]) for begin, end in zip([0, *ends], starts, strict=False)]
    if not all(names):  # "40% accuracy"
        names = [_name_after(text[begin:end]) for begin, end in zip(ends, [*starts[1:], len(text)], strict=True)]
    criteria: dict[str, tuple[str, float]] = {}
    for name, weight in zip(names, weights, strict=True):
        criteria.setdefault(name.casefold(), (name, weight))
    return tuple(criteria.values()) if all(names) else ()


def _name_before(text: str) -> str:
    """The criterion that a weight follows: the last phrase of `text`, without markup, remarks in brackets and numbering."""
    text = re.sub(r"\([^()]{0,100}\)", " ", text[-160:]).rstrip(f"{_MARKUP}:=[~")
    for _ in range(2):
        text = _WEIGHT_WORDS.sub("", text).rstrip(f"{_MARKUP}:=[~")
    return _phrase(re.split(r"[,;\n.|•:)\]]", text)[-1])


def _name_after(text: str) -> str:
    text = re.sub(r"^[\s*_:–—)\]-]{0,6}(?:(?:for|on|to)\s)?", "", text[:160])
    return _phrase(re.sub(r"\s(?:and|plus)\s?$", "", re.split(r"[,;\n.:(|]", text)[0]))


def _phrase(text: str) -> str:
    name = re.sub(r"^(?:and|with|plus)\s", "", text.strip(_MARKUP), flags=re.IGNORECASE).strip(_MARKUP)
    return name if len(name) <= _MAX_NAME and re.search(r"[^\W\d_]", name) else ""


def _named_scores(segment: str, criteria: Criteria) -> tuple[float, ...] | None:
    weights = {name.casefold(): weight for name, weight in criteria}
    names = "|".join(re.escape(name) for name, _ in sorted(criteria, key=lambda item: -len(item[0])))
    pattern = re.compile(rf"(?<!\w)({names})(?!\w){_LEAD_IN}(?:{_FACTORS}|({_DIGITS})(?!\.[0-9]|\s?%))", re.IGNORECASE)
    found: dict[str, float] = {}
    for match in pattern.finditer(segment):
        name, *factors, alone = match.groups()
        key = name.casefold()
        score = float(alone) if alone else _other_factor(factors, weights.get(key, math.nan))
        if score is not None:
            found.setdefault(key, score)
    row = tuple(found[key] for key in weights if key in found)
    return row if len(row) == len(criteria) else None


def _product_scores(segment: str, criteria: Criteria) -> tuple[float, ...] | None:
    """Scores from products in the order of the criteria, `8*0.40 + 7*0.60`; each weight must be the criterion's."""
    row: list[float] = []
    for match in _PRODUCT.finditer(segment):
        score = _other_factor(match.groups(), criteria[len(row)][1])
        if score is not None:
            row.append(score)
        if len(row) == len(criteria):
            return tuple(row)
    return None


def _other_factor(factors: Sequence[str | None], weight: float) -> float | None:
    """Of two factors (number, percent sign, number, percent sign), the one that is not the weight."""
    first, first_percent, second, second_percent = factors
    a, b = float(first or "nan"), float(second or "nan")
    if math.isclose(b if second_percent else 100 * b, weight, abs_tol=0.51):
        return a
    return b if math.isclose(a if first_percent else 100 * a, weight, abs_tol=0.51) else None
