"""A chain is kept only if it can be read, ranks, adds up and judges; each other one has its reason."""

import json

import pytest
from sec_world import CRITERIA, EXAMPLE, chain

from pgenrm_train.chains.chain import parse_chain, write_chain
from pgenrm_train.chains.rejection import reason_to_reject
from pgenrm_train.records.pairs import Example


def reason(text: str, example: Example = EXAMPLE) -> str | None:
    return reason_to_reject(parse_chain(text, len(example.responses)), example.chosen_index, text)


def test_a_correct_chain_is_kept_for_the_side_that_it_prefers():
    second = Example("p1", "u1", EXAMPLE.context, EXAMPLE.responses, 1)
    assert reason(chain(8, 3)) is None and reason(chain(3, 8), second) is None
    assert reason(chain(8, 3), second) == reason(chain(3, 8)) == "wrong_ranking"
    assert reason(chain(5, 5)) == reason(chain(5, 5), second) == "tie"


@pytest.mark.parametrize(
    "text,kind",
    [
        ("", "no_markers"),
        ("left is better", "no_markers"),
        ("<JSON_START>{oops<JSON_END>", "bad_json"),
        ('<JSON_START>{"rationale": "x"}<JSON_END>', "scores_missing"),
        ('<JSON_START>{"better_response": {"response_1": 8}}<JSON_END>', "scores_count"),
        (
            '<JSON_START>{"better_response": {"response_1": true, "response_2": 1}}<JSON_END>',
            "scores_not_numbers",
        ),
    ],
)
def test_chains_that_cannot_be_read(text, kind):
    assert reason(text) == f"parse:{kind}"


def declared(rationale: str, first: float = 8.0, second: float = 3.0) -> str:
    block = {"rationale": rationale, "better_response": {"response_1": first, "response_2": second}}
    return f"Analysis.\n<JSON_START>{json.dumps(block)}<JSON_END>"


@pytest.mark.parametrize(
    "text,issue",
    [
        (declared("It is simply better."), "no_rubric"),
        (
            declared(
                "brevity 70%, wit 70%. Response 1: brevity 8, wit 8 = 8.0. Response 2: brevity 3, wit 3 = "
                "3.0."
            ),
            "weights",
        ),
        (
            declared(
                "brevity 70%, wit 30%. Response 1: brevity 20, wit 20 = 20.0. Response 2: brevity 3, wit 3 "
                "= 3.0.",
                20,
            ),
            "score_range",
        ),
        (
            declared(
                "brevity 70%, wit 30%. Response 1: brevity 8, wit 8 = 8.0. Response 2: brevity 3, wit 3 = "
                "3.0.",
                9.5,
            ),
            "declared_differs",
        ),
        (chain(8, 3) + " And that is that.", "trailing_text"),
    ],
)
def test_chains_whose_rubric_does_not_hold(text, issue):
    assert reason(text) == f"issue:{issue}"


def test_the_ranking_is_looked_at_before_the_issues():
    assert reason(declared("It is simply better.", 3, 8)) == "wrong_ranking"


@pytest.mark.parametrize(
    "words",
    [
        "As the chosen response shows, short wins.",
        "The REJECTED Response fails.",
        "Ground truth: 1.",
        "By the label, the first wins.",
        "The user actually picked response 1, so it scores higher.",
        "Response 2 was clearly rejected for its length.",
        "Given the actual vote, brevity must weigh most.",
        "They voted for the first one.",
        "History is thin. The user preferred the first answer here.",
        "I correct my previous answer: brevity weighs more.",
    ],
)
def test_a_chain_that_speaks_of_the_vote_is_a_leak(words):
    assert reason(chain(8, 3, words)) == "label_leak"


@pytest.mark.parametrize(
    "words",
    [
        "In pair 2 the chosen response is shorter than the rejected answer.",
        "Earlier votes: they picked the first answer whenever it was brief.",
        "Response 1 is the better one, and this user prefers response 1 for its wit.",
        "The food label of the second is wrong, and response 2 was written in haste.",
        "Votes in the senate were selected as the topic; I score the previous sentence low.",
    ],
)
def test_judging_and_talk_of_earlier_votes_are_no_leak(words):
    assert reason(chain(8, 3, words)) is None


def test_a_leak_inside_the_rationale_counts():
    text = (
        "brevity 70%, wit 30%. Response 1: the user chose the first; "
        "brevity 8, wit 8 = 8.0. Response 2: brevity 3, wit 3 = 3.0."
    )
    assert reason(declared(text)) == "label_leak"


def test_totals_that_rank_only_by_rounding_are_rejected():
    """Declared 7.1 and 7.0 agree with 7.05 and 7.05 to a decimal, though the recomputed scores are a tie."""
    even = "a 50%, b 50%. Response 1: a 7, b 7.1 = 7.1. Response 2: a 7.1, b 7 = 7.0."
    other = "a 50%, b 50%. Response 1: a 7, b 7.1 = 7.1. Response 2: a 7.1, b 7.06 = 7.04."
    assert reason(declared(even, 7.1, 7.0)) == reason(declared(other, 7.1, 7.04)) == "verified_ranking"


def test_more_than_two_responses_need_the_chosen_one_above_every_other():
    three = Example("p1", "u1", EXAMPLE.context, ("a", "b", "c"), 1)
    scores = {(5, 8, 3): None, (8, 8, 3): "tie", (5, 6, 7): "wrong_ranking"}
    for given, expected in scores.items():
        assert reason(write_chain("x", CRITERIA, [[s, s] for s in given]), three) == expected
