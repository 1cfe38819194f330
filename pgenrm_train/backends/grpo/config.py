"""Our typed configuration → verl 0.9.1's `ppo_trainer`, checked before anything starts.

GRPO (METHOD §4) in verl's terms: advantage (r − mean)/(std + 1e-6) over a prompt's group, std with ddof 1;
token-mean loss; clipped ratio; KL as a loss term (low-variance estimator) to a frozen reference; constant
learning rate; AdamW .9/.999; gradient norm 1.

`grpo_keys` is one flat table of verl keys.  `cpu_keys` and `gpu_keys` hold the keys of a device, so a test
can take a GPU table, change an allow-listed few and run it on a CPU.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgenrm_train.config import (
    ROOT,
    Config,
    GrpoConfig,
    StageName,
    attention_of,
    compose,
    places_of,
    seed_of,
    tokens_per_pass,
)
from pgenrm_train.config.checks import grpo_problems
from pgenrm_train.config.grpo import VLLM_ALONE
from pgenrm_train.config.schema import FLASH
from pgenrm_train.config.setting import known
from pgenrm_train.errors import ArtifactError, ConfigError
from pgenrm_train.files import read_json

TRAINER = "pgenrm_sync"  # the registered name of `trainer.ChainTrainer`
JOB_IDS = "pgenrm_train.backends.ray.job_ids"
MODULE = "pgenrm_train.backends.grpo.cpu"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
TOKEN_LIMITS = (
    f"{ACTOR}.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
)


def verl_variables(config: Config) -> dict[str, str]:
    """Environment variables of driver and Ray workers, to be set *before* verl, vLLM or Ray are imported."""
    inherited = [
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)
    ]
    env = {
        # So that recipes, data_builders and eval can be imported in workers.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *inherited]),
        "VERL_USE_EXTERNAL_MODULES": JOB_IDS,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # stages pass local folders only
        "TRANSFORMERS_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",  # its ingestion can keep a core busy, and nothing reads it
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HYDRA_FULL_ERROR": "1",
        "TRANSFER_QUEUE_ENABLE": "1",
        "TQDM_DISABLE": "1",
    }
    if config.cluster.device == "cpu":
        env |= {
            "VERL_USE_EXTERNAL_MODULES": f"{JOB_IDS},{MODULE}",
            "VERL_PLATFORM": "cpu",
            "VERL_ENGINE_DEVICE": "cuda",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # With the `uni` executor: engine and server in one process.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "2",
            # vLLM compiles one small function of the sampler, in 3 seconds, or 20 for the first time.
            "TORCH_COMPILE_DISABLE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "RAY_enable_worker_prestart": "0",  # an idle Python per logical CPU costs seconds
            "RAY_prestart_worker_first_driver": "0",
            # Ray's default of 15 starves the workers on a machine with any other load.
            "RAY_worker_niceness": "0",
        }
    return env


def to_verl(
    config: Config, section: str, *, start: Path, rows: Path, work_dir: Path, total_steps: int
) -> Any:
    """verl's complete configuration (an OmegaConf DictConfig) for `section` (cre or curriculum).

    `start`: checkpoint in Hugging Face format.  `rows`: parquet of prompts.  `work_dir`: folder of veRL's own
    checkpoints. Raises ConfigError or ArtifactError, naming our keys, before verl would fail in a worker.
    """
    check(config, section, start)
    return with_defaults(
        verl_keys(config, section, start=start, rows=rows, work_dir=work_dir, total_steps=total_steps)
    )


def verl_keys(
    config: Config, section: str, *, start: Path, rows: Path, work_dir: Path, total_steps: int
) -> dict[str, object]:
    """The values that we set in verl's configuration, by dotted key; arguments as for `to_verl`."""
    device_keys = cpu_keys if config.cluster.device == "cpu" else gpu_keys
    return {
        **grpo_keys(config, section),
        "actor_rollout_ref.model.path": str(start),
        "data.train_files": str(rows),
        "data.val_files": str(rows),
        "trainer.default_local_dir": str(work_dir / "verl"),
        "trainer.total_training_steps": total_steps,
        "actor_rollout_ref.actor.optim.total_training_steps": total_steps,
        **device_keys(config, section),
        **(separate_keys(config, section) if getattr(config, section).separate else {}),
    }


def with_defaults(keys: Mapping[str, object]) -> Any:
    """verl's `ppo_trainer` with these keys (an OmegaConf DictConfig)."""
    import verl.trainer.config as verl_config
    from omegaconf import OmegaConf, open_dict

    composed = compose(Path(verl_config.__file__).parent, "ppo_trainer")
    with open_dict(composed):
        for key, value in keys.items():
            OmegaConf.update(composed, key, value, merge=False, force_add=True)
    return composed


