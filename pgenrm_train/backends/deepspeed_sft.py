"""PSI's engine: transformers' Trainer on DeepSpeed, loss on assistant tokens only.

One code path for nano on a CPU and 70B with LoRA on a cluster.  A single process runs in place; several are started by torchrun,
which runs this file's `main` on a job description.  Checkpoints carry a marker that is written last, so that one cut off by a
kill is recognised and passed over on resume.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgenrm_train.artifacts import publish_folder, write_json
from pgenrm_train.backends.base import Trained
from pgenrm_train.config import Config, parse, to_dict
from pgenrm_train.errors import BackendError, DataError, NothingTrainedError
from pgenrm_train.tracking import METRICS, append, trim

COMPLETE = "complete.json"  # the last file written into a checkpoint
IGNORED = -100  # label of tokens without loss


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one chat and the index of the first token that bears loss."""

    ids: tuple[int, ...]
    loss_from: int


def environment(config: Config) -> dict[str, str]:
    """What must be set before torch and DeepSpeed are imported."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    on_cpu = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"} if config.cluster.device == "cpu" else {}
    ranks = config.cluster.nodes * config.cluster.processes_per_node
    return {"TOKENIZERS_PARALLELISM": "false", **on_cpu, **(single if ranks == 1 else {})}


def train(config: Config, rows: Path, *, start: Path | str, work_dir: Path) -> Trained:
    """Fine-tune `start` on the chats in `rows` (parquet; METHOD §3) and publish `work_dir/checkpoint`.

    Rank 0 appends to `work_dir/metrics.jsonl` every `psi.log_every` steps.  Resumes from the newest complete checkpoint under
    `work_dir/steps`.  Raises NothingTrainedError when fewer optimiser steps were made than planned.
    """
    job = work_dir / "job.json"
    write_json(job, {"config": to_dict(config), "rows": str(rows), "start": str(start), "work_dir": str(work_dir)})
    ranks = config.cluster.processes_per_node
    if config.cluster.nodes * ranks == 1:
        return _train_here(config, rows, start, work_dir)
    command = ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "-m", "pgenrm_train.backends.deepspeed_sft", str(job)]
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]], env={**os.environ, **environment(config)}
    )
    if done.returncode:
        raise BackendError(f"torchrun ended with exit code {done.returncode}; the processes' messages stand above")
    result = json.loads((work_dir / "trained.json").read_text())
    return Trained(result["steps"], work_dir / "checkpoint", result["metrics"])


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], limit: int) -> Encoded:
    """Ids of a chat whose last message is the assistant's; loss starts where the generation prompt ends.

    The same ids result from tokenising prompt and answer apart, which is what generation sees: the template's text before the
    answer must be a prefix of the whole.  Raises DataError otherwise or when the chat is longer than `limit`.
    """
    render: Callable[..., str] = tokenizer.apply_chat_template
    prompt = render(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
    whole = render(list(messages), tokenize=False)
    if not whole.startswith(prompt):
        raise DataError("the chat template renders a prompt that is not a prefix of prompt and answer; loss could not be placed")
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    if len(prompt_ids) + len(answer_ids) > limit:
        raise DataError(f"a chat of {len(prompt_ids) + len(answer_ids)} tokens is longer than the model's limit of {limit}")
    return Encoded((*prompt_ids, *answer_ids), len(prompt_ids))


def newest_complete(steps: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are reported and removed."""
    for folder in sorted(steps.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if (folder / COMPLETE).exists():
            return folder
        print(f"ignoring half-written checkpoint {folder}", flush=True)
        shutil.rmtree(folder)
    return None


def _train_here(config: Config, rows: Path, start: Path | str, work_dir: Path) -> Trained:
    os.environ.update({k: v for k, v in environment(config).items() if k not in os.environ})
    _join_processes(config)
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    limit = config.model.max_prompt_tokens + config.model.max_response_tokens
    chats = [encode_chat(tokenizer, chat, limit) for chat in pq.read_table(rows, columns=["messages"])["messages"].to_pylist()]
    if not chats:
        raise DataError(f"{rows} holds no chains to train on")
    trainer = _trainer(config, start, chats, tokenizer, work_dir)
    resume = newest_complete(work_dir / "steps")
    if trainer.is_world_process_zero():
        trim(work_dir / METRICS, int(resume.name.split("-")[1]) if resume else 0)
    if resume:
        print(f"resuming from {resume}", flush=True)
    result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return _finish(config, trainer, tokenizer, result, start, work_dir)


def _finish(config: Config, trainer: Any, tokenizer: Any, result: Any, start: Path | str, work_dir: Path) -> Trained:
    state, planned = trainer.state, trainer.state.max_steps
    if state.global_step < planned or not planned:
        raise NothingTrainedError(f"PSI made {state.global_step} of {planned} planned optimiser steps")
    metrics = {"psi/train_loss": float(result.training_loss), "psi/steps": float(state.global_step)}
    staging = work_dir / "checkpoint.tmp"
    adapter = work_dir / "adapter"
    trainer.save_model(str(adapter if config.model.lora.rank else staging))
    if trainer.is_world_process_zero():
        if config.model.lora.rank:
            _merge(start, adapter, staging, config)
        (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nobody's to load
        tokenizer.save_pretrained(staging)
        publish_folder(staging, work_dir / "checkpoint")
        write_json(work_dir / "trained.json", {"steps": state.global_step, "metrics": metrics})
    return Trained(state.global_step, work_dir / "checkpoint", metrics)


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
    if config.cluster.nodes * config.cluster.processes_per_node > 1:
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl")


def _trainer(config: Config, start: Path | str, chats: Sequence[Encoded], tokenizer: Any, work_dir: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Trainer

    # Trainer must see DeepSpeed's settings before the weights are loaded (ZeRO-3 shards while loading).
    arguments = _arguments(config, work_dir / "steps")
    on_cpu = config.cluster.device == "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        start,
        dtype=torch.float32 if on_cpu else getattr(torch, config.model.dtype),
        attn_implementation="sdpa" if on_cpu else config.model.attention,
    )
    model.config.use_cache = False
    if config.model.lora.rank:
        model = _with_lora(config, model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=_Chats(chats),
        data_collator=lambda batch: _collate(batch, pad),
        callbacks=[_callbacks(work_dir / METRICS)],
    )


class _Chats:
    """A map-style dataset of encoded chats."""

    def __init__(self, chats: Sequence[Encoded]) -> None:
        self.chats = chats

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> Encoded:
        return self.chats[index]


def _collate(batch: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """Left-padded input_ids, attention_mask and position_ids, (batch, longest); labels (batch, kept) of the last `kept` tokens.

    Ends are aligned, so that the assistant's tokens, which alone are trained on, stand together: logits are made for these
    `kept` columns only.  A prompt is several times as long as its chain, and a row of logits as long as the vocabulary.
    """
    import torch

    longest = max(len(chat.ids) for chat in batch)
    kept = 1 + max(len(chat.ids) - chat.loss_from for chat in batch)  # and the token before, which predicts the first
    ids = torch.full((len(batch), longest), pad)
    labels = torch.full((len(batch), kept), IGNORED)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, chat in enumerate(batch):
        n, trained = len(chat.ids), len(chat.ids) - chat.loss_from
        ids[row, longest - n :] = torch.tensor(chat.ids)
        labels[row, kept - trained :] = torch.tensor(chat.ids[chat.loss_from :])
        mask[row, longest - n :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels, "logits_to_keep": kept}


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
    ranks = config.cluster.nodes * config.cluster.processes_per_node
    return TrainingArguments(
        output_dir=str(steps),
        per_device_train_batch_size=psi.micro_batch_size,
        gradient_accumulation_steps=psi.batch_size // (psi.micro_batch_size * ranks),
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
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        disable_tqdm=False,
    )


def _callbacks(metrics: Path) -> Any:
    from transformers import TrainerCallback

    class Callbacks(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, {"step": state.global_step})

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
            if logs and state.is_world_process_zero and "loss" in logs:
                numbers = {f"psi/{name}": float(value) for name, value in logs.items()}
                finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
                append(metrics, {"step": state.global_step, "stage": "psi", **finite})

    return Callbacks()


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    _train_here(parse(job["config"]), Path(job["rows"]), Path(job["start"]), Path(job["work_dir"]))
    from torch import distributed

    distributed.destroy_process_group()  # a rank that exits with its threads running may abort, and torchrun ends the others


if __name__ == "__main__":
    main(sys.argv[1])
