"""One session of veRL for the tests of this folder, in both modes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import verl_world
from grpo_session import (
    CURRICULUM_STEPS,
    ROWS,
    STEPS,
    children_of_ray,
    config,
    cre,
    curriculum,
    unreliable_judge,
)
from llm_server import serve

from pgenrm_train.backends.grpo.phase import Phase
from pgenrm_train.backends.grpo.scoring import JudgeSpec
from pgenrm_train.backends.grpo.supervisor import launch
from pgenrm_train.config import EndpointConfig
from pgenrm_train.config.stage_names import StageName


@pytest.fixture(scope="package", autouse=True)
def judge_on_path() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(verl_world.__file__).parent), prepend=os.pathsep)
    yield
    patch.undo()


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    verl_world.write_checkpoint(folder / "start", sft_steps=220)
    verl_world.write_rows(folder / "rows.parquet", ROWS)
    verl_world.write_rows(folder / "validation.parquet", 10, seed=5, both_orders=True)
    verl_world.write_rows(folder / "mirror.parquet", ROWS, turned=True)
    return folder


@pytest.fixture(scope="package")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All phases in one session, since its start takes longer than their steps.

    CRE, two arms of the curriculum, and CRE with a language model as judge; in the folder `async`, CRE, the
    curriculum and CRE with a dead judge and two updates per step, all with `mode=async`.
    """
    run = tmp_path_factory.mktemp("run")
    second = curriculum(world, run)
    arm = Phase(
        StageName.CURRICULUM,
        run / "cre/checkpoint",
        world / "rows.parquet",
        run / "arm",
        1,
        settings={"schedule": "uniform"},
    )
    with serve(unreliable_judge()) as server:
        settings = EndpointConfig(
            kind="endpoint",
            base_url=server.url,
            name="stub",
            attempts=1,
            timeout_seconds=1.0,
            give_up_after=99,
        )
        third = Phase(
            StageName.CRE,
            world / "start",
            world / "rows.parquet",
            run / "judged",
            2,
            judge=JudgeSpec(
                "pgenrm_train.backends.api.roles:judge_for_rewards", settings, run / "judge_cache"
            ),
            settings={"warmup_steps": 1},
        )
        whole = config(run)
        done = launch(whole, [cre(world, run), second, arm, third, *in_async(world, run / "async")])
    assert [t.steps for t in done] == [STEPS, CURRICULUM_STEPS, 1, 2, STEPS, CURRICULUM_STEPS, 2]
    assert not children_of_ray()
    return run


def in_async(world: Path, run: Path) -> list[Phase]:
    first, second = cre(world, run), curriculum(world, run)
    dead = dataclasses.replace(
        first, work_dir=run / "dead", steps=2, validation=None, gold=None,
        judge=JudgeSpec("verl_world:dead_judge"), settings={"max_null_share": 1.0, "mini_batch_prompts": 4},
    )  # fmt: skip
    return [
        dataclasses.replace(phase, settings=phase.settings | {"mode": "async"})
        for phase in (first, second, dead)
    ]
