"""Rubrics: criteria, weights and scores, read from a chain's JSON, and the totals recomputed from them.

Three readers are tried in this order: the optional `rubric` object, the writer's own grammar
(`chain.write_chain`), and the free forms that language models write (`rubric_free_text`).  Recomputing the
weighted totals is *our choice* (METHOD §2).  Time is linear in the length of the text.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pgenrm_train.chains.rubric_free_text import (
    MAX_CRITERIA,
    TOTAL,
    Criteria,
    CriterionScores,
    Rubric,
    read_free_text,
)

_MAX_QUOTED_ENDINGS = 16  # endings quoted by a note that the reader skips
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")
_NON_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_RESPONSE_KEY = re.compile(r"\s*response[\s_]*+0*+([0-9]{1,4})\s*", re.IGNORECASE)


def verify(criteria: Criteria, rows: CriterionScores) -> tuple[float, ...] | None:
    """Σ w·s / Σ w per response; None without a positive sum of weights or with an infinite total."""
    total = sum(weight for _, weight in criteria)
    if not total > 0:
        return None
    # Rounded, so that equal totals are equal whatever the order of their sums.
    verified = tuple(
        round(sum(w * s for (_, w), s in zip(criteria, row, strict=True)) / total, 10) for row in rows
    )
    return verified if all(map(math.isfinite, verified)) else None


def read_rubric(data: Mapping[str, object], n_responses: int) -> Rubric:
    """Return the first complete rubric, else the criteria of the first reader that found any."""
    partial: Criteria = ()
    for criteria, rows in _readings(data, n_responses):
        if rows is not None:
            return criteria, rows
        partial = partial or criteria
    return partial, None


def _readings(data: Mapping[str, object], n_responses: int) -> Iterator[Rubric]:
    yield _structured_rubric(data.get("rubric"), n_responses)
    rationale = data.get("rationale")
    if isinstance(rationale, str):
        yield _written_rubric(rationale, n_responses)
        yield read_free_text(rationale, n_responses)


def _weight(text: object) -> float | None:
    """A criterion's weight in percent, from 45, "45" or "45%"; None if negative or not finite."""
    weight = number(text.rstrip("% ") if isinstance(text, str) else text)
    return weight if weight is not None and 0 <= weight < math.inf else None


def _structured_rubric(rubric: object, n_responses: int) -> Rubric:
    """`{"criteria": {name: weight}, "scores": {"response_1": {name: score} or [score]}}`."""
    listed = rubric.get("criteria") if isinstance(rubric, dict) else None
    if not isinstance(listed, dict) or not 1 <= len(listed) <= MAX_CRITERIA:
        return (), None
    weights = [_weight(value) for value in listed.values()]
    criteria = tuple(
        (name, weight) for name, weight in zip(listed, weights, strict=True) if weight is not None
    )
    table = rubric.get("scores") if isinstance(rubric, dict) else None
    distinct = {name.strip().casefold() for name in listed}
    if not len(criteria) == len(listed) == len(distinct) or not isinstance(table, dict):
        return (), None
    by_index = {response_index(key): row for key, row in table.items()}
    units = {isinstance(weight, str) and "%" in weight for weight in listed.values()}
    mixed = len(units) > 1 and abs(sum(weight for _, weight in criteria) - 100) > 1  # 0.6 and "40%"
    if mixed or len(by_index) != len(table):
        return criteria, None
    rows = [_structured_row(by_index.get(i), criteria) for i in range(1, n_responses + 1)]
    complete = tuple(row for row in rows if row is not None)
    return criteria, complete if len(complete) == n_responses else None


def _structured_row(row: object, criteria: Criteria) -> tuple[float, ...] | None:
    names = [name.strip().casefold() for name, _ in criteria]
    if isinstance(row, dict):
        by_name = {name.strip().casefold(): score for name, score in row.items()}
        scored = [
            name for name in map(str.strip, row) if not TOTAL.fullmatch(name) or name.casefold() in names
        ]
        row = [by_name.get(name) for name in names] if len(scored) == len(names) else None
    if not isinstance(row, list) or len(row) != len(criteria):
        return None
    scores = tuple(score for score in map(number, row) if score is not None and math.isfinite(score))
    return scores if len(scores) == len(criteria) else None