def check(config: Config, section: str, start: Path) -> None:
    """Divisibility and lengths; each failure names both keys."""
    for problem in grpo_problems(config, StageName(section)):
        raise ConfigError(problem)
    model = config.model
    if not (start / "config.json").exists():
        raise ArtifactError(f"{start} is not a checkpoint: it has no config.json")
    positions = read_json(start / "config.json").get("max_position_embeddings")
    needed = model.max_prompt_tokens + model.max_response_tokens
    if positions is not None and needed > positions:
        raise ConfigError(
            f"model.max_prompt_tokens + model.max_response_tokens = {needed} exceeds the {positions} "
            f"positions of {start}"
        )


def grpo_keys(config: Config, section: str) -> dict[str, object]:
    """Keys that do not depend on the device."""
    grpo: GrpoConfig = getattr(config, section)
    model, cluster, seed = config.model, places_of(config, section).actor.cluster, seed_of(config, section)
    return {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        # Without `bypass_mode`, where the ratio is to the sampler: weights min(actor / sampler, 2) per token.
        "algorithm.rollout_correction.rollout_is": "token" if grpo.steps_ahead else None,
        "data.train_batch_size": known(grpo.prompts_per_step),
        "data.max_prompt_length": model.max_prompt_tokens,
        "data.max_response_length": model.max_response_tokens,
        "data.seed": seed,
        "data.dataloader_num_workers": 0,
        "actor_rollout_ref.nccl_timeout": int(grpo.stall_seconds),
        "actor_rollout_ref.model.lora_rank": model.lora.rank,
        "actor_rollout_ref.model.lora_alpha": model.lora.alpha,
        "actor_rollout_ref.model.target_modules": list(model.lora.target_modules),
        f"{ACTOR}.strategy": "fsdp2",
        f"{ACTOR}.fsdp_config.strategy": "fsdp2",
        "actor_rollout_ref.ref.fsdp_config.strategy": "fsdp2",
        f"{ACTOR}.ppo_mini_batch_size": known(grpo.mini_batch_prompts),
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": grpo.micro_batch_size,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": grpo.micro_batch_size,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": grpo.micro_batch_size,
        f"{ACTOR}.clip_ratio": grpo.clip_ratio,
        f"{ACTOR}.clip_ratio_low": grpo.clip_ratio,
        f"{ACTOR}.clip_ratio_high": grpo.clip_ratio,
        f"{ACTOR}.loss_agg_mode": "token-mean",
        f"{ACTOR}.entropy_coeff": grpo.entropy_coefficient,
        f"{ACTOR}.use_kl_loss": grpo.kl_coefficient > 0,
        f"{ACTOR}.kl_loss_coef": grpo.kl_coefficient,
        f"{ACTOR}.kl_loss_type": "low_var_kl",
        f"{ACTOR}.data_loader_seed": seed,
        f"{ACTOR}.optim.lr": grpo.learning_rate,
        f"{ACTOR}.optim.lr_warmup_steps": grpo.warmup_steps,
        f"{ACTOR}.optim.weight_decay": grpo.weight_decay,
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.n": grpo.group_size,
        f"{ROLLOUT}.temperature": grpo.temperature,
        f"{ROLLOUT}.seed": seed,
        f"{ROLLOUT}.tensor_model_parallel_size": cluster.tensor_parallel,
        f"{ROLLOUT}.max_model_len": model.max_prompt_tokens + model.max_response_tokens,
        f"{ROLLOUT}.enable_prefix_caching": True,
        "reward.num_workers": 0,  # rewards are computed where chains are sampled
        "trainer.nnodes": cluster.nodes,
        "trainer.n_gpus_per_node": cluster.processes_per_node,
        "trainer.device": cluster.device,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        # The last step is always saved.
        "trainer.save_freq": grpo.save_every if grpo.save_every > 0 else known(grpo.steps),
        "trainer.total_epochs": 1_000_000,  # steps, not epochs, end a stage
        "trainer.resume_mode": "disable",  # `trainer` resumes from the newest complete checkpoint
        "trainer.logger": [],  # metrics.jsonl is ours; `tracking.Tracker.follow` forwards it
        "trainer.project_name": config.tracking.project,
        "trainer.experiment_name": f"{Path(config.run_dir).name}-{section}",
        "trainer.v1.trainer_mode": TRAINER,
        "transfer_queue.enable": True,
    }


def separate_keys(config: Config, section: str) -> dict[str, object]:
    """`mode=separate_async`: vLLM has GPUs of its own, to which NCCL copies the actor's weights.

    verl's mode of this name is another trainer, which takes any finished groups; ours stays `trainer`.
    """
    cluster = places_of(config, section).sampler.cluster
    return {
        "actor_rollout_ref.hybrid_engine": False,
        f"{ROLLOUT}.nnodes": cluster.nodes,
        f"{ROLLOUT}.n_gpus_per_node": cluster.processes_per_node,
        f"{ROLLOUT}.gpu_memory_utilization": VLLM_ALONE,
        f"{ROLLOUT}.checkpoint_engine.backend": "nccl",
    }


