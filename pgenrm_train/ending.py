"""SIGTERM, with which a scheduler ends a job, ends a run as Ctrl-C does: engines are stopped and manifests put in order."""

from __future__ import annotations

import signal
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came.  Unlike Ctrl-C it reached this process alone."""


def end_on_sigterm() -> None:
    """Raise Terminated in the main thread, once: a second signal must not break off what the first has begun."""
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
