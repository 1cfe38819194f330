"""The reward of one evaluation chain, pure; what a training backend calls in its reward hook.

    R = α·PR + β·OR + γ·VR,   OR = 1{s_chosen > s_j for every other response j},   PR ∈ [0, 1] from a judge      (METHOD §4)

α = 0.5, β = 1.0 are the paper's best; a chain that cannot be parsed earns −0.1 and is shown to no judge.  The declared scores
decide OR, as in the paper.  A tie earns nothing: the paper's indicator is strict.  *Our choice*: where no process score exists
(no judge, a judge that failed) PR adds nothing rather than lowering the reward, and the breakdown says NaN; and VR = 1 for a chain whose
declared scores are the weighted sums of its own rubric, γ = 0 unless asked for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pgenrm_train.chains.chain import DECLARED_DIFFERS, Chain, ParseFailure, parse_chain

ProcessScore = float | Callable[[Chain], float | None] | None


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """β (`outcome`), α (`process`), the reward of a chain that cannot be parsed (`format_error`) and γ (`verified`)."""

    outcome: float = 1.0
    process: float = 0.5
    format_error: float = -0.1
    verified: float = 0.0


@dataclass(frozen=True, slots=True)
class Reward:
    """The scalar that trains and its raw, unweighted parts: `outcome` 0 | 1, `process` 0..1 or NaN, `format` 0 | format_error;
    `verified` 0 | 1 where it has a weight."""

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
) -> Reward:
    """Reward of the chain in `text` when `responses[chosen_index]` is the one that the user preferred.

    `process` is a score in [0, 1], None, or a judge that is asked once, with the parsed chain, and may answer None.
    Raises ValueError for an index outside the responses and a process score outside [0, 1].
    """
    if not 0 <= chosen_index < n_responses:
        raise ValueError(
            f"chosen_index: {chosen_index} is not one of the {n_responses} responses, 0..{n_responses - 1}"
        )
    given = None if callable(process) else _checked(process)
    chain = parse_chain(text, n_responses)
    verified = {"verified": _agrees(chain)} if weights.verified else {}
    if isinstance(chain, ParseFailure):
        return Reward(
            weights.format_error,
            {"outcome": 0.0, "process": math.nan, "format": weights.format_error} | verified,
        )
    judged = _checked(process(chain)) if callable(process) else given
    outcome = float(
        all(chain.scores[chosen_index] > s for i, s in enumerate(chain.scores) if i != chosen_index)
    )
    total = weights.outcome * outcome + (0.0 if judged is None else weights.process * judged)
    total += weights.verified * verified.get("verified", 0.0)
    return Reward(
        total,
        {"outcome": outcome, "process": math.nan if judged is None else judged, "format": 0.0} | verified,
    )


def _agrees(chain: Chain | ParseFailure) -> float:
    """1 for a chain with a complete rubric whose sums are the scores that it declares."""
    return float(
        isinstance(chain, Chain)
        and chain.verified_scores is not None
        and DECLARED_DIFFERS not in chain.issues
    )


def group_advantages(totals: Sequence[float], *, epsilon: float = 1e-6) -> list[float]:
    """GRPO's group-relative advantages, `(r − mean) / (std + ε)` with the sample standard deviation (ddof 1).

    A group of one, or of equal rewards, teaches nothing: zeros.
    """
    if len(totals) < 2 or max(totals) == min(totals):
        return [0.0] * len(totals)
    mean, deviation = statistics.fmean(totals), statistics.stdev(totals)
    return [(total - mean) / (deviation + epsilon) for total in totals]


def _checked(process: float | None) -> float | None:
    """The process score, None when there is none (None or NaN)."""
    if process is None or math.isnan(process):
        return None
    if not 0.0 <= process <= 1.0:
        raise ValueError(f"process: {process!r} is outside [0, 1]")
    return float(process)
