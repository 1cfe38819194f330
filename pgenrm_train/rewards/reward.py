"""The reward of one evaluation chain; training backends call it in their reward hook.

    R = α·PR + β·OR + γ·VR      (METHOD §4)
    OR = 1{s_chosen > s_j for every other response j},   PR ∈ [0, 1] from a judge

α = 0.5 and β = 1.0 are the paper's best.  A chain that cannot be parsed earns −0.1 and no judge sees it.  The
declared scores decide OR, as in the paper, or the recomputed ones (`chains.totals`).  A tie earns nothing,
because the paper's indicator is strict.

*Our choice*: without a process score (no judge, or a judge that failed) PR adds nothing instead of lowering
the reward, and the breakdown holds NaN.  VR = 1 for a chain whose declared scores are the weighted sums of
its own rubric; γ = 0 by default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from pgenrm_train.chains.chain import DECLARED_DIFFERS, Chain, ParseFailure
from pgenrm_train.chains.totals import read_chain
from pgenrm_train.config import Totals

ProcessScore = float | Callable[[Chain], float | None] | None


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """β (`outcome`), α (`process`), γ (`verified`) and the reward of an unparseable chain."""

    outcome: float = 1.0
    process: float = 0.5
    format_error: float = -0.1
    verified: float = 0.0


@dataclass(frozen=True, slots=True)
class Reward:
    """The scalar reward, and its unweighted parts.

    Parts: `outcome` 0 | 1, `process` 0..1 or NaN, `format` 0 | format_error, and `verified` 0 | 1 if it has a
    weight.
    """

    total: float
    parts: dict[str, float]


DEFAULT_WEIGHTS = RewardWeights()


def chain_reward(
    text: str,
    chosen_index: int,
    *,
    process: ProcessScore = None,
    weights: RewardWeights = DEFAULT_WEIGHTS,
    n_responses: int = 2,
    totals: Totals = Totals.DECLARED,
) -> Reward:
    """Parse `text` and compute its reward; the user preferred `responses[chosen_index]`.

    Raises ValueError for an index outside the responses, and as `reward_of` does.

    >>> from pgenrm_train.chains.chain import write_chain
    >>> text = write_chain("Wants it short.", [("short", 60), ("clear", 40)], [[9, 8], [4, 7]])
    >>> chain_reward(text, chosen_index=0, process=0.8).total
    1.4
    >>> chain_reward("not a chain", chosen_index=0).total
    -0.1
    """
    if not 0 <= chosen_index < n_responses:
        raise ValueError(
            f"chosen_index: {chosen_index} is not one of the {n_responses} responses, 0..{n_responses - 1}"
        )
    return reward_of(
        read_chain(text, totals, n_responses).chain, chosen_index, process=process, weights=weights
    )


def reward_of(
    chain: Chain | ParseFailure,
    chosen_index: int,
    *,
    process: ProcessScore = None,
    weights: RewardWeights = DEFAULT_WEIGHTS,
) -> Reward:
    """Reward of a parsed chain.

    `process` is a score in [0, 1], None, or a judge, which is called once with the chain and may return None.
    Raises ValueError for a process score outside [0, 1].
    """
    given = None if callable(process) else _checked(process)
    agrees = (  # complete rubric with the declared sums
        isinstance(chain, Chain)
        and chain.verified_scores is not None
        and DECLARED_DIFFERS not in chain.issues
    )
    verified = {"verified": float(agrees)} if weights.verified else {}
    if isinstance(chain, ParseFailure):
        parts = {"outcome": 0.0, "process": math.nan, "format": weights.format_error}
        return Reward(weights.format_error, parts | verified)
    judged = _checked(process(chain)) if callable(process) else given
    others = (score for i, score in enumerate(chain.scores) if i != chosen_index)
    outcome = float(all(chain.scores[chosen_index] > score for score in others))
    total = weights.outcome * outcome + (0.0 if judged is None else weights.process * judged)
    total += weights.verified * verified.get("verified", 0.0)
    parts = {"outcome": outcome, "process": math.nan if judged is None else judged, "format": 0.0}
    return Reward(total, parts | verified)


def _checked(process: float | None) -> float | None:
    """The process score, or None if there is none (None or NaN).  Raises ValueError outside [0, 1]."""
    if process is None or math.isnan(process):
        return None
    if not 0.0 <= process <= 1.0:
        raise ValueError(f"process: {process!r} is outside [0, 1]")
    return float(process)
