"""PSI's engine: transformers' Trainer on DeepSpeed, loss on assistant tokens only.

One code path for nano on a CPU and 70B with LoRA on a cluster.  `train` looks at everything that can be wrong first, encodes the
chats once for all processes, and publishes what training has left on disk.  A single process trains in place; several on one node
are started by torchrun, which runs this file's `main` on a job description, and several nodes' by Ray Train.  Checkpoints carry a
marker that is written last, so that one cut off by a kill is recognised and passed over on resume.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgenrm_train.backends.protocols import Trained
from pgenrm_train.backends.sft import ray_train
from pgenrm_train.backends.sft.batches import Chats, Encoded, StepOrder, collate, layout_of, write_chats
from pgenrm_train.backends.sft.checkpoints import (
    COMPLETE,
    check_resumable,
    is_over,
    newest_complete,
    state_of,
    step_of,
)
from pgenrm_train.backends.sft.checks import check_libraries, encode_rows, inspect_start
from pgenrm_train.config import Config, parse, to_dict
from pgenrm_train.errors import ArtifactError, BackendError, NothingTrainedError
from pgenrm_train.files import publish_folder, read_json, write_json
from pgenrm_train.run.process import die_with_parent
from pgenrm_train.run.tracking import METRICS, trim

CHATS, STEPS = "chats.parquet", "steps"
WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Job:
    """What every process of a training must know; `mark` is written into each checkpoint and compared on resume.

    Paths are absolute: a process on another node has another working directory.
    """

    config: Config
    start: str
    work_dir: Path
    mark: dict[str, Any]
    validator: str | None

    def write(self) -> Path:
        file = self.work_dir / "job.json"
        write_json(file, {**self.__dict__, "config": to_dict(self.config)})
        return file

    @classmethod
    def read(cls, path: Path) -> Job:
        found = read_json(path)
        return cls(
            parse(found["config"]), found["start"], Path(found["work_dir"]), found["mark"], found["validator"]
        )


def deepspeed_variables(config: Config) -> dict[str, str]:
    """What must be set before torch and DeepSpeed are imported."""
    single = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    on_cpu = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"} if config.cluster.device == "cpu" else {}
    return {"TOKENIZERS_PARALLELISM": "false", **on_cpu, **(single if _ranks(config) == 1 else {})}


def train(
    config: Config, rows: Path, *, start: Path | str, work_dir: Path, validator: str | None = None
) -> Trained:
    """Fine-tune `start` on the chats in `rows` (parquet; METHOD §3) and publish `work_dir/checkpoint`.

    Rank 0 appends to `work_dir/metrics.jsonl` every `psi.log_every` steps.  Resumes from the newest complete checkpoint under
    `work_dir/steps`.  `validator` is `module:function`, which makes a `Validator` of the configuration: a name, because every
    process makes its own; with it the checkpoint that it liked best is published, else the last.

    Raises ConfigError, DataError or ArtifactError for what cannot be trained on, before any weight is loaded, and
    NothingTrainedError when fewer optimiser steps were made than planned.
    """
    os.environ.update({k: v for k, v in deepspeed_variables(config).items() if k not in os.environ})
    check_libraries(config)
    found = inspect_start(config, start)
    write_chats(work_dir / CHATS, encode_rows(found.tokenizer, rows, found.limit))
    mark = {"ranks": _ranks(config), "zero_stage": config.cluster.zero_stage, "model": found.identity}
    if resume := newest_complete(work_dir / STEPS):
        check_resumable(resume, mark)
    base = str(Path(start).resolve()) if Path(start).exists() else str(start)
    job = Job(config, base, work_dir.resolve(), mark, validator if config.psi.evaluate_every else None)
    if resume and is_over(config, state_of(resume)):
        trim(work_dir / METRICS, step_of(resume))
    else:
        _run(job)
    return _publish(job, found.tokenizer)


def _ranks(config: Config) -> int:
    return config.cluster.nodes * config.cluster.processes_per_node


def _run(job: Job) -> None:
    if _ranks(job.config) == 1:
        _train_here(job)
    elif job.config.cluster.nodes == 1:
        _torchrun(job.config, job.write())
    else:
        ray_train.run(job.config, job.write(), deepspeed_variables(job.config))


def _torchrun(config: Config, job: Path) -> None:
    ranks = f"--nproc_per_node={config.cluster.processes_per_node}"
    command = ["torchrun", "--standalone", ranks, "-m", "pgenrm_train.backends.sft.engine", str(job)]
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        env={**os.environ, **deepspeed_variables(config)},
        preexec_fn=die_with_parent,
    )
    if done.returncode:
        raise BackendError(
            f"torchrun ended with exit code {done.returncode}; the processes' messages stand above"
        )


def _train_here(job: Job) -> None:
    """One process's part.  Each finds the checkpoint to go on from by itself: a launcher may start processes anew after a loss."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    os.environ.update({k: v for k, v in deepspeed_variables(job.config).items() if k not in os.environ})
    _join_processes(job.config)
    trainer = _trainer(job)
    first = trainer.is_world_process_zero()
    resume = newest_complete(job.work_dir / STEPS, clean=first)
    if first:
        trim(job.work_dir / METRICS, step_of(resume) if resume else 0)
        if resume:
            print(f"resuming from {resume}", flush=True)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        unset_hf_deepspeed_config()  # or ZeRO-3 would shard whatever model this process loads next


