"""psi: the chains of build_sec → SFT with transformers on DeepSpeed → a checkpoint that writes evaluation chains."""

from __future__ import annotations

from pathlib import Path

from eval.studies.validation import Validation
from pgenrm_train.backends.protocols import Validator
from pgenrm_train.cluster.preflight import stages_of, still_to_do
from pgenrm_train.config import Config
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.writer import PromptWriter, asked, histories, load_pairs
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.run.tracking import METRICS
from pgenrm_train.stages.build_sec import SEC
from pgenrm_train.stages.registry import PSI
from pgenrm_train.stages.stage import fail_early, prepare, run_stage
from recipes import build_sec
from recipes.build_sec import load_tokenizer


def run(config: Config) -> None:
    prepare(config)
    fail_early(config, stages_of(config))
    check_start(config)
    build_sec.run(config)

    def body(folder, tracker):  # type: ignore[no-untyped-def]
        from pgenrm_train.backends.sft import engine as deepspeed_sft
        from pgenrm_train.backends.sft.settings import set_variables

        set_variables(config)
        sec = Path(config.run_dir) / StageName.BUILD_SEC
        start = build_sec.base_model(config)
        if config.psi.evaluate_every:
            validation_pairs(config)  # there must be some, and this is the time to say so
        with tracker.follow(folder.path / METRICS):
            trained = deepspeed_sft.train(
                config, sec / SEC, start=start, work_dir=folder.path, validator="recipes.psi:validation"
            )
        return {"steps": trained.steps, "metrics": dict(trained.metrics)}

    run_stage(config, PSI, body, "{steps} optimiser steps")


def check_start(config: Config) -> None:
    """What is wrong with the model that PSI starts from is told before chains are made and paid for."""
    from pgenrm_train.backends.sft.checks import check_libraries, inspect_start

    if (
        not still_to_do(config, [StageName.PSI]) or config.model.kind != "hf"
    ):  # a nano may be made of the chains
        return
    check_libraries(config.psi)
    inspect_start(config, build_sec.base_model(config))


def validation(config: Config) -> Validator:
    """Accuracy while training: a fixed slice of the validation split, asked and judged by the shared harness."""
    sampler, pairs = histories(config, load_pairs(Path(config.run_dir))), validation_pairs(config)
    writer = PromptWriter(config, load_tokenizer(build_sec.base_model(config)))
    return Validation(config, pairs, {p.pair_id: sampler(p) for p in pairs}, writer)


def validation_pairs(config: Config) -> list[PreferencePair]:
    """Raises DataError when the data has no validation split."""
    if not (pairs := asked(load_pairs(Path(config.run_dir)), "val", config.psi.evaluate_pairs)):
        raise DataError(
            "psi.evaluate_every needs pairs with split=val, and this data has none; set psi.evaluate_every=0"
        )
    return pairs
