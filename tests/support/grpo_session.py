"""Phases of a small world for veRL, and what its tests share: metric lines, processes, work in a thread."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from llm_server import slowly

from pgenrm_train.backends.grpo.phase import HardnessSource, Phase
from pgenrm_train.backends.grpo.scoring import JudgeSpec
from pgenrm_train.config import Config
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import BackendError
from pgenrm_train.rewards.reward import RewardWeights

STEPS, ROWS, CURRICULUM_STEPS = 4, 48, 3
CHILD = "backends.grpo.supervisor"  # in the command line of the training process


def config(run_dir: Path, max_failures: int = 0, **changed: Any) -> Config:
    settings = Config(recipe="pipeline", run_dir=str(run_dir))
    settings.cluster.max_failures = max_failures
    settings.model.max_prompt_tokens, settings.model.max_response_tokens = 64, 64
    settings.tracking.kind = "none"
    for section in (settings.cre, settings.curriculum):
        section.prompts_per_step, section.mini_batch_prompts, section.group_size = 8, 8, 4
        section.micro_batch_size, section.learning_rate, section.kl_coefficient = 16, 1e-3, 0.01
        section.save_every, section.keep_checkpoints, section.stall_seconds = 1, 2, 180.0  # a busy machine
        section.validate_every = 3
        for key, value in changed.items():
            setattr(section, key, value)
    settings.curriculum.hard_share_start, settings.curriculum.hard_share_end = 0.25, 0.75
    settings.curriculum.schedule, settings.curriculum.resample = "self_paced", 1
    return settings


def cre(world: Path, run: Path, steps: int = STEPS) -> Phase:
    return Phase(
        StageName.CRE,
        world / "start",
        world / "rows.parquet",
        run / "cre",
        steps,
        judge=JudgeSpec("verl_world:unreliable_judge"),
        gold=JudgeSpec("verl_world:strict_judge"),
        validation=world / "validation.parquet",
    )


def curriculum(world: Path, run: Path) -> Phase:
    """Self-paced, with hardness from one chain in each order."""
    return Phase(
        StageName.CURRICULUM,
        None,
        world / "rows.parquet",
        run / "curriculum",
        CURRICULUM_STEPS,
        weights=RewardWeights(process=0.0),
        hardness=HardnessSource(samples=2, mirror=world / "mirror.parquet"),
    )


def unreliable_judge() -> Any:
    """A judge over HTTP that answers 0.8 · (1 − 0.25) = 0.6; three calls in ten fail, hang or are garbage."""
    troubles = {0: {"status": 500}, 3: {"raw": b"<html>"}, 6: "I would say 1.0!"}

    def behaviour(body: dict[str, Any], number: int) -> Any:
        if number == 7:
            return slowly(2.0, "too late")
        return troubles.get(number % 10, '{"reason": "likes", "covered": 0.8, "unsupported": 0.25}')

    return behaviour


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def training(run: Path, folder: str = "cre", stage: str | None = None) -> list[dict[str, Any]]:
    """The metric lines of training steps; validation has lines of its own."""
    return [
        line for line in lines(run / folder / "metrics.jsonl") if f"{stage or folder}/reward/total" in line
    ]


def children_of_ray() -> list[str]:
    """Command lines of Ray, vLLM and veRL processes below this one."""
    commands = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if any(name in line for name in ("raylet", "ray::", "EngineCore", "gcs_server", CHILD)):
            commands.append(line)
    return commands


def wait_for(condition: Any, seconds: float, event: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s for {event}")


def in_background(work: Any) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BackendError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def processes(name: str) -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]
