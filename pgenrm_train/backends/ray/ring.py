"""All-reduces over the processes of this node, or over every node of a Ray cluster, for preflight.

One checks the sum; the next ones measure bandwidth.  The bus bandwidth of N processes is 2(N − 1)/N · bytes /
seconds, as in nccl-tests.  The transport (P2P, SHM, NET/IB, NET/Socket) is read from NCCL's own log.

torchrun … -m pgenrm_train.backends.ray.ring nccl|gloo
python -m pgenrm_train.backends.ray.ring nccl|gloo ADDRESS RANKS
"""

import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import ray
import torch
from torch import distributed

from pgenrm_train.backends.ray.cluster import join

TIMEOUT = timedelta(seconds=120)
NUMBERS = {"nccl": 2**26, "gloo": 2**20}  # of float32 in one timed all-reduce
REPEATS = 4  # the first one also connects


@dataclass(frozen=True, slots=True)
class Measured:
    """One rank: whether its sum was right, bus bandwidth, and transports that NCCL named."""

    correct: bool
    gigabytes_per_second: float
    transports: set[str]


def log_transport(backend: str) -> Path | None:
    """Let NCCL log to a file of this process, unless the user has set its log."""
    if backend != "nccl" or "NCCL_DEBUG_FILE" in os.environ:
        return None
    log = Path(tempfile.mkdtemp(prefix="pgenrm_ring_")) / "nccl.log"
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,P2P,NET", "NCCL_DEBUG_FILE": str(log)}
    return log


def transports_in(log: str) -> set[str]:
    """Transports in NCCL's log, e.g. {"P2P", "NET/IB"}."""
    return {name.removesuffix("/") for name in re.findall(r" via (P2P|SHM|NVLS|NET/\w+)", log)}


def measure(backend: str, local: int) -> Measured:
    """Sum the ranks over the process group, check that every element is 0 + 1 + … + (N − 1), and time it."""
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = distributed.get_world_size()
    total = torch.full((1024,), float(distributed.get_rank()), device=device)
    distributed.all_reduce(total)
    correct = bool((total == world * (world - 1) / 2).all())
    large = torch.ones(NUMBERS[backend], device=device)
    spent = min(_seconds(large) for _ in range(REPEATS))
    log = Path(os.environ.get("NCCL_DEBUG_FILE", ""))
    transports = transports_in(log.read_text(errors="replace")) if log.is_file() else set()
    return Measured(correct, 2 * (world - 1) / world * large.nbytes / spent / 1e9, transports)


def _seconds(tensor: torch.Tensor) -> float:
    distributed.barrier()
    began = time.monotonic()
    distributed.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - began


def report(backend: str, ranks: Sequence[Measured]) -> str:
    transports = sorted(set().union(*(rank.transports for rank in ranks)))
    via = f" via {', '.join(transports)}" if transports else ""
    slowest = min(rank.gigabytes_per_second for rank in ranks)
    return f"ring: {len(ranks)} processes ({backend}{via}), {slowest:.2f} GB/s"


class Rank:
    """Actor that is one rank on a cluster; Ray makes its GPU the only visible one."""

    def address(self) -> str:
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def ring(self, backend: str, address: str, rank: int, ranks: int) -> Measured:
        log_transport(backend)
        distributed.init_process_group(
            backend, init_method=address, rank=rank, world_size=ranks, timeout=TIMEOUT
        )
        measured = measure(backend, 0)
        distributed.destroy_process_group()
        return measured


def over_cluster(backend: str, address: str, ranks: int) -> list[Measured]:
    """Measure the ring with as many ranks as training will have.

    Ray places them as it will place training: one GPU per rank with NCCL, spread over the nodes with gloo.
    """
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    names = ("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "GLOO_SOCKET_IFNAME")
    join(address, {name: os.environ[name] for name in names if name in os.environ})
    gpu = 1 if backend == "nccl" else 0
    group = placement_group(
        [{"CPU": 1.0} | ({"GPU": 1.0} if gpu else {})] * ranks, strategy="PACK" if gpu else "SPREAD"
    )
    ray.get(group.ready(), timeout=TIMEOUT.total_seconds())
    actor = ray.remote(num_cpus=1, num_gpus=gpu)(Rank)
    places = [
        PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=n)
        for n in range(ranks)
    ]
    actors = [actor.options(scheduling_strategy=place).remote() for place in places]
    meeting = ray.get(actors[0].address.remote())
    return list(ray.get([a.ring.remote(backend, meeting, rank, ranks) for rank, a in enumerate(actors)]))


def of_torchrun(backend: str) -> list[Measured]:
    """Measure the ring of torchrun's processes: on rank 0 all of them, else this process alone."""
    log_transport(backend)
    distributed.init_process_group(backend, timeout=TIMEOUT)
    gatherers = distributed.new_group(backend="gloo", timeout=TIMEOUT)
    every: list[Measured | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, measure(backend, int(os.environ["LOCAL_RANK"])), group=gatherers)
    first = distributed.get_rank() == 0
    distributed.destroy_process_group()
    return [each for each in every if each] if first else []


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measured = over_cluster(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        measured = of_torchrun(sys.argv[1])
    if measured:
        print(report(sys.argv[1], measured))
    sys.exit(0 if all(rank.correct for rank in measured) else 1)
