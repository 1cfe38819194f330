"""Refinement of prototypes by several processes of this machine, with one GPU each on a GPU machine.

Arrays are passed as files that every process maps, so that a large matrix is in memory once.  The result is
that of one process, except for the order in which gradients are added up (`refinement.Part`).
"""

import os
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pgenrm_train.errors import BackendError, ConfigError, last_line
from pgenrm_train.files import read_json, write_json
from pgenrm_train.prototypes.clusters import Prototypes
from pgenrm_train.prototypes.refinement import (
    Lookup,
    Part,
    RefinementBatch,
    RefinementMetrics,
    RefinementSettings,
    refine,
)


def refine_in_processes(
    prototypes: Prototypes,
    samples: RefinementBatch,
    settings: RefinementSettings,
    *,
    device: str,
    processes: int,
) -> tuple[Prototypes, RefinementMetrics]:
    """Run `refinement.refine` on `processes`, with its errors, and BackendError for a lost process."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn

    with tempfile.TemporaryDirectory(prefix="pg_refine_") as name:
        folder = Path(name)
        _write_arrays(folder / "clusters", prototypes)
        _write_arrays(folder / "samples", samples)
        try:
            spawn(_refine, (folder, settings, device, processes), nprocs=processes)
        except ProcessRaisedException as error:
            if (mistake := folder / "mistake.json").exists():
                raise ConfigError(read_json(mistake)) from None
            raise BackendError(f"a process of the refinement failed: {last_line(error)}") from error
        except ProcessExitedException as error:
            raise BackendError(
                f"a process of the refinement was lost ({error}); repeat the command to refine again"
            ) from None
        refined = _read_arrays(folder / "refined")
        # copies, because the files go with the folder
        A, labels = np.array(refined["A"]), np.array(refined["labels"])
        maps = {name: np.array(value) for name, value in refined["maps"].items()}
        return replace(prototypes, A=A, labels=labels, maps=maps), read_json(folder / "metrics.json")


def _refine(rank: int, folder: Path, settings: RefinementSettings, device: str, processes: int) -> None:
    import torch

    # on one machine, the host name need not resolve
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    try:
        prototypes = Prototypes(**_read_arrays(folder / "clusters"))
        samples = RefinementBatch(**_read_arrays(folder / "samples"))
        refined, metrics = refine(prototypes, samples, settings, device=device, part=Part(rank, processes))
        if rank == 0:
            _write_arrays(
                folder / "refined", {"A": refined.A, "labels": refined.labels, "maps": refined.maps}
            )
            write_json(folder / "metrics.json", metrics)
    except ConfigError as error:
        write_json(folder / "mistake.json", str(error))
        raise
    finally:
        torch.distributed.destroy_process_group()


def _write_arrays(folder: Path, arrays: Any, written: dict[int, Path] | None = None) -> None:
    """Write one .npy file per array of a dataclass or mapping.

    `Lookup` and mappings inside it become folders.  An array with several names is written once and linked.
    """
    folder.mkdir()
    written = {} if written is None else written
    named = arrays if isinstance(arrays, dict) else {f.name: getattr(arrays, f.name) for f in fields(arrays)}
    for name, value in named.items():
        path = folder / f"{name}.npy"
        if not isinstance(value, np.ndarray):
            _write_arrays(folder / f"{name}.{'rows' if isinstance(value, Lookup) else 'map'}", value, written)
        elif id(value) in written:  # the one table of texts of queries, responses and histories
            path.hardlink_to(written[id(value)])
        else:
            np.save(path, value)
            written[id(value)] = path


def _read_arrays(folder: Path) -> Any:
    """Map the arrays that `_write_arrays` wrote, by name."""
    arrays: dict[str, object] = {path.stem: np.load(path, mmap_mode="c") for path in folder.glob("*.npy")}
    arrays |= {path.stem: Lookup(**_read_arrays(path)) for path in folder.glob("*.rows")}
    return arrays | {path.stem: _read_arrays(path) for path in folder.glob("*.map")}
