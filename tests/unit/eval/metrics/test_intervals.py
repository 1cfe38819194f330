"""Bootstrap intervals cover the truth about as often as they say, and the two ways to draw users agree."""

import numpy as np
import pytest

from eval.metrics.intervals import FEW_USERS, few_users, interval, macro
from pgenrm_train.bootstrap import user_bootstrap


def coverage(n_users: int, pairs: int = 20, trials: int = 300) -> float:
    """Share of simulated tests whose interval holds the true accuracy; users differ widely (Beta(2, 1), mean 2/3)."""
    rng = np.random.default_rng(n_users)
    covered = 0
    for trial in range(trials):
        hits = rng.binomial(pairs, rng.beta(2, 1, size=n_users)).astype(float)
        low, high = user_bootstrap(hits, np.full(n_users, float(pairs)), draws=300, seed=trial)
        covered += low <= 2 / 3 <= high
    return covered / trials


@pytest.mark.parametrize("n_users", [30, 100])
def test_interval_covers_the_truth_when_users_differ(n_users):
    """Pairs resampled singly would cover far less than 95 %: 20 pairs of one user are not 20 independent votes."""
    assert 0.90 <= coverage(n_users) <= 0.99


def test_few_users_are_named_because_their_interval_is_too_narrow():
    assert coverage(4) < 0.87 < 0.89 < coverage(FEW_USERS)
    assert few_users(1) and few_users(FEW_USERS - 1) and few_users(FEW_USERS) is None


def test_pairs_drawn_singly_would_cover_too_little():
    """The simulation can tell a wrong interval from a right one."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        hits = rng.binomial(20, rng.beta(2, 1, size=30))
        pairs = np.concatenate([[1.0] * hit + [0.0] * (20 - hit) for hit in hits])
        low, high = user_bootstrap(pairs, np.ones(600), draws=200, seed=trial)
        covered += low <= 2 / 3 <= high
    assert covered / 200 < 0.75


def test_many_alike_users_are_drawn_by_kind_with_the_same_result():
    """500 users of 3 kinds take the multinomial; a millionth added to each makes them all different and takes the indices."""
    sums = np.random.default_rng(0).integers(0, 3, size=500).astype(float)
    counts = np.full(500, 2.0)
    grouped = user_bootstrap(sums, counts, draws=20_000, seed=1)
    single = user_bootstrap(sums + np.arange(500) * 1e-9, counts, draws=20_000, seed=1)
    assert grouped == pytest.approx(single, abs=0.003)


def test_what_has_no_value_takes_no_part():
    values, users = np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, 0.0]]), np.array([0, 1, 2])
    assert macro(values, users) == 0.5
    low, high = interval(values, users, 200, 0)
    assert (low, high) == (0.0, 1.0)  # two users have a value
    assert interval(values[:2], users[:2], 200, 0) == [0.0, 1.0]  # one has: the whole range
