"""What a stage needs of the machine, said in one sentence before the stage starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from pgenrm_train.config import Config
from pgenrm_train.errors import PreflightError

HEAVY = ("psi", "cre", "curriculum", "evaluate")


def check_machine(config: Config, stage: str) -> None:
    """Free memory and disk against `cluster.min_free_*`, and GPUs where the cluster names them.  Raises PreflightError."""
    import psutil

    free_disk = shutil.disk_usage(_existing(Path(config.run_dir))).free / 2**30
    if free_disk < config.cluster.min_free_disk_gib:
        raise PreflightError(
            f"{free_disk:.1f} GiB of disk are free at run_dir={config.run_dir}, and cluster.min_free_disk_gib="
            f"{config.cluster.min_free_disk_gib:g}; free some, choose another run_dir, or lower the limit"
        )
    if stage not in HEAVY:
        return
    free_memory = psutil.virtual_memory().available / 2**30
    if free_memory < config.cluster.min_free_memory_gib:
        raise PreflightError(
            f"{free_memory:.1f} GiB of memory are free, and {stage} needs cluster.min_free_memory_gib="
            f"{config.cluster.min_free_memory_gib:g}; close other programs or lower the limit"
        )
    if config.cluster.device == "cuda":
        _check_gpus(config)


def _check_gpus(config: Config) -> None:
    import torch

    found = torch.cuda.device_count()
    if found < config.cluster.processes_per_node:
        raise PreflightError(
            f"cluster={config.cluster.name} needs {config.cluster.processes_per_node} GPUs a node and this machine shows {found}; "
            "choose another cluster= or set cluster.processes_per_node="
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.resolve().parent
    return path