def _publish(job: Job, tokenizer: Any) -> Trained:
    """The last checkpoint, or the one that validation liked best, as a plain Hugging Face folder."""
    steps = job.work_dir / STEPS
    last = newest_complete(steps)
    state = state_of(last) if last else None
    if last is None or state is None or not is_over(job.config, state):
        made, planned = (state.global_step, state.max_steps) if state else (0, "the")
        raise NothingTrainedError(f"PSI made {made} of {planned} planned optimiser steps")
    chosen = (
        steps / f"checkpoint-{state.best_global_step}" if job.validator and state.best_global_step else last
    )
    if not (chosen / COMPLETE).exists():
        raise ArtifactError(
            f"{chosen}, which validation liked best, is gone; use another run_dir=, or resume=false"
        )
    staging = job.work_dir / "checkpoint.tmp"
    shutil.rmtree(staging, ignore_errors=True)  # of a start that was killed here
    if job.config.model.lora.rank:
        _merge(job.start, chosen, staging, job.config)
    else:
        staging.mkdir()
        for file in (file for pattern in WEIGHTS for file in chosen.glob(pattern)):
            shutil.copy2(file, staging)
    tokenizer.save_pretrained(staging)
    publish_folder(staging, job.work_dir / "checkpoint")
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    metrics = {"psi/steps": float(state.global_step), "psi/published_step": float(step_of(chosen))}
    if losses:
        metrics["psi/train_loss"] = sum(losses) / len(losses)
    return Trained(state.global_step, job.work_dir / "checkpoint", metrics)


