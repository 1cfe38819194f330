"""Chains: reading, failures by kind, recomputed scores, and one pass over any text."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgenrm_train.chains.chain import (
    FAILURE_KINDS,
    FORMAT_STRINGS,
    ISSUES,
    JSON_END,
    JSON_START,
    Chain,
    ParseFailure,
    parse_chain,
    write_chain,
)

RATIONALE = "formal 60%, brief 40%. Response 1: formal 8, brief 5 = 6.8. Response 2: formal 3, brief 6 = 4.2."
GOOD = {"rationale": RATIONALE, "better_response": {"response_1": 6.8, "response_2": 4.2}}


def block(value, before="analysis\n", after="") -> str:
    body = value if isinstance(value, str) else json.dumps(value)
    return f"{before}{JSON_START}{body}{JSON_END}{after}"


def scored(first, second, **more) -> str:
    return block({"rationale": "", "better_response": {"response_1": first, "response_2": second}, **more})


def rationale(text: str, first=6.8, second=4.2, **more) -> Chain:
    chain = parse_chain(scored(first, second, **{"rationale": text, **more}))
    assert isinstance(chain, Chain)
    return chain


def kind(text: str, n: int = 2) -> str:
    failure = parse_chain(text, n)
    assert isinstance(failure, ParseFailure) and failure.detail and "\n" not in failure.detail, failure
    return failure.kind


# ---- the writer --------------------------------------------------------------------------------------------


def test_the_writer_gives_exactly_this():
    criteria = [("formal", 45), ("cautious", 30), ("quality", 25.0)]
    text = write_chain("They like it formal.", criteria, [[8, 5, 8], [3, 6, 4]], ["formal data good", ""])
    assert text == (
        'They like it formal.\n<JSON_START>{"rationale": "formal 45%, cautious 30%, quality 25%. '
        "Response 1: formal data good; formal 8, cautious 5, quality 8 = 7.1. "
        'Response 2: formal 3, cautious 6, quality 4 = 4.2.", '
        '"better_response": {"response_1": 7.1, "response_2": 4.2}}<JSON_END>'
    )
    assert all(part in text for part in FORMAT_STRINGS)
    chain = parse_chain(text)
    assert chain.issues == () and chain.analysis == "They like it formal."
    assert chain.criteria == (("formal", 45.0), ("cautious", 30.0), ("quality", 25.0))
    assert chain.criterion_scores == ((8, 5, 8), (3, 6, 4))
    assert chain.verified_scores == pytest.approx((7.1, 4.15))


def test_totals_round_half_up():
    assert '"response_1": 5.7, "response_2": 8.1}' in write_chain(
        "", [("a", 65), ("b", 35)], [[6, 5], [8, 8.25]]
    )


NAMES = st.text(alphabet="abdresponRS -", min_size=1, max_size=8).filter(str.strip)
WORDS = st.sampled_from(
    [
        "formal",
        "data",
        "data use",
        "data 8",
        "; ",
        ", ",
        " = 7.",
        "Response 2",
        "40%",
        '"',
        "\\",
        "<JSON_END>",
        "<JSON_START>",
        "9 ",
        "é\n",
    ]
)
NOTES = st.one_of(st.text(max_size=20), st.lists(WORDS, max_size=6).map(" ".join))


@settings(max_examples=300)
@given(st.data())
def test_what_is_written_is_read_back(data):
    fixed = st.sampled_from(
        [["data", "data use"], ["data use", "data", "use"], ["formal", "data"], ["Response", "response"]]
    )
    names = data.draw(st.one_of(fixed, st.lists(NAMES, min_size=1, max_size=5, unique=True)))
    cuts = sorted(data.draw(st.lists(st.integers(0, 100), min_size=len(names) - 1, max_size=len(names) - 1)))
    weights = [float(b - a) for a, b in zip([0, *cuts], [*cuts, 100])]
    n = data.draw(st.integers(2, 5))
    score = st.one_of(st.integers(1, 10), st.floats(1, 10)).map(float)
    scores = data.draw(
        st.lists(st.lists(score, min_size=len(names), max_size=len(names)), min_size=n, max_size=n)
    )
    notes = data.draw(st.one_of(st.none(), st.lists(NOTES, min_size=n, max_size=n)))
    analysis = data.draw(st.text(max_size=40))
    chain = parse_chain(write_chain(analysis, list(zip(names, weights)), scores, notes), n)
    assert isinstance(chain, Chain)
    assert chain.issues == ()
    assert chain.analysis == analysis.strip()
    assert chain.criteria == tuple(zip(names, weights))
    assert chain.criterion_scores == tuple(map(tuple, scores))
    assert all(abs(s - v) <= 0.05 + 1e-6 for s, v in zip(chain.scores, chain.verified_scores))


@pytest.mark.parametrize(
    ("criteria", "scores", "notes"),
    [
        ([], [[], []], None),
        ([("a", 50), ("a", 50)], [[1, 2], [3, 4]], None),
        ([("a, b", 100)], [[1], [2]], None),
        ([(" ", 100)], [[1], [2]], None),
        ([("a", 100)], [[1, 2], [3]], None),
        ([("a", 100)], [], None),
        ([("a", 100)], [[1], [2]], ["one"]),
        ([("a", 0)], [[1], [2]], None),
        ([("a", 110), ("b", -10)], [[1, 1], [2, 2]], None),
        ([("a", 100)], [[math.nan], [2]], None),
        ([("a", math.inf)], [[1], [2]], None),
    ],
)
def test_the_writer_refuses_what_cannot_be_read_back(criteria, scores, notes):
    with pytest.raises(ValueError, match=r"criteria|scores|notes"):
        write_chain("", criteria, scores, notes)


# ---- what is tolerated, what fails -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        block(GOOD),
        block("```json\n" + json.dumps(GOOD, indent=2) + "\n```"),
        block("Here {as asked} it is:\n" + json.dumps(GOOD) + "\nThat was all."),
        block("{" + json.dumps(GOOD) + "}"),
        block(json.dumps(GOOD).replace("Response 2", "\nResponse 2")).replace("6.8}", "6.8 }"),
        scored("6.8", " 4.2 ", rationale=RATIONALE),
        block({"rationale": RATIONALE, "better_response": {"Response 1": 6.8, "RESPONSE_2": 4.2}}),
        block({"rationale": RATIONALE, "better_response": {"response_2": 4.2, "response_1": 6.8}}),
        block({**GOOD, "extra": {"nested": [{"deep": "}"}]}, "größe": "日本 😀"}),
        block(GOOD, before=f"I shall write {JSON_START} and {JSON_END}. "),
        block({**GOOD, "extra": f"ends with {JSON_END} and {JSON_START} here"}),
    ],
)
def test_what_is_tolerated(text):
    chain = parse_chain(text)
    assert isinstance(chain, Chain), chain
    assert chain.scores == (6.8, 4.2)
    assert chain.criterion_scores == ((8, 5), (3, 6))
    assert chain.issues == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no_markers"),
        (json.dumps(GOOD), "no_markers"),
        (JSON_START + json.dumps(GOOD), "no_markers"),
        (json.dumps(GOOD) + JSON_END, "no_markers"),
        (JSON_END + json.dumps(GOOD) + JSON_START, "no_markers"),
        (block(""), "bad_json"),
        (block("[1, 2]"), "bad_json"),
        (block('{"better_response": {"response_1": 1,, "response_2": 2}}'), "bad_json"),
        (block('{"a": ' * 100_000), "bad_json"),
        (block('{"a":' + "[" * 100_000), "bad_json"),
        (block({}), "scores_missing"),
        (block({"rationale": "x"}), "scores_missing"),
        (block({"better_response": [8, 7]}), "scores_missing"),
        (block({"better_response": None}), "scores_missing"),
        (block({"better_response": 1}), "scores_missing"),
        (block({"better_response": {}}), "scores_count"),
        (block({"better_response": {"response_1": 8}}), "scores_count"),
        (block({"better_response": {"response_1": 8, "response_3": 7}}), "scores_count"),
        (block({"better_response": {"response_1": 8, "response_2": 7, "winner": 1}}), "scores_count"),
        (block({"better_response": {"response_1": 8, "Response 1": 7}}), "scores_count"),
        (block({"better_response": {"response_1": 8, "Response 1": 7, "response_2": 3}}), "scores_count"),
        (scored(True, False), "scores_not_numbers"),
        (scored("7/10", 3), "scores_not_numbers"),
        (scored("1_0", 3), "scores_not_numbers"),
        (scored("", 3), "scores_not_numbers"),
        (scored("٧", 3), "scores_not_numbers"),
        (scored(None, 3), "scores_not_numbers"),
        (scored([8], 3), "scores_not_numbers"),
        (scored(math.nan, 3), "scores_not_finite"),
        (scored(3, -math.inf), "scores_not_finite"),
        (scored("nan", 3), "scores_not_finite"),
        (scored("1e999", 3), "scores_not_finite"),
        (
            block('{"better_response": {"response_1": ' + "9" * 5000 + ', "response_2": 2}}'),
            "scores_not_finite",
        ),
    ],
)
def test_failures_by_kind(text, expected):
    assert kind(text) == expected


def test_the_wrong_number_of_responses_is_a_failure():
    text = write_chain("", [("a", 100)], [[1], [2], [3]])
    assert parse_chain(text, 3).scores == (1, 2, 3)
    assert kind(text, 2) == kind(text, 4) == "scores_count"


def test_a_huge_integer_elsewhere_does_no_harm():
    assert parse_chain(block('{"seed": ' + "9" * 10_000 + ", " + json.dumps(GOOD)[1:])).issues == ()


def test_the_last_valid_block_counts():
    first, second, broken = scored(1, 2), scored(3, 4), block("{broken")
    assert parse_chain(first + second).scores == (3, 4)
    assert parse_chain(first + "\n").issues == ("no_rubric",)
    chain = parse_chain(first + second + broken)
    assert chain.scores == (3, 4) and "trailing_text" in chain.issues
    assert parse_chain(second + JSON_START + "{").scores == (3, 4)
    assert kind(block({"better_response": 1}) + broken) == "bad_json"
    assert kind(broken + block({"better_response": 1}) + JSON_START) == "scores_missing"


def test_analysis_is_the_text_before_the_used_block():
    assert parse_chain(block(GOOD, before="\n a persona \n\n")).analysis == "a persona"
    assert parse_chain(block(GOOD, before="draft " + scored(1, 2) + " again ")).analysis.endswith("again")


def test_scores_as_strings_are_numbers():
    """Defect of the released code (METHOD §11): "10.0" < "9.5" as strings."""
    chain = parse_chain(scored("10.0", "9.5"))
    assert chain.scores == (10.0, 9.5) and chain.scores[0] > chain.scores[1]


def test_a_chain_keeps_ties_and_identical_scores():
    assert parse_chain(scored(7, 7.0)).scores == (7.0, 7.0)


# ---- issues and the rubric ---------------------------------------------------------------------------------


def test_declared_scores_of_the_papers_showcase_differ():
    text = "A 35%, B 65%. Response 1: A 5, B 6 = 5.4. Response 2: A 9, B 7 = 8.0."
    chain = rationale(text, 5.4, 8.0)
    assert chain.verified_scores == pytest.approx((5.65, 7.7))
    assert chain.issues == ("declared_differs",)
    for rounded in (5.6, 5.7, 5.65):
        assert rationale(text, rounded, 7.7).issues == ()


RELEASED = """A. Evaluation Criteria:
1. **Accuracy** (40%): facts first
2. **Clarity** (60%): plain words

