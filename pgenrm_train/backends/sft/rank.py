"""Program of each rank, whether it starts in place, by torchrun or by Ray Train."""

import functools
import math
import os
import pkgutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pgenrm_train.backends.sft.batches import (
    Chats,
    Encoded,
    Layout,
    MicroBatch,
    StepOrder,
    batching_of,
    collate,
    layout_of,
    pad_of,
)
from pgenrm_train.backends.sft.job import STEPS, Job
from pgenrm_train.backends.sft.settings import set_variables, training_arguments
from pgenrm_train.config import ClusterConfig, Config, attention_of
from pgenrm_train.config.setting import known
from pgenrm_train.run.checkpoints import newest_complete, step_of
from pgenrm_train.run.process import die_with_parent
from pgenrm_train.run.tracking import trim

# Longest answer of a validation over the longest training chain: all processes wait for the longest.
LONGER = 1.5


def train_rank(job: Job) -> None:
    """Train until the planned steps are made, from the newest complete checkpoint.

    Each process finds that checkpoint by itself: a launcher may start processes again after a loss.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.utils import logging

    set_variables(job.config.cluster)
    join_processes(job.config.cluster)
    trainer = _trainer(job)
    first = trainer.is_world_process_zero()
    resume = newest_complete(job.steps, STEPS, clean=first)
    if first:
        trim(job.metrics, step_of(resume) if resume else -1)
        if resume:
            print(f"resuming from {resume}", flush=True)
    trainer.args.eval_on_start = trainer.validate is not None and resume is None
    # The bar of each checkpoint's shards breaks the training's bar, and prints a traceback if interrupted
    # as it starts.
    logging.disable_progress_bar()
    try:
        with _without_compiling(job.config.cluster):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        unset_hf_deepspeed_config()  # or ZeRO-3 would shard the next model of this process


def _without_compiling(cluster: ClusterConfig) -> AbstractContextManager[object]:
    """DeepSpeed would compile Muon's iteration, which takes a CPU longer than it saves."""
    import torch

    return torch.compiler.set_stance("force_eager") if cluster.device == "cpu" else nullcontext()


def join_processes(cluster: ClusterConfig) -> None:
    """Start the process group now, because ZeRO-3 needs the world size while the weights load."""
    import deepspeed

    on_cpu = cluster.device == "cpu"
    if on_cpu:
        # gloo's start would compile an op for minutes; if killed, its lock would block the next run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if cluster.ranks > 1:
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl")


def leave_processes() -> None:
    """End the process group, so that the next user of this process starts its own."""
    from accelerate.state import AcceleratorState
    from deepspeed import comm
    from torch import distributed

    if distributed.is_initialized():
        comm.destroy_process_group()
        comm.comm.cdb = None  # or DeepSpeed would continue with the ended group
    AcceleratorState._reset_state(reset_partial_state=True)


def _trainer(job: Job) -> Any:
    from transformers import AutoTokenizer

    from pgenrm_train.backends.sft.generate import TrainingGenerator
    from pgenrm_train.backends.sft.trainer import PsiCallback, SftTrainer

    psi, chats = job.config.psi, Chats(job.chats)
    order = StepOrder(chats.lengths, batching_of(psi, job.config.cluster), job.config.seed, known(psi.epochs))
    # Trainer must have DeepSpeed's settings before the weights are loaded (ZeRO-3 shards while loading).
    arguments = training_arguments(job.config, job.steps, order.accumulation)
    model, tokenizer = _model(job), AutoTokenizer.from_pretrained(job.start)
    validate = None
    if job.validator:
        # without gradients and optimiser, batches may be larger
        batch_size = max(8 * psi.micro_batch_size, 1 if job.config.cluster.device == "cpu" else 32)
        limit = min(job.config.model.max_response_tokens, math.ceil(LONGER * chats.longest_answer))
        generator = TrainingGenerator(job.config.model, model, tokenizer, batch_size, limit)
        validate = functools.partial(pkgutil.resolve_name(job.validator)(job.config), generator)
    return SftTrainer(
        psi,
        order=order,
        validate=validate,
        metrics=job.metrics,
        model=model,
        args=arguments,
        train_dataset=chats,
        data_collator=functools.partial(_collate, job.config, tokenizer),
        callbacks=[PsiCallback(psi, order, job.metrics, job.mark, validate is not None)],
    )


def _model(job: Job) -> Any:
    """The model to train, with its adapter, its attention and our loss."""
    import torch
    from peft import LoraConfig as Adapter
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from pgenrm_train.backends.sft import attention
    from pgenrm_train.backends.sft.loss import train_in_pieces

    psi, settings, device = job.config.psi, job.config.model, job.config.cluster.device
    kernel = "sdpa" if device == "cpu" else attention_of(job.config)
    if layout_of(psi, device) is Layout.PACKED and not kernel.startswith("flash_attention"):
        kernel = attention.register_packed()
    if psi.sequence_parallel > 1:
        attention.share_heads(AutoConfig.from_pretrained(job.start), kernel, psi.sequence_parallel)
    dtype = torch.float32 if device == "cpu" else getattr(torch, settings.dtype)
    model = AutoModelForCausalLM.from_pretrained(job.start, dtype=dtype, attn_implementation=kernel)
    train_in_pieces(model)
    if not settings.lora.rank:
        return model
    adapter = Adapter(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=settings.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def _collate(config: Config, tokenizer: Any, micro_batches: Sequence[list[Encoded]]) -> MicroBatch:
    """This rank's only micro-batch, or its part of the sequence that it shares with its neighbours."""
    from pgenrm_train.backends.sft.attention import part_of

    psi, pad = config.psi, pad_of(tokenizer)
    packed = layout_of(psi, config.cluster.device) is Layout.PACKED
    batch = collate(micro_batches[0], pad=pad, packed=packed, score_weight=psi.score_weight)
    if psi.sequence_parallel == 1:
        return batch
    return part_of(batch, int(os.environ["RANK"]) % psi.sequence_parallel, psi.sequence_parallel, pad)


if __name__ == "__main__":
    # ranks that outlive a killed run would hold the GPUs, and write into the files of its successor
    die_with_parent()
    train_rank(Job.read(Path(sys.argv[1])))
    leave_processes()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may outlive the group; joined by C++'s exit handlers they abort the process, and torchrun
    # would call that a failed rank although its checkpoint is complete
    os._exit(0)
