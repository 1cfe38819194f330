"""ECE of the service's probabilities on test users, after a fit on validation users.

    python benchmarks/serving/calibration.py run_dir=runs/personaworld-nano-demo serve.calibrate=300

Arguments are those of `recipe=serve`.  `serve.calibrate` pairs of each split are scored: a group of both
responses, and each response alone.  Prints one JSON object.  Bar: ECE of single responses at most 0.05.
"""

import asyncio
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pgenrm_train.config import load
from pgenrm_train.run.folder import weights_digest
from recipes.wiring.service.calibrate import fit, measure
from recipes.wiring.service.local import checkpoint_of, local_service

BINS = 10


def ece(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Expected calibration error in `BINS` bins of equal numbers."""
    order = np.argsort(probabilities)
    bins = np.array_split(order, BINS)
    gaps = [abs(probabilities[b].sum() - outcomes[b].sum()) for b in bins]
    return float(sum(gaps) / len(probabilities))


def main() -> None:
    config = load("recipe=serve", "serve.local=true", "serve.calibrate=300", *sys.argv[1:])
    most, digest = config.serve.calibrate, weights_digest(checkpoint_of(config))
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(config.serve, calibrate=0, store=f"sqlite:///{folder}/users.db")
        with local_service(replace(config, serve=settings)) as service:
            calibration = fit(
                asyncio.run(measure(service, "val", most)), config.score.ind, config.score.pro, digest
            )
            votes = asyncio.run(measure(service, "test", most))
    margins = np.array([vote.margin for vote in votes if vote.margin is not None])
    pairs = 1 / (1 + np.exp(-margins / calibration.temperature))
    single = [(m, label) for v in votes for m, label in ((v.chosen, 1), (v.rejected, 0)) if m is not None]
    alone = np.array([calibration.single_probability(*m) for m, _ in single])
    both, right = np.concatenate([pairs, 1 - pairs]), np.repeat([1.0, 0.0], len(pairs))
    report = {
        "pairs": len(pairs),
        "accuracy": round(float(((margins > 0) + 0.5 * (margins == 0)).mean()), 4),
        "ece of groups": round(ece(both, right), 4),
        "single responses": len(alone),
        "ece of single responses": round(ece(alone, np.array([label for _, label in single])), 4),
        "calibration": {"temperature": calibration.temperature, "single": calibration.single},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