B. Scoring Breakdown:
Response 1:
- Accuracy: 8
- Clarity: 7
Response 1 Final Score = (8 * 0.4) + (7 * 0.6) = 7.4

Response 2:
- Accuracy: 4
- Clarity: 5
Response 2 Final Score = (4 * 0.4) + (5 * 0.6) = 4.6"""


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("fence", ["{}", "\n```json\n{}\n```\n"])
def test_the_released_checkpoints_format_is_read_and_verified(escaped, fence):
    """The layout of the paper's prompts (Figures 10 and 11): scores as texts, raw or escaped line breaks."""
    body = json.dumps(
        {"rationale": RELEASED, "better_response": {"response_1": "7.4", "response_2": "4.6"}}, indent=1
    )
    chain = parse_chain(
        block(fence.format(body if escaped else body.replace("\\n", "\n")), before="**PART 1** a persona\n")
    )
    assert (
        chain.criteria == (("Accuracy", 40.0), ("Clarity", 60.0)) and chain.analysis == "**PART 1** a persona"
    )
    assert (
        chain.scores == (7.4, 4.6)
        and chain.verified_scores == pytest.approx((7.4, 4.6))
        and chain.issues == ()
    )


@pytest.mark.parametrize("n", [3, 6, 12])
def test_any_number_of_responses_is_written_and_read(n):
    text = write_chain("x", [("formal", 60), ("brief", 40)], [[1 + i % 10, 10 - i % 10] for i in range(n)])
    chain = parse_chain(text, n)
    assert (
        len(chain.scores) == n and chain.issues == () and chain.scores == pytest.approx(chain.verified_scores)
    )
    assert kind(text, n - 1) == kind(text, n + 1) == "scores_count"


