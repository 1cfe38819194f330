"""What `cre` and `curriculum` share: GRPO on veRL, both stages in one warm session when the pipeline asks for both."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgenrm_train.artifacts import StageFolder, read_json
from pgenrm_train.config import Config
from pgenrm_train.stages import grpo
from pgenrm_train.stages.inputs import PromptWriter, load_pairs
from pgenrm_train.tracking import Tracker
from recipes import build_data
from recipes.build_sec import load_tokenizer
from recipes.run import newest, prepare, progress, run_stage

BEFORE = {"cre": ("psi",), "curriculum": ("cre", "psi")}  # where a stage starts when model.path is not given
JUDGES = {"oracle": "data_builders.oracle:judge_for_rewards", "none": None}


def run_stages(config: Config, stages: Sequence[str]) -> None:
    """Train `stages` one after the other; the engine is started once for all that are still to be done."""
    prepare(config)
    start = Path(config.model.path) if config.model.path else newest(config, *BEFORE[stages[0]]).path / "checkpoint"
    build_data.run(config)
    made_by = [] if config.model.path else [start.parent.name]
    for number, stage in enumerate(stages):
        inputs = ["build_data", *(made_by if number == 0 else [stages[number - 1]])]
        body = functools.partial(train, config, list(stages[number:]), start)
        start = (
            run_stage(config, stage, grpo.reads(stage), inputs, body, "{steps} optimiser steps, judge={judge}").path
            / "checkpoint"
        )


def train(config: Config, stages: Sequence[str], start: Path, folder: StageFolder, tracker: Tracker) -> dict[str, Any]:
    """Run the phases of `stages` in one session; returns the facts of the first, whose folder is open."""
    from pgenrm_train.backends import verl_grpo

    phases = [phase(config, stage, start if n == 0 else None) for n, stage in enumerate(stages)]
    said = [p.work_dir / verl_grpo.TRAINED for p in phases]
    known = [path.exists() for path in said]
    with tracker.follow(folder.path / "metrics.jsonl"):
        trained = verl_grpo.launch(config, phases)[0]
    # One session serves several stages: each stage's time goes to its own row of the table.
    seconds = [read_json(path)["seconds"] for path in said]
    shift = (seconds[0] if known[0] else 0.0) - sum(s for s, before in zip(seconds[1:], known[1:]) if not before)
    return {"steps": trained.steps, "metrics": dict(trained.metrics), "judge": config.judge.kind, "seconds_shift": shift}


def phase(config: Config, stage: str, start: Path | None) -> Any:
    """The engine's description of one stage, with its rows on disk."""
    from pgenrm_train.backends import verl_grpo

    settings = getattr(config, stage)
    work_dir = Path(config.run_dir) / stage
    rows = work_dir / "rows.parquet"
    if not rows.exists():
        tokenizer = load_tokenizer(start or Path(config.run_dir) / "psi" / "checkpoint")
        grpo.write_rows(config, stage, rows, load_pairs(Path(config.run_dir)), PromptWriter(config, tokenizer), progress)
    weights = {"outcome": settings.outcome_weight, "process": settings.process_weight, "format_error": settings.format_error}
    judge = JUDGES[config.judge.kind] if settings.process_weight else None
    mining = getattr(settings, "mining_samples", 0)
    return verl_grpo.Phase(stage, start, rows, work_dir, settings.steps, weights=weights, judge=judge, mining_samples=mining)
