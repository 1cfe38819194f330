"""The disagreement probe is balanced, deterministic and swaps histories between twins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.ask.baselines import fit_baseline
from eval.ask.scored import score_pairs
from eval.metrics.accuracy import accuracy_report
from eval.studies import probes
from eval.studies.probes import disagreement_twins, swapped_histories
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import HistoryItem, Message, PreferencePair


def vote(pair_id, user, chosen, rejected, query="q"):
    return PreferencePair(str(pair_id), user, (Message("user", query),), chosen, rejected)


def flat(twins):
    return [pair for twin in twins for pair in twin]


def test_opposite_votes_on_the_same_content_are_matched():
    pairs = [
        vote(1, "a", "yes", "no"),
        vote(2, "b", "no", "yes"),
        vote(3, "c", "yes", "no"),
        vote(4, "d", "no", "yes", query="other"),
    ]
    twins = disagreement_twins(pairs)
    assert len(twins) == 1
    assert {p.chosen for p in twins[0]} == {"yes", "no"}
    assert disagreement_twins(pairs[:1]) == []


def test_as_many_twins_as_different_users_allow():
    # a greedy first-come match takes u2 for u1 and leaves u3 with itself
    pairs = [
        vote(1, "u1", "yes", "no"),
        vote(2, "u3", "yes", "no"),
        vote(3, "u2", "no", "yes"),
        vote(4, "u3", "no", "yes"),
    ]
    twins = disagreement_twins(pairs)
    assert {frozenset((a.user_id, b.user_id)) for a, b in twins} == {
        frozenset(("u1", "u3")),
        frozenset(("u2", "u3")),
    }


def test_a_user_is_no_twin_of_themselves_and_equal_responses_are_left_out():
    assert disagreement_twins([vote(1, "u", "yes", "no"), vote(2, "u", "no", "yes")]) == []
    assert disagreement_twins([vote(1, "u", "same", "same"), vote(2, "v", "same", "same")]) == []


def test_the_assignment_is_of_users_with_votes_either_way_alone(monkeypatch):
    shapes, assign = [], probes.linear_sum_assignment
    monkeypatch.setattr(
        probes, "linear_sum_assignment", lambda costs: shapes.append(costs.shape) or assign(costs)
    )
    pairs = [vote(i, f"u{i % 998}", *(("yes", "no") if i % 3 else ("no", "yes"))) for i in range(1000)]
    assert len(disagreement_twins(pairs)) == 334 and shapes == [(4, 4)]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
def test_no_other_matching_has_more_twins(drawn):
    sides = [[user for user, yes in drawn if yes is way] for way in (True, False)]
    pairs = [
        vote(i, f"u{user}", *(("yes", "no") if yes else ("no", "yes"))) for i, (user, yes) in enumerate(drawn)
    ]
    twins = disagreement_twins(pairs)
    assert all(one.user_id != other.user_id for one, other in twins)
    alone = [len(drawn) - sum(user == name for user, _ in drawn) for name in range(5)]
    assert len(twins) == min(*map(len, sides), *alone), "by Hall's theorem"


votes = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.sampled_from("qr")), max_size=25)


@settings(max_examples=60)
@given(votes, st.randoms())
def test_balance_and_determinism(drawn, random):
    pairs = [
        vote(i, f"u{user}", *(("yes please", "no") if yes else ("no", "yes please")), query=query)
        for i, (user, yes, query) in enumerate(drawn)
    ]
    twins = disagreement_twins(pairs)
    used = [p.pair_id for p in flat(twins)]
    assert len(used) == len(set(used))
    for a, b in twins:
        assert a.user_id != b.user_id
        assert (a.context, a.chosen, a.rejected) == (b.context, b.rejected, b.chosen)
    shuffled = pairs[:]
    random.shuffle(shuffled)
    assert disagreement_twins(shuffled) == twins
    if twins:  # a rule that ignores the user is right for one of two, always
        scores = score_pairs(fit_baseline("longer", [], []), flat(twins))
        assert accuracy_report(scores, draws=5)["accuracy"] == 0.5


class FollowsHistory:
    """A perfectly personal scorer: prefers the response that the history's chosen text names."""

    def score(self, example):
        return tuple(float(text == example.history[0].chosen) for text in example.responses)


def test_own_histories_score_above_and_swapped_ones_below_one_half():
    pairs = [
        vote(1, "a", "yes", "no"),
        vote(2, "b", "no", "yes"),
        vote(3, "c", "yes", "no"),
        vote(4, "d", "no", "yes"),
    ]
    twins = disagreement_twins(pairs)
    own = {p.pair_id: (HistoryItem("earlier", p.chosen, p.rejected),) for p in pairs}
    swapped = swapped_histories(twins, own)
    assert set(swapped) == {p.pair_id for p in flat(twins)}
    for a, b in twins:
        assert swapped[a.pair_id] == own[b.pair_id]
    reports = [
        accuracy_report(score_pairs(FollowsHistory().score, flat(twins), h), draws=5) for h in (own, swapped)
    ]
    assert [r["accuracy"] for r in reports] == [1.0, 0.0]


def test_missing_histories_and_shared_ids_are_refused():
    twins = disagreement_twins([vote(1, "a", "yes", "no"), vote(2, "b", "no", "yes")])
    with pytest.raises(DataError, match="has no history"):
        swapped_histories(twins, {"1": ()})
    shared = disagreement_twins([vote(1, "a", "yes", "no"), vote(1, "b", "no", "yes")])
    with pytest.raises(DataError, match="names several votes"):
        swapped_histories(shared, {"1": ()})
