"""cre, then curriculum, with one start of Ray, actor and vLLM for both."""

import functools
from collections.abc import Sequence

from pgenrm_train.config import GRPO_STAGES, Config, StageName
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages.stage import Start, prepare, run_stage, start_of, with_totals
from recipes import build_data, criteria
from recipes.wiring.grpo import synthesized, train


def run(config: Config) -> None:
    run_stages(config, GRPO_STAGES)


def run_stages(config: Config, stages: Sequence[StageName]) -> None:
    """Train `stages` one after the other; the engine is started once for all incomplete ones."""
    prepare(config)
    start = start_of(config, stages[0].starts_from)
    config = with_totals(config, start.checkpoint)
    build_data.run(config)
    if any(synthesized(config, stage) for stage in stages):
        criteria.run(config)
    try:
        for number, stage in enumerate(stages):
            inputs = (*start.made_by, *([StageName.CRITERIA] if synthesized(config, stage) else []))
            body = functools.partial(train, config, stages[number:], start.checkpoint)
            summary = "{steps} optimiser steps, judge={judge}"
            folder = run_stage(config, stage, body, summary, inputs=inputs)
            start = Start(folder.path / "checkpoint", (stage,))
    finally:
        Tracker.close_early()
