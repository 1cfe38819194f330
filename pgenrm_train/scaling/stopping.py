"""When may sampling of a pair stop?  A sequential rule for the verdict of a budget of M chains (METHOD §7, test-time scaling).

A chain votes for the response that it scores higher; ties and failures vote for none.  Of the budget's M chains, drawn or not, D vote,
W of them for one response; the order in which they are drawn tells nothing, so the votes that are seen are a sample *without
replacement*.  Sampling stops for a response when the majority of the whole budget is proven to be its: where W ≤ D/2, for whichever
D, it stops for that response with a probability of at most α, all looks together.

The test is group-sequential with one nominal level for all looks (Pocock, *Group sequential methods in the design and analysis of
clinical trials*, Biometrika 1977).  At a look, p is the probability of so many votes among those seen if half of D voted so and all
chains that are left vote (hypergeometric tail); p ≤ c and more votes for than against stop.  c is the largest level that keeps α: the
error of each is known exactly, by passing the distribution of the votes on from draw to draw, for every D at its worst, W = ⌊D/2⌋.
(With fewer W every path of votes for the response only shrinks.)  Stops for the other response and the condition on the mean, below,
are left out there, which can only overstate the error.

Our choices.  The score stays the *mean* of METHOD §7,
while the proof is about votes; so a stop also needs the running mean to agree with the votes.  What the two together save, and how
often the mean over all M would have said otherwise, is measured (`replay`, benchmarks/learning/adaptive_stopping.py).  The mean of n similar
users' chains shifts every vote; it hangs on the first chain, whose analysis finds these users, so that with them the order tells a little and
the bound holds on average over orders, not given the shift.  α bounds the error for each response: a pair that is an exact draw may be
stopped for either.  It is no level for the accuracy, which loses less, because verdicts that are close to a draw are right about as
often one way as the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from pgenrm_train.errors import ConfigError

ROUNDING = 1e-9  # sums of probabilities that are equal differ by less
LOOKS = 5  # rounds over the global queue: a look waits for the slowest chain of its round, so that few are better than many


def looks(budget: int, alpha: float) -> tuple[int, ...]:
    """Numbers of chains at which to look: the first that may settle anything, then evenly up to the budget.

    Raises ConfigError for an alpha outside (0, 1).
    """
    return (*stops(budget, alpha), budget)


@cache
def stops(budget: int, alpha: float) -> Mapping[int, np.ndarray]:
    """Look t → (t + 1, t + 1) of bool: where w votes for a response and l against it settle the verdict for it."""
    if not 0 < alpha < 1:
        raise ConfigError(f"eval.adaptive={alpha} is an error level and must lie between 0 and 1")
    for first in range(1, budget):
        times = sorted({round(x) for x in np.linspace(first, budget, LOOKS)})[:-1]
        nominal = {t: _nominal(t, budget) for t in times}
        if (
            nominal[first].min() <= alpha + ROUNDING
            and (found := _at_level(budget, alpha, nominal))[first].any()
        ):
            return found
    return {}


def _at_level(budget: int, alpha: float, nominal: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """p ≤ c at every look, for the largest c that keeps α.  At c = 0 the rest of the budget cannot change the majority."""
    levels = np.unique([0.0, *(p for table in nominal.values() for p in table.flat)])
    low, high = 0, len(levels)
    while high - low > 1:
        middle = (low + high) // 2
        keeps = _error(budget, _stops(nominal, levels[middle])) <= alpha + ROUNDING
        low, high = (middle, high) if keeps else (low, middle)
    return _stops(nominal, levels[low])


def _stops(nominal: Mapping[int, np.ndarray], level: float) -> dict[int, np.ndarray]:
    """Fewer votes for than against settle nothing, whatever the level."""
    return {t: (p <= level + ROUNDING) & np.tri(len(p), k=-1, dtype=bool) for t, p in nominal.items()}


@np.errstate(
    invalid="ignore"
)  # beside torch, numpy's comparisons of plain numbers may raise the flag and warn
def settled(margins: np.ndarray, drawn: int, alpha: float) -> np.ndarray:
    """Which pairs (G,) need no further chain at the look after the first `drawn` of `margins` (G, M): chosen − rejected score of a
    chain, the similar users' mean margin added, NaN where it failed.  What is not drawn is not read."""
    if drawn >= margins.shape[1]:
        return np.ones(len(margins), dtype=bool)
    seen = np.nan_to_num(margins[:, :drawn])  # a chain that failed votes for nobody
    stop = stops(margins.shape[1], alpha)[drawn]
    for_chosen, for_rejected, total = (seen > 0).sum(axis=1), (seen < 0).sum(axis=1), seen.sum(axis=1)
    return np.asarray(
        (stop[for_chosen, for_rejected] & (total > 0)) | (stop[for_rejected, for_chosen] & (total < 0))
    )


def replay(margins: np.ndarray, alpha: float) -> np.ndarray:
    """How many chains of each row (G,) of a full pool of `margins` (G, M) the rule would have drawn."""
    used = np.full(len(margins), margins.shape[1])
    for drawn in reversed(looks(margins.shape[1], alpha)):
        used[settled(margins, drawn, alpha)] = drawn
    return used


def _nominal(drawn: int, budget: int) -> np.ndarray:
    """p (drawn + 1, drawn + 1) of w votes for and l against after `drawn` chains; 1 where w + l exceeds them."""
    from scipy.stats import hypergeom

    w, against = np.indices((drawn + 1, drawn + 1))
    all_votes = w + against + budget - drawn
    p = hypergeom.sf(w - 1, all_votes, all_votes // 2, w + against)
    return np.where(w + against <= drawn, p, 1.0)


def _error(budget: int, stop: Mapping[int, np.ndarray]) -> float:
    """The largest probability, over D = 0 … M, of ever stopping for a response that has ⌊D/2⌋ of D votes."""
    D = np.arange(budget + 1)[:, None, None]
    W, side = D // 2, (budget + 1) // 2 + 1
    w, against = np.indices((side, side))[:, None]
    P = np.zeros((budget + 1, side, side))  # of w votes for and l against, not stopped so far
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
