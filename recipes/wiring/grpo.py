"""What `cre` and `curriculum` share: GRPO on veRL, both stages in one warm session when the pipeline asks for both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import ConfigError
from pgenrm_train.files import read_json, write_json
from pgenrm_train.prompts.writer import PromptWriter, load_pairs
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.progress import progress
from pgenrm_train.run.tracking import METRICS, Tracker, read
from pgenrm_train.stages import grpo
from pgenrm_train.stages.criteria import load as load_criteria
from pgenrm_train.stages.grpo_validation import VALIDATION, write_validation
from pgenrm_train.stages.registry import REGISTRY
from pgenrm_train.stages.stage import Start, prepare, run_stage, start_of
from recipes import build_data, criteria
from recipes.build_sec import load_tokenizer
from recipes.wiring.costs import judge_cost, tell_judge
from recipes.wiring.llm import settings_of

JUDGES = {
    "oracle": "data_builders.teachers.oracle:judge_for_rewards",
    "endpoint": "pgenrm_train.backends.api.roles:judge_for_rewards",
    "none": None,
}


def run_stages(config: Config, stages: Sequence[StageName]) -> None:
    """Train `stages` one after the other; the engine is started once for all that are still to be done."""
    prepare(config)
    start = start_of(config, stages[0].starts_from)
    build_data.run(config)
    if any(synthesized(config, stage) for stage in stages):
        criteria.run(config)
    for number, stage in enumerate(stages):
        inputs = (*start.made_by, *([StageName.CRITERIA] if synthesized(config, stage) else []))
        body = functools.partial(train, config, stages[number:], start.checkpoint)
        summary = "{steps} optimiser steps, judge={judge}"
        folder = run_stage(config, REGISTRY[stage], body, summary, inputs=inputs)
        start = Start(folder.path / "checkpoint", (stage,))


def synthesized(config: Config, stage: str) -> bool:
    """Whether a stage is judged by synthetic criteria where users stated none."""
    return config.sec.synthesize_criteria and bool(getattr(config, stage).process_weight)


def train(
    config: Config, stages: Sequence[str], start: Path, folder: StageFolder, tracker: Tracker
) -> dict[str, Any]:
    """Run the phases of `stages` in one session; returns the facts of the first, whose folder is open."""
    from pgenrm_train.backends.grpo import engine as verl_grpo

    judged = any(getattr(config, stage).process_weight for stage in stages)
    with (
        settings_of(config, "judge", folder.path / "judge_server.log")
        if judged
        else nullcontext(config.judge) as judge
    ):
        phases = [phase(config, stage, start if n == 0 else None, judge) for n, stage in enumerate(stages)]
        judged_by_model = [p for p in phases if p.judge == JUDGES["endpoint"]]
        if judged_by_model:
            folder.note(
                estimate=tell_judge(config, judge, {p.work_dir.name: p.rows for p in judged_by_model})
            )
        said = [p.work_dir / verl_grpo.TRAINED for p in phases]
        known = [path.exists() for path in said]
        with tracker.follow(folder.path / METRICS):
            trained = verl_grpo.launch(config, phases)[0]
    # One session serves several stages: each stage's time goes to its own row of the table.
    seconds = [read_json(path)["seconds"] for path in said]
    shift = (seconds[0] if known[0] else 0.0) - sum(
        s for s, before in zip(seconds[1:], known[1:]) if not before
    )
    counted = folder.path / "hardness.json"
    facts: dict[str, Any] = {
        "steps": trained.steps,
        "metrics": dict(trained.metrics),
        "judge": config.judge.kind,
    }
    if lost := read(folder.path / verl_grpo.RESTARTS):
        facts["restarts"] = [line["reason"] for line in lost]
    if counted.exists():
        facts["hardness"] = read_json(counted)
    if cost := judge_cost(config.judge, [p.work_dir / "judge_cache" for p in judged_by_model]):
        print(f"judge was paid: {cost}", flush=True)
        facts["judge_cost"] = cost
    folder.add_seconds(shift)
    return facts


def phase(config: Config, stage: str, start: Path | None, judge: EndpointConfig) -> Any:
    """The engine's description of one stage, with its rows on disk; judge: as it answers now, a served one included."""
    from pgenrm_train.backends.grpo import engine as verl_grpo

    settings, work_dir = getattr(config, stage), Path(config.run_dir) / stage
    rows, validation = work_dir / grpo.ROWS, work_dir / VALIDATION
    if not rows.exists():
        make_rows(config, stage, start or Path(config.run_dir) / "psi" / "checkpoint")
    weights = {"outcome": settings.outcome_weight, "process": settings.process_weight, "format_error": settings.format_error,
               "verified": settings.verified_weight}  # fmt: skip
    return verl_grpo.Phase(
        stage, start, rows, work_dir, settings.steps, weights=weights, validation=validation if validation.exists() else None,
        **hardness_of(config, stage, work_dir), **(judged_by(config, judge, rows) if settings.process_weight else {}),
    )  # fmt: skip


