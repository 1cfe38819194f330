"""Reliability curve and expected calibration error (ECE) of score margins.

The question: is a larger margin a surer verdict?  A margin is no probability.  It is read as the log odds of
a Bradley–Terry model, the reading that training a reward model on pairs would give it:

    confidence = σ(|s_chosen − s_rejected| / T) in [1/2, 1)      ECE = Σ_b n_b/n · |accuracy_b − confidence_b|

`ece` takes the scores as they are (T = 1).  `ece_scaled` fits one temperature by maximum likelihood, on one
half of the users for the other half.  So a model is not blamed for the unit of its scores, and the fit does
not see the verdicts that it is judged on.

Bins hold about equally many verdicts, and equal margins share a bin.  A tie counts one half right at
confidence one half.  An order without a valid sample has no margin; `n_failed` counts them.  Our choice; not
in the paper.
"""

from typing import TypedDict

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from eval.metrics.intervals import interval
from eval.metrics.outcomes import outcomes

BINS = 10


class CurvePoint(TypedDict):
    """One bin of verdicts."""

    confidence: float  # mean, at T = 1
    accuracy: float
    ci95: list[float]
    margin: float  # mean size
    verdicts: int


class Calibration(TypedDict):
    ece: float | None  # None without a verdict, as `ece_scaled`
    ece_scaled: float | None  # None with one user, as `temperature`
    temperature: float | None  # fitted on all users
    n: int  # verdicts
    n_failed: int
    curve: list[CurvePoint]


def calibration(predictions: pd.DataFrame, *, draws: int, seed: int, bins: int = BINS) -> Calibration:
    """Measure the calibration of the margins.  Raises DataError for a table that does not fit."""
    grid = outcomes(predictions)
    margin = grid.margin.ravel()
    users = np.repeat(grid.users, grid.margin[0].size)
    valid = ~np.isnan(margin)
    margin, users = margin[valid], users[valid]
    right = (np.sign(margin) + 1) / 2
    confidence = expit(np.abs(margin))
    scaled, temperature = _scaled_confidence(margin, users)

    def point(inside: np.ndarray) -> CurvePoint:
        return {
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(right[inside].mean()),
            "ci95": interval(right[inside][:, None], users[inside], draws, seed),
            "margin": float(np.abs(margin)[inside].mean()),
            "verdicts": int(inside.sum()),
        }

    code = _bins(np.abs(margin), bins)
    return {
        "ece": _ece(confidence, right, bins),
        "ece_scaled": None if scaled is None else _ece(scaled, right, bins),
        "temperature": temperature,
        "n": len(margin),
        "n_failed": int((~valid).sum()),
        "curve": [point(code == b) for b in np.unique(code)],
    }


def fit_temperature(margin: np.ndarray) -> float:
    """The T > 0 with the greatest likelihood Σ log σ(margin/T); very large for uninformative margins."""
    unit = float(np.abs(margin).mean())
    if unit == 0:
        return 1.0
    best = minimize_scalar(
        lambda log_t: -log_expit(margin / (unit * np.exp(log_t))).mean(), bounds=(-7, 7), method="bounded"
    )
    return float(unit * np.exp(best.x))


def _scaled_confidence(margin: np.ndarray, users: np.ndarray) -> tuple[np.ndarray | None, float | None]:
    """Confidence per verdict at the temperature of the other half of the users; temperature of all users."""
    names = np.unique(users)
    if len(names) < 2:
        return None, None
    half = np.isin(users, names[::2])
    scaled = np.empty_like(margin)
    for part in (half, ~half):
        scaled[part] = expit(np.abs(margin[part]) / fit_temperature(margin[~part]))
    return scaled, fit_temperature(margin)


def _ece(confidence: np.ndarray, right: np.ndarray, bins: int) -> float | None:
    if not len(confidence):
        return None
    gaps = np.bincount(_bins(confidence, bins), weights=right - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def _bins(values: np.ndarray, bins: int) -> np.ndarray:
    """Bin number of each value: quantiles, merged where a value spans several."""
    if not len(values):
        return np.zeros(0, dtype=int)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], method="inverted_cdf"))
    code = np.searchsorted(edges, values, side="left")
    return np.unique(code, return_inverse=True)[1]
