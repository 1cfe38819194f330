"""Phases of GRPO before an engine runs them: their own settings, and their JSON for the training process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import verl_world

from pgenrm_train.backends.grpo.config import verl_keys
from pgenrm_train.backends.grpo.phase import PHASES, Draw, HardnessSource, Phase, PhaseRun
from pgenrm_train.backends.grpo.scoring import JudgeSpec
from pgenrm_train.cluster.sizes import with_sizes
from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.curriculum.sampler import CurriculumSampler, PairFacts, Schedule
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


def test_a_step_that_was_sampled_ahead_is_not_drawn_again(tmp_path: Path) -> None:
    """A kill after step 2 with steps 3 and 4 in flight: no batch is lost or repeated."""
    rows = verl_world.write_rows(tmp_path / "rows.parquet", 24)

    def start() -> PhaseRun:
        made = PhaseRun(dataclasses.replace(phase(), rows=rows), Config(recipe="curriculum"))
        facts = PairFacts([True] * 12 + [False] * 12)
        made.sampler = CurriculumSampler(
            24, prompts_per_step=4, steps=6, seed=0, schedule=Schedule("self_paced"), facts=facts
        )
        return made

    def train(run: PhaseRun, step: int) -> Draw:
        for ahead in range(step, min(step + 2, 6) + 1):
            run.draw(ahead)
        drawn = run.draws.pop(step)
        run.sampler.observe((row, 4 * (row % 2), 4) for row in drawn.rows)
        return drawn

    run = start()
    steps = [train(run, step) for step in (1, 2)]
    state = json.loads(json.dumps(run.state_dict()))
    steps += [train(run, step) for step in (3, 4, 5, 6)]
    resumed = start()
    resumed.load_state_dict(state)
    assert [train(resumed, step) for step in (3, 4, 5, 6)] == steps[2:]
    assert all(draw.target == 0.8 and draw.realised is not None for draw in steps)
    del state["ahead"]  # as in a checkpoint of an older version
    resumed = start()
    resumed.load_state_dict(state)
    assert not resumed.draws


def test_only_async_samples_ahead() -> None:
    config = with_sizes(Config(recipe="cre"), StageName.CRE, 64)
    assert config.cre.steps_ahead == 0
    config.cre.mode = "async"
    assert config.cre.steps_ahead == 1
    keys = [verl_keys(config, "cre", start=Path(), rows=Path(), work_dir=Path(), total_steps=1)]
    config.cre.mode = "sync"
    keys += [verl_keys(config, "cre", start=Path(), rows=Path(), work_dir=Path(), total_steps=1)]
    corrected = "algorithm.rollout_correction.rollout_is"
    assert [each[corrected] for each in keys] == ["token", None]
