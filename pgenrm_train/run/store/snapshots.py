"""Snapshots of a stage's folder for publication, which the stage's own writing cannot change.

A complete stage is published without files that only its training needed.  A running stage is published when
an engine has written a complete step checkpoint: with it go all files from which another machine can
continue.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import fingerprint, read_json
from pgenrm_train.run.checkpoints import complete_checkpoints, step_of
from pgenrm_train.run.folder import StageFolder

STEPS = ("steps/checkpoint-*", "verl/global_step_*")  # of PSI; of CRE and the curriculum
LEFT_OUT = ("steps", "verl", "wandb", "ray_logs", "ray_train")
# Answers of a model.  SQLite's files are valid only together, so they are published with the complete stage.
OPEN_DATABASE = "cache.db"
GROWING = (".jsonl", ".log")  # appended in place; every other file is replaced at once
SETTLED = 0.5  # seconds after which a removal by an engine is visible


class Moved(Exception):
    """The folder changed during the snapshot; the next try follows."""


def state_of(folder: Path) -> str | None:
    """Short text that identifies the publishable content of a folder; None if there is none."""
    stage = StageFolder.read(folder.parent, folder.name)
    if stage.complete:
        return f"complete {fingerprint(stage.manifest.as_json())}"
    steps = [str(path.relative_to(folder)) for path in resumable(folder)]
    # of a phase that waits for its session to end
    trained = ["trained.json"] if (folder / "trained.json").exists() else []
    return " ".join(steps + trained) or None


def resumable(folder: Path) -> list[Path]:
    """Step checkpoints to continue from or to publish: the newest complete one and the best by validation."""
    kept = []
    for pattern in STEPS:
        if complete := complete_checkpoints(folder, pattern):
            newest, best = complete[-1], _best(complete[-1])
            kept += [path for path in complete if path == newest or step_of(path) == best]
    return kept


def freeze(folder: Path, to: Path) -> str:
    """Fill `to` with links or copies of the publishable files; returns the state.

    Raises Moved if an engine wrote or removed a checkpoint meanwhile.
    """
    state = state_of(folder)
    shutil.rmtree(to, ignore_errors=True)
    try:
        before = set(_names(folder))
        for name in sorted(before):
            _hold(folder / name, to / name)
        if state is not None and not state.startswith("complete "):
            time.sleep(SETTLED)
            if any(name.startswith(_KEPT) for name in before ^ set(_names(folder))):
                raise Moved
    except FileNotFoundError:
        raise Moved from None
    if state is None or state_of(folder) != state:
        raise Moved
    return state


_KEPT = tuple(pattern.partition("/")[0] + "/" for pattern in STEPS)


def _names(folder: Path) -> Iterator[str]:
    """Publishable files, relative to the folder."""
    complete = StageFolder.read(folder.parent, folder.name).complete
    steps = [] if complete else resumable(folder)
    for path in [*_walk(folder, complete), *(path for step in steps for path in _walk(step, True))]:
        yield path.relative_to(folder).as_posix()


def _walk(folder: Path, everything: bool) -> Iterator[Path]:
    """Files below, without half-written ones, left-out folders and, unless `everything`, open databases."""
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not _half_written(name)]
        if everything or OPEN_DATABASE not in files:
            yield from (Path(where, name) for name in files if not _half_written(name))


def _half_written(name: str) -> bool:
    return name.endswith((".tmp", ".old", ".lock"))


def _hold(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix not in GROWING and not path.is_symlink():
        try:
            os.link(path, to)
            return
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            pass
    shutil.copy2(path, to)


def _best(checkpoint: Path) -> int | None:
    """Step that validation likes best, as the trainer notes it."""
    try:
        best: int | None = read_json(checkpoint / "trainer_state.json").get("best_global_step")
    except ArtifactError:  # checkpoints of CRE and the curriculum have no trainer state
        return None
    return best
