"""Ray for our own actors: the cluster that runs at `ray.address`, or one of this machine that ends with what started it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from pgenrm_train.backends import guardian
from pgenrm_train.config import ROOT, Config
from pgenrm_train.errors import ConfigError


def join(address: str, variables: Mapping[str, str], *, workers_speak: bool = False) -> Any:
    """Connect; workers inherit nothing from us, so the checkout and the environment variables travel with the job.

    Every node needs the same Python environment and must see `run_dir` (a shared file system).  No secret belongs in `variables`:
    Ray shows them in its dashboard.  `workers_speak`: their output appears here.
    """
    import ray

    travels = {"env_vars": dict(variables), "working_dir": str(ROOT), "excludes": [".*", "runs", "outputs"]}
    return ray.init(address=address, runtime_env=travels, log_to_driver=workers_speak)


def connect(config: Config, workers: int, variables: Mapping[str, str]) -> Callable[[], None]:
    """Join the cluster at `ray.address`, or start a Ray of our own with a CPU a worker; returns what ends it.

    Raises ConfigError for several nodes without `ray.address`.
    """
    import ray

    if config.cluster.nodes > 1 and config.ray.address is None:
        raise ConfigError(f"cluster.nodes={config.cluster.nodes} needs ray.address=HOST:PORT of a running Ray cluster")
    if config.ray.address is not None:
        join(config.ray.address, variables)
        return ray.shutdown
    folder = Path(tempfile.mkdtemp(prefix="pg_", dir="/tmp"))  # short: AF_UNIX paths end at 107 characters
    watch = guardian.watch_over(folder)

    def close() -> None:
        ray.shutdown()
        guardian.kill(set(guardian.holders(folder)) - {psutil.Process()})
        shutil.rmtree(folder, ignore_errors=True)
        guardian.dismiss(watch)

    try:
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


def last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
