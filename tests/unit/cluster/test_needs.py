"""Host memory, disk, replicas and idle GPUs of a stage."""

import dataclasses

import pytest

from pgenrm_train.cluster.planning.advice import batches_of
from pgenrm_train.cluster.planning.needs import disk_gib, host_gib, host_parts, idle_warnings
from pgenrm_train.cluster.planning.plan import plan_of
from pgenrm_train.cluster.planning.work import with_planned_sizes
from pgenrm_train.config import TRAINED, Config, StageName, load

PSI, CRE, _ = TRAINED
EVALUATE, BUILD_SEC = StageName.EVALUATE, StageName.BUILD_SEC


def composed(model: str, cluster: str, *more: str) -> Config:
    return load("recipe=plan", f"model={model}", f"cluster={cluster}", "data=chatbot_arena", *more)


def test_lora_needs_host_memory_for_loading_and_for_the_sleeping_engine():
    """70B: rank 0 loads it in fp32, and vLLM keeps its weights in bf16 while it sleeps."""
    parts = host_parts(composed("llama31_70b_lora", "multi_node"), CRE)
    assert parts["loading or publishing"] == pytest.approx(263, abs=1)
    assert parts["sleeping vLLM"] == pytest.approx(131, abs=1)


def test_host_memory_is_that_of_the_plan_unless_it_is_given():
    config = composed("llama31_8b", "gpu8")
    planned = sum(plan_of(config).stages[2].host.values())
    assert host_gib(config, CRE) == pytest.approx(planned) and planned > 100
    config.cluster.min_free_memory_gib = 7.0
    assert host_gib(config, CRE) == 7.0
    unknown = composed("llama31_8b", "gpu8", "model.name=someone/else")
    assert host_gib(unknown, CRE) == 6.0 and disk_gib(unknown, (CRE,)) == 3.0, "no plan, the least"


def test_disk_holds_the_plan_and_a_checkpoint_that_is_being_saved():
    config = composed("llama31_8b", "gpu8", "run_dir=nowhere")
    plan = plan_of(config)
    assert disk_gib(config, TRAINED) > 1.4 * plan.disk_gib
    assert disk_gib(config, (EVALUATE,)) == 3.0


def test_tensor_parallelism_belongs_to_the_model():
    for model, replicas in (("llama31_8b", 32), ("qwen3_8b", 32), ("llama31_70b_lora", 4)):
        batches = batches_of(with_planned_sizes(composed(model, "multi_node")), CRE)
        assert batches is not None and batches.facts["vLLM replicas"] == replicas


@pytest.mark.parametrize(
    ("stage", "keys", "better"),
    [
        (EVALUATE, {"cluster.engines": 3}, "cluster.engines=8"),
        (BUILD_SEC, {"teacher.gpus": 1}, "teacher.gpus=8"),
        (BUILD_SEC, {"teacher.gpus": 8, "cluster.nodes": 4}, "cluster.nodes=1"),
        (CRE, {"cre.prompts_per_step": 3}, "cre.prompts_per_step=8 cre.mini_batch_prompts=8"),
        (CRE, {"cre.prompts_per_step": 3, "plan.pairs": 5}, "cluster.processes_per_node=5"),
        (
            CRE,
            {"cre.prompts_per_step": 1, "plan.pairs": 1, "cluster.nodes": 2},
            "cluster.nodes=1 cluster.processes_per_node=1",
        ),
    ],
)
def test_an_idle_cluster_gets_one_sentence_with_a_better_setting(stage, keys, better):
    config = composed("llama31_8b", "gpu8", "teacher=vllm", "teacher.name=Qwen/Qwen3-8B")
    for key, value in keys.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    (warning,) = idle_warnings(config, stage)
    assert better in warning and "nearest better setting" in warning
    assert warning in next(s for s in plan_of(config).stages if s.stage == stage).warnings


def test_a_served_model_needs_host_memory_too():
    judged = composed("llama31_8b", "multi_node", "judge=vllm", "judge.name=Qwen/Qwen3-8B", "judge.gpus=2")
    assert host_parts(judged, CRE)["processes"] - host_parts(judged, PSI)["processes"] == 2 * 8
    taught = composed("llama31_8b", "gpu1", "teacher=vllm", "teacher.name=Qwen/Qwen3-8B", "teacher.gpus=4")
    assert host_parts(taught, BUILD_SEC)["processes"] == 4 * 8


def test_a_busy_cluster_gets_none():
    config = composed("llama31_8b", "gpu8", "teacher=vllm", "teacher.name=Qwen/Qwen3-8B", "teacher.gpus=4")
    assert not [w for stage in (BUILD_SEC, PSI, CRE, EVALUATE) for w in idle_warnings(config, stage)]
    halved = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, engines=4))
    assert not list(idle_warnings(halved, EVALUATE))
