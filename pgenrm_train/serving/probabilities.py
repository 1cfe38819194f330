"""Probabilities from scores, with parameters fitted on validation users.

    P(i is the best of N) = exp(s_i / T) / Σ_j exp(s_j / T)     for N = 2: σ((s_1 − s_2) / T)

This is the Bradley–Terry model that `eval.metrics.calibration` measures, and its extension to N responses
(Plackett–Luce).  T > 0 is fitted by maximum likelihood on the margins of served scores, merged over both
positions.

A single response r is compared with anchors: answers that the user chose (c) and rejected (x) in their votes.

    P(r) = σ(a + b_c · mean(s_r − s_c) + b_x · mean(s_r − s_x))

This is Platt scaling (Platt, *Probabilistic outputs for support vector machines*, 1999) of two margins.
a, b_c and b_x are fitted by logistic regression on the chosen (1) and rejected (0) responses of validation
users' votes.  So P(r) is the probability that the user would choose r over a typical rival.

Both are our choices; the paper has no probabilities.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import read_json

FILE = "calibration.json"


@dataclass(frozen=True, slots=True)
class ProbabilityModel:
    """Fitted parameters, and the data and model of the fit."""

    temperature: float
    single: tuple[float, float, float]  # a, b_c, b_x
    pairs: int
    users: int
    ind: int
    pro: int
    model: str  # digest of the weights

    def is_for(self, ind: int, pro: int) -> bool:
        """Whether it was fitted on scores of so many chains."""
        return (self.ind, self.pro) == (ind, pro)

    def best_probabilities(self, scores: np.ndarray) -> list[float | None]:
        """P(best) per response among those with a score; None for the others."""
        valid = np.isfinite(scores)
        shifted = np.where(valid, (scores - scores[valid].max(initial=-np.inf)) / self.temperature, -np.inf)
        weights = np.exp(shifted)
        return [float(w / weights.sum()) if ok else None for w, ok in zip(weights, valid)]

    def single_probability(self, against_chosen: float, against_rejected: float) -> float:
        """P(r) of a single response, from its mean margins against both kinds of anchors."""
        a, chosen, rejected = self.single
        logit = a + chosen * against_chosen + rejected * against_rejected
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, logit))))


def read_probabilities(path: Path, model: str) -> ProbabilityModel:
    """Read fitted parameters.  Raises ArtifactError if they belong to another model."""
    values = read_json(path)
    calibration = ProbabilityModel(**{**values, "single": tuple(values["single"])})
    if calibration.model != model:
        raise ArtifactError(f"{path} was fitted for another model; fit it again with serve.calibrate=PAIRS")
    return calibration
