"""Emitted engine configurations hold the values of the run, and a comment on each value that we set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgenrm_train.backends.grpo.config import verl_keys, with_defaults
from pgenrm_train.backends.sft.batches import batching_of
from pgenrm_train.backends.sft.settings import deepspeed_settings
from pgenrm_train.backends.vllm.engine import engine_settings
from pgenrm_train.cluster.planning.geometry import geometry_of
from pgenrm_train.cluster.planning.memory import with_zero_stage
from pgenrm_train.cluster.planning.work import with_planned_sizes
from pgenrm_train.config import ROOT, Config, compose, load
from pgenrm_train.errors import ConfigError
from recipes.wiring.engine_config import engine_yaml, sources


def config(model: str, cluster: str, *more: str) -> Config:
    return load("recipe=plan", f"model={model}", f"cluster={cluster}", "data=chatbot_arena", *more)


def verl(config: Config) -> dict[str, Any]:
    place, config = Path("run"), with_planned_sizes(config)
    return verl_keys(config, "cre", start=place, rows=place, work_dir=place, total_steps=1)


# Keys by which the shipped pairs differ: parallelism, precision and batches.
A, R, F = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
ON_CPU = {
    "trainer.device": "cpu",
    f"{R}.dtype": "float32",
    f"{F}.fsdp_config.model_dtype": "fp32",
    "algorithm.rollout_correction.bypass_mode": True,
    "actor_rollout_ref.model.use_remove_padding": False,
    f"{R}.agent.num_workers": 0,
    f"{A}.use_dynamic_bsz": None,
}
ON_GPU = {
    "trainer.device": "cuda",
    f"{R}.dtype": "bfloat16",
    f"{F}.fsdp_config.model_dtype": "bf16",
    "algorithm.rollout_correction.bypass_mode": True,
    "actor_rollout_ref.model.use_remove_padding": False,
    f"{R}.max_num_seqs": 256,
    f"{A}.use_dynamic_bsz": False,
    f"{A}.entropy_from_logits_with_chunking": True,
}
LORA = {f"{R}.load_format": "safetensors", "algorithm.rollout_correction.bypass_mode": False}
CLUSTERS = {
    "cpu": {"trainer.nnodes": 1, "trainer.n_gpus_per_node": 1},
    "gpu1": {"trainer.n_gpus_per_node": 1, f"{A}.fsdp_config.param_offload": True},
    "gpu8": {"trainer.n_gpus_per_node": 8, f"{A}.fsdp_config.param_offload": False},
    "multi_node": {"trainer.nnodes": 4, "trainer.n_gpus_per_node": 8, f"{R}.agent.num_workers": 8},
}


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("model", ["llama31_8b", "qwen3_8b", "llama31_70b_lora", "nano", "nano_1b"])
def test_the_shipped_pairs_have_the_expected_keys(model: str, cluster: str) -> None:
    more = ["psi.batch_size=128", "psi.micro_batch_size=1"] if model.startswith("nano") else []
    settings = config(model, cluster, *more)
    expected = (ON_CPU if cluster == "cpu" else ON_GPU) | CLUSTERS[cluster]
    if cluster != "cpu" and model == "llama31_70b_lora":
        expected |= LORA
    if model == "nano" and cluster != "cpu":
        expected |= {f"{R}.dtype": "float32", f"{F}.fsdp_config.model_dtype": "fp32"}
    keys = verl(settings)
    assert {name: keys.get(name) for name in expected} == expected
    engine = engine_settings(settings)
    assert engine["dtype"] == expected[f"{R}.dtype"]
    assert engine["enable_chunked_prefill"] or engine["max_num_batched_tokens"] >= engine["max_model_len"]
    assert engine["tensor_parallel_size"] == keys[f"{R}.tensor_model_parallel_size"]
    batching = batching_of(with_planned_sizes(settings).psi, settings.cluster)
    assert batching.layout == ("grouped" if cluster == "cpu" else "packed")
    planned = with_zero_stage(with_planned_sizes(settings), geometry_of(settings)).cluster
    assert deepspeed_settings(planned, settings.model, settings.psi)["bf16"] == {
        "enabled": engine["dtype"] == "bfloat16"
    }


# Fields of verl's dataclasses, or without a default, that its YAML does not have.
NOT_IN_YAML = {
    f"{R}.name",
    f"{R}.enable_sleep_mode",
    f"{R}.engine_kwargs.vllm.distributed_executor_backend",
} | {f"{part}.fsdp_config.mixed_precision" for part in (A, F)}


@pytest.mark.parametrize("model", ["nano", "llama31_70b_lora"])
@pytest.mark.parametrize("cluster", ["cpu", "gpu8"])
def test_verl_has_every_key_that_we_set(model: str, cluster: str) -> None:
    import verl.trainer.config as verl_config
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    theirs = compose(Path(verl_config.__file__).parent, "ppo_trainer")
    keys = verl(config(model, cluster, "model.attention=flash_attention_2", "psi.batch_size=128"))
    unknown = {key for key in keys if OmegaConf.select(theirs, key, default=keys) is keys}
    assert unknown <= NOT_IN_YAML
    for part in ("actor", "rollout"):  # the dataclasses refuse fields that they do not have
        omega_conf_to_dataclass(with_defaults(keys).actor_rollout_ref[part])


# What verl 0.9's examples/grpo_trainer/run_qwen3_8b_fsdp.sh sets on eight GPUs, beside files and names.
EXAMPLE: dict[str, Any] = {
    "algorithm.adv_estimator": "grpo",
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 2048,
    "data.filter_overlong_prompts": True,
    "actor_rollout_ref.model.use_remove_padding": True,
    f"{A}.optim.lr": 1e-6,
    f"{A}.ppo_mini_batch_size": 256,
    f"{A}.use_dynamic_bsz": True,
    f"{A}.ppo_max_token_len_per_gpu": 24576,
    f"{A}.use_kl_loss": True,
    f"{R}.name": "vllm",
    f"{R}.tensor_model_parallel_size": 2,
    f"{R}.gpu_memory_utilization": 0.6,
    f"{R}.n": 5,
    f"{R}.log_prob_use_dynamic_bsz": True,
    f"{R}.log_prob_max_token_len_per_gpu": 24576,
    f"{F}.log_prob_use_dynamic_bsz": True,
    f"{F}.log_prob_max_token_len_per_gpu": 24576,
    f"{F}.fsdp_config.param_offload": True,
    "trainer.save_freq": 20,
    "trainer.test_freq": 5,
    "trainer.total_epochs": 15,
}


def test_the_page_has_every_key_that_differs_from_verls_example_and_no_other() -> None:
    from omegaconf import OmegaConf

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix.removesuffix(".").removeprefix("actor_rollout_ref."): node}
        return {name: value for key in node for name, value in flat(node[key], f"{prefix}{key}.").items()}

    shipped = config("qwen3_8b", "gpu8", "model.attention=flash_attention_2")
    theirs, ours = (
        flat(OmegaConf.to_container(with_defaults(keys), resolve=False)) for keys in (EXAMPLE, verl(shipped))
    )
    differ = {key for key in theirs | ours if theirs.get(key, theirs) != ours.get(key, theirs)}
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    table = page.partition("| key | veRL's example |")[2].partition("\n## ")[0]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert differ == set(re.findall(r"`([^`]+)`", " ".join(first)))


@pytest.mark.parametrize("model", ["llama31_8b", "llama31_70b_lora"])
def test_with_flash_attention_micro_batches_are_cut_by_tokens(model: str) -> None:
    keys = verl(config(model, "gpu8", "model.attention=flash_attention_2", "cre.micro_batch_tokens=100"))
    names = {f"{A}.ppo_max_token_len_per_gpu", *(f"{x}.log_prob_max_token_len_per_gpu" for x in (R, F))}
    longest = keys[f"{R}.max_model_len"]
    assert {keys[name] for name in names} == {longest}, "a micro-batch holds at least one longest sequence"
    names = {f"{A}.use_dynamic_bsz", *(f"{x}.log_prob_use_dynamic_bsz" for x in (R, F))}
    assert {keys[name] for name in names} == {True}
    assert keys["actor_rollout_ref.model.use_remove_padding"]
    several = verl(config(model, "gpu8", "cre.prompts_per_step=128", "cre.mini_batch_prompts=32"))
    assert several["algorithm.rollout_correction.bypass_mode"] is False, (
        "the actor has moved since it sampled"
    )


def test_a_model_in_float32_computes_in_it() -> None:
    half, full = (verl(config("llama31_8b", "gpu8", f"model.dtype={d}")) for d in ("bfloat16", "float32"))
    for part in (A, F):
        assert full[f"{part}.fsdp_config.mixed_precision"]["param_dtype"] == "fp32", "veRL's default is bf16"
        assert f"{part}.fsdp_config.mixed_precision" not in half
    assert full[f"{F}.fsdp_config.model_dtype"] == "fp32" and full[f"{R}.dtype"] == "float32"


def test_a_value_has_the_keys_that_change_it() -> None:
    found = sources(config("llama31_8b", "gpu8"), verl)
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    limits = ["model.max_prompt_tokens", "model.max_response_tokens"]
    assert found[f"{actor}.optim.lr"] == ["cre.learning_rate"]
    assert found[f"{actor}.use_kl_loss"] == ["cre.kl_coefficient"], "crosses its threshold"
    assert found[f"{rollout}.max_model_len"] == limits
    assert found[f"{rollout}.seed"] == ["seed", "cre.seed"]
    assert found["trainer.device"] == ["cluster.device"]
    assert found["algorithm.adv_estimator"] == []
    assert found["algorithm.use_kl_in_reward"] == []


def test_deepspeed_is_printed_with_the_batch_of_the_trainer() -> None:
    text = engine_yaml(config("llama31_8b", "gpu8", "psi.batch_size=64", "psi.packing=false"), "deepspeed")
    values = yaml.safe_load(text)
    assert values["deepspeed"]["train_batch_size"] == 64
    (rate,) = (line for line in text.splitlines() if line.startswith("  learning_rate: "))
    assert "psi.learning_rate" in rate.partition("#")[2].split(", ")
    packed = engine_yaml(config("llama31_8b", "gpu8", "psi.optimizer=muon"), "deepspeed")
    values = yaml.safe_load(packed)
    assert values["deepspeed"]["train_batch_size"] is None, "follows from the lengths of the chains"
    (size,) = (line for line in packed.splitlines() if line.startswith("  train_batch_size: "))
    assert "psi.packing" in size
    assert values["deepspeed"]["optimizer"]["params"]["betas"] == [0.9, 0.999]
    assert values["deepspeed"]["optimizer"]["params"]["lr"] == values["trainer"]["learning_rate"]
    assert ": auto" not in text + packed
    (stage,) = (line for line in text.splitlines() if line.startswith("    stage: "))
    assert stage.split()[1] == "2" and "cluster.zero_stage" in stage


def test_vllm_is_printed_with_its_servers_and_environment() -> None:
    more = ("teacher=vllm", "teacher.name=some/model", "teacher.gpus=2")
    settings = config("llama31_8b", "gpu8", *more)
    values = yaml.safe_load(text := engine_yaml(settings, "vllm"))
    assert values["engine"] == engine_settings(settings)
    assert "--model some/model" in values["servers"]["teacher"]
    assert "--tensor-parallel-size 2" in values["servers"]["teacher"] and "judge" not in values["servers"]
    assert "teacher.gpus" in text and values["environment"]["VLLM_NO_USAGE_STATS"] == "1"


def test_verl_is_printed_whole_for_each_selected_stage() -> None:
    settings = config("qwen3_8b", "gpu8", "cre.steps=9")
    documents = list(yaml.safe_load_all(text := engine_yaml(settings, "verl")))
    assert len(documents) == 2
    for document, stage in zip(documents, ("cre", "curriculum"), strict=True):
        assert document["trainer"]["experiment_name"].endswith(stage)
        assert document["actor_rollout_ref"]["actor"]["optim"]["betas"] == [0.9, 0.999], "verl's default"
        assert f"lr: 1.0e-06  # {stage}.learning_rate" in text
    place = Path(settings.run_dir)
    where = {"start": place / "psi/checkpoint", "rows": place / "cre/rows.parquet", "work_dir": place / "cre"}
    for key, value in verl_keys(with_planned_sizes(settings), "cre", total_steps=9, **where).items():
        node: Any = documents[0]
        for name in key.split("."):
            node = node[name]
        assert node == value, key


def test_a_stage_without_the_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"plan\.stage=psi does not use plan\.emit=verl"):
        engine_yaml(config("llama31_8b", "gpu8", "plan.stage=psi"), "verl")
