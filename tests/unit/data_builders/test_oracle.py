"""The oracle teacher is correct except for its weight of quality, and the oracle judge cannot be deceived."""

import dataclasses
import itertools
import random
import statistics

import pytest

from data_builders.sources.personaworld import OPPOSITE, POLES, Response, build, read_response
from data_builders.teachers.oracle import (
    OracleTeacher,
    advantage,
    judge_for_rewards,
    names_judge,
    oracle_judge,
    read_criteria,
)
from pgenrm_train.chains.chain import Chain, parse_chain, write_chain
from pgenrm_train.config import DataConfig
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import present
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem, Message

PAIRS = list(build(DataConfig(users=60, heldout_users=60), 5))
TEST = [p for p in PAIRS if p.split == "test"]
HISTORY = HistorySampler(PAIRS, size=3, policy="random")
CRITERIA = ("formal", "direct", "warm")
STATED = ExplicitSignals(
    f"For work I want {CRITERIA[0]} above all, then {CRITERIA[1]}, then {CRITERIA[2]}.",
    "People call me a buddy.",
)


def hit(pair, order: int, attempt: int = 0) -> bool:
    chain = parse_chain(OracleTeacher().write(present(pair, HISTORY(pair), order), attempt))
    return chain.scores[order] > chain.scores[1 - order]


def equal_quality(pair) -> bool:
    return read_response(pair.chosen).quality == read_response(pair.rejected).quality


def an_example(*texts: str, index: int = 0, explicit: ExplicitSignals = STATED) -> Example:
    return Example("p", "u", (Message("user", "Plan my trip?"),), texts, index, (), explicit)


def rendered(*poles: str, quality: str = "good", seed: int = 0) -> str:
    return Response(poles, quality).render(random.Random(seed))


def test_chains_parse_without_issues_and_ground_their_analysis_in_the_history():
    for pair, attempt in itertools.product(TEST[:100], (0, 1)):
        example = present(pair, HISTORY(pair), attempt)
        chain = parse_chain(OracleTeacher().write(example, attempt))
        assert isinstance(chain, Chain) and chain.issues == () and chain.verified_scores is not None
        assert [name for name, _ in chain.criteria] == [*read_criteria(pair.explicit)[1], "quality"]
        for number, item in enumerate(example.history, start=1):
            assert f"Pair {number}: {' '.join(advantage(item)) or 'nothing'}." in chain.analysis


def test_chains_are_deterministic_and_attempts_differ():
    example = present(TEST[0], HISTORY(TEST[0]), 0)
    assert OracleTeacher(1).write(example, 0) == OracleTeacher(1).write(example, 0)
    assert len({OracleTeacher(1).write(example, attempt) for attempt in range(8)}) > 1
    assert len({OracleTeacher(seed).write(example, 0) for seed in range(8)}) > 1


def test_equal_attributes_get_equal_scores():
    for seed in range(30):
        left, right = (
            rendered("formal", "cautious", "listed", seed=seed),
            rendered("formal", "cautious", "listed", seed=seed + 100),
        )
        chain = parse_chain(OracleTeacher(seed).write(an_example(left, right)))
        assert chain.scores[0] == chain.scores[1]
        assert chain.criterion_scores[0] == chain.criterion_scores[1]


def test_an_attribute_earns_its_opposite_costs_and_silence_does_neither():
    for seed in range(20):
        chain = parse_chain(
            OracleTeacher(seed).write(an_example(rendered("formal", "listed"), rendered("casual", "listed")))
        )
        has, lacks = chain.criterion_scores[0][0], chain.criterion_scores[1][0]
        assert has > 5 > lacks and chain.criterion_scores[0][1] == chain.criterion_scores[1][1] == 5


def test_the_label_is_never_used():
    for pair in TEST[:80]:
        example = present(pair, HISTORY(pair), 0)
        assert OracleTeacher().write(example) == OracleTeacher().write(
            dataclasses.replace(example, chosen_index=1)
        )


def test_scores_are_attached_to_texts_not_to_their_roles():
    """The same two texts in the same places, with both possible votes."""
    for pair in TEST[:80]:
        other = dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        voted, reversed_ = present(pair, HISTORY(pair), 0), present(other, HISTORY(pair), 1)
        assert voted.responses == reversed_.responses and voted.chosen_index != reversed_.chosen_index
        assert OracleTeacher().write(voted) == OracleTeacher().write(reversed_)


def test_the_presentation_order_does_not_favour_a_place():
    first = [
        parse_chain(OracleTeacher().write(present(p, (), order))).scores for p in TEST for order in (0, 1)
    ]
    wins = sum((a > b) - (a < b) for a, b in first)
    assert abs(wins) / len(first) < 0.08


def test_accuracy_where_quality_is_equal():
    pairs = [p for p in TEST if equal_quality(p)]
    accuracy = statistics.fmean(hit(p, order) for p in pairs for order in (0, 1))
    assert len(pairs) > 150 and accuracy >= 0.95


def test_quality_is_overweighed_where_the_rejected_response_is_of_better_quality():
    rivals = [p for p in TEST if p.kind == "rival" and not equal_quality(p)]
    accuracy = statistics.fmean(hit(p, order) for p in rivals for order in (0, 1))
    assert (
        len(rivals) > 20 and 0.2 < accuracy < 0.9
    )  # headroom for RL, and something for rejection sampling to keep


