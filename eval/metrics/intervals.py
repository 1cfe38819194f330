"""Statistics of a table of values (pairs × evaluation seeds) whose pairs cluster by user.

A value is the accuracy of one pair in one evaluation seed, NaN where the protocol drops it.  The bootstrap
resamples users, not pairs: a user comes with all their pairs.
"""

import numpy as np

from pgenrm_train.bootstrap import user_bootstrap

# With fewer users the percentile bootstrap covers clearly less than 95 % (simulated in test_intervals.py).
FEW_USERS = 15


def interval(
    values: np.ndarray,
    users: np.ndarray,
    draws: int,
    seed: int,
    whole_range: tuple[float, float] = (0.0, 1.0),
) -> list[float]:
    """95 % interval of the mean of `values` (pairs, seeds); the full range for fewer than two users."""
    sums, counts = by_user(values, users)
    if sums.size < 2:  # resampling a single user cannot narrow the range
        return list(whole_range)
    return list(user_bootstrap(sums, counts, draws=draws, seed=seed))


def by_user(values: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of the values per user, both float (users with a value,)."""
    sums = np.bincount(users, weights=np.nansum(values, axis=1))
    counts = np.bincount(users, weights=(~np.isnan(values)).sum(axis=1))
    return sums[counts > 0], counts[counts > 0]


def few_users(n_users: int) -> str | None:
    """Warning for readers if `n_users` are too few for an interval over users, else None."""
    if n_users < 2:
        return f"{n_users} user: no interval over users is possible, so the full range is shown instead"
    if n_users < FEW_USERS:
        return f"{n_users} users: too few for an interval over users; the true one is wider"
    return None


def accuracy(values: np.ndarray) -> float | None:
    """Mean over evaluation seeds of the mean over pairs."""
    means = per_seed(values)
    return float(means.mean()) if means.size else None


def stderr(values: np.ndarray) -> float | None:
    """sd/√seeds over evaluation seeds; None with one."""
    means = per_seed(values)
    return float(means.std(ddof=1) / np.sqrt(means.size)) if means.size > 1 else None


def macro(values: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean over groups (users, prototypes; int (pairs,)) of each group's mean."""
    sums, counts = by_user(values, groups)
    return float((sums / counts).mean()) if sums.size else None


def per_seed(values: np.ndarray) -> np.ndarray:
    """Accuracy per evaluation seed that scored at least one pair."""
    scored = values[:, ~np.isnan(values).all(axis=0)]
    return np.nanmean(scored, axis=0)
