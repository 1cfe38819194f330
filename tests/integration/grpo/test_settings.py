"""What veRL makes of a configuration, and what a CPU needs of it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgenrm_train.backends.grpo.config import check, to_verl, verl_variables
from pgenrm_train.cluster.sizes import with_sizes
from pgenrm_train.config import Config
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import ConfigError


def test_to_verl_maps_a_gpu_configuration_that_verl_accepts(world: Path) -> None:
    from verl.utils.config import validate_config

    gpu = Config(recipe="cre")
    gpu.cluster.device, gpu.cluster.processes_per_node, gpu.cluster.tensor_parallel = "cuda", 8, 2
    gpu.model.max_prompt_tokens, gpu.model.max_response_tokens = 256, 256
    gpu.model.lora.rank = 16
    gpu = with_sizes(gpu, StageName.CRE, 8192)
    composed = to_verl(
        gpu, "cre", start=world / "start", rows=world / "rows.parquet", work_dir=world, total_steps=7
    )
    validate_config(composed, use_reference_policy=True, use_critic=False)
    assert composed.actor_rollout_ref.rollout.tensor_model_parallel_size == 2
    assert (
        not composed.actor_rollout_ref.model.use_remove_padding
    )  # packing needs flash-attn, which the default does not
    gpu.model.attention = "flash_attention_2"
    composed = to_verl(
        gpu, "cre", start=world / "start", rows=world / "rows.parquet", work_dir=world, total_steps=7
    )
    assert composed.actor_rollout_ref.model.use_remove_padding
    assert composed.actor_rollout_ref.actor.use_kl_loss
    assert composed.trainer.total_training_steps == 7


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"cre.mini_batch_prompts": 6, "cluster.processes_per_node": 5},
            r"cre.mini_batch_prompts × cre.group_size = 48 .* = 5",
        ),
        ({"cre.micro_batch_size": 7}, "cre.micro_batch_size=7 must divide the 1024"),
        ({"cluster.tensor_parallel": 3}, "cluster.tensor_parallel=3 must divide"),
        (
            {"model.max_response_tokens": 9000},
            r"model.max_prompt_tokens \+ model.max_response_tokens = 13096 exceeds the 512",
        ),
    ],
)
def test_conflicts_name_both_keys(world: Path, change: dict[str, int], text: str) -> None:
    settings = with_sizes(Config(recipe="cre"), StageName.CRE, 8192)
    for key, value in change.items():
        section, name = key.split(".")
        setattr(getattr(settings, section), name, value)
    with pytest.raises(ConfigError, match=text):
        check(settings, "cre", world / "start")


def test_logprobs_in_chunks_are_those_that_verl_takes_token_by_token() -> None:
    import torch
    from verl.utils import torch_functional

    theirs = torch_functional.logprobs_from_logits_v2
    from pgenrm_train.backends.grpo import worker as verl_worker

    assert torch_functional.logprobs_from_logits_v2 is verl_worker.logprobs_in_chunks
    if theirs is verl_worker.logprobs_in_chunks:  # imported before this test
        theirs = torch_functional.logprobs_from_logits_naive
    torch.manual_seed(0)
    for shape in ((2 * verl_worker.CHUNK + 3,), (3, 7)):
        logits = torch.randn(*shape, 11, requires_grad=True)
        labels = torch.randint(11, shape)
        results = [take(logits, labels) for take in (theirs, verl_worker.logprobs_in_chunks)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(r.square().sum(), logits)[0] for r in results))


def test_the_cpu_patches_are_still_needed() -> None:
    """If one of these fails, a patch in grpo/cpu.py or a setting in `config.cpu_keys` can go."""
    from verl.model_merger import fsdp_model_merger
    from verl.workers.engine.fsdp import transformer_impl

    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(transformer_impl)
    from verl.workers.rollout.vllm_rollout import utils, vllm_async_server, vllm_rollout

    for module, words in (
        (vllm_rollout, "job_id = ray.get_runtime_context().get_job_id()"),
        (vllm_async_server, 'os.environ["VERL_RAY_JOB_ID"] = ray.get_runtime_context().get_job_id()'),
        (utils, 'os.environ.get("VERL_RAY_JOB_ID"'),
    ):
        assert words in inspect.getsource(module), "the socket has another name: ray/job_ids.py can go"
    assert ".bfloat16()" in inspect.getsource(fsdp_model_merger), (
        "verl's merger still rounds: our export stays"
    )
    script = """
import torch
from torch import distributed
try:
    distributed.init_process_group("cpu:gloo,cpu:gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    raise SystemExit("torch takes a device named twice: use_gloo can go")
except (ValueError, AssertionError):
    pass
try:
    torch.Generator("cpu").get_offset()
    raise SystemExit("CPU generators have offsets: chunked prefill can be switched on")
except RuntimeError:
    pass
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
layer = torch.nn.Linear(64, 64, bias=False)
layer.weight.requires_grad_(False)
dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
if layer.weight.numel():
    raise SystemExit("vLLM keeps Linear weights: keep_linear_weights can go")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_environment_reaches_every_worker() -> None:
    variables = verl_variables(Config(recipe="cre"))
    modules = variables["VERL_USE_EXTERNAL_MODULES"].split(",")
    assert modules == ["pgenrm_train.backends.ray.job_ids", "pgenrm_train.backends.grpo.cpu"]
    assert all(isinstance(value, str) for value in variables.values())
