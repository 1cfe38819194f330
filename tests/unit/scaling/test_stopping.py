"""Adaptive stopping: the error level and the budget hold, and chains that are not drawn are not read."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pgenrm_train.errors import ConfigError
from pgenrm_train.scaling.stopping import looks, replay, settled, stops

MARGINS = arrays(
    float,
    st.tuples(st.integers(1, 6), st.integers(1, 20)),
    elements=st.sampled_from([-2.0, -0.5, 0.0, 1.0, np.nan]),
)


@given(MARGINS, st.sampled_from([0.01, 0.1, 0.4]))
def test_the_budget_is_never_exceeded_and_some_chain_is_always_drawn(margins, alpha):
    used = replay(margins, alpha)
    assert ((used >= 1) & (used <= margins.shape[1])).all()
    assert (
        set(used) <= set(looks(margins.shape[1], alpha))
        and looks(margins.shape[1], alpha)[-1] == margins.shape[1]
    )


@given(MARGINS, st.sampled_from([0.05, 0.3]))
def test_a_stop_reads_only_the_drawn_chains(margins, alpha):
    for drawn in looks(margins.shape[1], alpha):
        other = margins.copy()
        other[:, drawn:] = 7.0
        assert np.array_equal(settled(margins, drawn, alpha), settled(other, drawn, alpha))


@given(MARGINS, st.sampled_from([0.05, 0.3]))
def test_the_rule_takes_no_side(margins, alpha):
    assert np.array_equal(replay(margins, alpha), replay(-margins, alpha))


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
@pytest.mark.parametrize(
    ("wins", "votes", "budget"), [(8, 16, 16), (5, 10, 16), (7, 15, 16), (4, 8, 32), (16, 32, 32), (2, 4, 7)]
)
def test_the_error_level_holds_where_the_majority_is_the_other_or_none(alpha, wins, votes, budget):
    """Pools without a majority for the chosen response: stops for it are errors."""
    rng = np.random.default_rng(0)
    pool = np.repeat([1.0, -1.0, 0.0], [wins, votes - wins, budget - votes])
    margins = rng.permuted(np.tile(pool, (4000, 1)), axis=1)
    stopped, wrong = np.zeros(4000, dtype=bool), np.zeros(4000, dtype=bool)
    for drawn in looks(budget, alpha)[:-1]:
        now = settled(margins, drawn, alpha) & ~stopped
        wrong |= now & (margins[:, :drawn].sum(axis=1) > 0)
        stopped |= now
    assert wrong.mean() <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 4000)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("budget", range(2, 8))
def test_the_error_level_holds_in_every_order_of_every_small_pool(budget, alpha):
    for wins, against in itertools.product(range(budget + 1), repeat=2):
        if wins > against or wins + against > budget:
            continue
        pools = [
            [1.0 if i in won else -1.0 if i in lost else 0.0 for i in range(budget)]
            for won in itertools.combinations(range(budget), wins)
            for lost in itertools.combinations(sorted(set(range(budget)) - set(won)), against)
        ]
        margins = np.array(pools)
        used = replay(margins, alpha)
        for_it = np.where(np.arange(budget) < used[:, None], margins, 0.0).sum(axis=1) > 0
        assert ((used < budget) & for_it).mean() <= alpha + 1e-9, (wins, against)


def test_the_error_level_is_spent():
    """With eight of sixteen chains for each response, stops are nearly as frequent as α allows."""
    pool = np.repeat([1.0, -1.0], [8, 8])
    margins = np.random.default_rng(0).permuted(np.tile(pool, (20_000, 1)), axis=1)
    used = replay(margins, 0.1)
    drawn = np.where(np.arange(16) < used[:, None], margins, 0.0).sum(axis=1)
    assert 0.08 <= ((used < 16) & (drawn > 0)).mean() <= 0.1


def test_clear_pairs_stop_early_and_torn_ones_do_not():
    clear, torn = np.full((1, 16), 2.0), np.tile([1.0, -1.0], 8)[None]
    assert replay(clear, 0.1)[0] == 4 and replay(-clear, 0.1)[0] == 4 and replay(torn, 0.1)[0] == 16
    assert replay(np.full((1, 16), np.nan), 0.1)[0] == 16, "a pair whose chains all fail is never settled"


def test_a_majority_that_the_rest_cannot_change_needs_no_level():
    assert replay(np.full((1, 4), 1.0), 0.01)[0] == 3 and looks(2, 0.1) == (2,) and looks(1, 0.1) == (1,)


def test_ties_and_failures_are_no_votes():
    with_gaps = np.full((1, 16), 2.0)
    with_gaps[0, [1, 3]] = [np.nan, 0.0]
    assert replay(with_gaps, 0.1)[0] == 7, "two votes of four, then five of seven"


def test_votes_that_the_mean_contradicts_settle_nothing():
    margins = np.full((1, 16), 0.5)
    margins[0, 2] = -9.0
    assert not settled(margins, 13, 0.2)[0] and settled(np.abs(margins), 13, 0.2)[0]


def test_a_stop_remains_when_a_vote_changes_in_its_favour():
    for budget, alpha in ((16, 0.05), (16, 0.2), (40, 0.1)):
        for t, stop in stops(budget, alpha).items():
            for_it, against = np.nonzero(stop)
            turned = against > 0
            assert stop[for_it[turned] + 1, against[turned] - 1].all() and for_it.max() <= t


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1])
def test_levels_outside_their_range_are_refused(alpha):
    with pytest.raises(ConfigError, match="error level"):
        looks(3, alpha)


def test_most_samples_are_saved_where_chains_agree_and_the_accuracy_stays():
    rng = np.random.default_rng(1)
    truth = np.repeat(rng.normal(0.6, 1.0, 2000), 2)[:, None]
    margins = np.round(2 * truth + 0.8 * rng.normal(size=(4000, 16)), 0) / 2
    used = replay(margins, 0.1)
    early = np.where(np.arange(16) < used[:, None], margins, 0.0).sum(axis=1) > 0
    assert 1 - used.mean() / 16 >= 0.5
    assert abs(early.mean() - (margins.sum(axis=1) > 0).mean()) <= 0.002
