"""Training checkpoints of a run.  Engines write `complete.json` last: a folder without it is half-written."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from pgenrm_train.config import Totals
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import read_json, write_json

COMPLETE = "complete.json"
MANIFEST = "manifest.json"  # of a published checkpoint: how its chains are read
GROUP_SIZE = 2  # responses per prompt in all stages of training


def write_manifest(checkpoint: Path, totals: Totals) -> None:
    write_json(checkpoint / MANIFEST, {"totals": totals, "group_size": GROUP_SIZE})


def check_group_size(checkpoint: Path) -> None:
    """Raise ArtifactError for a checkpoint that was trained on prompts of more responses."""
    file = checkpoint / MANIFEST
    manifest = read_json(file) if file.exists() else {}
    size = manifest.get("group_size", GROUP_SIZE) if isinstance(manifest, dict) else GROUP_SIZE
    if size != GROUP_SIZE:
        raise ArtifactError(
            f"{file}: group_size={size}, but scores come from prompts of {GROUP_SIZE} responses"
        )


def totals_of(checkpoint: Path) -> Totals | None:
    """Kind of totals of a published checkpoint; None for a checkpoint of others, without a manifest."""
    file = checkpoint / MANIFEST
    if not file.exists():
        return None
    manifest = read_json(file)
    stated = manifest.get("totals", Totals.DECLARED) if isinstance(manifest, dict) else manifest
    if stated not in tuple(Totals):
        raise ArtifactError(f"{file}: totals={stated} is not one of {', '.join(Totals)}")
    return Totals(stated)


def step_of(checkpoint: Path) -> int:
    """The number at the end of the folder's name, as in `checkpoint-20` and `global_step_20`."""
    return int(re.split(r"[-_]", checkpoint.name)[-1])


def mark_complete(checkpoint: Path, facts: Mapping[str, object]) -> None:
    """Write the marker, which must be the last file of the checkpoint.

    `bytes` among the facts, if given, are the sizes of all files.
    """
    write_json(checkpoint / COMPLETE, {"step": step_of(checkpoint), **facts})


def complete_checkpoints(folder: Path, pattern: str) -> list[Path]:
    """Folders that match `pattern` and hold the marker, oldest first."""
    return sorted((marker.parent for marker in folder.glob(f"{pattern}/{COMPLETE}")), key=step_of)


def newest_complete(folder: Path, pattern: str, *, clean: bool = True) -> Path | None:
    """Return the newest usable checkpoint; report and remove (`clean`) newer ones that are not usable."""
    for checkpoint in sorted(folder.glob(pattern), key=step_of, reverse=True):
        complete = (checkpoint / COMPLETE).exists()
        if complete and not _damaged(checkpoint):
            return checkpoint
        if clean:
            print(f"ignoring {'damaged' if complete else 'half-written'} checkpoint {checkpoint}", flush=True)
            shutil.rmtree(checkpoint)
    return None


def sizes(checkpoint: Path) -> dict[str, int]:
    """Size of every file in bytes."""
    files = (file for file in checkpoint.rglob("*") if file.is_file())
    return {str(file.relative_to(checkpoint)): file.stat().st_size for file in files}


def _damaged(checkpoint: Path) -> bool:
    """Whether a file of the marker is missing or has another size, as after a disk failure."""
    marker = read_json(checkpoint / COMPLETE)
    return bool(marker.get("bytes", {}).items() - sizes(checkpoint).items())
