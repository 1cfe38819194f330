"""Environment and arguments of vLLM on GPUs, without a start."""

import subprocess
import sys

import pytest

from pgenrm_train.backends.vllm.engine import vllm_variables
from pgenrm_train.backends.vllm.server import _split_gpus, server_arguments
from pgenrm_train.config import ROOT, load
from pgenrm_train.errors import BackendError

CHOICE = """
from vllm import envs
print(envs.VLLM_USE_FLASHINFER_SAMPLER)
"""


def test_the_sampler_on_gpus_is_not_compiled_at_run_time():
    done = subprocess.run(
        [sys.executable, "-c", CHOICE],
        env={"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), **vllm_variables("cuda")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split()[-1:] == ["False"], done.stderr[-2000:]


def test_a_served_model_decodes_as_many_sequences_as_vllm_takes_by_default():
    config = load(
        "recipe=build_sec",
        "model=llama31_8b",
        "cluster=gpu8",
        *("teacher=vllm", "teacher.name=Qwen/Qwen3-8B", "judge=vllm", "judge.name=Qwen/Qwen3-8B"),
    )
    for settings in (config.teacher, config.judge):
        arguments = server_arguments(config, settings)
        assert arguments[arguments.index("--max-num-seqs") + 1] == "256" == str(settings.max_in_flight)


def test_two_judges_take_the_last_gpus_one_after_the_other(monkeypatch):
    config = load(
        "recipe=cre",
        *("model=llama31_8b", "cluster=gpu8", "cluster.processes_per_node=5", "data=chatbot_arena"),
        *("cre.prompts_per_step=40", "cre.mini_batch_prompts=40", "judge=vllm", "judge.name=a/b"),
        *("judge_gold=vllm", "judge_gold.name=c/d", "judge_gold.gpus=2"),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    first = _split_gpus(config, config.judge, with_training=True)
    assert first == ("7", "0,1,2,3,4,5,6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", first.others)
    assert _split_gpus(config, config.judge_gold, with_training=True) == ("5,6", "0,1,2,3,4")
    config.cluster.processes_per_node = 6
    with pytest.raises(BackendError, match="needs 2 GPUs and training 6, and 7 are visible"):
        _split_gpus(config, config.judge_gold, with_training=True)
