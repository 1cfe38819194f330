"""Probabilities from scores, with parameters fitted on validation users.

    P(i is the best of N) = exp(s_i / T) / Σ_j exp(s_j / T)     for N = 2: σ((s_1 − s_2) / T)

This is the Bradley–Terry model that `eval.metrics.calibration` measures, and its extension to N responses
(Plackett–Luce).  T > 0 is fitted by maximum likelihood on the margins of served scores, merged over both
positions.  Our choice; not in the paper.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted parameters, and on what they were fitted."""

    temperature: float
    pairs: int
    users: int
    ind: int
    pro: int
    model: str  # digest of the weights

    def best(self, scores: np.ndarray) -> list[float | None]:
        """P(best) per response among those with a score; None for the others."""
        valid = np.isfinite(scores)
        shifted = np.where(valid, (scores - scores[valid].max(initial=-np.inf)) / self.temperature, -np.inf)
        weights = np.exp(shifted)
        return [float(w / weights.sum()) if ok else None for w, ok in zip(weights, valid)]
