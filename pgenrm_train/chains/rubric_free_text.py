"""Rubrics in free text: criteria, weights and scores as language models write them.

A text is read only where it is clear.  Unclear are a weight that no criterion owns, two scores of one
criterion, weights that do not sum to 100, and a last weight that may be a criterion or the sum of the others.
An unclear rubric has no scores: better none than false ones.  Every pattern is bounded, so that no text makes
it backtrack far and time is linear in the length of the text.
"""

import math
import re
from collections.abc import Iterable, Sequence

Criteria = tuple[tuple[str, float], ...]
CriterionScores = tuple[tuple[float, ...], ...]
Rubric = tuple[Criteria, CriterionScores | None]

MAX_CRITERIA = 32
_MAX_RATIONALE = 20_000  # characters; longer rationales are not read
_MAX_NAME = 60
_MAX_GAP = 160  # characters next to a weight in which its name is searched
_MAX_WEIGHT_WORDS = 24  # characters of the words between a name and its weight
_ROUNDING = 1.0 + 1e-9  # weights in percent may miss their sum by this much

_POSITIVE = r"(?<![:=(]-)(?<![:=(]\s-)"  # "quality: -3" is no score of 3
_DIGITS = r"(?:[0-9]{1,3}(?:\.[0-9]{1,4})?|\.[0-9]{1,4})(?!\d|[¹²³⁰⁴-⁹]|[٫٬'’]\d|e[+-]?\d)"  # "1e309" is no 1
_PERCENT = re.compile(rf"(?<![0-9.])(?<![0-9],){_POSITIVE}({_DIGITS})\s?%")
_ANY_PERCENT = re.compile(r"[0-9]\s?(?:%|per\s?cent\b)", re.IGNORECASE)
MENTION = re.compile(
    r"\bresponse[ _#*-]{0,3}([0-9]{1,2})(?![0-9])(?P<heads>[*_\"'`)\]]{0,3}\s?[:=–—-])?", re.IGNORECASE
)
_FACTORS = rf"({_DIGITS})(\s?%)?(?:\s?/\s?10(?![0-9]))?[\s)]{{0,3}}[*×x·][\s(]{{0,3}}({_DIGITS})(\s?%)?"
_PRODUCT = re.compile(rf"(?<![0-9.]){_FACTORS}")
_LEAD_IN = (  # between a criterion's name and its score: markup, its weight again, a verb
    rf"[\s*_`\"']{{0,4}}(?:[(\[][^()\[\]\n]{{0,40}}%[^()\[\]\n]{{0,10}}[)\]]|[:=–—-]?\s?{_DIGITS}\s?%)?"
    r"[\s*_`\"':=–—\-(\[]{0,8}(?:(?:scores?|gets|is|rated|earns)\s{1,2})?"
)
# A score out of 10: no percentage, no range, no decimal comma, no other scale.
_ALONE = rf"{_POSITIVE}({_DIGITS})(?!\.[0-9]|\s?%|[-–,][0-9]|\s?/\s?(?!10(?![0-9]))[0-9])"
_SCORE = re.compile(rf"{_LEAD_IN}(?:{_FACTORS}|{_ALONE})", re.IGNORECASE)
_MARKUP = " \t\n*_`\"'#+&-–—("
_NAME_END = f"{_MARKUP}:=[~"
_REMARK = re.compile(r"\([^()]{0,100}\)")
_BREAK_BEFORE = re.compile(r"[,;\n.|•:)\]]")
_BREAK_AFTER = re.compile(r"[,;\n.:(|]")
_LEAD_TO_NAME = re.compile(r"^[\s*_:–—)\]-]{0,6}(?:(?:for|on|to)\s)?")
_TRAILING_AND = re.compile(r"\s(?:and|plus)\s?$")
_LEADING_AND = re.compile(r"^(?:and|with|plus)\s", re.IGNORECASE)
_LETTER = re.compile(r"[^\W\d_]")
TOTAL = re.compile(r"(?:the\s)?(?:grand\s)?(?:total|sum|overall)(?:\sweights?)?", re.IGNORECASE)
_NO_CRITERION = re.compile(r"[0-9]|\b(?:total|sum|overall|scor(?:e|es|ing)|weights?)\b", re.IGNORECASE)
_WEIGHT_WORDS = re.compile(  # between a name and its weight
    r"(?:[\s:=(–—-]{0,4}\b(?:weight(?:ed|ing|s)?|at|is|of)|[\s:=(]{0,4}[0-9.]{1,6}(?:/10)?\s?[*×x·])"
    r"[\s:=(*]{0,4}$"
)


