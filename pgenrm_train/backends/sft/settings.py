"""Settings of DeepSpeed and of transformers' Trainer, from the configuration."""

import os
from pathlib import Path
from typing import Any

from pgenrm_train.config import ClusterConfig, Config, ModelConfig, PsiConfig
from pgenrm_train.config.setting import known


def deepspeed_variables(cluster: ClusterConfig) -> dict[str, str]:
    """Environment variables that must be set before torch and DeepSpeed are imported."""
    variables = {"TOKENIZERS_PARALLELISM": "false"}
    if cluster.device == "cpu":
        variables |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    if cluster.ranks == 1:
        variables |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return variables


def set_variables(cluster: ClusterConfig) -> None:
    """Set the variables above in this process; values that are already set stay."""
    os.environ.update(deepspeed_variables(cluster) | os.environ)


def deepspeed_settings(cluster: ClusterConfig, model: ModelConfig, psi: PsiConfig) -> dict[str, object]:
    """DeepSpeed's JSON; `auto` values come from TrainingArguments."""
    zero: dict[str, object] = {"stage": known(cluster.zero_stage)}
    if cluster.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if cluster.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    precision: dict[str, object] = {
        "bf16": {"enabled": cluster.device == "cuda" and model.dtype == "bfloat16"}
    }
    if cluster.zero_stage:
        # DeepSpeed adds micro-batches up in the type of the weights, and 64 sums in bf16 lose small ones
        precision["data_types"] = {"grad_accum_dtype": "fp32"}
    muon: dict[str, object] = {
        "lr": "auto",
        "muon_lr": psi.muon_learning_rate,
        "betas": "auto",
        "eps": "auto",
        "weight_decay": "auto",
        "torch_adam": True,  # DeepSpeed's own would be compiled at the first start
    }
    if psi.optimizer == "muon" and cluster.zero_stage == 3:
        zero["reduce_scatter"] = False  # Muon needs whole gradients
    return {
        **precision,
        **({"optimizer": {"type": "Muon", "params": muon}} if psi.optimizer == "muon" else {}),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW, even if the optimiser is offloaded
        "zero_force_ds_cpu_optimizer": False,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def training_arguments(config: Config, steps: Path, accumulation: int) -> Any:
    """Arguments of transformers' Trainer, which saves its checkpoints in `steps`.

    `accumulation`: micro-batches per process and optimiser step.
    """
    from transformers import TrainingArguments

    return TrainingArguments(**trainer_settings(config, steps, accumulation))


def trainer_settings(config: Config, steps: Path, accumulation: int | None) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments`; `accumulation` as above."""
    psi, on_cpu = config.psi, config.cluster.device == "cpu"
    return {
        "output_dir": str(steps),
        "per_device_train_batch_size": 1,  # an item of `batches.Chats` is a micro-batch
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": known(psi.epochs),
        "max_steps": psi.max_steps or -1,
        "learning_rate": known(psi.learning_rate),
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": psi.min_learning_rate_ratio},
        "warmup_steps": psi.warmup_ratio,
        "weight_decay": psi.weight_decay,
        "adam_beta2": psi.beta2,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": psi.gradient_checkpointing,
        "use_cpu": on_cpu,
        "bf16": not on_cpu and config.model.dtype == "bfloat16",
        # torch's own, also on a CPU: DeepSpeed would compile its own at the first start
        "optim": "adamw_torch_fused",
        "deepspeed": deepspeed_settings(config.cluster, config.model, psi),
        "save_strategy": "steps",
        "save_steps": psi.save_every,
        "save_total_limit": psi.keep_checkpoints,
        "logging_steps": psi.log_every,
        "logging_nan_inf_filter": False,  # `SftTrainer` ends a run that diverges
        "report_to": [],
        "seed": config.seed,
        "data_seed": config.seed,
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "metric_for_best_model": "accuracy" if psi.evaluate_every else None,
        "greater_is_better": True,
        "use_liger_kernel": psi.liger,
        # our own cross entropy works in pieces
        "liger_kernel_config": {"cross_entropy": False, "fused_linear_cross_entropy": False}
        if psi.liger
        else None,
        "disable_tqdm": False,
    }
