"""Ray for our own actors: the cluster at `ray.address`, or a local one that ends with its parent.

This module joins a cluster, waits for its nodes and notices the loss of one.
`python -m pgenrm_train.backends.ray.cluster ADDRESS` prints the resources of each living node for preflight.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import psutil

from pgenrm_train.backends.ray import guardian
from pgenrm_train.config import ROOT, ClusterConfig, Config
from pgenrm_train.errors import BackendError, ConfigError
from pgenrm_train.run.process import sigterm_kept

CODE = ("pgenrm_train", "recipes", "configs", "data_builders", "eval", "requirements")
# In gitignore's grammar.  "!." comes first: a pattern that matches the root silently leaves an empty package.
# Run folders may be inside the checkout, and Ray refuses packages above 500 MiB.
ALL_BUT_CODE = ["/*", "!.", *(f"!/{folder}" for folder in CODE), "__pycache__"]
BACK_SECONDS = 3600.0  # patience with absent or busy nodes
NOTICE_SECONDS = 45.0  # Ray declares nodes dead after 30 silent seconds


def join(address: str, variables: Mapping[str, str], *, show_output: bool = False) -> Any:
    """Connect to the cluster, and ship the checkout and the environment variables to its workers.

    Workers inherit nothing from this process.  Every node needs the same Python environment and must see
    `run_dir` (a shared file system).  Put no secret in `variables`: Ray shows them in its dashboard.
    `show_output`: print the workers' output here.
    """
    import ray

    shipped = {"env_vars": dict(variables), "working_dir": str(ROOT), "excludes": ALL_BUT_CODE}
    with sigterm_kept():
        return ray.init(address=address, runtime_env=shipped, log_to_driver=show_output)


def connect(config: Config, workers: int, variables: Mapping[str, str]) -> Callable[[], None]:
    """Join the cluster at `ray.address`, or start a local Ray with one CPU per worker.

    Returns the function that ends the connection, and a local Ray with it.
    Raises ConfigError for several nodes without `ray.address`.
    """
    import ray

    if config.cluster.nodes > 1 and config.ray.address is None:
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes} needs ray.address=HOST:PORT of a running Ray cluster"
        )
    if config.ray.address is not None:
        join(config.ray.address, variables)
        return ray.shutdown
    folder = Path(tempfile.mkdtemp(prefix="pg_", dir="/tmp"))  # short: AF_UNIX paths end at 107 bytes
    watch = guardian.watch_over(folder)

    def close() -> None:
        ray.shutdown()
        guardian.kill(set(guardian.holders(folder)) - {psutil.Process()})
        shutil.rmtree(folder, ignore_errors=True)
        guardian.dismiss(watch)

    try:
        with sigterm_kept():
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                _temp_dir=str(folder),
                log_to_driver=False,
                runtime_env={"env_vars": dict(variables)},
            )
    except BaseException:
        close()
        raise
    return close


def await_gpus(cluster: ClusterConfig, beat: Callable[[], None], seconds: float = BACK_SECONDS) -> None:
    """Wait until `cluster.nodes` nodes have `cluster.processes_per_node` free GPUs each.

    A node may be away, or still busy with the processes of a former start.
    Raises BackendError after `seconds`.
    """
    import ray

    wanted, gpus, reported = cluster.nodes, cluster.processes_per_node, -1
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        free = ray._private.state.available_resources_per_node()
        ready = sum(int(node.get("GPU", 0) // gpus) for node in free.values())
        if ready >= wanted:
            return
        if ready != reported:
            print(
                f"cluster: {ready} of {wanted} nodes have {gpus} free GPUs each; waiting for the others",
                flush=True,
            )
        reported = ready
        beat()
        time.sleep(1.0)
    raise BackendError(
        f"{ready} of {wanted} nodes of the Ray cluster had {gpus} free GPUs each after {seconds:.0f} s; "
        "check the nodes with ray status, then repeat the command to continue"
    )


def nodes_of(groups: Collection[Any]) -> dict[str, str]:
    """Map id to address of the nodes that hold these placement groups."""
    import ray

    tables = [ray.util.placement_group_table(group) for group in groups]
    used = {node for table in tables for node in table["bundles_to_node_id"].values()}
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in used}


def dead_node(nodes: Mapping[str, str], seconds: float = 0.0) -> str | None:
    """Address of a node that Ray has declared dead within `seconds`; None while all are alive."""
    import ray

    end = time.monotonic() + seconds
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if dead := next((address for node, address in nodes.items() if node not in alive), None):
            return dead
        if time.monotonic() >= end:
            return None
        time.sleep(0.5)


if __name__ == "__main__":
    import ray

    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
    print(json.dumps([node["Resources"] for node in ray.nodes() if node["Alive"]]))
