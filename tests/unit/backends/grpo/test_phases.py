"""Phases of GRPO before an engine runs them: their own settings, and their JSON for the training process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pgenrm_train.backends.grpo.phase import PHASES, HardnessSource, Phase
from pgenrm_train.backends.grpo.scoring import JudgeSpec
from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.rewards.reward import RewardWeights


def phase(**settings: object) -> Phase:
    paths = Path("cre/checkpoint"), Path("rows.parquet"), Path("arm")
    return Phase(StageName.CURRICULUM, *paths, 3, settings=settings)


def test_an_arm_has_settings_of_its_own_and_the_session_keeps_its() -> None:
    config = Config(recipe="curriculum")
    arm = phase(schedule="anti", seed=7).config(config)
    assert (arm.curriculum.schedule, arm.curriculum.seed, config.curriculum.schedule) == ("anti", 7, "linear")
    assert arm.curriculum.rows == config.curriculum.rows and arm.cre is config.cre
    assert phase().config(config) == config


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="shedule"):
        phase(shedule="anti").config(Config())


def test_a_phase_reaches_the_training_process_as_it_is() -> None:
    plain = phase(schedule="uniform", process_weight=0.5)
    full = dataclasses.replace(
        plain,
        start=None,
        weights=RewardWeights(process=0.0),
        judge=JudgeSpec("module:judge", EndpointConfig(kind="endpoint", max_dollars=2.5), Path("cache"), 16),
        hardness=HardnessSource(Path("signals.parquet"), 4, Path("mirror.parquet")),
        validation=Path("validation.parquet"),
    )
    sent = [plain, full]
    job = json.dumps([dataclasses.asdict(phase) for phase in sent], default=str)
    assert PHASES.validate_python(json.loads(job)) == sent
