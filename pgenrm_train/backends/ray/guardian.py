"""A process that outlives a killed Ray driver just long enough to clean up after it.

Linux ends the raylet with its driver, but not the raylet's agents: for a minute they try to report to a
dead server.  The driver holds the other end of this process's standard input.  When that end closes, the
guardian kills every process that still has a file of the session's folder open, and removes the folder.
"""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

SECONDS = 10.0  # how long new processes may appear after the driver's death


def watch_over(folder: Path) -> subprocess.Popen[bytes]:
    """Start the guardian of `folder`, in a session of its own so that Ctrl-C does not reach it."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder)], stdin=subprocess.PIPE, start_new_session=True
    )


def dismiss(guardian: subprocess.Popen[bytes]) -> None:
    """Stop the guardian after the driver has cleaned up itself."""
    guardian.kill()
    guardian.wait()
    if guardian.stdin:
        guardian.stdin.close()


def holders(folder: Path) -> list[psutil.Process]:
    """Processes that have a file below `folder` open."""
    processes = []
    for process in psutil.process_iter():
        try:
            if any(Path(file.path).is_relative_to(folder) for file in process.open_files()):
                processes.append(process)
        except psutil.Error:  # gone, or another user's
            continue
    return processes


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    sys.stdin.read()
    end, quiet = time.monotonic() + SECONDS, 0
    while quiet < 3 and time.monotonic() < end:
        left = holders(Path(sys.argv[1]))
        quiet = 0 if left else quiet + 1
        kill(left)
        time.sleep(0.3)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
