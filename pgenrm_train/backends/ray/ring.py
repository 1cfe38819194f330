"""One all-reduce over the processes of this node, or over every node of a Ray cluster, for preflight.

torchrun … -m pgenrm_train.backends.ray.ring nccl|gloo
python -m pgenrm_train.backends.ray.ring nccl|gloo ADDRESS RANKS
"""

import os
import socket
import sys
from datetime import timedelta

import ray
import torch
from torch import distributed

from pgenrm_train.backends.ray.cluster import join

TIMEOUT = timedelta(seconds=120)


def sums_correctly(backend: str, local: int) -> bool:
    """Sum the ranks over the process group, and check that every element is 0 + 1 + … + (N − 1)."""
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = distributed.get_world_size()
    total = torch.full((1024,), float(distributed.get_rank()), device=device)
    distributed.all_reduce(total)
    correct = bool((total == world * (world - 1) / 2).all())
    distributed.destroy_process_group()
    return correct


class Rank:
    """Actor that is one rank on a cluster; Ray makes its GPU the only visible one."""

    def address(self) -> str:
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def ring(self, backend: str, address: str, rank: int, ranks: int) -> bool:
        distributed.init_process_group(
            backend, init_method=address, rank=rank, world_size=ranks, timeout=TIMEOUT
        )
        return sums_correctly(backend, 0)


def over_cluster(backend: str, address: str, ranks: int) -> bool:
    """Check the ring with as many ranks as training will have.

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
    return all(ray.get([a.ring.remote(backend, meeting, rank, ranks) for rank, a in enumerate(actors)]))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        closed = over_cluster(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:  # one of torchrun's processes
        distributed.init_process_group(sys.argv[1], timeout=TIMEOUT)
        closed = sums_correctly(sys.argv[1], int(os.environ["LOCAL_RANK"]))
    sys.exit(0 if closed else 1)
