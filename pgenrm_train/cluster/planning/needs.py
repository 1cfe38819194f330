"""Needs of a stage: host memory and disk; and warnings about GPUs that would stay idle.

Host memory of a node with GPUs, in GiB: 8 per process (a rank, its vLLM worker, libraries; an assumption) and
per GPU of a judge or teacher that is served there, the planned host parts of the fullest phase, and loading
on rank 0 (veRL: in fp32) or publishing (PSI: all weights gathered on rank 0; veRL: one file at a time).  With
LoRA vLLM sleeps with its weights in host memory.

Disk of a training stage: the kept optimiser states and one more while it saves, and the published checkpoint.
"""

from collections.abc import Iterator
from pathlib import Path

from pgenrm_train.cluster.planning.geometry import geometry_of
from pgenrm_train.cluster.planning.memory import GIB, element_bytes, phases_of
from pgenrm_train.cluster.planning.work import STATES, examples_of, with_planned_sizes, work_of
from pgenrm_train.config import GRPO_STAGES, TRAINED, Config, StageName, gpus_per_node, places_of
from pgenrm_train.config.setting import known
from pgenrm_train.errors import ConfigError

LEAST_MEMORY, LEAST_DISK = 6.0, 3.0  # GiB
PROCESS = 8.0  # GiB of host memory per process on GPUs


def host_gib(config: Config, stage: StageName) -> float:
    """Host memory per node; `cluster.min_free_memory_gib` if it is given."""
    if (given := config.cluster.min_free_memory_gib) is not None:
        return given
    if config.cluster.device == "cpu":
        return LEAST_MEMORY
    try:
        return max(LEAST_MEMORY, sum(host_parts(config, stage).values()))
    except ConfigError:  # no plan of an unknown model
        return LEAST_MEMORY


def host_parts(config: Config, stage: StageName) -> dict[str, float]:
    """GiB of host memory per node by part.  Raises ConfigError if the model's geometry is unknown."""
    sized, geometry, cluster = with_planned_sizes(config), geometry_of(config), config.cluster
    parts = {"processes": PROCESS * gpus_per_node(config, stage)}
    phases = [dict(phase.host_parts) for phase in phases_of(sized, geometry, stage)]
    fullest: dict[str, float] = max(phases, key=lambda each: sum(each.values()), default={})
    parts |= fullest
    weights, lora = geometry.parameters / GIB, bool(config.model.lora.rank)
    if stage in TRAINED:
        parts["loading or publishing"] = weights * (4 if stage in GRPO_STAGES else element_bytes(config))
    if lora and stage in GRPO_STAGES:
        replicas = max(1, cluster.processes_per_node // cluster.tensor_parallel)
        parts["sleeping vLLM"] = replicas * weights * element_bytes(config)
    return parts


def disk_gib(config: Config, stages: tuple[StageName, ...]) -> float:
    """Disk of stages that are still to do, less their files so far; `cluster.min_free_disk_gib` if given."""
    if (given := config.cluster.min_free_disk_gib) is not None:
        return given
    return max(LEAST_DISK, sum(_disk(config, stage) for stage in stages if stage in TRAINED))


def _disk(config: Config, stage: StageName) -> float:
    try:
        disk = work_of(with_planned_sizes(config), geometry_of(config), stage).disk
    except ConfigError:
        return 0.0
    keep: int = getattr(config, stage).keep_checkpoints
    one_more = disk[STATES] / keep
    folder = Path(config.run_dir) / stage
    return max(0.0, sum(disk.values()) + one_more - _size(folder) / GIB)


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*")) if folder.is_dir() else 0


def idle_warnings(config: Config, stage: StageName) -> Iterator[str]:
    """A warning with the nearest better setting if a stage leaves more than half of the GPUs idle."""
    cluster, teacher = config.cluster, config.teacher
    if cluster.device == "cpu":
        return
    used = (cluster.engines or 0) * cluster.tensor_parallel
    if stage in (StageName.PROTOTYPES, StageName.EVALUATE) and 0 < 2 * used < cluster.ranks:
        yield (
            f"{stage} uses {used} of {cluster.ranks} GPUs with cluster.engines={cluster.engines}; "
            f"the nearest better setting is cluster.engines={cluster.ranks // cluster.tensor_parallel}"
        )
    if stage in GRPO_STAGES:
        yield from _idle_replicas(config, stage)
    if stage == StageName.BUILD_SEC and teacher.kind == "vllm" and 2 * teacher.gpus < cluster.ranks:
        better = f"teacher.gpus={cluster.processes_per_node}"
        if teacher.gpus >= cluster.processes_per_node:
            better = "recipe=build_sec on one node first, with cluster.nodes=1 and the same run_dir"
        yield (
            f"{stage} uses {teacher.gpus} of {cluster.ranks} GPUs with teacher.gpus={teacher.gpus}; "
            f"the nearest better setting is {better}"
        )


def _idle_replicas(config: Config, stage: StageName) -> Iterator[str]:
    """One vLLM replica samples the chains of a prompt, so a step of few prompts leaves others idle."""
    cluster = config.cluster
    replicas = places_of(config, stage).sampler.cluster.ranks // cluster.tensor_parallel
    prompts = known(getattr(with_planned_sizes(config), stage).prompts_per_step)
    if 2 * prompts >= replicas:
        return
    better = " ".join(f"{stage}.{key}={replicas}" for key in ("prompts_per_step", "mini_batch_prompts"))
    if (pairs := examples_of(config, stage)) < replicas:  # and a step draws no pair twice
        nodes = "cluster.nodes=1 " if cluster.nodes > 1 else ""
        processes = min(pairs * cluster.tensor_parallel, cluster.processes_per_node)
        better = f"{nodes}cluster.processes_per_node={processes}"
    yield (
        f"{stage} samples {prompts} prompt{'s' if prompts > 1 else ''} per step, each on one of {replicas} "
        f"vLLM replicas; the nearest better setting is {better}"
    )
