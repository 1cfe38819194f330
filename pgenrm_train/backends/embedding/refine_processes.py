"""Refinement of prototypes by several processes of this machine, a GPU each where there are GPUs (`refinement.Part`).

Arrays travel as files that every process maps, so that a large matrix is in memory once.  The result is that of one process, but
for the order in which gradients are added up.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pgenrm_train.config import PrototypesConfig
from pgenrm_train.errors import BackendError, ConfigError
from pgenrm_train.files import read_json, write_json
from pgenrm_train.prototypes.clusters import Prototypes
from pgenrm_train.prototypes.refinement import Part, RefinementBatch, Rows, refine


def refine_in_processes(
    prototypes: Prototypes,
    samples: RefinementBatch,
    config: PrototypesConfig,
    seed: int,
    *,
    device: str,
    processes: int,
) -> tuple[Prototypes, dict[str, Any]]:
    """As `refinement.refine`, shared out over `processes`.  Raises what it raises, BackendError when a process is lost."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn

    with tempfile.TemporaryDirectory(prefix="pg_refine_") as name:
        folder = Path(name)
        _lay_down(folder / "prototypes", prototypes)
        _lay_down(folder / "samples", samples)
        try:
            spawn(_refine, (folder, config, seed, device, processes), nprocs=processes)
        except ProcessRaisedException as error:
            if (told := folder / "mistake.json").exists():  # of the user
                raise ConfigError(read_json(told)) from None
            raise BackendError(
                f"a process of the refinement failed: {str(error).strip().splitlines()[-1]}"
            ) from error
        except ProcessExitedException as error:
            raise BackendError(
                f"a process of the refinement was lost ({error}); the same command starts it anew"
            ) from None
        found = _picked_up(folder / "refined")
        A, labels = (np.array(found[name]) for name in ("A", "labels"))  # the files go with the folder
        maps = {name: np.array(value) for name, value in found["maps"].items()}
        return dataclasses.replace(prototypes, A=A, labels=labels, maps=maps), read_json(
            folder / "metrics.json"
        )


def _refine(
    rank: int, folder: Path, config: PrototypesConfig, seed: int, device: str, processes: int
) -> None:
    import torch

    os.environ.setdefault(
        "GLOO_SOCKET_IFNAME", "lo"
    )  # a host name that does not resolve is no obstacle on one machine
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    try:
        given = Prototypes(**_picked_up(folder / "prototypes"))
        samples = RefinementBatch(**_picked_up(folder / "samples"))
        refined, metrics = refine(given, samples, config, seed, device=device, part=Part(rank, processes))
        if rank == 0:
            _lay_down(folder / "refined", {"A": refined.A, "labels": refined.labels, "maps": refined.maps})
            write_json(folder / "metrics.json", metrics)
    except ConfigError as error:
        write_json(folder / "mistake.json", str(error))
        raise
    finally:
        torch.distributed.destroy_process_group()


def _lay_down(folder: Path, arrays: Any, laid: dict[int, Path] | None = None) -> None:
    """A .npy file an array, which several names may share; `Rows` and mappings are folders."""
    folder.mkdir()
    laid = {} if laid is None else laid
    named = (
        arrays
        if isinstance(arrays, dict)
        else {f.name: getattr(arrays, f.name) for f in dataclasses.fields(arrays)}
    )
    for name, value in named.items():
        path = folder / f"{name}.npy"
        if not isinstance(value, np.ndarray):
            _lay_down(folder / f"{name}.{'rows' if isinstance(value, Rows) else 'map'}", value, laid)
        elif id(value) in laid:  # the one table of texts behind queries, responses and histories
            path.hardlink_to(laid[id(value)])
        else:
            np.save(path, value)
            laid[id(value)] = path


def _picked_up(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.stem: np.load(path, mmap_mode="c") for path in folder.glob("*.npy")}
    found |= {path.stem: Rows(**_picked_up(path)) for path in folder.glob("*.rows")}
    return found | {path.stem: _picked_up(path) for path in folder.glob("*.map")}
