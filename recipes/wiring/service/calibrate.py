"""Fit the probabilities of a service on validation users of the run (`serving.probabilities`)."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from eval.metrics.calibration import fit_temperature
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_json
from pgenrm_train.prompts.writer import load_pairs, pairs_of_split
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.serving.probabilities import FILE, ProbabilityModel, read_probabilities
from pgenrm_train.serving.scoring import Task
from pgenrm_train.serving.service import Service

LEAST_PAIRS = 20
AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Measured:
    """A vote's margin, and each response's margins against anchors; None without scores."""

    user_id: str
    margin: float | None
    chosen: tuple[float, float] | None
    rejected: tuple[float, float] | None


def calibrated(service: Service, model: str) -> Service:
    """The service with the calibration of its run folder; `serve.calibrate` fits it first.

    Raises ArtifactError for a calibration of another model, DataError for too few validation pairs.
    """
    config = service.config
    path = Path(config.run_dir) / "serve" / FILE
    if config.serve.calibrate:
        votes = asyncio.run(measure(service, "val", config.serve.calibrate))
        calibration = fit(votes, config.score.ind, config.score.pro, model)
        write_json(path, asdict(calibration))
        print(f"calibrated on {calibration.pairs} pairs of {calibration.users} users: {path}", flush=True)
    elif not path.exists():
        return service
    return replace(service, calibration=read_probabilities(path, model))


async def measure(service: Service, split: str, most: int) -> list[Measured]:
    """Score about `most` votes of a split: the pair, and each response alone against anchors."""
    pairs = load_pairs(Path(service.config.run_dir))
    chosen = pairs_of_split(pairs, split, most)
    users = {pair.user_id for pair in chosen}
    votes: dict[str, list[PreferencePair]] = {user: [] for user in users}
    for pair in pairs:
        if pair.split == "train" and pair.user_id in users:
            votes[pair.user_id].append(pair)
    free = asyncio.Semaphore(AT_ONCE)

    async def one(pair: PreferencePair) -> Measured:
        async with free:
            return await _measure(service, pair, votes[pair.user_id])

    return list(await asyncio.gather(*map(one, chosen)))


async def _measure(service: Service, pair: PreferencePair, votes: Sequence[PreferencePair]) -> Measured:
    earlier = tuple(v for v in votes if pair.time is None or v.time is None or v.time < pair.time)
    defaults = service.config.score
    both = (pair.chosen, pair.rejected)
    task = Task(pair.user_id, False, earlier, pair.context, both, None, defaults.ind, defaults.pro)
    scored = await service.run(task)
    margin = float(scored.scores[0] - scored.scores[1])
    alone = [(await service.margins(replace(task, responses=(response,))))[0] for response in both]
    return Measured(pair.user_id, margin if np.isfinite(margin) else None, alone[0], alone[1])


def fit(votes: Sequence[Measured], ind: int, pro: int, model: str) -> ProbabilityModel:
    """The temperature of groups, and the three parameters of single responses."""
    from sklearn.linear_model import LogisticRegression

    margins = np.array([vote.margin for vote in votes if vote.margin is not None])
    single = [(m, label) for v in votes for m, label in ((v.chosen, 1), (v.rejected, 0)) if m is not None]
    labels = [label for _, label in single]
    if len(margins) < LEAST_PAIRS or len(set(labels)) < 2:
        raise DataError(
            f"serve.calibrate: of {len(votes)} validation pairs {len(margins)} have scores; "
            f"expected at least {LEAST_PAIRS}"
        )
    model_of_single = LogisticRegression().fit(np.array([m for m, _ in single]), labels)
    against_chosen, against_rejected = map(float, model_of_single.coef_[0])
    return ProbabilityModel(
        temperature=fit_temperature(margins),
        single=(float(model_of_single.intercept_[0]), against_chosen, against_rejected),
        pairs=len(margins),
        users=len({vote.user_id for vote in votes}),
        ind=ind,
        pro=pro,
        model=model,
    )
