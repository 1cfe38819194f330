"""psi: the chains of build_sec → SFT with transformers on DeepSpeed → a checkpoint that writes evaluation chains."""

from __future__ import annotations

import os
from pathlib import Path

from pgenrm_train.config import Config
from pgenrm_train.stages import psi
from pgenrm_train.tracking import METRICS
from recipes import build_sec
from recipes.run import prepare, run_stage


def run(config: Config) -> None:
    prepare(config)
    build_sec.run(config)

    def body(folder, tracker):  # type: ignore[no-untyped-def]
        from pgenrm_train.backends import deepspeed_sft

        os.environ.update({k: v for k, v in deepspeed_sft.environment(config).items() if k not in os.environ})
        sec = Path(config.run_dir) / "build_sec"
        start = build_sec.base_model(config)
        with tracker.follow(folder.path / METRICS):
            trained = deepspeed_sft.train(config, sec / psi.SEC, start=start, work_dir=folder.path)
        return psi.facts(trained)

    run_stage(config, "psi", psi.READS, ["build_sec"], body, "{steps} optimiser steps")