def test_issues_in_order():
    text = "a 50%, b 30%. Response 1: a 12, b 5 = 9. Response 2: a 0, b 3 = 1."
    chain = parse_chain(
        block({"rationale": text, "better_response": {"response_1": 11, "response_2": 0.5}}, after=" bye")
    )
    assert chain.issues == ("weights", "score_range", "declared_differs", "trailing_text")
    assert chain.verified_scores == pytest.approx((9.375, 1.125))
    chain = parse_chain(scored(0, 5))
    assert chain.issues == ("no_rubric", "score_range")
    assert (chain.criteria, chain.criterion_scores, chain.verified_scores) == ((), None, None)


@pytest.mark.parametrize(
    ("weights", "flagged"),
    [((60, 40), False), ((60, 41), False), ((59, 40), False), ((60, 41.5), True), ((0.6, 0.4), True)],
)
def test_weights_within_one_of_a_hundred(weights, flagged):
    text = f"a {weights[0]}%, b {weights[1]}%. Response 1: a 8, b 8 = 8.0. Response 2: a 4, b 4 = 4.0."
    assert ("weights" in rationale(text, 8, 4).issues) is flagged


def test_criteria_without_complete_scores_are_kept_but_not_verified():
    chain = rationale(
        "formal 60%, brief 40%. Response 1: formal 8, brief 5 = 6.8. Response 2: formal 3 = 3.0."
    )
    assert chain.criteria == (("formal", 60.0), ("brief", 40.0))
    assert chain.verified_scores is None and chain.criterion_scores is None and chain.issues == ("no_rubric",)


