"""Hard and suspect pairs, the reasons in their records, and hard negatives that rest on given votes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgenrm_train.curriculum.hard_negatives import FLIP, NEAR_TIE, PROTOTYPE_FLIP, hard_negatives, near_ties
from pgenrm_train.curriculum.hardness import (
    SIGNALS,
    MinedPair,
    Votes,
    harder_half,
    key_of,
    model_free,
    ranks,
    records,
    signals,
    similarity,
    wavers,
)
from pgenrm_train.errors import ConfigError
from pgenrm_train.records.pairs import Message, PreferencePair

NAN = float("nan")


def pair(
    name: str, user: str, chosen: str, rejected: str, scores: tuple[float, float] | None = None, **more: Any
) -> PreferencePair:
    chosen_score, rejected_score = scores or (None, None)
    context = (Message("user", more.pop("query", "q")),)
    return PreferencePair(
        name,
        user,
        context,
        chosen,
        rejected,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
        **more,
    )


def mined(**changed: Any) -> MinedPair:
    return replace(MinedPair(0, "p", 0.5, 0.2, None, 0.0, samples=4, failures=0), **changed)


def test_pairs_on_which_the_model_wavers_are_hard_and_the_label_does_not_choose_them() -> None:
    rates = np.array([0.0, 0.25, 0.5, 0.75, 1.0, NAN])
    assert wavers(rates, 0.25, 0.75).tolist() == [False, True, True, True, False, False]
    assert wavers(1 - rates, 0.25, 0.75).tolist() == wavers(rates, 0.25, 0.75).tolist()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"pass_rate": 0.0, "margin": -3.0}, True),
        ({"pass_rate": 0.0, "margin": -3.0, "order_gap": None}, True),
        ({"pass_rate": 0.0, "margin": -0.5}, False),  # not confident
        ({"pass_rate": 0.25, "margin": -3.0}, False),  # not consistent
        ({"pass_rate": 0.2, "margin": -3.0, "order_gap": 0.5}, False),  # the order decides
        ({"pass_rate": 0.0, "margin": -3.0, "failures": 3}, False),  # one chain of four shows little
        ({"pass_rate": 0.0, "margin": None, "failures": 4}, False),  # nothing parsed: no contradiction
    ],
)
def test_suspect_is_a_confident_and_consistent_contradiction(row: dict[str, Any], expected: bool) -> None:
    record = records(["p"], [mined(**row)], None, 0.25, 0.75)
    assert record["suspect"] == [expected]
    assert not (record["hard"][0] and record["suspect"][0])
    assert record["why"][0].startswith("contradicted: ") == expected


def test_the_record_has_reasons() -> None:
    pairs = [
        pair(f"p{i}", "u", "the same words here", f"the same words {'other ' * i}", (50, 50 - i))
        for i in range(4)
    ]
    record = records(
        [p.pair_id for p in pairs],
        [mined(), mined(order_gap=1.0), mined(pass_rate=1.0), mined()],
        signals(pairs, Votes(pairs)),
        0.25,
        0.75,
    )
    assert record["hard"] == [True, True, False, True]
    assert (
        record["why"][0]
        == "wavers: 50% of 4 chains rank the chosen response first; similar responses (0.85); "
        "close ratings (0 apart)"
    )
    assert "the verdict follows the order" in record["why"][1]
    assert record["why"][2] == ""
    assert record["rating_gap"] == [0, 1, 2, 3] and record["disagreement"] == [None] * 4
    assert set(record) >= {"pass_rate", "margin", "verified_margin", "order_gap", *SIGNALS}
    assert {len(column) for column in record.values()} == {4}


def test_nothing_known_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"curriculum\.mine=true"):
        records(["p"], None, None, 0.25, 0.75)
    one = [pair("p", "u", "a", "b")]
    with pytest.raises(ConfigError, match="these data hold none"):
        records(["p"], None, signals(one, Votes(one)), 0.25, 0.75)


def test_a_cold_start_calls_the_harder_half_hard() -> None:
    pairs = [pair(f"p{i}", "u", "abcdefgh" * 5, "abcdefgh" * (i + 1)) for i in range(5)]
    record = records([p.pair_id for p in pairs], None, signals(pairs, Votes(pairs)), 0.25, 0.75)
    assert record["hard"] == [False, False, True, True, True]
    assert record["suspect"] == [False] * 5
    assert record["model_free_hardness"][4] == max(record["model_free_hardness"])
    assert record["why"][4].startswith(("similar responses", "similar lengths"))


@pytest.mark.parametrize(
    ("by", "values", "hard", "why"),
    [
        ("history", [3.0, 3.0, 0.0, 1.0, 3.0], [False, False, True, True, False], "short history (0 items)"),
        (
            "scenario",
            [0.6, 0.6, 0.2, 0.2, 0.6],
            [False, False, True, True, False],
            "rare scenario (20.0% of the pairs)",
        ),
    ],
)
def test_another_order_than_hardness(by: str, values: list[float], hard: list[bool], why: str) -> None:
    pairs = [pair(f"p{i}", "u", "a", "b" * (i + 1)) for i in range(5)]
    columns = signals(pairs, Votes(pairs)) | {by: np.array(values)}
    record = records([p.pair_id for p in pairs], None, columns, 0.25, 0.75, by)
    assert record["hard"] == hard and record["suspect"] == [False] * 5
    assert (record["why"][2], record["why"][0]) == (why, "") and record[by] == values
    with pytest.raises(ConfigError, match=f"finds the same {by} in every pair"):
        records([p.pair_id for p in pairs], None, columns | {by: np.ones(5)}, 0.25, 0.75, by)


def test_ranks_are_those_of_scipy_scaled_and_gaps_stay_unknown() -> None:
    from scipy.stats import rankdata

    values = np.array([3.0, 1.0, 1.0, NAN, 7.0])
    ranked = ranks(
        {
            "similarity": values,
            "length_ratio": np.ones(5),
            "rating_gap": np.full(5, NAN),
            "disagreement": values / 10,
        }
    )
    known = np.isfinite(values)
    assert ranked["similarity"][known] == pytest.approx((rankdata(values[known]) - 1) / 3)
    assert np.isnan(ranked["similarity"][3])
    assert np.isnan(ranked["length_ratio"]).all(), "a constant tells nothing apart"
    assert np.isnan(ranked["rating_gap"]).all()


def test_who_disagrees_does_not_turn_the_hardness() -> None:
    """With every vote reversed, the same pairs would be hard: a label must not choose the batch."""
    one = {
        "similarity": np.full(4, NAN),
        "length_ratio": np.full(4, NAN),
        "rating_gap": np.full(4, NAN),
        "disagreement": np.array([0.0, 0.3, 0.5, 0.9]),
    }
    other = one | {"disagreement": 1 - one["disagreement"]}
    assert model_free(one) == pytest.approx(model_free(other))
    assert model_free(one).argmax() == 2


@given(st.text(max_size=60), st.text(max_size=60))
def test_similarity_is_symmetric_and_bounded(one: str, other: str) -> None:
    assert 0.0 <= similarity(one, other) == similarity(other, one) <= 1.0
    assert similarity(one, one) == 1.0


def test_an_embedder_may_measure_the_similarity_of_responses() -> None:
    """By the angle of their embeddings; the other signals stay."""
    direction = {"north": (1.0, 0.0), "east": (0.0, 1.0), "north-east": (0.6, 0.8)}
    pairs = [
        pair("1", "u", "north", "east"),
        pair("2", "u", "north", "north-east"),
        pair("3", "u", "east", "east"),
    ]
    embedded, plain = (
        signals(pairs, Votes(pairs), lambda texts: np.array([direction[t] for t in texts])),
        signals(pairs, Votes(pairs)),
    )
    assert embedded["similarity"] == pytest.approx([0.0, 0.6, 1.0])
    assert all(np.array_equal(embedded[name], plain[name], equal_nan=True) for name in SIGNALS[1:])
    assert signals([], Votes([]), lambda texts: np.zeros((0, 2)))["similarity"].shape == (0,)


def test_half_of_an_odd_number_is_rounded_up_and_ties_keep_their_order() -> None:
    assert harder_half(np.array([0.5, 0.5, 0.5])).tolist() == [True, True, False]


def test_disagreement_counts_other_users_once() -> None:
    votes = [
        pair("1", "u", "a", "b"),
        pair("2", "v", "b", "a"),
        pair("3", "v", "b", "a", query="q"),
        pair("4", "w", "a", "b"),
        pair("5", "x", "a", "b", query="another"),
    ]
    counted = Votes(votes)
    assert counted.others(votes[0]) == (1, 1)
    assert counted.disagreement(votes[0]) == 0.5
    assert np.isnan(counted.disagreement(votes[4])), "no other user voted on it"


def votes() -> list[PreferencePair]:
    return [
        # Ratings x 80, z 75, y 40: x–z is no pair yet.
        pair("a1", "ann", "x", "y", (80, 40)),
        pair("a2", "ann", "z", "y", (75, 40)),
        pair("b1", "bob", "y", "x"),
        pair("c1", "cyd", "y", "x"),  # both against ann's a1
        pair("d1", "dan", "x", "y", split="test"),
        pair("e1", "eve", "x", "y", user_split="test"),  # held out
    ]


def test_hard_negatives_rest_on_votes_and_ratings_that_exist() -> None:
    given_pairs = votes()
    negatives = hard_negatives(given_pairs, near=10)
    assert [(m.origin, m.pair.user_id) for m in negatives] == [(NEAR_TIE, "ann"), (FLIP, "ann")]
    tie = negatives[0].pair
    assert (tie.chosen, tie.rejected, tie.chosen_score, tie.rejected_score) == ("x", "z", 80, 75)
    assert tie.pair_id not in {p.pair_id for p in given_pairs}
    assert negatives[1].pair is given_pairs[0], "a flip is the given vote, nothing new"


def test_another_prototype_may_prefer_what_the_user_rejected() -> None:
    """Three of five voters side with ann, so the majority does not object; bob's and cyd's prototype does."""
    given_pairs = [*votes()[2:4], *(pair(f"{user}1", user, "x", "y") for user in ("ann", "fay", "gil"))]
    camp = {"ann": 0, "fay": 0, "bob": 1, "cyd": 1}
    negatives = hard_negatives(given_pairs, near=10, prototype_of=camp)
    assert [(m.origin, m.pair.user_id) for m in negatives] == [
        (FLIP, "bob"),
        (FLIP, "cyd"),
        (PROTOTYPE_FLIP, "ann"),
        (PROTOTYPE_FLIP, "fay"),
    ], "gil has no prototype"
    assert all(m.pair in given_pairs for m in negatives)
    same_camp = hard_negatives(given_pairs, near=10, prototype_of=dict.fromkeys(camp, 0))
    assert [m.origin for m in same_camp] == [FLIP, FLIP], "one's own prototype is no other"


def test_held_out_votes_neither_count_nor_return() -> None:
    against = [replace(p, user_split="test") if p.user_id in ("bob", "cyd") else p for p in votes()]
    assert [m.origin for m in hard_negatives(against, near=10)] == [NEAR_TIE], "the majority was held out"
    held_out = [*votes(), pair("a3", "ann", "x", "z", (80, 75), split="test")]
    assert near_ties(held_out, 10) == [], "ann is asked this in test"


@pytest.mark.parametrize(
    ("ratings", "near", "expected"),
    [
        ({"x": 80, "z": 75}, 5.0, []),  # five points apart is not less than five
        ({"x": 80, "z": 80}, 10.0, []),  # equal ratings prefer nothing
        ({"x": 80, "z": 78, "w": 77}, 10.0, [("z", "w"), ("x", "z")]),  # neighbours only
        ({"x": 80, "z": 60}, 10.0, []),
    ],
)
def test_near_ties_join_neighbours(
    ratings: dict[str, float], near: float, expected: list[tuple[str, str]]
) -> None:
    pairs = [pair(f"p{text}", "u", text, "low", (score, 1)) for text, score in ratings.items()]
    assert [(p.chosen, p.rejected) for p in near_ties(pairs, near)] == expected


def test_a_text_rated_twice_and_differently_is_left_out() -> None:
    pairs = [
        pair("1", "u", "x", "y", (80, 10)),
        pair("2", "u", "x", "w", (50, 10)),
        pair("3", "u", "z", "y", (82, 10)),
    ]
    assert all("x" not in (p.chosen, p.rejected) for p in near_ties(pairs, 10))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 4), st.integers(0, 4), st.integers(0, 100), st.integers(0, 100)
        ),
        max_size=25,
    )
)
def test_every_near_tie_agrees_with_its_users_ratings(rows: list[tuple[int, int, int, int, int]]) -> None:
    pairs = [
        pair(f"p{n}", f"u{user}", f"r{a}", f"r{b}", (max(x, y), min(x, y)))
        for n, (user, a, b, x, y) in enumerate(rows)
        if a != b
    ]
    given_keys = {(p.user_id, key_of(p)) for p in pairs}
    for tie in near_ties(pairs, 10):
        assert (tie.user_id, key_of(tie)) not in given_keys
        for text, score in ((tie.chosen, tie.chosen_score), (tie.rejected, tie.rejected_score)):
            rated = {
                s
                for p in pairs
                if p.user_id == tie.user_id
                for t, s in ((p.chosen, p.chosen_score), (p.rejected, p.rejected_score))
                if t == text
            }
            assert rated == {score}
