"""Environment and arguments of vLLM on GPUs, without a start."""

import subprocess
import sys

from pgenrm_train.backends.vllm.engine import vllm_variables
from pgenrm_train.backends.vllm.server import server_arguments
from pgenrm_train.config import ROOT, load

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
