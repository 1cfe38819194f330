"""psi: chains of build_sec → SFT on DeepSpeed → a checkpoint that writes evaluation chains."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pgenrm_train.cluster.preflight.checks import fail_early, stages_of
from pgenrm_train.cluster.preflight.fit import zero_stage_here
from pgenrm_train.config import Config, StageName, psi_cluster
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import METRICS, Tracker
from pgenrm_train.stages.build_sec import SEC
from pgenrm_train.stages.stage import prepare, run_stage, with_totals
from recipes import build_sec
from recipes.wiring.models import NO_VAL, base_model, check_base, validation_pairs


def run(config: Config) -> None:
    prepare(config)
    config = with_totals(config, *([Path(config.model.path)] if config.model.path else []))
    fail_early(config, stages_of(config.recipe))
    check_base(config)
    build_sec.run(config)

    def body(folder: StageFolder, tracker: Tracker) -> Mapping[str, object]:
        from pgenrm_train.backends.sft import engine as deepspeed_sft
        from pgenrm_train.backends.sft.settings import set_variables

        set_variables(psi_cluster(config))
        validates = config.psi.evaluate_every != 0 and bool(validation_pairs(config))
        if config.psi.evaluate_every is None and not validates:
            print(f"psi: accuracy is not measured while training: {NO_VAL}", flush=True)
        validator = "recipes.wiring.models:validation" if validates else None
        trained_config = with_zero_stage(config, folder.path)
        rows, start = Path(config.run_dir) / StageName.BUILD_SEC / SEC, base_model(config)
        with tracker.follow(folder.path / METRICS):
            trained = deepspeed_sft.train(
                trained_config, rows, start=start, work_dir=folder.path, validator=validator
            )
        return {"steps": trained.steps, "metrics": dict(trained.metrics)}

    run_stage(config, StageName.PSI, body, "{steps} optimiser steps")


def with_zero_stage(config: Config, work_dir: Path) -> Config:
    """The configuration with a ZeRO stage: the given one, that of a started training, or the plan's."""
    from pgenrm_train.backends.sft.job import zero_stage_of

    if config.cluster.zero_stage is not None:
        return config
    started = zero_stage_of(work_dir)
    stage, reason = (zero_stage_here(config), "by the plan") if started is None else (started, "as started")
    print(f"psi: ZeRO stage {stage} ({reason}; cluster.zero_stage=null)", flush=True)
    return replace(config, cluster=replace(config.cluster, zero_stage=stage))
