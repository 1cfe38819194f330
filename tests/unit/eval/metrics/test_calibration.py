"""Calibration of margins: by hand, and on verdicts with known probabilities."""

import numpy as np
import pandas as pd
import pytest
from prediction_tables import consistent, row
from scipy.special import expit

from eval.metrics.calibration import calibration, fit_temperature


def votes(margins, users=40):
    """One pair per margin (chosen − rejected), the same in both orders."""
    return pd.DataFrame(
        [row(f"p{i}", f"u{i % users}", order, m, 0.0) for i, m in enumerate(margins) for order in (0, 1)]
    )


def drawn(n, unit=1.0, seed=0):
    """Margins with true log odds: the larger score wins with probability σ(|margin|/unit)."""
    rng = np.random.default_rng(seed)
    size = rng.exponential(1.5, n)
    return np.where(rng.random(n) < expit(size), size, -size) * unit


def test_by_hand():
    """Margin 2 is right three times of four, and its confidence is σ(2)."""
    found = calibration(votes([2, 2, 2, -2], users=4), draws=50, seed=0)
    assert found["ece"] == pytest.approx(expit(2) - 0.75)
    assert [(r["confidence"], r["accuracy"], r["verdicts"]) for r in found["curve"]] == [
        (pytest.approx(expit(2)), 0.75, 8)
    ]
    assert (found["n"], found["n_failed"]) == (8, 0)


def test_true_log_odds_are_calibrated_and_another_unit_is_found():
    right = calibration(votes(drawn(3000)), draws=50, seed=0)
    assert right["ece"] < 0.04 and right["temperature"] == pytest.approx(1.0, rel=0.15)
    wrong = calibration(votes(drawn(3000, unit=20.0)), draws=50, seed=0)
    assert (
        wrong["ece"] > 0.1
        and wrong["ece_scaled"] < 0.04
        and wrong["temperature"] == pytest.approx(20.0, rel=0.15)
    )
    accuracies = [r["accuracy"] for r in right["curve"]]
    assert len(accuracies) == 10 and accuracies[0] < 0.6 < 0.9 < accuracies[-1]


def test_margins_that_mislead_get_a_large_temperature():
    assert fit_temperature(-np.abs(drawn(200))) > 100 * 1.5
    assert fit_temperature(np.zeros(3)) == 1.0


def test_ties_failures_and_single_users():
    ties = calibration(consistent([1, 1], score=(5, 5)), draws=50, seed=0)
    assert (ties["ece"], ties["curve"][0]["accuracy"]) == (0.0, 0.5)
    lost = consistent([1, 1]).assign(failure="length")
    nothing = calibration(lost, draws=50, seed=0)
    assert (nothing["ece"], nothing["n"], nothing["n_failed"], nothing["curve"]) == (None, 0, 4, [])
    one = calibration(consistent([1, 0], ["u", "u"]), draws=50, seed=0)
    assert one["ece_scaled"] is None and one["curve"][0]["ci95"] == [0.0, 1.0]