@dataclass(frozen=True, slots=True)
class _ScoreLine:
    """Scores of one response, and where its scores and its total end; the same place without a total."""

    scores: tuple[float, ...]
    end: int
    total_end: int


def restate(rationale: str, totals: Sequence[float | None]) -> str | None:
    """The rationale with these totals at the end of its score lines; None for no total.

    Returns None for a rationale in another grammar than that of `write_chain`.
    """
    _, lines = _written_lines(rationale, len(totals))
    if not lines:
        return None
    text, start = "", 0
    for line, total in zip(lines, totals, strict=True):
        text += rationale[start : line.end] + ("" if total is None else f" = {total!r}")
        start = line.total_end
    return text + rationale[start:]


def _written_rubric(rationale: str, n_responses: int) -> Rubric:
    criteria, lines = _written_lines(rationale, n_responses)
    return criteria, tuple(line.scores for line in lines) or None


def _written_lines(rationale: str, n_responses: int) -> tuple[Criteria, Sequence[_ScoreLine]]:
    """Read the grammar of `write_chain` exactly, so that no text in a note counts as a score.

    There are no lines unless every response has one.
    """
    head, found, rest = rationale.partition(". Response 1: ")
    items = [item.rpartition(" ") for item in head.split(", ", MAX_CRITERIA)]
    weights = [_weight(value) if value.endswith("%") else None for _, _, value in items]
    criteria = tuple(
        (name, weight)
        for (name, _, _), weight in zip(items, weights, strict=True)
        if name and weight is not None
    )
    if not found or len(criteria) != len(items) or len(criteria) > MAX_CRITERIA or not rest.endswith("."):
        return (), ()
    names = [name for name, _ in criteria]
    # Without totals a last weight, or a criterion of that name, could be one.
    without_totals = abs(sum(weight for _, weight in criteria) - 100) <= 1 and not any(
        TOTAL.fullmatch(name) for name in names
    )
    # The longest score line; the text before it is a note.
    reach = sum(map(len, names)) + 40 * (len(names) + 2)
    lines: list[_ScoreLine] = []
    at, offset = 0, len(head) + len(found)
    for i in range(1, n_responses + 1):
        ending = f". Response {i + 1}: "
        line, end = None, at
        for _ in range(_MAX_QUOTED_ENDINGS):  # a note may quote the ending
            end = rest.find(ending, end + 1) if i < n_responses else len(rest) - 1
            text = rest[max(at, end - reach) : end]
            line = _score_line(text, names, offset + end, without_totals) if end >= 0 else None
            if line is not None or end < 0 or i == n_responses:
                break
        if line is None:
            return (), ()
        lines.append(line)
        at = end + len(ending)
    return criteria, lines


def _score_line(text: str, names: Sequence[str], end: int, without_total: bool) -> _ScoreLine | None:
    """The line `…; name s, name s = total` at the end of `text`, or one without a total.

    `end`: the place of that end in the rationale.
    """
    marks, equals, total = text.rpartition(" = ")
    if equals and number(total) is not None:
        scores = _scores_at_end(marks, names)
        return None if scores is None else _ScoreLine(scores, end - len(text) + len(marks), end)
    scores = _scores_at_end(text, names) if without_total else None
    return None if scores is None else _ScoreLine(scores, end, end)


def _scores_at_end(text: str, names: Sequence[str]) -> tuple[float, ...] | None:
    items = text.rsplit(", ", len(names) - 1)
    items[0] = items[0].rpartition("; ")[2]
    parts = [item.rpartition(" ") for item in items]
    scores = tuple(
        score
        for score in (number(value) for _, _, value in parts)
        if score is not None and math.isfinite(score)
    )
    fits = [name for name, _, _ in parts] == list(names) and len(scores) == len(names)
    return scores if fits else None


def response_index(key: str) -> int | None:
    """The number in a key like `response_1`; None for other keys."""
    match = _RESPONSE_KEY.fullmatch(key)
    return int(match[1]) if match else None


def number(value: object) -> float | None:
    """A JSON number, or a string that holds one ("10.0", " 7 "); None for booleans and "7/10"."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if _NUMBER.fullmatch(text) or _NON_FINITE.fullmatch(text) else None
    return value if isinstance(value, float) else None