@pytest.mark.parametrize(
    "scores",
    [
        {"response_1": {"Formal ": 8, "brief": "5"}, "response_2": {"brief": 6, "formal": 3}},
        {"Response 1": [8, 5], "Response 2": [3, 6]},
    ],
)
def test_a_structured_rubric_takes_precedence(scores):
    text = "formal 10%, brief 90%. Response 1: formal 1, brief 1 = 1.0. Response 2: formal 1, brief 1 = 1.0."
    chain = rationale(text, rubric={"criteria": {"formal": 60, "brief": "40%"}, "scores": scores})
    assert chain.criteria == (("formal", 60.0), ("brief", 40.0))
    assert chain.criterion_scores == ((8, 5), (3, 6)) and chain.issues == ()


@pytest.mark.parametrize(
    "rubric",
    [
        None,
        [],
        {},
        {"criteria": {}},
        {"criteria": {"a": True}, "scores": {}},
        {"criteria": {"a": -1}, "scores": {}},
        {"criteria": {"a": 100}, "scores": {"response_1": [8]}},
        {"criteria": {"a": 100}, "scores": {"response_1": [8], "response_2": ["x"]}},
        {"criteria": {"a": 1e308, "b": 1e308}, "scores": {"response_1": [8, 1e308], "response_2": [1, 2]}},
        {"criteria": {"a": 100}, "scores": {"response_1": {"b": 8}, "response_2": [math.nan]}},
    ],
)
def test_an_unusable_structured_rubric_does_no_harm(rubric):
    chain = parse_chain(block({**GOOD, "rubric": rubric}))
    assert isinstance(chain, Chain)
    if not (isinstance(rubric, dict) and len(rubric.get("criteria", ())) == 2):
        assert chain.criterion_scores == ((8, 5), (3, 6))


