"""PSI's engine: transformers' Trainer on DeepSpeed, with loss on assistant tokens only.

One code path serves nano on a CPU and 70B with LoRA on a cluster.  `train` first checks everything that can
be wrong, encodes the chats once for all processes, and publishes the checkpoint that training left on disk.
A single process trains in place.  Several processes on one node are started by torchrun, those of several
nodes by Ray Train; both run `rank` on a job file.  Each checkpoint gets a marker as its last file, so that a
resume recognises and skips a half-written one.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgenrm_train.backends.protocols import Trained
from pgenrm_train.backends.sft import ray_train
from pgenrm_train.backends.sft.batches import write_chats
from pgenrm_train.backends.sft.checks import check_libraries, encode_rows, inspect_start
from pgenrm_train.backends.sft.job import STEPS, Job, Mark, check_resumable, is_over, state_of
from pgenrm_train.backends.sft.rank import leave_processes, train_rank
from pgenrm_train.backends.sft.settings import deepspeed_variables, set_variables
from pgenrm_train.cluster.sizes import settle_sizes
from pgenrm_train.config import Config, StageName, psi_cluster
from pgenrm_train.config.setting import known
from pgenrm_train.errors import ArtifactError, BackendError, NothingTrainedError
from pgenrm_train.files import read_json, staged_folder, write_json
from pgenrm_train.run import timeline
from pgenrm_train.run.checkpoints import COMPLETE, complete_checkpoints, newest_complete, step_of
from pgenrm_train.run.process import run_child
from pgenrm_train.run.tracking import trim

STOP_SECONDS = 15.0  # for torchrun to end its ranks
WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def train(
    config: Config, rows: Path, *, start: Path | str, work_dir: Path, validator: str | None = None
) -> Trained:
    """Fine-tune `start` on the chats in `rows` (parquet; METHOD §3) and publish `work_dir/checkpoint`.

    Rank 0 appends to `work_dir/metrics.jsonl` every `psi.log_every` steps.  Training resumes from the newest
    complete checkpoint in `work_dir/steps`.  `validator` is `module:function`, which makes a `Validator` from
    the configuration: a name, because every process makes its own.  With a validator the best checkpoint is
    published, without one the last.

    Raises ConfigError, DataError or ArtifactError before any weight is loaded if the inputs cannot be trained
    on, and NothingTrainedError if fewer optimiser steps were made than planned.
    """
    config = replace(config, cluster=psi_cluster(config))
    set_variables(config.cluster)
    check_libraries(config.psi)
    inspected = inspect_start(config, start)
    chats = encode_rows(inspected.tokenizer, rows, inspected.limit)
    config = settle_sizes(config, StageName.PSI, len(chats))
    mark = Mark(config.cluster.ranks, known(config.cluster.zero_stage), inspected.identity)
    base = str(Path(start).resolve()) if Path(start).exists() else str(start)
    job = Job(config, base, work_dir.resolve(), mark, None if config.psi.evaluate_every == 0 else validator)
    write_chats(job.chats, chats)
    if resume := newest_complete(job.steps, STEPS):
        check_resumable(resume, mark)
    if resume and is_over(config.psi, state_of(resume)):
        trim(job.metrics, step_of(resume))
    else:
        timeline.mark(timeline.Part.START)
        _run(job)
    timeline.mark(timeline.Part.EXPORT)
    return publish(job, inspected.tokenizer)


def _run(job: Job) -> None:
    cluster = job.config.cluster
    if cluster.ranks == 1:
        try:
            train_rank(job)
        finally:
            leave_processes()
    elif cluster.nodes > 1:
        ray_train.run(job.config, job.write(), deepspeed_variables(cluster))
    else:
        ranks = f"--nproc_per_node={cluster.processes_per_node}"
        module = ["-m", "pgenrm_train.backends.sft.rank", str(job.write())]
        command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", ranks, *module]
        if code := run_child(command, os.environ | deepspeed_variables(cluster), patience=STOP_SECONDS):
            raise BackendError(f"torchrun exited with code {code}; see the messages of its ranks above")


def publish(job: Job, tokenizer: Any) -> Trained:
    """Publish the best checkpoint by validation, or the last one without validation."""
    last = newest_complete(job.steps, STEPS)
    state = state_of(last) if last else None
    if last is None or state is None or not is_over(job.config.psi, state):
        made, planned = (state.global_step, state.max_steps) if state else (0, "the")
        raise NothingTrainedError(f"PSI made {made} of {planned} planned optimiser steps")
    best = state.best_global_step if job.validator else None
    source = job.steps / f"checkpoint-{best}" if best else last
    if not (source / COMPLETE).exists():
        raise ArtifactError(
            f"{source}, the best checkpoint by validation, is missing; use another run_dir=, or resume=false"
        )
    final = job.work_dir / "checkpoint"
    with staged_folder(final) as staging:
        if job.config.model.lora.rank:
            merge_adapter(job.start, source, staging, job.config)
        else:
            staging.mkdir()
            for file in (file for pattern in WEIGHTS for file in source.glob(pattern)):
                shutil.copy2(file, staging)
        tokenizer.save_pretrained(staging)
    prune(job.steps)
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    metrics = {
        "psi/steps": float(state.global_step),
        "psi/published_step": float(step_of(source)),
        "psi/peak_learning_rate": known(job.config.psi.learning_rate),
    }
    if losses:
        metrics["psi/train_loss"] = sum(losses) / len(losses)
    return Trained(state.global_step, final, metrics)


def prune(steps: Path) -> None:
    """Remove the optimiser's states, most of a checkpoint's size: a published training is over.

    Markers change first, so that a kill in between leaves no checkpoint that looks damaged.
    """
    for checkpoint in complete_checkpoints(steps, STEPS):
        marker = read_json(checkpoint / COMPLETE)
        kept = {file: size for file, size in marker["bytes"].items() if not file.startswith("global_step")}
        write_json(checkpoint / COMPLETE, marker | {"bytes": kept})
        for states in checkpoint.glob("global_step*"):
            shutil.rmtree(states)


def merge_adapter(start: Path | str, adapter: Path, merged: Path, config: Config) -> None:
    """Merge base and adapter into one plain checkpoint.

    This takes place in host memory: otherwise every GPU would have to gather the sharded weights.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # ZeRO-3 would shard the base while it loads
    dtype = torch.float32 if config.cluster.device == "cpu" else getattr(torch, config.model.dtype)
    base = AutoModelForCausalLM.from_pretrained(start, dtype=dtype)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(merged)