def read_free_text(rationale: str, n_responses: int) -> Rubric:
    """Read `Accuracy (40%)`, then `Accuracy: 8/10` or `8*0.4` per response; scores are None where unclear."""
    if len(rationale) > _MAX_RATIONALE:
        return (), None
    head, segments = _segments(rationale, n_responses)
    readings = _criteria(head) or _criteria("".join(segments[:1]))
    scored = [(criteria, _scores(segments, criteria)) for criteria in readings]
    complete = [rubric for rubric in scored if rubric[1] is not None]
    # With another sum a weight may have gone unseen, such as one in words or with another sign.
    if len(complete) == 1 and _near(_whole(complete[0][0]), 100):
        criteria, _ = complete[0]
        if not any(_scores_by_name(segments, name) for name in _without_weight(head, criteria)):
            return complete[0]
    return (readings[0] if readings else ()), None


def _without_weight(head: str, criteria: Criteria) -> list[str]:
    """Phrases next to the criteria that are none of them: a scored one is a criterion without a weight."""
    known = {name.casefold() for name, _ in criteria}
    phrases = [_phrase(part) for part in _BREAK_BEFORE.split(head, 2 * MAX_CRITERIA)]
    return [
        phrase
        for phrase in phrases
        if phrase and phrase.casefold() not in known and not _NO_CRITERION.search(phrase)
    ]


def _scores_by_name(segments: Sequence[str], name: str) -> bool:
    """Whether the text on each response scores `name`."""
    return all(_named_scores(segment, ((name, 0.0),)) for segment in segments)


def _segments(rationale: str, n_responses: int) -> tuple[str, list[str]]:
    """Split at the responses: the text before the first, then one text per response.

    Where each response has a heading, other mentions of responses do not end a segment.
    """
    mentions = [m for m in MENTION.finditer(rationale) if 1 <= int(m[1]) <= n_responses]
    headings = [m for m in mentions if m["heads"]]
    if len({int(m[1]) for m in headings}) == n_responses:
        mentions = headings
    segments = [""] * n_responses
    ends = [m.start() for m in mentions[1:]] + [len(rationale)]
    for mention, end in zip(mentions, ends, strict=False):
        segments[int(mention[1]) - 1] += rationale[mention.end() : end] + "\n"
    return rationale[: mentions[0].start()] if mentions else rationale, segments


def _criteria(text: str) -> list[Criteria]:
    """The possible readings of `text` as criteria with weights; none where a percentage is not understood."""
    tokens = list(_PERCENT.finditer(text))
    if not tokens or len(tokens) != len(_ANY_PERCENT.findall(text)):
        return []
    starts, ends = [token.start() for token in tokens], [token.end() for token in tokens]
    weights = [float(token[1]) for token in tokens]
    before = [_name_before(text[begin:end]) for begin, end in zip([0, *ends], starts, strict=False)]
    if readings := _readings(before, weights):
        return readings
    gaps = zip(ends, [*starts[1:], len(text)], strict=True)  # "40% accuracy"
    return _readings([_name_after(text[begin:end]) for begin, end in gaps], weights)


def _readings(names: Sequence[str | None], weights: Sequence[float]) -> list[Criteria]:
    """The criteria of names and weights, without a stated sum.

    Two readings if the last weight may be a criterion or the sum.

    A sum is named as such and is 100, or it is the last weight and has no name.
    """
    distinct: dict[str, tuple[str, float]] = {}
    for name, weight in zip(names, weights, strict=True):
        if name is None or distinct.setdefault(name.casefold(), (name, weight))[1] != weight:
            return []
    criteria = [criterion for criterion in distinct.values() if not TOTAL.fullmatch(criterion[0])]
    sums = [weight for name, weight in distinct.values() if TOTAL.fullmatch(name)]
    if not criteria or (
        sums and not (len(sums) == 1 and _near(sums[0], 100) and _near(_whole(criteria), 100))
    ):
        return []
    *others, (name, weight) = criteria
    is_sum = len(others) > 0 and _near(weight, _whole(others))
    if not name:
        readings = [others] if is_sum and not _near(_whole(criteria), 100) else []
    else:
        readings = [others, criteria] if is_sum and len(others) > 1 and _near(weight, 100) else [criteria]
    repeats = len(distinct) < len(weights)  # a list stated twice is complete, so that its weights sum to 100
    if repeats and _near(sum(weights) - sum(sums), 100):
        return []  # or two criteria whose names differ in case
    return [
        tuple(reading)
        for reading in readings
        if len(reading) <= MAX_CRITERIA
        and all(name for name, _ in reading)
        and (not repeats or _near(_whole(reading), 100))
    ]