@pytest.mark.parametrize(
    ("criteria", "rows"),
    [
        ({"Short": 60, "short": 40}, [{"Short": 9, "short": 1}, {"Short": 4, "short": 7}]),
        ({"short": 0.6, "clear": "40%"}, [[9, 1], [4, 7]]),
        ({"short": 60, "clear": 40}, [{"short": 9, "clear": 1, "warm": 1}, {"short": 4, "clear": 7}]),
    ],
)
def test_a_structured_rubric_never_drops_a_criterion(criteria, rows):
    scores = {f"response_{i}": row for i, row in enumerate(rows, start=1)}
    chain = rationale("", rubric={"criteria": criteria, "scores": scores})
    assert chain.verified_scores is None and "no_rubric" in chain.issues
    scores = {"response_1": [9], "response_01": [2], "response_2": [4]}
    assert rationale("", rubric={"criteria": {"short": 100}, "scores": scores}).verified_scores is None


def test_totals_in_a_structured_rubric_are_no_criteria():
    scores = {f"response_{i}": {"short": 9, "clear": 4, "total": 7} for i in (1, 2)}
    chain = rationale("", rubric={"criteria": {"short": 60, "clear": 40}, "scores": scores})
    assert chain.criterion_scores == ((9, 4), (9, 4))


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        ('"a": 40', '"a": 40, "a": 1'),
        ('"response_2": 4', '"response_2": 4, "response_2": 9'),
        ('"rationale"', '"rationale": "a 100%. Response 1: a 1. Response 2: a 9.", "rationale"'),
    ],
)
def test_a_key_given_twice_is_a_failure(once, twice):
    rubric = {"criteria": {"a": 40, "b": 60}, "scores": {"response_1": [8, 8], "response_2": [4, 4]}}
    verdict = {"rationale": "", "rubric": rubric, "better_response": {"response_1": 8, "response_2": 4}}
    text = f"{JSON_START}{json.dumps(verdict)}{JSON_END}"
    assert parse_chain(text).verified_scores == (8, 4) and once in text
    assert parse_chain(text.replace(once, twice, 1)).kind == "bad_json"


