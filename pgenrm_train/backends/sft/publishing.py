"""The trained checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pgenrm_train.backends.protocols import Trained
from pgenrm_train.backends.sft.checkpoints import STEPS, is_over, state_of
from pgenrm_train.backends.sft.job import Job
from pgenrm_train.config import Config
from pgenrm_train.errors import ArtifactError, NothingTrainedError
from pgenrm_train.files import staged_folder
from pgenrm_train.run.checkpoints import COMPLETE, newest_complete, step_of

WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


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
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    metrics = {"psi/steps": float(state.global_step), "psi/published_step": float(step_of(source))}
    if losses:
        metrics["psi/train_loss"] = sum(losses) / len(losses)
    return Trained(state.global_step, final, metrics)


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