def _whole(criteria: Iterable[tuple[str, float]]) -> float:
    return sum(weight for _, weight in criteria)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= _ROUNDING


def _name_before(text: str) -> str | None:
    """The criterion before a weight: the last phrase of `text`, without markup, remarks and numbering.

    Empty if there is none; None if it is too long for a name, or if a score after it would look like a
    heading.
    """
    text = _REMARK.sub(" ", text[-_MAX_GAP:]).rstrip(_NAME_END)
    for _ in range(2):
        words = _WEIGHT_WORDS.search(text, max(0, len(text) - _MAX_WEIGHT_WORDS))
        if words is None:
            break
        text = text[: words.start()].rstrip(_NAME_END)
    return _phrase(_BREAK_BEFORE.split(text)[-1])


def _name_after(text: str) -> str | None:
    """The criterion after a weight: the first phrase of `text`; empty or None as for `_name_before`."""
    text = _LEAD_TO_NAME.sub("", text[:_MAX_GAP])
    return _phrase(_TRAILING_AND.sub("", _BREAK_AFTER.split(text)[0].rstrip(_NAME_END)))


def _phrase(text: str) -> str | None:
    name = _LEADING_AND.sub("", text.strip(_MARKUP)).strip(_MARKUP)
    if len(name) > _MAX_NAME or name.lower().endswith("response"):
        return None
    return name if _LETTER.search(name) else ""


def _scores(segments: Iterable[str], criteria: Criteria) -> CriterionScores | None:
    """Scores per response and criterion; None where one is missing or unclear."""
    rows = [_named_scores(segment, criteria) or _product_scores(segment, criteria) for segment in segments]
    complete = tuple(row for row in rows if row)
    return complete if len(complete) == len(rows) else None


def _named_scores(segment: str, criteria: Criteria) -> tuple[float, ...] | None:
    """Scores that follow the criteria's names; None where one is missing or two differ.

    A later number may be the weighted score.  Of names that begin at one place, the longest that has a score
    counts. Names are found as plain text: a pattern per chain would cost more than all the rest.
    """
    scores: dict[int, float] = {}
    end = 0
    for start, minus_length, index in _mentions_of([name for name, _ in criteria], segment):
        match = _SCORE.match(segment, start - minus_length) if start >= end else None
        if match is None:
            continue
        end = match.end()
        *factors, alone = match.groups()
        weight = criteria[index][1]
        score = float(alone) if alone else _other_factor(factors, weight)
        if score is None:
            continue
        first = scores.setdefault(index, score)
        if score != first and not math.isclose(score, first * weight / 100, abs_tol=0.06):
            return None
    return tuple(scores[index] for index in range(len(criteria))) if len(scores) == len(criteria) else None


def _mentions_of(names: Sequence[str], text: str) -> list[tuple[int, int, int]]:
    """(start, −length, name's index) of all mentions as full words in any case, by place, longest first."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a letter whose lower case is two characters would shift every place
        lowered = text
    mentions = []
    for index, name in enumerate(name.lower() for name in names):
        start = lowered.find(name)
        while start >= 0:
            end = start + len(name)
            if not (_in_word(lowered[start - 1 : start]) or _in_word(lowered[end : end + 1])):
                mentions.append((start, -len(name), index))
            start = lowered.find(name, start + 1)
    return sorted(mentions)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _product_scores(segment: str, criteria: Criteria) -> tuple[float, ...] | None:
    """Scores from products in the order of the criteria, `8*0.40 + 7*0.60`, by their weights."""
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
