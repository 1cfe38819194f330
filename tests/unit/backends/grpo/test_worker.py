"""Patience of a GRPO session (process group, watchdog), and the loss that compares actor and sampler."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pgenrm_train.backends.grpo import session
from pgenrm_train.backends.grpo.config import grpo_keys, verl_variables
from pgenrm_train.config import ROOT, load
from pgenrm_train.errors import PGenRMError

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


COMPILE = """
import torch

def backend(graph, inputs):
    raise SystemExit("compiled")

print(torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1)).item())
"""


def test_nothing_is_compiled_on_a_cpu():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | verl_variables(load("recipe=cre")),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "2.0\n", done.stderr[-2000:]
    assert "TORCH_COMPILE_DISABLE" not in verl_variables(load("recipe=cre", "cluster=gpu1"))


def test_a_start_up_has_more_patience_than_a_step(tmp_path, monkeypatch):
    assert load("recipe=cre").cre.stall_seconds < session.STARTUP_SECONDS
    monkeypatch.setattr(session, "STARTUP_SECONDS", 600.0)
    stalls: list[PGenRMError] = []
    watchdog = session.Watchdog(0.2, stalls.append, tmp_path)
    try:
        watchdog.beat("cre", 1, "sampling")
        time.sleep(1.5)
        assert not stalls, "the first step compiles"
        watchdog.beat("cre", 2, "sampling")
        end = time.monotonic() + 30
        while not stalls and time.monotonic() < end:
            time.sleep(0.05)
        assert "cre made no progress" in str(stalls[0])
    finally:
        watchdog.stopped.set()


def test_the_loss_of_bypass_mode_compares_the_actor_with_the_sampler() -> None:
    """Sampler's probabilities e^-1, the actor's e^-1.1, on 2 + 3 response tokens."""
    import torch
    from tensordict import NonTensorData, TensorDict
    from verl.workers.config import FSDPActorConfig

    from pgenrm_train.backends.grpo.worker import loss_and_difference

    def nested(*lengths: int, value: float = 1.0, kind: torch.dtype = torch.float32) -> torch.Tensor:
        rows = [torch.full((length,), value, dtype=kind) for length in lengths]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    data = TensorDict(
        {
            "prompts": nested(4, 2, kind=torch.int64),
            "responses": nested(2, 3, kind=torch.int64),
            "response_mask": nested(2, 3, kind=torch.int64),
            "old_log_probs": nested(2, 3, value=-1.0),
            "advantages": nested(2, 3, value=0.5),
            "dp_size": NonTensorData(1),
            "batch_num_tokens": NonTensorData(5),
            "global_batch_size": NonTensorData(2),
        },
        batch_size=[2],
    )
    settings = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, use_dynamic_bsz=False
    )
    _, metrics = loss_and_difference(settings, {"log_probs": nested(6, 5, value=-1.1)}, data)
    mean = metrics["training/rollout_probs_diff_mean"].aggregate()
    assert mean == pytest.approx(math.exp(-1) - math.exp(-1.1), rel=1e-4)
    assert metrics["rollout_corr/kl"].aggregate() == pytest.approx(0.1, rel=1e-4)
    assert metrics["training/rollout_probs_diff_max"].aggregate() == pytest.approx(mean, rel=1e-4)


def test_a_phase_cuts_all_its_passes_by_its_own_tokens() -> None:
    """Actor, log-probabilities, reference: the second phase has other limits, the third cuts by sequences."""
    from types import SimpleNamespace

    from verl.workers.config import FSDPEngineConfig

    from pgenrm_train.backends.grpo.config import verl_keys, with_defaults
    from pgenrm_train.backends.grpo.worker import ChainWorker
    from pgenrm_train.cluster.planning.work import with_planned_sizes
    from pgenrm_train.config import load

    engines = [FSDPEngineConfig() for _ in range(2)]
    actor, reference = (
        SimpleNamespace(
            engine=SimpleNamespace(
                engine_config=each,
                module=None,
                checkpoint_manager=SimpleNamespace(),
                _build_optimizer=lambda _: None,
                _build_lr_scheduler=lambda _: None,
            ),
            model_config=None,
            set_loss_fn=lambda _: None,
        )
        for each in engines
    )
    worker: Any = object.__new__(ChainWorker)
    worker.actor, worker.ref = actor, reference

    def begin(*more: str) -> set[tuple[bool, int, int]]:
        """By tokens?, tokens, sequences: of the update, the actor's log-probabilities, the reference's."""
        place = Path("run")
        shipped = ("recipe=plan", "model=llama31_8b", "cluster=gpu8", "data=chatbot_arena", *more)
        keys = verl_keys(
            with_planned_sizes(load(*shipped)), "cre", start=place, rows=place, work_dir=place, total_steps=1
        )
        verl = with_defaults(keys)
        worker.begin_phase(verl.actor_rollout_ref, "", False, False)
        update = (
            engines[0].use_dynamic_bsz, engines[0].max_token_len_per_gpu, engines[0].micro_batch_size_per_gpu
        )  # fmt: skip
        return {update} | {
            (each.use_dynamic_bsz, each.infer_max_token_len_per_gpu, each.infer_micro_batch_size_per_gpu)
            for each in engines
        }

    flash = "model.attention=flash_attention_2"
    assert begin(flash, "cre.micro_batch_tokens=30000") == {(True, 30000, 1)}
    assert begin(flash, "cre.micro_batch_tokens=20000") == {(True, 20000, 1)}
    by_sequences = begin("model.attention=sdpa", "cre.micro_batch_size=2")
    assert {each[::2] for each in by_sequences} == {(False, 2)}
