"""Means, and the bootstrap over users: pairs of one user depend on each other, so users are drawn."""

from collections.abc import Sequence

import numpy as np


def mean(values: Sequence[float] | np.ndarray) -> float | None:
    """The mean, None without values; of booleans, the share that is true."""
    return float(np.mean(values)) if len(values) else None


def user_bootstrap(sums: np.ndarray, counts: np.ndarray, *, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of Σsums/Σcounts, users drawn with replacement.

    `sums` and `counts` are float (users,).  Users with the same sum and count are interchangeable.  If there
    are many of them, one multinomial over the kinds of users replaces one index per user: the same
    distribution, and cheap for any number of users.  Memory stays below ~64 MB.
    """
    rng = np.random.default_rng(seed)
    kinds, members = np.unique(sums + 1j * counts, return_counts=True)
    grouped = len(kinds) * 8 < len(sums)  # a binomial costs about as much as eight indices
    chunk = max(1, 4_000_000 // (len(kinds) if grouped else len(sums)))
    ratios = []
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        if grouped:
            drawn = rng.multinomial(len(sums), members / len(sums), size=size)
            top, bottom = drawn @ kinds.real, drawn @ kinds.imag
        else:
            index = rng.integers(0, len(sums), size=(size, len(sums)))
            top, bottom = sums[index].sum(axis=1), counts[index].sum(axis=1)
        with np.errstate(invalid="ignore"):
            ratios.append(top / bottom)
    low, high = np.nanpercentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)
