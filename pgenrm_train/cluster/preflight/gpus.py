"""Checks of NVIDIA's GPUs: count, kind, free memory, driver and compilers."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgenrm_train.cluster.preflight.reach import nodes_at
from pgenrm_train.config import CHOOSING, TRAINED, Config, StageName, gpus_per_node, machines, served_judges

HEAVY = (*TRAINED, StageName.EVALUATE, *CHOOSING)
TOOLKIT = "/usr/local/cuda"
DRIVER = 580  # the first version that supports CUDA 13


@dataclass(frozen=True, slots=True)
class Gpu:
    """One visible GPU, as NVML reports it."""

    name: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int]
    busy: float = 0.0  # share of the last sample period in which a kernel ran


def check_gpus(config: Config, stage: str) -> Iterator[str]:
    """Count and kind of this machine's GPUs; with ray.address it may have none."""
    taught = stage == StageName.BUILD_SEC and config.teacher.kind == "vllm"
    used = stage in (*HEAVY, StageName.PROTOTYPES) or taught
    if config.cluster.device != "cuda" or not used or config.ray.address is not None:
        return
    import torch

    visible, needed = torch.cuda.device_count(), gpus_per_node(config, stage)
    if visible < needed:
        judges = served_judges(config, stage)
        judge = "".join(f", {of.gpus} of them for {section}=vllm" for section, of in judges.items())
        tp = config.cluster.tensor_parallel
        left = (visible - sum(of.gpus for of in judges.values())) // tp * tp
        better = (
            f"the nearest is cluster.processes_per_node={left}" if left > 0 else "choose another cluster="
        )
        if taught and config.teacher.gpus > visible:
            judge = f", {config.teacher.gpus} of them for the teacher"
            better = f"the nearest is teacher.gpus={visible}" if visible else "choose another teacher="
        yield (
            f"cluster={config.cluster.name} needs {needed} GPUs per node{judge} and this machine shows "
            f"{visible}; {better}"
        )
        return
    yield from driver_problems(driver_version())
    yield from gpu_problems(config, visible_gpus()[: config.cluster.processes_per_node])


def idle_gpus(config: Config, stage: str) -> Iterator[str]:
    """A warning if more than half of the GPUs of this machine, or of the Ray cluster, stay unused."""
    cluster, address = config.cluster, config.ray.address
    if cluster.device != "cuda" or stage not in (*HEAVY, StageName.PROTOTYPES):
        return
    if address is None:
        import torch

        found, needed = torch.cuda.device_count(), gpus_per_node(config, stage)
        better = f"cluster.processes_per_node={found - needed + cluster.processes_per_node}"
    else:
        found, needed = (
            int(sum(node.get("GPU", 0) for node in nodes_at(address))),
            machines(config, stage).all,
        )
        better = f"cluster.nodes={cluster.nodes * found // needed}"
    if found > 2 * needed:
        yield f"{stage} uses {needed} of {found} GPUs; the nearest better setting is {better}"


def driver_version() -> str | None:
    """Version of NVIDIA's driver; None without NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def driver_problems(version: str | None) -> Iterator[str]:
    """The driver must support CUDA 13 of the pins."""
    if version and int(version.partition(".")[0]) < DRIVER:
        yield (
            f"NVIDIA's driver is {version}, and CUDA 13 of the pins needs {DRIVER} or newer; "
            "update the driver of this machine"
        )


def check_compilers(config: Config, stage: str) -> Iterator[str]:
    """A C compiler for Triton's launchers, and nvcc for kernels of DeepSpeed and FlashInfer."""
    if config.cluster.device != "cuda" or stage not in (*HEAVY, StageName.PROTOTYPES):
        return
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        yield f"no C compiler is on PATH, and Triton needs one in {stage}; install gcc (build-essential)"
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT)
    if not shutil.which("nvcc") and not any(home and Path(home, "bin", "nvcc").exists() for home in homes):
        yield (
            f"nvcc is neither on PATH nor under CUDA_HOME, and {stage} may compile kernels; "
            "install the CUDA 13 toolkit, set CUDA_HOME, or preflight.skip=[compilers]"
        )


def gpu_problems(config: Config, gpus: Sequence[Gpu]) -> Iterator[str]:
    if config.model.dtype == "bfloat16" and (old := [gpu.name for gpu in gpus if gpu.capability < (8, 0)]):
        yield (
            f"{old[0]} computes no bfloat16 (compute capability 8.0 is needed); "
            "use Ampere or newer GPUs, or model.dtype=float32"
        )
    if len(kinds := {gpu.name for gpu in gpus}) > 1:
        yield (
            f"the GPUs differ ({', '.join(sorted(kinds))}) and the slowest would set the pace; "
            "choose equal ones with CUDA_VISIBLE_DEVICES"
        )
    for number, gpu in enumerate(gpus):
        if gpu.free_gib < 0.9 * gpu.memory_gib:
            yield (
                f"GPU {number} ({gpu.name}) has {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free: another "
                "process uses it; stop that process (nvidia-smi shows it) or choose other GPUs with "
                "CUDA_VISIBLE_DEVICES"
            )


def visible_gpus() -> list[Gpu]:
    """GPUs in the order of CUDA_VISIBLE_DEVICES; none without NVML.  Makes no CUDA context."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver or no library: `torch.cuda.device_count` decides
        return []
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = wanted.split(",") if wanted else [str(n) for n in range(pynvml.nvmlDeviceGetCount())]
    handles = [
        pynvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.isdigit()
        else pynvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]
    return [_gpu(pynvml, handle) for handle in handles]


def _gpu(nvml, handle) -> Gpu:  # type: ignore[no-untyped-def]
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    name, busy = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    return Gpu(name, memory.total / 2**30, memory.free / 2**30, (major, minor), busy)