def make_rows(config: Config, stage: str, tokenizer: Path) -> None:
    """The prompts of a stage, and those that it is validated on."""
    work_dir, pairs = Path(config.run_dir) / stage, load_pairs(Path(config.run_dir))
    write = PromptWriter(config, load_tokenizer(tokenizer))
    synthetic = load_criteria(Path(config.run_dir)) if synthesized(config, stage) else {}
    if (
        not write_validation(config, stage, work_dir / VALIDATION, pairs, write)
        and getattr(config, stage).validate_every
    ):
        print(f"{stage}: no pair has split=val, so nothing is validated while it trains", flush=True)
    known = known_of_pairs(config) if stage == "curriculum" else {}
    grpo.write_rows(config, stage, work_dir / grpo.ROWS, pairs, write, progress, synthetic, **known)
    write_json(work_dir / "trimmed.json", dict(write.trimmed))
    if told := write.told(f"{stage} prompts"):
        print(told, flush=True)


def known_of_pairs(config: Config) -> dict[str, Any]:
    """What tells hard pairs beside the data: an embedder of responses, and the prototypes of users."""
    from recipes import prototypes

    settings, found = config.curriculum, {}
    if settings.similarity != "trigrams" and settings.schedule != "uniform":
        found["embed"] = prototypes.make_embedder(config, settings.similarity)
    if settings.prototypes:
        found["prototype_of"] = prototypes.of_users(Path(settings.prototypes))
    return found


def hardness_of(config: Config, stage: str, work_dir: Path) -> dict[str, Any]:
    """From what the engine knows which pairs are hard; nothing where no schedule asks."""
    settings = config.curriculum
    if stage != "curriculum" or settings.schedule == "uniform":
        return {}
    mined = (
        {"mining_samples": settings.mining_samples, "mirror": work_dir / grpo.MIRROR}
        if grpo.mines(config)
        else {}
    )
    return {"signals": work_dir / grpo.SIGNALS, **mined}


def judged_by(config: Config, judge: EndpointConfig, rows: Path) -> dict[str, Any]:
    """Who rates the process; ConfigError when a language model would have nothing to judge by."""
    if judge.kind != "endpoint":
        return {"judge": JUDGES[judge.kind]}
    said = pq.read_table(rows, columns=["extra_info"])["extra_info"].to_pylist()
    if not any(extra["explicit"] != "{}" for extra in said):
        raise ConfigError(
            f"judge={config.judge.kind} has nothing to judge by: no training user of data={config.data.name} states criteria, style, "
            "attributes or a self-description; use judge=none, or sec.synthesize_criteria=true to infer criteria from their votes"
        )
    # several nodes share no file that SQLite can lock
    cache = str(rows.parent / "judge_cache") if config.cluster.nodes == 1 else None
    kwargs = {"settings": dataclasses.asdict(judge), "cache": cache}
    return {"judge": JUDGES["endpoint"], "judge_kwargs": kwargs, "judge_in_flight": judge.max_in_flight}