def test_another_attempt_often_mends_a_chain_that_ranks_wrongly():
    wrong = [
        (p, order)
        for p in TEST
        for order in (0, 1)
        if p.kind == "rival" and not equal_quality(p) and not hit(p, order)
    ]
    mended = [any(hit(p, order, attempt) for attempt in range(1, 8)) for p, order in wrong]
    assert wrong and statistics.fmean(mended) > 0.3


@pytest.mark.parametrize(
    "example",
    [
        an_example("Hello, world.", rendered("formal")),
        an_example(rendered("formal"), rendered("casual"), explicit=ExplicitSignals()),
        an_example(rendered("formal"), rendered("casual"), explicit=ExplicitSignals("I like it short.")),
    ],
)
def test_the_teacher_refuses_what_is_not_of_its_world(example):
    with pytest.raises(ValueError, match="PersonaWorld"):
        OracleTeacher().write(example)


def test_advantage_is_what_the_chosen_one_has_over_the_other():
    assert advantage(HistoryItem("q", rendered("formal", "direct"), rendered("formal", "cautious"))) == (
        "direct",
    )
    assert advantage(HistoryItem("q", "Something else.", rendered("formal"))) == ()


# ---- judge ----


def chain_naming(weights: dict[str, float]) -> str:
    return write_chain("x", list(weights.items()), [[8.0] * len(weights), [3.0] * len(weights)])


def verdict(weights: dict[str, float], criteria: tuple[str, ...] = CRITERIA) -> float:
    stated = ExplicitSignals("For work I want {} above all, then {}, then {}.".format(*criteria))
    return oracle_judge(chain_naming(weights), stated)


def test_the_true_weights_earn_everything_and_opposites_nothing():
    true = dict(zip((*CRITERIA, "quality"), (45, 30, 15, 10), strict=True))
    assert verdict(true) == pytest.approx(1.0)
    assert verdict({name: 10 * weight for name, weight in true.items()}) == pytest.approx(
        1.0
    )  # shares count, not sums
    assert verdict({OPPOSITE[c]: 30 for c in CRITERIA}) == 0.0
    assert verdict({OPPOSITE[CRITERIA[0]]: 50, CRITERIA[1]: 30, "quality": 20}) == 0.0
    assert verdict({"nonsense": 100}) == 0.0


def test_the_judge_prefers_truer_weights():
    ranked = [
        {"formal": 45, "direct": 30, "warm": 15, "quality": 10},
        {"formal": 25, "direct": 15, "warm": 10, "quality": 50},
        {"formal": 30, "quality": 70},
        {"quality": 100},
    ]
    scores = [verdict(weights) for weights in ranked]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)


def test_the_judge_of_names_ignores_weights_and_subtracts_opposites():
    first, second, third = CRITERIA
    for names, earned in (
        ((first, second, third), 1.0),
        ((first, second), 2 / 3),
        ((first, second, OPPOSITE[third]), 1 / 3),
        ((first, OPPOSITE[second], OPPOSITE[third]), 0.0),
        (POLES, 0.0),  # everything
    ):
        for quality in (0, 10, 900):
            weights = {**dict.fromkeys(names, 10), "quality": quality}
            assert names_judge(chain_naming(weights), STATED) == pytest.approx(earned)
    assert names_judge("no chain at all", STATED) is None
    assert names_judge(chain_naming({first: 100}), ExplicitSignals()) is None


def test_naming_every_attribute_earns_no_more_than_naming_random_ones():
    rng = random.Random(0)
    everything = (
        dict.fromkeys(POLES, 10),
        {**dict.fromkeys(POLES, 9), "quality": 10},
        {**dict.fromkeys(POLES, 1), "quality": 90},
    )
    users = [
        tuple(rng.choice(axis) for axis in rng.sample([POLES[i : i + 2] for i in range(0, 10, 2)], 3))
        for _ in range(300)
    ]
    guesses = []
    for criteria in users:
        poles = [rng.choice(axis) for axis in rng.sample([POLES[i : i + 2] for i in range(0, 10, 2)], 3)]
        guesses.append(verdict({**dict(zip(poles, (45, 30, 15), strict=True)), "quality": 10}, criteria))
    for weights in everything:
        assert statistics.fmean(verdict(weights, c) for c in users) <= statistics.fmean(guesses)


def test_scores_lie_between_0_and_1_whatever_is_named():
    rng = random.Random(1)
    for _ in range(200):
        named = {
            name: rng.randint(0, 100) for name in rng.sample([*POLES, "quality", "other"], rng.randint(1, 8))
        }
        if sum(named.values()):
            assert 0.0 <= verdict(named) <= 1.0


@pytest.mark.parametrize(
    "text,explicit",
    [
        ("no chain at all", STATED),
        ("", STATED),
        (chain_naming({"formal": 100}), ExplicitSignals()),
        (chain_naming({"formal": 100}), ExplicitSignals("Keep it short.")),
    ],
)
def test_no_verdict_without_a_readable_chain_and_stated_criteria(text, explicit):
    assert oracle_judge(text, explicit) is None


def test_a_chain_without_criteria_earns_nothing():
    text = 'x <JSON_START>{"better_response": {"response_1": 7, "response_2": 3}}<JSON_END>'
    assert oracle_judge(text, STATED) == 0.0


def test_the_judge_for_rewards_reads_the_fields_next_to_the_prompt():
    judge, text = (
        judge_for_rewards(anything=1),
        chain_naming({"formal": 45, "direct": 30, "warm": 15, "quality": 10}),
    )
    assert judge(text, {"criteria": STATED.criteria}) == pytest.approx(1.0)
    assert judge(text, {}) is None
