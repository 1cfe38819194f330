"""Does a larger margin mean a surer verdict?  Reliability curve and expected calibration error (ECE) of score margins.

A margin is no probability.  It is read as the log odds of a Bradley–Terry model, the reading that training a reward model on pairs
would give it:

    confidence = σ(|s_chosen − s_rejected| / T) in [1/2, 1)      ECE = Σ_b n_b/n · |accuracy_b − confidence_b|

`ece` takes the scores as they stand (T = 1).  `ece_scaled` lets one temperature be fitted by maximum likelihood, on one half of the
users for the other half, so that a model is not blamed for the unit of its scores and the fit does not see what it is judged on.
Bins hold about equally many verdicts, and equal margins are never parted.  A tie counts one half right at confidence one half; an
order without a valid sample has no margin and is counted in `n_failed`.  Our choice; not in the paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from eval.metrics.intervals import interval
from eval.metrics.outcomes import outcomes

BINS = 10


def calibration(predictions: pd.DataFrame, *, draws: int, seed: int, bins: int = BINS) -> dict[str, Any]:
    """`ece`, `ece_scaled`, `temperature` (None with one user), `n` verdicts, `n_failed`, and `curve`: a row a bin with mean
    confidence (T = 1), accuracy, its interval over users, mean margin and number of verdicts.

    Raises DataError for a table that does not fit.
    """
    found = outcomes(predictions)
    margin = found.margin.ravel()
    users = np.repeat(found.users, found.margin[0].size)
    valid = ~np.isnan(margin)
    margin, users = margin[valid], users[valid]
    right = (np.sign(margin) + 1) / 2
    confidence = expit(np.abs(margin))
    scaled, temperature = _scaled_confidence(margin, users)
    return {
        "ece": _ece(confidence, right, bins),
        "ece_scaled": None if scaled is None else _ece(scaled, right, bins),
        "temperature": temperature,
        "n": len(margin),
        "n_failed": int((~valid).sum()),
        "curve": _curve(np.abs(margin), confidence, right, users, bins, draws, seed),
    }


def fit_temperature(margin: np.ndarray) -> float:
    """The T > 0 with the greatest likelihood Σ log σ(margin/T); very large where margins say nothing or mislead."""
    unit = float(np.abs(margin).mean())
    if unit == 0:
        return 1.0
    best = minimize_scalar(
        lambda log_t: -log_expit(margin / (unit * np.exp(log_t))).mean(), bounds=(-7, 7), method="bounded"
    )
    return float(unit * np.exp(best.x))


def _scaled_confidence(margin: np.ndarray, users: np.ndarray) -> tuple[np.ndarray | None, float | None]:
    """Confidence of each verdict under the temperature of the other half of the users, and the temperature of all."""
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
    code = _bins(confidence, bins)
    gaps = np.bincount(code, weights=right - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def _bins(values: np.ndarray, bins: int) -> np.ndarray:
    """Number of the bin of each value: quantiles, merged where a value spans several."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], method="inverted_cdf"))
    code = np.searchsorted(edges, values, side="left")
    return np.unique(code, return_inverse=True)[1]


def _curve(
    size: np.ndarray,
    confidence: np.ndarray,
    right: np.ndarray,
    users: np.ndarray,
    bins: int,
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    if not len(size):
        return []
    code = _bins(size, bins)
    rows = []
    for b in range(code.max() + 1):
        inside = code == b
        rows.append(
            {
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(right[inside].mean()),
                "ci95": interval(right[inside][:, None], users[inside], draws, seed),
                "margin": float(size[inside].mean()),
                "verdicts": int(inside.sum()),
            }
        )
    return rows
