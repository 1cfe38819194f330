"""The shipped GPU settings of veRL and vLLM take a real step on this CPU; only allow-listed keys change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import verl_world

from pgenrm_train.backends.grpo.config import verl_variables
from pgenrm_train.backends.grpo.progress import MAX_DIFFERENCE
from pgenrm_train.config import ROOT, Config, load

SETTINGS = [("llama31_8b", "gpu8"), ("qwen3_8b", "gpu1"), ("llama31_70b_lora", "multi_node")]
# By tokens without padding, in full and with LoRA; the kernel is a CPU's.
WITHOUT_PADDING = [(model, cluster, "flash_attention_2") for model, cluster in (SETTINGS[0], SETTINGS[2])]


@pytest.mark.parametrize(
    ("model", "cluster", "attention", "more"),
    [
        ("qwen3_8b", "gpu1", "sdpa", ""),
        ("qwen3_8b", "gpu8", "flash_attention_2", "model.lora.rank=8"),
        *((*setting, "") for setting in WITHOUT_PADDING),
    ],
)
def test_the_shipped_verl_settings_take_a_real_step(
    model: str, cluster: str, attention: str, more: str, tmp_path: Path
) -> None:
    """A model of the same shape with untied embeddings; two ranks, but one for the cluster of one GPU."""
    import torch
    from safetensors.torch import load_file

    shape = "qwen3" if model.startswith("qwen3") else "llama"
    verl_world.write_checkpoint(tmp_path / "start", sft_steps=120, shape=shape)
    verl_world.write_rows(tmp_path / "rows.parquet", 8)
    env = {**os.environ, **verl_variables(Config(recipe="cre"))}
    command = [sys.executable, str(ROOT / "tests/support/gpu_on_cpu.py"), str(tmp_path), model, cluster]
    command += [attention, *more.split()]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = json.loads((tmp_path / "cre" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["cre/actor/grad_norm"] > 0, "groups whose rewards differ"
    assert 0 < line["cre/training/rollout_probs_diff_mean"] < MAX_DIFFERENCE, "of rounding in bf16"
    assert "cre/rollout_corr/kl" in line and line["cre/perf/mfu/actor"] > 0
    saved = tmp_path / "cre/verl/global_step_1/actor"
    ranks = 1 if cluster == "gpu1" else 2
    weights, optimiser = (
        torch.load(saved / f"{part}_world_size_{ranks}_rank_0.pt", weights_only=False)
        for part in ("model", "optim")
    )
    moments = [value for state in optimiser["state"].values() for value in state.values()]
    # adapters and moments too: in bf16 most updates of a learning rate of 1e-5 round away
    assert {tensor.dtype for tensor in [*weights.values(), *moments]} == {torch.float32}
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "start", tmp_path / "cre" / "checkpoint")
    )
    assert any(not torch.equal(before[name].to(after[name].dtype), after[name]) for name in before)


def test_vllm_on_gpus_of_its_own_samples_the_next_step_during_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`separate_async` with the shipped settings: one rank trains, one vLLM samples, a file for NCCL."""
    monkeypatch.setenv("PYTHONPATH", str(Path(verl_world.__file__).parent))
    verl_world.write_checkpoint(tmp_path / "start", sft_steps=120, shape="llama")
    verl_world.write_rows(tmp_path / "rows.parquet", 16)
    env = {**os.environ, **verl_variables(Config(recipe="cre"))}
    command = [sys.executable, str(ROOT / "tests/support/gpu_on_cpu.py"), str(tmp_path), "llama31_8b", "gpu8"]
    command += ["sdpa", "cre.mode=separate_async", "cre.steps=3", "cre.learning_rate=1e-3"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "cre/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["cre/staleness/mean"] for line in steps] == [0, 1, 1], "weights reach vLLM after each update"
    assert all(line["cre/actor/grad_norm"] > 0 for line in steps)
    assert steps[0]["cre/training/rollout_probs_diff_mean"] < MAX_DIFFERENCE
    assert (tmp_path / "cre/verl/global_step_3/actor/model_world_size_1_rank_0.pt").exists()


ON_CPU = {
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "tensor_parallel_size": 1,
    "max_model_len": 128,
}
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
for settings in json.loads(sys.argv[2]):
    output = LLM(model=sys.argv[1], tokenizer=sys.argv[1], **settings).generate(
        [{"prompt_token_ids": [5, 6, 7]}], SamplingParams(n=2, seed=1, max_tokens=8, temperature=0.7)
    )
    print("TOKENS", sum(len(o.token_ids) for o in output[0].outputs), flush=True)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Tokens of one prompt's two samples with each of SETTINGS, from one process."""
    from pgenrm_train.backends.vllm import engine as vllm_engine

    asked = []
    for model, cluster in SETTINGS:
        shipped = load(
            "recipe=evaluate",
            f"model={model}",
            f"cluster={cluster}",
            "data=pairs",
            "data.path=none.parquet",
            "teacher=features",
            "judge=none",
        )
        settings = vllm_engine.engine_settings(shipped)
        assert settings["dtype"] == "bfloat16" and settings["max_model_len"] == 12288
        asked.append(settings | ON_CPU)
    start = tmp_path_factory.mktemp("vllm") / "start"
    verl_world.write_checkpoint(start, sft_steps=1)
    env = {**os.environ, **vllm_engine.vllm_variables("cpu")}
    command = [sys.executable, "-c", VLLM, str(start), json.dumps(asked)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("TOKENS")]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_shipped_vllm_settings_generate(setting: tuple[str, str], written: list[int]) -> None:
    assert len(written) == len(SETTINGS) and written[SETTINGS.index(setting)] >= 2