FREE_FORMS = [
    "Accuracy (40%), Clarity (60%). Response 1: Accuracy: 8/10, Clarity: 7/10. Response 2: Accuracy: 4/10, "
    "Clarity: 5/10.",
    "**Accuracy**: 40%\n**Clarity**: 60%\n\n**Response 1**: Accuracy = 8, Clarity = 7\n**Response 2**: "
    "Accuracy = 4, Clarity = 5",
    "- Accuracy – 40%\n- Clarity – 60%\nresponse_1\n- Accuracy (8)\n- Clarity (7)\nresponse_2\n- Accuracy "
    "(4)\n- Clarity (5)",
    "40% Accuracy, 60% Clarity. Response 1: accuracy 8, clarity 7. Response 2: accuracy 4, clarity 5.",
    "A. Evaluation Criteria: 1. Accuracy (40%): facts first. 2. Clarity (60%): plain words.\nB. Scoring "
    "Breakdown: Response 1: "
    "**Accuracy**: 8/10, better than Response 2. **Clarity**: 7/10. Response 1 Final Score = (8 * 0.40) + "
    "(7 * 0.60) = 7.4\n"
    "Response 2: **Accuracy**: 4/10. **Clarity**: 5/10. Response 2 Final Score = (4 * 0.40) + (5 * 0.60) = "
    "4.6",
    "Accuracy 40% and Clarity 60%. Response 1: 8*0.40 + 7*0.60 = 7.4. Response 2: 4*0.40 + 5*0.60 = 4.6.",
    "Accuracy: 40%, Clarity: 60%. Response 1 = 0.4×8 + 0.6×7. Response 2 = 0.4×4 + 0.6×5.",
    "Criteria & weights: Accuracy (weight: 40%); Clarity (weight: 60%); total 100%. "
    "Response 1: Accuracy (40%): 8, Clarity (60%): 7. Response 2: Accuracy (40%): 4, Clarity (60%): 5.",
    "Response 1: Accuracy (40%): 8/10, Clarity (60%): 7/10 = 7.4. Response 2: Accuracy (40%): 4/10, Clarity "
    "(60%): 5/10 = 4.6.",
    "Accuracy 40%, Clarity 60%. "
    "Response 1: Accuracy 8 × 0.4 = 3.2; Clarity 7 × 0.6 = 4.2. Response 2: Accuracy 4 × 40%, Clarity 5 × "
    "60%.",
    "Accuracy is weighted 40%, clarity weighted at 60%. "
    "Response 1 - Accuracy: 8, clarity: 7. Response 2 - Accuracy: 4, clarity: 5.",
]


@pytest.mark.parametrize("text", FREE_FORMS)
def test_rubrics_as_language_models_write_them(text):
    chain = rationale(text, 7.4, 4.6)
    assert [(name.lower(), weight) for name, weight in chain.criteria][:1] == [
        ("accuracy", 40.0)
    ] or "is weighted" in text
    assert [weight for _, weight in chain.criteria] == [40.0, 60.0]
    assert chain.criterion_scores == ((8, 7), (4, 5))
    assert chain.issues == ()


def test_a_note_is_not_taken_for_scores():
    text = write_chain(
        "",
        [("formal", 50), ("data", 30), ("data use", 20)],
        [[8, 5, 6], [2, 3, 4]],
        ["formal 3 data good", "data 9, data use 9 = 9.0"],
    )
    assert parse_chain(text).criterion_scores == ((8, 5, 6), (2, 3, 4))


# ---- no text raises, no text is slow -----------------------------------------------------------------------

