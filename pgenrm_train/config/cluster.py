"""Settings of the machines: cluster, preflight and the planner's assumptions."""

from dataclasses import dataclass, replace

from pgenrm_train.config.setting import REQUIRED, setting
from pgenrm_train.config.stage_names import PLANNED

PREFLIGHT = (
    "disk",
    "store",
    "memory",
    "versions",
    "gpus",
    "fit",
    "compilers",
    "shared_memory",
    "ports",
    "ray",
    "data",
    "model",
    "wandb",
    "teacher",
    "judge",
    "model_endpoint",
    "ring",
)


@dataclass
class ClusterConfig:
    name: str = setting("cpu", "name of the group in configs/cluster/")
    device: str = setting("cpu", "device of training and generation", choices=("cpu", "cuda"))
    nodes: int = setting(1, "machines", gt=0)
    processes_per_node: int = setting(1, "ranks of FSDP and DeepSpeed; on cuda: GPUs", gt=0)
    zero_stage: int | None = setting(
        0,
        "DeepSpeed's ZeRO stage of PSI; null: the lowest that is planned to take at most 80 % of a GPU",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer: bool = setting(False, "keep the optimiser's states in host memory")
    max_failures: int = setting(
        3, "restarts of a training stage from its newest checkpoint after a lost engine or node", ge=0
    )
    tensor_parallel: int = setting(1, "GPUs of a vLLM replica", gt=0)
    engines: int | None = setting(
        None, "vLLM replicas that evaluate; null: processes / tensor_parallel", gt=0
    )
    gpu_memory_utilization: float = setting(
        0.6, "vLLM's share of a GPU that it shares with the actor", gt=0, lt=1
    )
    rollout_gpus: int | None = setting(
        None, "mode=separate_async: GPUs of all nodes that vLLM has alone; null: half", gt=0
    )
    min_free_memory_gib: float | None = setting(
        None, "preflight: host memory that must be free; null: as planned for the stage"
    )
    min_free_disk_gib: float | None = setting(
        None, "preflight: disk space that must be free; null: as planned for the stage"
    )

    @property
    def ranks(self) -> int:
        """Processes of one training, over all nodes."""
        return self.nodes * self.processes_per_node

    def split(self) -> tuple["ClusterConfig", "ClusterConfig"]:
        """Clusters of the actor and of vLLM with `mode=separate_async`: full nodes, or parts of one node."""
        key = "processes_per_node" if self.nodes == 1 else "nodes"
        parts = getattr(self, key)  # GPUs or nodes
        per_part = self.ranks // parts
        alone = self.rollout_gpus // per_part if self.rollout_gpus else parts // 2
        alone = min(max(alone, 1), max(parts - 1, 1))  # `checks` refuses other numbers
        return replace(self, **{key: max(parts - alone, 1)}), replace(self, **{key: alone})


@dataclass
class RayConfig:
    address: str | None = setting(None, "its address; null: start Ray on this machine")


@dataclass
class PreflightConfig:
    only: bool = setting(False, "check, print a table, start nothing")
    skip: list[str] = setting([], "checks to leave out (docs/troubleshooting.md)", choices=PREFLIGHT)
    ring: bool | None = setting(
        None, "an all-reduce over this node's processes; null: on GPUs with several processes"
    )


@dataclass
class CardConfig:
    memory_gib: float = setting(REQUIRED, "memory in GiB")
    tflops: float = setting(REQUIRED, "dense bf16 peak in TFLOP/s")
    terabytes_per_second: float = setting(REQUIRED, "memory bandwidth in TB/s")
    dollars_per_hour: float = setting(REQUIRED, "price per card and hour")


CARDS = {
    "a100": CardConfig(80.0, 312.0, 2.04, 2.0),  # A100 SXM 80 GB
    "h100": CardConfig(79.6, 989.0, 3.35, 3.0),  # H100 SXM 80 GB
    "h200": CardConfig(140.4, 989.0, 4.8, 4.0),  # H200 SXM 141 GB
    "l40s": CardConfig(45.0, 362.0, 0.864, 1.2),
    "cpu": CardConfig(24.0, 0.3, 0.02, 0.0),  # a process of cluster=cpu: two cores
}


@dataclass
class PlanConfig:
    stage: str = setting("all", "stage to plan", choices=(*PLANNED, "all"))
    emit: str | None = setting(
        None,
        "print a launch file, or an engine's exact configuration, instead of the table",
        choices=("slurm", "rayjob", "verl", "deepspeed", "vllm"),
    )
    json: bool = setting(False, "print plan.json instead of the table")
    card: str = setting("h100", "a key of plan.cards; cluster=cpu takes cpu")
    cards: dict[str, CardConfig] = setting(
        CARDS, "accelerators by the peaks of their data sheets; replace the assumed prices with yours"
    )
    mfu: float = setting(0.35, "model FLOPs of training and prefill over the card's peak", gt=0, le=1)
    bandwidth_use: float = setting(0.5, "used share of the memory bandwidth during generation", gt=0, le=1)
    tokens_per_second: float | None = setting(
        None, "measured generation speed of one GPU; null: from the bandwidth", gt=0
    )
    prompt_tokens: int = setting(
        2000, "mean prompt length, at most the model's limit; memory is planned for the limit", gt=0
    )
    response_tokens: int = setting(1000, "mean chain length, at most the model's limit", gt=0)
    pairs: int | None = setting(None, "training pairs; null: by the data's configuration or file", gt=0)
    test_pairs: int | None = setting(None, "test pairs; null: by the data's configuration or file", gt=0)
    sbatch: list[str] = setting([], 'more SLURM options, e.g. ["--partition=gpu","--account=me"]')
    image: str = setting("pgenrm-train:0.1.0", "Kubernetes: image of the Dockerfile")
    volume_claim: str = setting("pgenrm-runs", "Kubernetes: ReadWriteMany claim, mounted at /runs")
    secret: str = setting(
        "pgenrm-secrets", "Kubernetes: secret with the keys, each under its variable's name"
    )
