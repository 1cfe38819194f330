"""Sequential rule for when sampling of a pair may stop within a budget of M chains (METHOD §7).

A chain votes for the response that it scores higher; ties and failures vote for neither.

    M   chains of the budget, drawn or not
    D   those of them that vote; W: the votes for one response
    p   probability at a look of so many votes for it in the sample, if half of D voted so and all remaining
        chains vote (hypergeometric tail)

    stop for the response if p ≤ c and it has more votes for than against
    c = the largest level with P(stop for it at any look | W ≤ D/2) ≤ α, for every D

The order of the draws is not informative, so the votes so far are a sample *without replacement*.  A stop
means that the response has the majority of the full budget, with error at most α over all looks together.
The test is group-sequential with one nominal level c for all looks (Pocock, *Group sequential methods in the
design and analysis of clinical trials*, Biometrika 1977).

The error of each level is computed exactly: the distribution of the votes is propagated from draw to draw,
for every D in its worst case W = ⌊D/2⌋.  (With a smaller W, every path of votes for the response is less
likely.)  The computation omits stops for the other response, and the condition on the mean below.  Both
omissions can only overstate the error.

Our choices.
- The score stays the *mean* of METHOD §7, while the proof is about votes.  So a stop also requires that the
  running mean agrees with the votes.  `replay` and benchmarks/learning/adaptive_stopping.py measure the
  saving of both conditions, and how often the mean over all M would have decided otherwise.
- The mean of n similar users' chains shifts every vote.  The similar users depend on the first chain, whose
  analysis finds them, so the order is slightly informative.  The bound then holds on average over orders, not
  given the shift.
- α bounds the error for each response: a pair that is an exact draw may be stopped for either.
- α is not a level for the accuracy, which loses less: verdicts that are close to a draw are right about as
  often one way as the other.
"""

from collections.abc import Mapping
from functools import cache

import numpy as np

from pgenrm_train.errors import ConfigError

ROUNDING = 1e-9  # equal sums of probabilities differ by less
LOOKS = 5  # rounds over the queue; few, because a look waits for the slowest chain of its round


def looks(budget: int, alpha: float) -> tuple[int, ...]:
    """Numbers of chains at which to look: the first that can settle pairs, then evenly up to the budget.

    Raises ConfigError for an alpha outside (0, 1).
    """
    return (*stops(budget, alpha), budget)


@cache
def stops(budget: int, alpha: float) -> Mapping[int, np.ndarray]:
    """Map look t to bool (t + 1, t + 1): whether w votes for and l against settle the verdict."""
    if not 0 < alpha < 1:
        raise ConfigError(f"eval.adaptive={alpha} is an error level and must lie between 0 and 1")
    for first in range(1, budget):
        times = sorted({round(x) for x in np.linspace(first, budget, LOOKS)})[:-1]
        nominal = {t: _nominal(t, budget) for t in times}
        if nominal[first].min() > alpha + ROUNDING:
            continue
        if (tables := _at_level(budget, alpha, nominal))[first].any():
            return tables
    return {}


def _at_level(budget: int, alpha: float, nominal: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Tables of p ≤ c at every look, for the largest c that keeps α.

    At c = 0 the rest of the budget cannot change the majority.
    """
    levels = np.unique([0.0, *(p for table in nominal.values() for p in table.flat)])
    low, high = 0, len(levels)
    while high - low > 1:
        middle = (low + high) // 2
        keeps = _error(budget, _stops(nominal, levels[middle])) <= alpha + ROUNDING
        low, high = (middle, high) if keeps else (low, middle)
    return _stops(nominal, levels[low])


def _stops(nominal: Mapping[int, np.ndarray], level: float) -> dict[int, np.ndarray]:
    """Tables of p ≤ level with more votes for than against."""
    return {t: (p <= level + ROUNDING) & np.tri(len(p), k=-1, dtype=bool) for t, p in nominal.items()}


# With torch loaded, numpy's comparisons of plain numbers may set the flag and warn
@np.errstate(invalid="ignore")
def settled(margins: np.ndarray, drawn: int, alpha: float) -> np.ndarray:
    """Whether each pair (G,) needs no further chain at the look after `drawn` chains.

    `margins` (G, M) are chosen − rejected scores per chain plus the similar users' mean margin, NaN for a
    failure.  Only the first `drawn` are read.
    """
    if drawn >= margins.shape[1]:
        return np.ones(len(margins), dtype=bool)
    sample = np.nan_to_num(margins[:, :drawn])  # a failed chain votes for neither response
    stop = stops(margins.shape[1], alpha)[drawn]
    for_chosen, for_rejected, total = (sample > 0).sum(axis=1), (sample < 0).sum(axis=1), sample.sum(axis=1)
    return np.asarray(
        (stop[for_chosen, for_rejected] & (total > 0)) | (stop[for_rejected, for_chosen] & (total < 0))
    )


def replay(margins: np.ndarray, alpha: float) -> np.ndarray:
    """Count the chains (G,) that the rule would have drawn from a full pool of `margins` (G, M)."""
    used = np.full(len(margins), margins.shape[1])
    for drawn in reversed(looks(margins.shape[1], alpha)):
        used[settled(margins, drawn, alpha)] = drawn
    return used


def _nominal(drawn: int, budget: int) -> np.ndarray:
    """p (drawn + 1, drawn + 1) of w votes for and l against after `drawn` chains; 1 for w + l > `drawn`."""
    from scipy.stats import hypergeom

    w, against = np.indices((drawn + 1, drawn + 1))
    all_votes = w + against + budget - drawn
    p = hypergeom.sf(w - 1, all_votes, all_votes // 2, w + against)
    return np.where(w + against <= drawn, p, 1.0)


def _error(budget: int, stop: Mapping[int, np.ndarray]) -> float:
    """Largest probability, over D = 0 … M, of a stop for a response that has ⌊D/2⌋ of D votes."""
    D = np.arange(budget + 1)[:, None, None]
    W, side = D // 2, (budget + 1) // 2 + 1
    w, against = np.indices((side, side))[:, None]
    P = np.zeros((budget + 1, side, side))  # of w votes for and l against, without a stop so far
    P[:, 0, 0] = 1.0
    error = np.zeros(budget + 1)
    for drawn in range(max(stop, default=0)):
        vote, opposed = (P * (count / (budget - drawn)) for count in (W - w, D - W - against))
        P *= (budget - D - (drawn - w - against)) / (budget - drawn)
        P[:, 1:] += vote[:, :-1]
        P[:, :, 1:] += opposed[:, :, :-1]
        if (table := stop.get(drawn + 1)) is not None:
            ends = np.zeros((side, side), dtype=bool)
            inside = table[:side, :side]
            ends[: inside.shape[0], : inside.shape[1]] = inside
            error += P[:, ends].sum(axis=1)
            P[:, ends] = 0.0
    return float(error.max())
