"""When may sampling of a pair stop?  A sequential rule for the verdict of a budget of M chains (METHOD §7, test-time scaling).

A chain votes for the response that it scores higher; ties and failures vote for none.  Of the budget's M chains, drawn or not, D vote,
W of them for one response; the order in which they are drawn tells nothing, so the first d votes are a sample *without replacement*.
Sampling stops once W > D/2 is proven for one response: what the majority of the whole budget says is then known, except with a
probability of at most α.

The proof is the prior-posterior-ratio martingale of Waudby-Smith and Ramdas, *Confidence sequences for sampling without replacement*
(NeurIPS 2020): for every possible θ = W, R_t(θ) = prior(θ) / posterior_t(θ) is a martingale that starts at 1 when θ is the truth, so
it ever reaches 1/α with probability at most α (Ville), however often one looks.  Stop when R(θ) ≥ 1/α for all θ ≤ D/2, and, as D is
not known before the end, for every D that is still possible.  The prior is beta-binomial; any prior is valid, and ours (¼, ¼) is fast
where chains agree, as most do.

Our choices.  The score stays the *mean* of METHOD §7,
while the proof is about votes; so a stop also needs the running mean to agree with the votes.  What the two together save, and how
often the mean over all M would have said otherwise, is measured (`replay`, benchmarks/adaptive_stopping.py).  The mean of n similar
users' chains is known before and shifts every vote.  α bounds the error for each response; it is no level for the accuracy, which loses
less, because verdicts that are close to a draw are right about as often one way as the other.
"""

from __future__ import annotations

from functools import cache
from math import lgamma, log

import numpy as np

from pgenrm_train.errors import ConfigError

PRIOR = 0.25
LOOKS = 6  # rounds over the global queue: a look waits for the slowest chain of its round, so that few are better than many


@cache
def least_votes(votes: int, left: int, alpha: float) -> int:
    """The least number of `votes` that one response must have when at most `left` more may come; votes + 1 where none is enough.

    Raises ConfigError for an alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"eval.adaptive={alpha} is an error level and must lie between 0 and 1")

    def proven(wins: int, total: int) -> bool:
        return all(_log_ratio(theta, wins, votes, total) >= -log(alpha) for theta in range(total // 2 + 1))

    enough = (v for v in range(votes + 1) if all(proven(v, total) for total in range(votes, votes + left + 1)))
    return next(enough, votes + 1)


def looks(budget: int, alpha: float) -> tuple[int, ...]:
    """Numbers of chains at which to look: the first that may settle anything, then evenly up to the budget."""
    first = next((t for t in range(1, budget + 1) if least_votes(t, budget - t, alpha) <= t), budget)
    return tuple(sorted({round(x) for x in np.linspace(first, budget, LOOKS)}))


@np.errstate(invalid="ignore")  # beside torch, numpy's comparisons of plain numbers may raise the flag and warn
def settled(margins: np.ndarray, drawn: int, alpha: float) -> np.ndarray:
    """Which pairs (G,) need no further chain after the first `drawn` of `margins` (G, M): chosen − rejected score of a chain, the
    similar users' mean margin added, NaN where it failed.  What is not drawn is not read."""
    seen = np.nan_to_num(margins[:, :drawn])  # a chain that failed votes for nobody
    left = margins.shape[1] - drawn
    least = np.array([least_votes(votes, left, alpha) for votes in range(drawn + 1)])
    for_chosen, for_rejected = (seen > 0).sum(axis=1), (seen < 0).sum(axis=1)
    least = least[for_chosen + for_rejected]
    total = seen.sum(axis=1)
    proven = ((for_chosen >= least) & (total > 0)) | ((for_rejected >= least) & (total < 0))
    return np.asarray(proven | (drawn >= margins.shape[1]))


def replay(margins: np.ndarray, alpha: float) -> np.ndarray:
    """How many chains of each row (G,) of a full pool of `margins` (G, M) the rule would have drawn."""
    used = np.full(len(margins), margins.shape[1])
    for drawn in reversed(looks(margins.shape[1], alpha)):
        used[settled(margins, drawn, alpha)] = drawn
    return used


def _log_ratio(theta: int, votes: int, t: int, budget: int) -> float:
    """log R_t(θ) after `votes` of t: the marginal of what was seen over its probability under θ, hypergeometric."""
    if votes > theta or t - votes > budget - theta:
        return float("inf")
    marginal = _log_choose(t, votes) + _log_beta(votes + PRIOR, t - votes + PRIOR) - _log_beta(PRIOR, PRIOR)
    likelihood = _log_choose(theta, votes) + _log_choose(budget - theta, t - votes) - _log_choose(budget, t)
    return marginal - likelihood


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
