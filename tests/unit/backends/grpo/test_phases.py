"""Phases of GRPO before an engine runs them: settings of their own, and the way to the process that trains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pgenrm_train.backends.grpo.engine import Phase, _phase
from pgenrm_train.config import Config


def phase(**settings: object) -> Phase:
    return Phase(
        "curriculum", Path("cre/checkpoint"), Path("rows.parquet"), Path("arm"), 3, settings=settings
    )


def test_an_arm_has_settings_of_its_own_and_the_session_keeps_its() -> None:
    config = Config(recipe="curriculum")
    own = phase(schedule="anti", seed=7).config(config)
    assert (own.curriculum.schedule, own.curriculum.seed, config.curriculum.schedule) == ("anti", 7, "linear")
    assert own.curriculum.rows == config.curriculum.rows and own.cre is config.cre
    assert phase().config(config) == config


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="shedule"):
        phase(shedule="anti").config(Config())


def test_a_phase_reaches_the_training_process_as_it_is() -> None:
    sent = phase(schedule="uniform", process_weight=0.5)
    assert _phase(json.loads(json.dumps(dataclasses.asdict(sent), default=str))) == sent
