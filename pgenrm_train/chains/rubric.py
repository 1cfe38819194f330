"""Rubrics: criteria, weights and per-criterion scores, read from a chain's JSON, and the totals recomputed from them.

A rubric is looked for in this order: the optional `rubric` object, the writer's own grammar (`chains.write_chain`), the free forms
that language models write.  Recomputing the weighted totals is *our choice* (METHOD §2).  Every pattern is bounded, so that no text
makes it backtrack far: time is linear in the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Criteria = tuple[tuple[str, float], ...]
CriterionScores = tuple[tuple[float, ...], ...]
Rubric = tuple[Criteria, CriterionScores | None]

MAX_CRITERIA = 32
MAX_QUOTED_ENDINGS = 16  # endings quoted by a note that are passed over
_MAX_FREE_RATIONALE = 20_000  # characters; a longer rationale is not read as free text
_MAX_NAME = 60
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")
_NON_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_RESPONSE_KEY = re.compile(r"\s*response[\s_]*+0*+([0-9]{1,4})\s*", re.IGNORECASE)


def verify(criteria: Criteria, rows: CriterionScores) -> tuple[float, ...] | None:
    total = sum(weight for _, weight in criteria)
    if not total > 0:
        return None
    verified = tuple(sum(w * s for (_, w), s in zip(criteria, row, strict=True)) / total for row in rows)
    return verified if all(map(math.isfinite, verified)) else None


def read_rubric(data: Mapping[str, Any], n_responses: int) -> Rubric:
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
    weight = number(text.rstrip("% ") if isinstance(text, str) else text)
    return weight if weight is not None and 0 <= weight < math.inf else None


def _structured_rubric(rubric: Any, n_responses: int) -> Rubric:
    """`{"criteria": {name: weight}, "scores": {"response_1": {name: score} or [score]}}`."""
    listed = rubric.get("criteria") if isinstance(rubric, dict) else None
    if not isinstance(listed, dict) or not 1 <= len(listed) <= MAX_CRITERIA:
        return (), None
    weights = [_weight(value) for value in listed.values()]
    criteria = tuple(
        (name, weight) for name, weight in zip(listed, weights, strict=True) if weight is not None
    )
    table = rubric.get("scores")
    if len(criteria) != len(listed) or not isinstance(table, dict):
        return (), None
    by_index = {response_index(key): row for key, row in table.items()}
    rows = [_structured_row(by_index.get(i), criteria) for i in range(1, n_responses + 1)]
    complete = tuple(row for row in rows if row is not None)
    return criteria, complete if len(complete) == n_responses else None


def _structured_row(row: object, criteria: Criteria) -> tuple[float, ...] | None:
    if isinstance(row, dict):
        by_name = {name.strip().casefold(): score for name, score in row.items()}
        row = [by_name.get(name.strip().casefold()) for name, _ in criteria]
    if not isinstance(row, list) or len(row) != len(criteria):
        return None
    scores = tuple(score for score in map(number, row) if score is not None and math.isfinite(score))
    return scores if len(scores) == len(criteria) else None


def _written_rubric(rationale: str, n_responses: int) -> Rubric:
    """The grammar of `write_chain`, read exactly, so that nothing in a note is taken for a score."""
    head, found, rest = rationale.partition(". Response 1: ")
    items = [item.rpartition(" ") for item in head.split(", ", MAX_CRITERIA)]
    weights = [_weight(value) if value.endswith("%") else None for _, _, value in items]
    criteria = tuple(
        (name, weight)
        for (name, _, _), weight in zip(items, weights, strict=True)
        if name and weight is not None
    )
    if not found or len(criteria) != len(items) or len(criteria) > MAX_CRITERIA or not rest.endswith("."):
        return (), None
    names = [name for name, _ in criteria]
    reach = sum(map(len, names)) + 40 * (
        len(names) + 2
    )  # longest score line; what stands before it is a note
    rows: list[tuple[float, ...]] = []
    at = 0
    for i in range(1, n_responses + 1):
        ending = f". Response {i + 1}: "
        row, end = None, at
        for _ in range(MAX_QUOTED_ENDINGS):  # a note may quote the ending
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
    scores = tuple(
        score
        for score in (number(value) for _, _, value in parts)
        if score is not None and math.isfinite(score)
    )
    fits = (
        [name for name, _, _ in parts] == list(names)
        and len(scores) == len(names)
        and number(total) is not None
    )
    return scores if fits else None


# ---- rubric in free text: every pattern is bounded, so that no text makes it backtrack far -------------------------------------

_DIGITS = r"(?:[0-9]{1,3}(?:\.[0-9]{1,4})?|\.[0-9]{1,4})(?![0-9])"
_PERCENT = re.compile(rf"(?<![0-9.])({_DIGITS})\s?%")
_MENTION = re.compile(
    r"\bresponse[ _#*-]{0,3}([0-9]{1,2})(?![0-9])(?P<heads>[*_\"'`)\]]{0,3}\s?[:=–—-])?", re.IGNORECASE
)
_FACTORS = rf"({_DIGITS})(\s?%)?(?:\s?/\s?10(?![0-9]))?[\s)]{{0,3}}[*×x·][\s(]{{0,3}}({_DIGITS})(\s?%)?"
_PRODUCT = re.compile(rf"(?<![0-9.]){_FACTORS}")
_LEAD_IN = (  # between a criterion's name and its score: markup, its weight again, a verb
    rf"[\s*_`\"']{{0,4}}(?:[(\[][^()\[\]\n]{{0,40}}%[^()\[\]\n]{{0,10}}[)\]]|[:=–—-]?\s?{_DIGITS}\s?%)?"
    r"[\s*_`\"':=–—\-(\[]{0,8}(?:(?:scores?|gets|is|rated|earns)\s{1,2})?"
)
_MAX_WEIGHT_WORDS = 24  # characters that they span at most
_SCORE = re.compile(rf"{_LEAD_IN}(?:{_FACTORS}|({_DIGITS})(?!\.[0-9]|\s?%))", re.IGNORECASE)
_MARKUP = " \t\n*_`\"'#+&-–—("
_NAME_END = f"{_MARKUP}:=[~"
_REMARK = re.compile(r"\([^()]{0,100}\)")
_BREAK_BEFORE = re.compile(r"[,;\n.|•:)\]]")
_BREAK_AFTER = re.compile(r"[,;\n.:(|]")
_LEAD_TO_NAME = re.compile(r"^[\s*_:–—)\]-]{0,6}(?:(?:for|on|to)\s)?")
_TRAILING_AND = re.compile(r"\s(?:and|plus)\s?$")
_LEADING_AND = re.compile(r"^(?:and|with|plus)\s", re.IGNORECASE)
_LETTER = re.compile(r"[^\W\d_]")
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
    if not 1 <= len(tokens) <= MAX_CRITERIA:
        return ()
    starts, ends = [token.start() for token in tokens], [token.end() for token in tokens]
    names = [_name_before(text[begin:end]) for begin, end in zip([0, *ends], starts, strict=False)]
    if not all(names):  # "40% accuracy"
        names = [
            _name_after(text[begin:end]) for begin, end in zip(ends, [*starts[1:], len(text)], strict=True)
        ]
    criteria: dict[str, tuple[str, float]] = {}
    for name, weight in zip(names, weights, strict=True):
        criteria.setdefault(name.casefold(), (name, weight))
    return tuple(criteria.values()) if all(names) else ()


def _name_before(text: str) -> str:
    """The criterion that a weight follows: the last phrase of `text`, without markup, remarks in brackets and numbering."""
    text = _REMARK.sub(" ", text[-160:]).rstrip(_NAME_END)
    for _ in range(2):
        words = _WEIGHT_WORDS.search(text, max(0, len(text) - _MAX_WEIGHT_WORDS))
        if words is None:
            break
        text = text[: words.start()].rstrip(_NAME_END)
    return _phrase(_BREAK_BEFORE.split(text)[-1])


def _name_after(text: str) -> str:
    text = _LEAD_TO_NAME.sub("", text[:160])
    return _phrase(_TRAILING_AND.sub("", _BREAK_AFTER.split(text)[0]))


def _phrase(text: str) -> str:
    name = _LEADING_AND.sub("", text.strip(_MARKUP)).strip(_MARKUP)
    return name if len(name) <= _MAX_NAME and _LETTER.search(name) else ""


def _named_scores(segment: str, criteria: Criteria) -> tuple[float, ...] | None:
    """Scores that follow the criteria's names, the first of each; of names that begin at one place the longest that has a score.

    Names are found as plain text: a pattern compiled for each chain's names would cost more than all the rest.
    """
    found: dict[int, float] = {}
    end = 0
    for start, minus_length, index in _mentions_of([name for name, _ in criteria], segment):
        match = _SCORE.match(segment, start - minus_length) if start >= end else None
        if match is None:
            continue
        end = match.end()
        *factors, alone = match.groups()
        score = float(alone) if alone else _other_factor(factors, criteria[index][1])
        if score is not None:
            found.setdefault(index, score)
    return tuple(found[index] for index in range(len(criteria))) if len(found) == len(criteria) else None


def _mentions_of(names: Sequence[str], text: str) -> list[tuple[int, int, int]]:
    """(start, −length, index of the name) of every whole-word mention in any case, by place and the longest name first."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a letter whose lower case is two characters would shift every place
        lowered = text
    found = []
    for index, name in enumerate(name.lower() for name in names):
        start = lowered.find(name)
        while start >= 0:
            if not (
                _in_word(lowered[start - 1 : start])
                or _in_word(lowered[start + len(name) : start + len(name) + 1])
            ):
                found.append((start, -len(name), index))
            start = lowered.find(name, start + 1)
    return sorted(found)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


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


def response_index(key: str) -> int | None:
    match = _RESPONSE_KEY.fullmatch(key)
    return int(match[1]) if match else None


def number(value: object) -> float | None:
    """A JSON number, or a string that is one ("10.0", " 7 "); booleans and "7/10" are not."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if _NUMBER.fullmatch(text) or _NON_FINITE.fullmatch(text) else None
    return value if isinstance(value, float) else None
