"""Training checkpoints of a run.  Engines write `complete.json` last: a folder without it is half-written."""

from __future__ import annotations

import re
from pathlib import Path

COMPLETE = "complete.json"


def step_of(checkpoint: Path) -> int:
    """The number at the end of the folder's name, as in `checkpoint-20` and `global_step_20`."""
    return int(re.split(r"[-_]", checkpoint.name)[-1])


def complete_checkpoints(folder: Path, pattern: str) -> list[Path]:
    """Folders that match `pattern` and hold the marker, oldest first."""
    return sorted((marker.parent for marker in folder.glob(f"{pattern}/{COMPLETE}")), key=step_of)