FRAGMENTS = [
    JSON_START,
    JSON_END,
    *FORMAT_STRINGS,
    "{",
    "}",
    '"',
    ":",
    ",",
    "[",
    "]",
    "\\",
    "NaN",
    "Infinity",
    "-",
    "1e999",
    "true",
    "null",
    "\ud800",
    "\n",
    '"rationale"',
    '"better_response"',
    '"response_1"',
    '"response_2"',
    '"rubric"',
    '"criteria"',
    '"scores"',
    "Response 1",
    "Response 2:",
    "a 50%",
    "a",
    "8",
    " = ",
    "; ",
    ". ",
    "(40%)",
    "*",
    "×",
    "0.5",
    "%",
    "**",
    "```json",
    "9" * 5000,
    "İ",
    "ſ",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=10)
    | st.sampled_from(FREE_FORMS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["response_1", "response_2", "criteria", "scores", "a"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


def check(result) -> None:
    if isinstance(result, ParseFailure):
        assert result.kind in FAILURE_KINDS
        return
    assert all(map(math.isfinite, result.scores)) and len(result.scores) == 2
    assert result.issues == tuple(name for name in ISSUES if name in result.issues)
    assert (
        (result.verified_scores is None)
        == (result.criterion_scores is None)
        == ("no_rubric" in result.issues)
    )
    if result.verified_scores is not None:
        assert all(map(math.isfinite, result.verified_scores))
        assert [len(row) for row in result.criterion_scores] == [len(result.criteria)] * 2


@given(st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)))
def test_no_text_raises(text):
    check(parse_chain(text))
    check(parse_chain(JSON_START + text + JSON_END))
    check(parse_chain(scored(3, 4, rationale=text)))


@given(JSON, JSON, JSON)
def test_no_object_raises(rationale_value, scores, rubric):
    check(parse_chain(block({"rationale": rationale_value, "better_response": scores, "rubric": rubric})))
    check(parse_chain(scored(5, 6, rationale=rationale_value, rubric=rubric)))


@given(st.integers(0, len(block(GOOD))), st.sampled_from(FRAGMENTS))
def test_damaged_chains_never_raise(at, fragment):
    text = block(GOOD)
    check(parse_chain(text[:at] + fragment + text[at:]))
    check(parse_chain(text[:at]))
    check(parse_chain(text[:at] + text[at + 1 :]))


UNITS = [
    JSON_START,
    JSON_END,
    "{",
    JSON_START + "{",
    JSON_START + '{"',
    JSON_START + JSON_END,
    JSON_START + "{" + JSON_END,
    JSON_START + '{"a":',
    '{"a":',
    "%",
    "1",
    "1%",
    "a 1%, ",
    "1 ",
    " ",
    "\n",
    '"',
    "\\",
    '{"',
    "{ ",
    "[",
    "Response 1",
    "Response 1: ",
    ". Response 1: ",
    ". Response 2: ",
    "1*1 ",
    "a 1, ",
    "(",
    "((40%",
    "a ",
    ": ",
    "0.5*",
    "\u0338",
    JSON_START + '{"better_response":1}' + JSON_END,
    "response_",
    "; ",
    " = ",
    ", ",
    "a*",
    "- ",
    "\u00a0",
]


@pytest.mark.parametrize("unit", UNITS)
def test_a_megabyte_takes_linear_time(unit):
    text = (unit * 1_000_000)[:1_000_000]
    texts = [
        text,
        JSON_START + text + JSON_END,
        JSON_START + '{"' + text + JSON_END,
        scored(3, 4, rationale=text),
        scored(3, 4, rationale=text[:19_000]),
    ]
    texts.append(scored(3, 4, rationale="a 50%, b 50%. Response 1: " + text + ". Response 2: " + text + "."))
    texts.append(
        scored(
            3,
            4,
            rationale="a 50%, b 50%. Response 1: " + text[:9_000] + ". Response 2: " + text[:9_000] + ".",
        )
    )
    texts.append(
        block(
            '{"better_response": {"response_1": "'
            + text.replace('"', "").replace("\\", "")
            + '", "response_2": 1}}'
        )
    )
    for candidate in texts:
        began = time.process_time()
        check(parse_chain(candidate))
        assert time.process_time() - began < 3, candidate[:60]


def test_earlier_blocks_are_no_part_of_the_analysis():
    draft = write_chain("First thoughts.", [("tone", 100)], [[3], [4]])
    final = write_chain("Second thoughts.", [("tone", 100)], [[8], [2]])
    chain = parse_chain(draft + "\n" + final)
    assert chain.scores == (8.0, 2.0)
    assert chain.analysis.split() == ["First", "thoughts.", "Second", "thoughts."]
