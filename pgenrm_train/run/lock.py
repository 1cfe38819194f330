"""Lock of a run folder: two processes must not write one run."""

import atexit
import fcntl
import os
from pathlib import Path
from typing import IO

from pgenrm_train.errors import ArtifactError

_LOCKS: dict[Path, IO[str]] = {}  # open for as long as this process lives


def lock(run_dir: Path) -> None:
    """Lock a run folder until this process ends.  Raises ArtifactError if another process has it."""
    if run_dir.resolve() in _LOCKS:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ArtifactError(
            f"run_dir={run_dir} is in use by process {file.read().strip() or '?'}; "
            "wait for it or use another run_dir"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    atexit.register(file.close)
    _LOCKS[run_dir.resolve()] = file


def unlock(locked: Path) -> None:
    """Release a lock of this process; `locked` is the resolved path that the folder had."""
    _LOCKS.pop(locked).close()
