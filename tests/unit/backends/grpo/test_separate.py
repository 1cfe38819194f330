"""`mode=separate_async`: vLLM has GPUs of its own.  It composes for GPUs, and is refused elsewhere."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pgenrm_train.backends.grpo.config import verl_keys, with_defaults
from pgenrm_train.cluster.planning.advice import batches_of
from pgenrm_train.cluster.planning.plan import plan_of
from pgenrm_train.cluster.planning.work import with_planned_sizes
from pgenrm_train.cluster.preflight.checks import findings
from pgenrm_train.cluster.preflight.machine import check_versions
from pgenrm_train.config import Config, StageName, load
from pgenrm_train.config.checks import grpo_problems
from pgenrm_train.errors import ConfigError
from pgenrm_train.files import fingerprint
from pgenrm_train.stages.registry import REGISTRY

CRE = StageName.CRE


def config(cluster: str, *more: str, model: str = "llama31_8b", mode: str = "separate_async") -> Config:
    given = ("data=chatbot_arena", "cre.mode=" + mode, *more)
    return load("recipe=plan", f"model={model}", f"cluster={cluster}", *given)


def composed(settings: Config) -> Any:
    place = Path("run")
    keys = verl_keys(
        with_planned_sizes(settings), "cre", start=place, rows=place, work_dir=place, total_steps=1
    )
    return with_defaults(keys)


@pytest.mark.parametrize(
    ("cluster", "more", "actor", "vllm"),
    [
        ("multi_node", (), (2, 8), (2, 8)),
        ("multi_node", ("cluster.rollout_gpus=8",), (3, 8), (1, 8)),
        ("gpu8", (), (1, 4), (1, 4)),
        ("gpu8", ("cluster.rollout_gpus=2",), (1, 6), (1, 2)),
    ],
)
def test_it_composes_with_the_gpus_divided(
    cluster: str, more: tuple[str, ...], actor: tuple[int, int], vllm: tuple[int, int]
) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    settings = config(cluster, *more)
    verl = composed(settings)
    rollout = omega_conf_to_dataclass(verl.actor_rollout_ref.rollout)
    assert (verl.trainer.nnodes, verl.trainer.n_gpus_per_node) == actor
    assert (rollout.nnodes, rollout.n_gpus_per_node) == vllm
    assert verl.actor_rollout_ref.hybrid_engine is False
    assert rollout.checkpoint_engine.backend == "nccl", "naive shares memory with the actor's process"
    assert rollout.gpu_memory_utilization > settings.cluster.gpu_memory_utilization
    assert verl.algorithm.rollout_correction.rollout_is == "token"
    ranks = actor[0] * actor[1]
    rollouts = verl.actor_rollout_ref.actor.ppo_mini_batch_size * rollout.n
    assert rollouts % ranks == 0, "sizes from the data divide over the actor's GPUs"


def test_other_modes_share_all_gpus() -> None:
    verl = composed(config("multi_node", mode="async"))
    assert verl.actor_rollout_ref.hybrid_engine is True
    assert (verl.trainer.nnodes, verl.actor_rollout_ref.rollout.nnodes) == (4, 0)


@pytest.mark.parametrize(
    ("cluster", "model", "more", "sentence"),
    [
        ("cpu", "nano", (), "cre.mode=separate_async needs GPUs, because veRL's nccl checkpoint engine"),
        ("gpu1", "llama31_8b", (), "needs one GPU for vLLM and one for the actor"),
        ("multi_node", "llama31_70b_lora", (), "would sample without the adapter"),
        ("multi_node", "llama31_8b", ("cluster.rollout_gpus=12",), "full nodes of 8, of the 32 GPUs"),
        ("multi_node", "llama31_8b", ("cluster.rollout_gpus=32",), "nearest is cluster.rollout_gpus=24"),
        ("gpu8", "llama31_8b", ("cluster.rollout_gpus=9",), "nearest is cluster.rollout_gpus=7"),
        ("gpu8", "llama31_8b", ("cluster.rollout_gpus=3", "cluster.tensor_parallel=2"), "GPUs of vLLM on a"),
    ],
)
def test_what_cannot_be_divided_gets_one_sentence(
    cluster: str, model: str, more: tuple[str, ...], sentence: str
) -> None:
    (problem,) = grpo_problems(with_planned_sizes(config(cluster, *more, model=model)), CRE)
    assert sentence in problem


def test_stages_of_one_session_share_the_mode() -> None:
    given = ("model=llama31_8b", "cluster=multi_node", "data=chatbot_arena", "cre.mode=separate_async")
    with pytest.raises(ConfigError, match=r"needs curriculum\.mode=separate_async too"):
        load("recipe=pipeline", *given)
    load("recipe=pipeline", *given, "curriculum.mode=separate_async")


def test_the_plan_shows_both_parts() -> None:
    separate, shared = config("multi_node"), config("multi_node", mode="sync")
    facts = batches_of(with_planned_sizes(separate), CRE).facts  # type: ignore[union-attr]
    assert (facts["GPUs of the actor"], facts["GPUs of vLLM"], facts["vLLM replicas"]) == (16, 16, 16)
    plan = next(stage for stage in plan_of(separate).stages if stage.stage == CRE)
    assert plan.fits and "overlaps" in " ".join(plan.work.assumptions)
    rollout, update = plan.phases
    other_rollout, other_update = next(s for s in plan_of(shared).stages if s.stage == CRE).phases
    assert update.parts["actor weights"] == pytest.approx(2 * other_update.parts["actor weights"])
    assert "actor weights" in other_rollout.parts and "actor weights" not in rollout.parts
    assert rollout.parts["vLLM KV cache"] > other_rollout.parts["vLLM KV cache"]
    assert rollout.parts["buckets of weights"] == update.parts["buckets of weights"] == 4


def test_preflight_asks_for_nothing_but_cupy() -> None:
    """Without GPUs both modes lack the same things, and this one also the package of the nccl engine."""

    def problems(mode: str) -> set[str]:
        given = config("multi_node", mode=mode)
        given.recipe = "cre"
        skip = ("ring", "model", "data", "memory")  # of other tests; memory is that of the plan
        return {text for found in findings(given, ("cre",), skip) for text in found.problems}

    (missing,) = problems("separate_async") - problems("sync")
    assert "needs the package cupy-cuda13x" in missing and "cre.mode=async" in missing
    assert missing in set(check_versions(config("multi_node"), "cre"))


@pytest.mark.skipif(find_spec("cupy") is not None, reason="has CuPy")
def test_verls_nccl_engine_does_not_exist_on_a_cpu() -> None:
    """Why the mode is refused on a CPU: nothing can copy weights to another process's vLLM."""
    from verl.checkpoint_engine import CheckpointEngineRegistry

    with pytest.raises(ValueError, match=r"Checkpoint engine nccl not registered.*cupy"):
        CheckpointEngineRegistry.get("nccl")


def test_the_division_counts_for_a_run_folder_with_this_mode_alone() -> None:
    def of(mode: str, *more: str) -> str:
        return fingerprint(REGISTRY[CRE].settings(config("multi_node", *more, mode=mode)))

    assert of("separate_async") != of("separate_async", "cluster.rollout_gpus=8")
    assert of("async") == of("async", "cluster.rollout_gpus=8")
