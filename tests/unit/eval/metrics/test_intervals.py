"""Bootstrap intervals have their nominal coverage, and the two ways to draw users agree."""

import numpy as np
import pytest

from eval.metrics.intervals import FEW_USERS, few_users, interval, macro
from pgenrm_train.bootstrap import user_bootstrap


def coverage(n_users: int, pairs: int = 20, trials: int = 300) -> float:
    """Share of simulations with the true accuracy in the interval; users differ (Beta(2, 1), mean 2/3)."""
    rng = np.random.default_rng(n_users)
    covered = 0
    for trial in range(trials):
        hits = rng.binomial(pairs, rng.beta(2, 1, size=n_users)).astype(float)
        low, high = user_bootstrap(hits, np.full(n_users, float(pairs)), draws=300, seed=trial)
        covered += low <= 2 / 3 <= high
    return covered / trials


@pytest.mark.parametrize("n_users", [30, 100])
def test_interval_covers_the_truth_when_users_differ(n_users):
    """Resampling single pairs would cover far less: 20 pairs of one user are not independent."""
    assert 0.90 <= coverage(n_users) <= 0.99


def test_few_users_are_named_because_their_interval_is_too_narrow():
    assert coverage(4) < 0.87 < 0.89 < coverage(FEW_USERS)
    assert few_users(1) and few_users(FEW_USERS - 1) and few_users(FEW_USERS) is None


def test_pairs_drawn_singly_would_cover_too_little():
    """The simulation detects a wrong interval."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        hits = rng.binomial(20, rng.beta(2, 1, size=30))
        pairs = np.concatenate([[1.0] * hit + [0.0] * (20 - hit) for hit in hits])
        low, high = user_bootstrap(pairs, np.ones(600), draws=200, seed=trial)
        covered += low <= 2 / 3 <= high
    assert covered / 200 < 0.75


def test_many_equal_users_are_drawn_by_kind_with_the_same_result():
    """500 users of 3 kinds use the multinomial; tiny offsets make them all different and use the indices."""
    sums = np.random.default_rng(0).integers(0, 3, size=500).astype(float)
    counts = np.full(500, 2.0)
    grouped = user_bootstrap(sums, counts, draws=20_000, seed=1)
    single = user_bootstrap(sums + np.arange(500) * 1e-9, counts, draws=20_000, seed=1)
    assert grouped == pytest.approx(single, abs=0.003)


def test_missing_values_are_ignored():
    values, users = np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, 0.0]]), np.array([0, 1, 2])
    assert macro(values, users) == 0.5
    low, high = interval(values, users, 200, 0)
    assert (low, high) == (0.0, 1.0)  # two users have a value
    assert interval(values[:2], users[:2], 200, 0) == [0.0, 1.0]  # one user: the whole range
