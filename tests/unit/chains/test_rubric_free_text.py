"""Rubrics in free text are read back as they were written, or the reader states that it cannot."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgenrm_train.chains.chain import JSON_END, JSON_START, Chain, parse_chain


def read(rationale: str, n: int = 2) -> Chain:
    """The chain of a rationale, with declared scores that no test reads."""
    scores = {f"response_{i}": 5 for i in range(1, n + 1)}
    text = json.dumps({"rationale": rationale, "better_response": scores})
    chain = parse_chain(f"{JSON_START}{text}{JSON_END}", n)
    assert isinstance(chain, Chain)
    return chain


def percent(weight: float) -> str:
    return f"{weight:g}%"


# Criteria with weights, one criterion at a time, and the text between two of them.
PLAIN_LISTS = [
    (lambda name, weight: f"{name} {weight}", ", "),
    (lambda name, weight: f"{name} ({weight})", ", "),
    (lambda name, weight: f"**{name}**: {weight}", "\n"),
    (lambda name, weight: f"- {name} – {weight}", "\n"),
    (lambda name, weight: f"{name} (weight: {weight})", "; "),
    (lambda name, weight: f"{name} is weighted {weight}", ", "),
    (lambda name, weight: f"{name} {weight}", " + "),
    (lambda name, weight: f"{name} {weight}", " and "),
    (lambda name, weight: f"{weight} {name}", ", "),
    (lambda name, weight: f"{weight} for {name}", "; "),
    (lambda name, weight: f"1. **{name}** ({weight}): facts first.", " "),
    (lambda name, weight: f"* {name} [{weight}]", "\n"),
]
HARD_LISTS = [
    (lambda name, weight: f"{weight} {name}", " + "),
    (lambda name, weight: f"{weight} {name}", " and "),
    (lambda name, weight: f"| {name} | {weight} |", "\n"),
    (lambda name, weight: f"| {weight} | {name} |", "\n"),
    (lambda name, weight: f"{name}: about 3 of 10 ({weight})", ", "),
    (lambda name, weight: f"{name}: {weight.rstrip('%')} percent", ", "),
    (lambda name, weight: f"{name}: {weight.replace('.', ',')}", "; "),
    (lambda name, weight: f"{name}: -{weight}", "; "),
    (lambda name, weight: f"{name} in every place where {'long ' * 20}texts are read {weight}", ", "),
]
NO_TOTAL = [".", "", "\n"]
TOTALS = [
    " = 100%.",
    ", total 100%.",
    " (total: 100%).",
    ". Sum: 100%.",
    "; overall 100%",
    "\n**Total**: 100%",
]
HARD_TOTALS = [", all in all 100%.", "; in sum 100%", " which add to 100%.", ". Total weight = 100%"]

# The score of one criterion, and the text between two of them.
PLAIN_SCORES = [
    (lambda name, weight, score: f"{name}: {score}/10", ", "),
    (lambda name, weight, score: f"{name} {score}", ", "),
    (lambda name, weight, score: f"{name} = {score}", "; "),
    (lambda name, weight, score: f"- {name} ({score})", "\n"),
    (lambda name, weight, score: f"**{name}**: {score}/10, well done.", "\n"),
    (lambda name, weight, score: f"{name} ({percent(weight)}): {score}", ", "),
    (lambda name, weight, score: f"{name} {score} × {weight / 100:g} = {score * weight / 100:g}", "; "),
    (lambda name, weight, score: f"{name} {score} × {percent(weight)}", ", "),
    (lambda name, weight, score: f"{name} scores {score}", ", "),
    (lambda name, weight, score: f"{score}*{weight / 100:g}", " + "),
    (lambda name, weight, score: f"({weight / 100:g} × {score})", " + "),
]
HARD_SCORES = [
    (lambda name, weight, score: f"{name}: {score}/10 (weighted {score * weight / 100:g})", ", "),
    (lambda name, weight, score: f"{name}: {score}, so {name} {score * weight / 100:.1f}", ", "),
    (lambda name, weight, score: f"{name}: {score}/5", ", "),
    (lambda name, weight, score: f"{name}: {10 * score:g}%", ", "),
    (lambda name, weight, score: f"{name}: {score},5", ", "),
    (lambda name, weight, score: f"{name}: {score}-{score + 1}", ", "),
    (lambda name, weight, score: f"{name}: -{score}", ", "),
    (lambda name, weight, score: f"| {name} | {score} |", "\n"),
    (lambda name, weight, score: f"{name} 3 slips; {name}: {score}", ", "),
    (lambda name, weight, score: f"{name}: {score}, above the {name} 2 of Response 1", ". "),
]
PLAIN_NAMES = ["warm", "Formal", "data use", "quality", "Überblick", "clear language", "depth_of_facts"]
HARD_NAMES = [
    *PLAIN_NAMES,
    "data",
    "use",
    "overall",
    "Total",
    "sum",
    "response",
    "Response quality",
    "at ease",
    "short and plain",
    "data 2",
    "FORMAL",
]
WEIGHTS = st.one_of(
    st.sampled_from(
        [
            (50, 50),
            (25, 25, 50),
            (30, 20, 50),
            (25, 15, 10, 50),
            (12.5, 37.5, 50),
            (33.3, 33.3, 33.4),
            (100,),
            (40, 60),
            (1, 49, 50),
            (99, 1),
            (20, 20, 20, 40),
        ]
    ),
    st.sets(st.integers(1, 99), max_size=5).map(
        lambda cuts: tuple(b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 100]))
    ),
).flatmap(st.permutations)
SCORE = st.one_of(st.integers(1, 10), st.integers(2, 20).map(lambda half: half / 2))


@st.composite
def rubrics(draw, *, hard: bool):
    """A rubric: text, criteria, scores per response; if hard, with misleading names, styles and notes."""
    weights = draw(WEIGHTS)
    pool = HARD_NAMES if hard else PLAIN_NAMES
    names = draw(st.lists(st.sampled_from(pool), min_size=len(weights), max_size=len(weights), unique=True))
    item, join = draw(st.sampled_from([*PLAIN_LISTS, *HARD_LISTS] if hard else PLAIN_LISTS))
    total = draw(st.sampled_from([*NO_TOTAL, *TOTALS, *HARD_TOTALS] if hard else [*NO_TOTAL, *TOTALS]))
    mark, between = draw(st.sampled_from([*PLAIN_SCORES, *HARD_SCORES] if hard else PLAIN_SCORES))
    notes = st.sampled_from(["", "good facts. ", "better than the other. ", "it names 3 of 4 sources; "])
    n = draw(st.integers(2, 3))
    scores = [[draw(SCORE) for _ in weights] for _ in range(n)]
    text = join.join(item(name, percent(weight)) for name, weight in zip(names, weights)) + total
    for i, row in enumerate(scores, start=1):
        marks = between.join(mark(*values) for values in zip(names, weights, row))
        text += f"\nResponse {i}: {draw(notes)}{marks}. "
        text += draw(st.sampled_from(["", "Total: 7.5.", "Response 1 Final Score = 7.5"])) if hard else ""
    return text, tuple(zip(names, map(float, weights))), tuple(tuple(map(float, row)) for row in scores)


@settings(max_examples=400)
@given(rubrics(hard=False))
def test_every_plain_style_is_read_back(rubric):
    text, criteria, scores = rubric
    chain = read(text, len(scores))
    assert (chain.criteria, chain.criterion_scores) == (criteria, scores)


@settings(max_examples=500)
@given(rubrics(hard=True))
def test_a_misleading_rubric_is_read_back_or_not_verified(rubric):
    text, criteria, scores = rubric
    chain = read(text, len(scores))
    if chain.verified_scores is not None:
        assert [weight for _, weight in chain.criteria] == [weight for _, weight in criteria]
        assert chain.criterion_scores == scores
        if any(f"{name} {mark}" in text for name, _ in criteria for mark in (":", "=")):
            assert chain.criteria == criteria


@pytest.mark.parametrize("weights", [(25, 25, 50), (30, 20, 50), (25, 15, 10, 50), (50, 50), (50, 30, 20)])
@pytest.mark.parametrize("total", ["", " = 100%", ", total 100%", "; sum: 100%", " (overall: 100%)"])
def test_a_last_weight_that_equals_the_sum_of_the_others_is_a_criterion(weights, total):
    names = ["warm", "formal", "brief", "quality"][: len(weights)]
    listed = ", ".join(f"{name} {weight}%" for name, weight in zip(names, weights))
    marks = ", ".join(f"{name} {score}" for score, name in enumerate(names, start=2))
    chain = read(f"{listed}{total}. Response 1: {marks}. Response 2: {marks}.")
    assert chain.criteria == tuple(zip(names, weights))
    assert chain.criterion_scores == (tuple(range(2, 2 + len(names))),) * 2


@pytest.mark.parametrize(
    "text",
    [
        "warm 25%, formal 25%, total 50%. Response 1: warm 8, formal 7, total 7.5. Response 2: warm 4, "
        "formal 5, total 4.5.",
        "warm 50%, formal 50%, brief 100%. Response 1: warm 8, formal 7, brief 1. Response 2: warm 4, "
        "formal 5, brief 1.",
        "warm 33.33333%, formal 33.33333%, brief 33.3%. Response 1: brief 8. Response 2: brief 4.",
        "warm 60%, formal 40 percent. Response 1: warm 8, formal 7. Response 2: warm 4, formal 5.",
        "warm 60%, Warm 30%, formal 10%. Response 1: warm 8, formal 7. Response 2: warm 4, formal 5.",
        "warm 60%, formal 40%. Response 1: warm 8, formal 7, warm 3. Response 2: warm 4, formal 5.",
        "warm 60%, formal 40%. Response 1: warm 4/5, formal 3/5. Response 2: warm 4/5, formal 5/5.",
        "warm 60%, formal 40%. Response 1: warm: -4, formal: 3. Response 2: warm: 4, formal: 5.",
        "warm 60%, formal 40%. Response 1: warm 7,5, formal 3. Response 2: warm 4, formal 5.",
        "warm 60%, formal 40%. Response 1: warm 1e309, formal 3. Response 2: warm 4, formal 5.",
        *(
            f"warm 60%, formal 40%. Response 1: warm {score}, formal 3. Response 2: warm 4, formal 5."
            for score in ("9²", "9８", "9٣", "9٫5", "9'5")
        ),
        "warm 60%, brief, formal 40%. Response 1: warm 8, brief 1, formal 3. Response 2: warm 4, brief 9, "
        "formal 5.",
        "brief; warm: 60%; formal: 40%. Response 1: warm: 8, brief: 1, formal: 3. Response 2: warm: 4, "
        "formal: 5, brief: 9.",
        "warm 1%, Warm 1%, formal 98%. Response 1: warm 8, Warm 8, formal 3. Response 2: warm 4, formal 5.",
        "warm -60%, formal 160%. Response 1: warm 8, formal 3. Response 2: warm 4, formal 5.",
        *(
            f"warm 60%, formal {weight}. Response 1: warm 8, formal 3. Response 2: warm 4, formal 5."
            for weight in ("forty percent", "40 pct", "0.4", "٤٠%", "40％")
        ),
    ],
)
def test_what_is_unclear_is_not_verified(text):
    chain = read(text)
    assert chain.verified_scores is None and "no_rubric" in chain.issues
