"""How processes end: SIGTERM, with which a scheduler ends a job, as Ctrl-C does, and what we start together with us."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came.  Unlike Ctrl-C it reached this process alone."""


def end_on_sigterm() -> None:
    """Raise Terminated in the main thread, once: a second signal must not break off what the first has begun."""
    signal.signal(signal.SIGTERM, _end)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """SIGTERM goes to whom it went before the block: Ray takes it when it starts, and would end the process with a dump."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Linux: the kernel sends `number` to this process when its parent is gone, even by kill -9.  Called first thing in a child."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, number)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
