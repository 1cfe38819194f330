"""What of a stage's folder is worth publishing, and how it is held still while it travels.

A complete stage is published without what only its training needed.  One that is under way is published when an engine has left a
step checkpoint that is complete: with it, and with what else a start on another machine goes on from.
"""

from __future__ import annotations

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
OPEN_DATABASE = "cache.db"  # answers of a model: SQLite's files make sense together only, so they travel when the stage is complete
GROWING = (".jsonl", ".log")  # written to in place; every other file is replaced whole
SETTLED = 0.5  # seconds in which a checkpoint that an engine is removing shows it


class Moved(Exception):
    """The folder changed while it was looked at; the next look finds it at rest."""


def state_of(folder: Path) -> str | None:
    """What there is to publish in a few words, which differ when it does; None for nothing."""
    stage = StageFolder.read(folder.parent, folder.name)
    if stage.complete:
        return f"complete {fingerprint(stage.manifest.as_json())}"
    steps = [str(path.relative_to(folder)) for path in resumable(folder)]
    trained = (
        ["trained.json"] if (folder / "trained.json").exists() else []
    )  # a phase that waits for its session to end
    return " ".join(steps + trained) or None


def resumable(folder: Path) -> list[Path]:
    """The step checkpoints that a start goes on from or publishes: the newest complete one, and the one that validation likes best."""
    found = []
    for pattern in STEPS:
        if complete := complete_checkpoints(folder, pattern):
            newest, best = complete[-1], _best(complete[-1])
            found += [path for path in complete if path == newest or step_of(path) == best]
    return found


def freeze(folder: Path, to: Path) -> str:
    """Fill `to` with what is to be published, as links or copies that the stage's own writing no longer touches; returns the state.

    Raises Moved when an engine wrote or removed a checkpoint meanwhile.
    """
    state = state_of(folder)
    shutil.rmtree(to, ignore_errors=True)
    try:
        for name in (before := sorted(_names(folder))):
            _hold(folder / name, to / name)
        if state is not None and not state.startswith("complete "):
            time.sleep(SETTLED)
            if [name for name in before if name.startswith(_KEPT)] != [
                n for n in sorted(_names(folder)) if n.startswith(_KEPT)
            ]:
                raise Moved
    except FileNotFoundError:
        raise Moved from None
    if state is None or state_of(folder) != state:
        raise Moved
    return state


_KEPT = tuple(pattern.partition("/")[0] + "/" for pattern in STEPS)


def _names(folder: Path) -> Iterator[str]:
    complete = StageFolder.read(folder.parent, folder.name).complete
    for path in [
        *_walk(folder, complete),
        *(p for steps in ([] if complete else resumable(folder)) for p in _walk(steps, True)),
    ]:
        yield path.relative_to(folder).as_posix()


def _walk(folder: Path, everything: bool) -> Iterator[Path]:
    """Files below, without half-written ones and, in a stage's folder, what is left out."""
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
    try:
        return read_json(checkpoint / "trainer_state.json").get("best_global_step")  # type: ignore[no-any-return]
    except ArtifactError:  # CRE's and the curriculum's have none
        return None