# Actor and reference compute in fp32; veRL's default is bf16, whatever the type of the weights.
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
IN_FP32: dict[str, object] = {
    f"{ACTOR}.fsdp_config.mixed_precision": FP32,
    "actor_rollout_ref.ref.fsdp_config.model_dtype": "fp32",
    "actor_rollout_ref.ref.fsdp_config.mixed_precision": FP32,
}


def cpu_keys(config: Config, section: str) -> dict[str, object]:
    """fp32; engine and server in one process.

    The log-probabilities of sampling equal those of the actor that sampled, so they are not computed again.
    """
    grpo: GrpoConfig = getattr(config, section)
    return {
        **IN_FP32,
        # With several updates of older chains the sampler is not the old policy.
        "algorithm.rollout_correction.bypass_mode": not grpo.steps_ahead
        or grpo.mini_batch_prompts == grpo.prompts_per_step,
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.model.override_config": {"attn_implementation": "sdpa"},
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        f"{ACTOR}.use_torch_compile": False,
        f"{ACTOR}.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.ref.use_torch_compile": False,
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile": False,
        f"{ROLLOUT}.dtype": "float32",
        f"{ROLLOUT}.enforce_eager": True,
        f"{ROLLOUT}.free_cache_engine": False,
        f"{ROLLOUT}.enable_sleep_mode": False,
        f"{ROLLOUT}.load_format": "auto",
        f"{ROLLOUT}.max_num_seqs": min(256, known(grpo.prompts_per_step) * grpo.group_size),
        f"{ROLLOUT}.max_num_batched_tokens": max(
            8192, config.model.max_prompt_tokens + config.model.max_response_tokens
        ),
        # vLLM 0.28 rewinds the generator of a seeded request after a partial prefill: no CPU generator can.
        f"{ROLLOUT}.enable_chunked_prefill": False,
        f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": 64,
        f"{ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend": (
            "uni" if config.cluster.tensor_parallel == 1 else "mp"
        ),
        f"{ROLLOUT}.agent.num_workers": 0,  # a thread of the driver collects chains: one process less
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    }


def gpu_keys(config: Config, section: str) -> dict[str, object]:
    """The model's type, bf16 by default, with FlashAttention over packed sequences; NCCL is verl's default.

    vLLM shares the GPUs and sleeps during updates.  Rows without padding are cut by tokens.  With one update
    per rollout the actor is still the policy that has sampled, so vLLM's log-probabilities are taken for the
    old policy's, except with LoRA.
    """
    model, cluster, grpo = config.model, config.cluster, getattr(config, section)
    offload, tokens = cluster.offload_optimizer, tokens_per_pass(config, section)
    attention = attention_of(config)
    return {
        # Not with adapters: FSDP2 fixes its dtypes at the first pass, and the reference's pass freezes them.
        "algorithm.rollout_correction.bypass_mode": not model.lora.rank
        and grpo.mini_batch_prompts == grpo.prompts_per_step,
        f"{ACTOR}.use_dynamic_bsz": tokens is not None,
        "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": tokens is not None,
        f"{ROLLOUT}.log_prob_use_dynamic_bsz": tokens is not None,
        **(dict.fromkeys(TOKEN_LIMITS, tokens) if tokens else {}),
        f"{ACTOR}.entropy_from_logits_with_chunking": True,
        "actor_rollout_ref.model.use_remove_padding": attention == FLASH,
        "actor_rollout_ref.model.override_config": {"attn_implementation": attention},
        "actor_rollout_ref.model.enable_gradient_checkpointing": True,
        f"{ACTOR}.fsdp_config.dtype": model.dtype,
        f"{ACTOR}.fsdp_config.param_offload": offload,
        f"{ACTOR}.fsdp_config.optimizer_offload": offload,
        # fp32 master weights.  veRL casts adapters to the type of their base: in bf16 most updates are lost.
        f"{ACTOR}.fsdp_config.model_dtype": "fp32",
        "actor_rollout_ref.ref.fsdp_config.param_offload": True,
        # Never trained: the checkpoint's own precision.
        "actor_rollout_ref.ref.fsdp_config.model_dtype": "bf16",
        **(IN_FP32 if model.dtype == "float32" else {}),
        f"{ROLLOUT}.dtype": model.dtype,
        f"{ROLLOUT}.max_num_seqs": 256,
        f"{ROLLOUT}.gpu_memory_utilization": cluster.gpu_memory_utilization,
        f"{ROLLOUT}.load_format": "safetensors" if model.lora.rank else "dummy",
        f"{ROLLOUT}.layered_summon": bool(model.lora.rank),
        f"{ROLLOUT}.max_num_batched_tokens": max(8192, model.max_prompt_tokens + model.max_response_tokens),
        f"{ROLLOUT}.agent.num_workers": 2 * cluster.nodes,
    }
