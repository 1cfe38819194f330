"""Labels: the rule, what is left out by kind, agreement with ratings and votes, confidence."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from eval.choosing.labels import LEAST, agreement, agreement_by_confidence, label, shown_match, votes_on
from eval.choosing.schemes import Match, Slot
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.slates import Slate

NONE = pd.DataFrame({"pair_id": [], "failure": []}, dtype=object)


def slate(number, responses=("a", "b"), values=(), user="ann"):
    prompt = PreferencePair(f"p{number}", user, (Message("user", f"q{number}"),), "", "")
    return Slate(prompt, responses, None, values)


def labelled(slates, scores, rule="ends", votes=(), chains=NONE, **settings):
    slots = {Slot(i, len(s.responses)): np.array(v, float) for i, (s, v) in enumerate(zip(slates, scores))}
    return label(slates, slots, chains, votes_on(votes), rule, **settings)


@pytest.mark.parametrize(
    ("rule", "pairs"), [("ends", {(2, 1)}), ("best", {(2, 0), (2, 1)}), ("all", {(2, 0), (2, 1), (0, 1)})]
)
def test_the_rule_names_the_pairs(rule, pairs):
    result = labelled([slate(0, ("a", "b", "c"))], [[5, 1, 9]], rule)
    assert {(la.chosen, la.rejected) for la in result.labels} == pairs and not result.left_out
    assert all(la.margin == la.score_chosen - la.score_rejected > 0 for la in result.labels)


def test_ties_close_margins_and_failures_are_left_out_and_counted():
    chains = pd.DataFrame(
        {
            "pair_id": ["ann/p2/0-1"] * 3 + ["ann/p3/1-2"],
            "failure": ["length", "length", None, "parse:no_json"],
        }
    )
    slates = [slate(0), slate(1), slate(2), slate(3, ("a", "b", "c")), slate(4)]
    scores = [[5, 5], [5, 5.4], [np.nan, np.nan], [7, np.nan, 2], [9, 1]]
    result = labelled(slates, scores, chains=chains, min_margin=0.5)
    assert [(la.slate, la.chosen) for la in result.labels] == [(3, 0), (4, 0)]
    assert result.left_out == {
        "tie": 1,
        "margin below label.min_margin": 1,
        "response without a score (length)": 2,
        "response without a score (parse:no_json)": 1,
    }


def test_ratings_come_before_votes_and_a_changed_vote_is_unknown():
    votes = [
        PreferencePair("v0", "ann", (Message("user", "q0"),), "b", "a"),
        PreferencePair("v1", "ann", (Message("user", "q1"),), "a", "b"),
        PreferencePair("v2", "ann", (Message("user", "q2"),), "a", "b"),
        PreferencePair("v3", "ann", (Message("user", "q2"),), "b", "a"),
        PreferencePair("v4", "bob", (Message("user", "q3"),), "a", "b"),
    ]
    slates = [slate(0, values=(3, 1)), slate(1), slate(2), slate(3), slate(4, values=(2, 2))]
    result = labelled(slates, [[9, 1]] * 5, votes=votes)
    assert [la.right for la in result.labels] == [True, True, None, None, None]
    found = agreement(slates, result.labels, 50, 0)
    assert (found["compared labels"], found["agreement accuracy"]) == (2, 1.0)
    assert found["agreement accuracy ci95"] == [0.0, 1.0], "one user"
    assert agreement(slates, result.labels[2:], 50, 0)["agreement accuracy"] is None


def test_confidence_is_fitted_on_known_preferences_and_grows_with_the_margin():
    rng = np.random.default_rng(0)
    margins = rng.exponential(2, 400)
    right = rng.random(400) < expit(margins / 2)
    slates = [slate(i, values=(1, 0) if r else (0, 1), user=f"u{i % 40}") for i, r in enumerate(right)]
    result = labelled(slates, [[5 + m, 5] for m in margins])
    assert result.fitted and 1.3 < result.temperature < 3
    quarters = agreement_by_confidence(slates, result, 200, 0)
    assert sum(row["compared labels"] for row in quarters) == 400
    assert quarters[0]["agreement accuracy"] < quarters[-1]["agreement accuracy"]
    for row in quarters:
        low, high = row["agreement accuracy ci95"]
        assert low - 0.1 < row["mean confidence"] < high + 0.1
    few = labelled(slates[: LEAST - 1], [[6, 5]] * (LEAST - 1))
    assert not few.fitted and few.confidence(few.labels[0]) == pytest.approx(expit(1))


def test_the_reader_shows_the_two_answers_of_a_label_if_they_met():
    result = labelled([slate(0, tuple("abcd"))], [[9, 8, 1, 7]])
    assert shown_match(Slot(0, 4), result.labels[0]) == Match(0, 0, 1), "0 and 2 are not neighbours"
    result = labelled([slate(0, tuple("abcd"))], [[9, 8, 7, 1]])
    assert shown_match(Slot(0, 4), result.labels[0]) == Match(0, 0, 3)
