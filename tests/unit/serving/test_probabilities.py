"""Probabilities are fitted on validation users, kept with the run, and refused for another model."""

import json
import math

import numpy as np
import pytest
from serving_world import StubEngine, configured, running, service_of

from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import write_table
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.rows import pair_to_row
from pgenrm_train.serving.probabilities import ProbabilityModel
from recipes.wiring.service.calibrate import Measured, calibrated, fit


def like(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


def test_the_fit_finds_the_truth():
    """Outcomes drawn by a known law: fitted probabilities are within 0.03 of it on new margins."""
    rng = np.random.default_rng(0)
    votes = []
    for n in range(4000):
        margin = rng.normal(0, 3)
        margin *= 1 if rng.random() < like(margin / 2) else -1
        margins = rng.normal(0, 2, size=(2, 2))
        liked = rng.random(2) < [like(0.5 * c + 0.25 * x - 0.2) for c, x in margins]
        chosen = next((tuple(m) for m, yes in zip(margins, liked) if yes), None)
        rejected = next((tuple(m) for m, yes in zip(margins, liked) if not yes), None)
        votes.append(Measured(f"u{n % 50}", margin, chosen, rejected))
    calibration = fit(votes, 1, 0, "m")
    first, second = calibration.best_probabilities(np.array([3.0, 1.0]))
    assert first + second == pytest.approx(1) and first > 0.6
    a, chosen, rejected = calibration.single
    assert (a, chosen, rejected) == pytest.approx((-0.2, 0.5, 0.25), abs=0.1)
    assert calibration.users == 50 and calibration.pairs == 4000


def test_a_response_without_a_score_has_no_probability():
    calibration = ProbabilityModel(2.0, (0.0, 1.0, 1.0), 9, 3, 1, 0, "m")
    assert calibration.best_probabilities(np.array([1.0, np.nan, 1.0])) == [0.5, None, 0.5]
    assert calibration.best_probabilities(np.array([np.nan, np.nan])) == [None, None]
    assert calibration.best_probabilities(np.array([1e4, -1e4])) == [1.0, 0.0]
    assert calibration.single_probability(1e6, 1e6) <= 1 and calibration.single_probability(-1e6, 0) >= 0


def pairs(users):
    """Users who like short responses, less surely when lengths are close."""
    rng = np.random.default_rng(1)
    for user in range(users):
        for n in range(8):
            short, long = sorted(rng.integers(1, 12, size=2) * 4)
            texts = "x" * short, "y" * long
            chosen, rejected = texts if rng.random() < 0.8 else texts[::-1]
            context, split = (Message("user", f"Question {n}?"),), "train" if n < 5 else "val"
            yield PreferencePair(f"{user}-{n}", f"u{user}", context, chosen, rejected, split=split)


def run_folder(tmp_path, users=12):
    write_table(tmp_path / "build_data" / "pairs.parquet", [pair_to_row(pair) for pair in pairs(users)])
    return configured(tmp_path, serve__calibrate=36) if users else None


def test_a_service_is_calibrated_once_and_reads_it_later(tmp_path):
    config = run_folder(tmp_path)
    config.run_dir = str(tmp_path)
    service = calibrated(service_of(config, StubEngine()), "digest")
    kept = json.loads((tmp_path / "serve" / "calibration.json").read_text())
    assert kept["pairs"] == 36 and kept["users"] == 12 and kept["model"] == "digest"
    assert sum(service.calibration.single[1:]) > 0, "shorter is likelier"
    config.serve.calibrate = 0
    again = calibrated(service_of(config, StubEngine()), "digest")
    assert again.calibration == service.calibration
    vote = {"query": "q", "chosen": "x", "rejected": "y" * 40}
    with running(again) as client:
        body = {"history": [vote], "query": "q2", "responses": ["x" * 4, "y" * 36]}
        first, second = client.post("/v1/score", json=body).json()["probabilities"]
        assert first > 0.5 > second and first + second == pytest.approx(1)
        other = client.post("/v1/score", json=body | {"ind": 2}).json()["probabilities"]
        assert other == [None, None], "calibrated for ind=1"
    with pytest.raises(ArtifactError, match="fitted for another model"):
        calibrated(service_of(config, StubEngine()), "other")


def test_too_few_pairs_are_refused(tmp_path):
    config = run_folder(tmp_path, users=3)
    config.run_dir = str(tmp_path)
    with pytest.raises(DataError, match="expected at least 20"):
        calibrated(service_of(config, StubEngine()), "digest")
    assert not (tmp_path / "serve").exists()