def _merge(start: Path | str, adapter: Path, merged: Path, config: Config) -> None:
    """Base and adapter → one plain checkpoint, in host memory: sharded weights would have to be gathered on every GPU."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # ZeRO-3 would shard the base while it loads
    dtype = torch.float32 if config.cluster.device == "cpu" else getattr(torch, config.model.dtype)
    base = AutoModelForCausalLM.from_pretrained(start, dtype=dtype)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(merged)


def _join_processes(config: Config) -> None:
    """Start the process group now: ZeRO-3 asks for the world size while the weights load."""
    import deepspeed

    on_cpu = config.cluster.device == "cpu"
    if on_cpu:  # gloo's start would compile an op for minutes, and a killed compile leaves a lock that hangs the next run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if _ranks(config) > 1:
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl")


def _trainer(job: Job) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from pgenrm_train.backends.sft import packed_attention
    from pgenrm_train.backends.sft.loss import train_in_pieces
    from pgenrm_train.backends.sft.shared_sequence import share_attention
    from pgenrm_train.backends.sft.trainer import Follower, SftTrainer

    config, psi = job.config, job.config.psi
    # Trainer must see DeepSpeed's settings before the weights are loaded (ZeRO-3 shards while loading).
    arguments = _arguments(config, job.work_dir / STEPS)
    on_cpu = config.cluster.device == "cpu"
    layout = layout_of(config)
    attention = "sdpa" if on_cpu else config.model.attention
    if layout == "packed" and not attention.startswith("flash_attention"):
        attention = packed_attention.register()
    if psi.sequence_parallel > 1:
        share_attention(AutoConfig.from_pretrained(job.start), attention, psi.sequence_parallel)
    model = AutoModelForCausalLM.from_pretrained(
        job.start,
        dtype=torch.float32 if on_cpu else getattr(torch, config.model.dtype),
        attn_implementation=attention,
    )
    train_in_pieces(model)
    if config.model.lora.rank:
        model = _with_lora(config, model)
    tokenizer, chats = AutoTokenizer.from_pretrained(job.start), Chats(job.work_dir / CHATS)
    order = StepOrder(
        chats.lengths,
        layout,
        batch_size=psi.batch_size,
        micro_batch_size=psi.micro_batch_size,
        seed=config.seed,
        copies=psi.sequence_parallel,
    )
    return SftTrainer(
        config,
        order=order,
        validate=_called(job.validator)(config) if job.validator else None,
        tokenizer=tokenizer,
        work_dir=job.work_dir,
        model=model,
        args=arguments,
        train_dataset=chats,
        data_collator=functools.partial(_lay_out, config, tokenizer),
        callbacks=[Follower(config, order, job.work_dir / METRICS, job.mark)],
    )


def _lay_out(config: Config, tokenizer: Any, chats: Sequence[Encoded]) -> dict[str, Any]:
    """This process's micro-batch, or its part of the one that it shares with its neighbours."""
    from pgenrm_train.backends.sft.shared_sequence import share_of

    psi = config.psi
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = collate(chats, pad=pad, packed=layout_of(config) == "packed", score_weight=psi.score_weight)
    if psi.sequence_parallel == 1:
        return batch
    return share_of(batch, int(os.environ["RANK"]) % psi.sequence_parallel, psi.sequence_parallel, pad)


def _called(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _with_lora(config: Config, model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = config.model.lora
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON for the stage; `auto` values come from TrainingArguments."""
    zero: dict[str, Any] = {"stage": config.cluster.zero_stage}
    if config.cluster.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if config.cluster.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also when the optimiser is offloaded
        "bf16": {"enabled": config.cluster.device == "cuda" and config.model.dtype == "bfloat16"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def _arguments(config: Config, steps: Path) -> Any:
    from transformers import TrainingArguments

    psi, on_cpu = config.psi, config.cluster.device == "cpu"
    return TrainingArguments(
        output_dir=str(steps),
        per_device_train_batch_size=psi.micro_batch_size,
        gradient_accumulation_steps=psi.batch_size
        * psi.sequence_parallel
        // (psi.micro_batch_size * _ranks(config)),
        num_train_epochs=psi.epochs,
        max_steps=psi.max_steps or -1,
        learning_rate=psi.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": psi.min_learning_rate_ratio},
        warmup_steps=psi.warmup_ratio,
        weight_decay=psi.weight_decay,
        adam_beta2=psi.beta2,
        max_grad_norm=1.0,
        gradient_checkpointing=psi.gradient_checkpointing,
        use_cpu=on_cpu,
        bf16=not on_cpu and config.model.dtype == "bfloat16",
        optim="adamw_torch_fused",  # torch's own, also on a CPU: DeepSpeed's would be compiled at the first start
        deepspeed=deepspeed_settings(config),
        save_strategy="steps",
        save_steps=psi.save_every,
        save_total_limit=psi.keep_checkpoints,
        logging_steps=psi.log_every,
        logging_nan_inf_filter=False,  # `SftTrainer` ends a run that diverges
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        metric_for_best_model="accuracy" if psi.evaluate_every else None,
        greater_is_better=True,
        use_liger_kernel=psi.liger,
        liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": False}
        if psi.liger
        else None,  # ours is made in pieces
        disable_tqdm=False,
    )


def train_rank(job_file: str) -> None:
    """One process's part of the training that `train` has described in the job file."""
    _train_here(Job.read(Path(job_file)))


def main(job_file: str) -> None:
    die_with_parent()  # ranks that outlive a killed run would hold the GPUs, and go on writing what its successor reads
    train_rank(job_file)
    from torch import distributed

    distributed.destroy_process_group()  # a rank that exits with its threads running may abort, and torchrun ends the others


if __name__ == "__main__":
    main(sys.argv[1])
