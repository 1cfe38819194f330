"""The end of processes: SIGTERM, with which a scheduler ends a job, acts as Ctrl-C; children die with us."""

import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, Any

from pgenrm_train.config import ROOT


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived.  Unlike Ctrl-C it reached this process alone."""


def end_on_sigterm() -> None:
    """Raise Terminated in the main thread at the first SIGTERM; later ones do not interrupt the clean-up."""
    signal.signal(signal.SIGTERM, _end)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Restore the SIGTERM handler after the block: Ray installs one that ends the process with a dump."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Make the kernel (Linux) send `number` to this process when its parent ends, even by kill -9.

    A child calls it before anything else.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def child_environment() -> dict[str, str]:
    """Environment of a child process that can import this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def run_child(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    patience: float,
    relay: Callable[[IO[str]], None] | None = None,
) -> int:
    """Run a command in a child process that dies with this one; return its exit code.

    If this process is interrupted, the child has `patience` seconds to end by itself.  Without `relay`,
    Ctrl-C reaches the child as well, and whatever it started is killed with it.  With `relay`, which reads
    the child's output, the child has a session of its own: it gets SIGTERM and cleans up after itself.
    """
    child = subprocess.Popen(
        command,
        env=environment,
        start_new_session=relay is not None,
        preexec_fn=die_with_parent,
        stdout=subprocess.PIPE if relay else None,
        stderr=subprocess.STDOUT if relay else None,
        text=True,
        errors="replace",
    )
    if relay:  # in a thread, because daemons may hold the pipe open longer than the child lives
        threading.Thread(target=relay, args=(child.stdout,), daemon=True).start()
    try:
        return child.wait()
    except BaseException as reason:
        reached = relay is None and type(reason) is KeyboardInterrupt
        stop_child(child, patience, terminate=not reached, family=relay is None)
        raise


def stop_child(
    child: subprocess.Popen[Any], patience: float, *, terminate: bool = True, family: bool = True
) -> None:
    """Give a child `patience` seconds to end, then kill it and, with `family`, all that it started."""
    import psutil

    started = psutil.Process(child.pid).children(recursive=True) if family and child.poll() is None else []
    if terminate:
        child.terminate()
    try:
        child.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        child.kill()
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
