"""Patience of a GRPO session: the timeout of verl's process group, and the watchdog's at the start."""

import os
import subprocess
import sys

from pgenrm_train.backends.grpo.config import grpo_keys, verl_variables
from pgenrm_train.backends.grpo.session import STARTUP_SECONDS
from pgenrm_train.config import ROOT, load

JOIN = """
import sys
from contextlib import suppress

import torch
from omegaconf import OmegaConf

from pgenrm_train.backends.grpo.worker import ChainWorker

worker = object.__new__(ChainWorker)
worker.config = OmegaConf.create({"nccl_timeout": int(sys.argv[1])})
with suppress(Exception):  # there is no model to build
    worker.init_model()
group = torch.distributed.distributed_c10d._get_default_group()
print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""


def test_ranks_wait_for_each_other_as_long_as_the_watchdog(tmp_path):
    config = load("recipe=cre")
    timeout = grpo_keys(config, "cre")["actor_rollout_ref.nccl_timeout"]
    assert timeout == config.cre.stall_seconds
    variables = verl_variables(config) | {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "DIST_INIT_METHOD": (tmp_path / "meeting").as_uri(),
    }
    done = subprocess.run(
        [sys.executable, "-c", JOIN, str(timeout)],
        env=os.environ | variables | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) == timeout


def test_a_start_up_has_more_patience_than_a_step():
    assert load("recipe=cre").cre.stall_seconds < STARTUP_SECONDS
