"""Join a Ray cluster that runs already: `ray.address=`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgenrm_train.config import ROOT


def join(address: str, variables: Mapping[str, str], *, workers_speak: bool = False) -> Any:
    """Connect; workers inherit nothing from us, so the checkout and the environment variables travel with the job.

    Every node needs the same Python environment and must see `run_dir` (a shared file system).  No secret belongs in `variables`:
    Ray shows them in its dashboard.  `workers_speak`: their output appears here.
    """
    import ray

    travels = {"env_vars": dict(variables), "working_dir": str(ROOT), "excludes": [".*", "runs", "outputs"]}
    return ray.init(address=address, runtime_env=travels, log_to_driver=workers_speak)
