"""Run one recipe, and measure its time, its peak memory and its steps from outside.

Memory comes from NVML on GPUs, and from the kernel's share of each process on a CPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pgenrm_train.cluster.preflight.machine import visible_gpus
from pgenrm_train.config import Config
from pgenrm_train.errors import PGenRMError
from pgenrm_train.run.tracking import METRICS
from pgenrm_train.stages.stage import launch


@dataclass
class Measurement:
    """One recipe: seconds, GiB at the peak, the times at which metrics were written, and its failure."""

    seconds: float = 0.0
    peak_gib: float = 0.0
    steps: list[float] = field(default_factory=list)
    error: str | None = None


def measure(config: Config, recipe: str, seconds: float, late: str) -> Measurement:
    """Run one recipe in a process of its own and kill it after `seconds`, with `late` as its failure.

    A failure is kept for the verdict.
    """
    measurement, began = Measurement(), time.monotonic()
    with watching(config, recipe, measurement, end=began + seconds, late=late):
        try:
            launch(config, recipe)
        except PGenRMError as error:
            measurement.error = measurement.error or str(error)
        except SystemExit:
            measurement.error = measurement.error or "see its message above"
    measurement.seconds = time.monotonic() - began
    return measurement


@contextmanager
def watching(
    config: Config,
    recipe: str,
    measurement: Measurement,
    *,
    every: float = 0.25,
    end: float = float("inf"),
    late: str = "",
) -> Iterator[None]:
    """While the block runs, sample memory and note the times of new lines in the stage's metrics.jsonl.

    From the time `end` on all child processes are killed.
    """
    ended, metrics = threading.Event(), Path(config.run_dir) / recipe / METRICS
    before = used_gib(config)

    def watch() -> None:
        while not ended.wait(every):
            measurement.peak_gib = max(measurement.peak_gib, used_gib(config) - before)
            lines = metrics.read_text().count("\n") if metrics.exists() else 0
            measurement.steps += [time.monotonic()] * (lines - len(measurement.steps))
            if time.monotonic() > end:
                measurement.error = late
                _kill_children()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _kill_children() -> None:
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def used_gib(config: Config) -> float:
    """GiB in use on the fullest visible GPU, or by all child processes."""
    if config.cluster.device == "cuda":
        return max((gpu.memory_gib - gpu.free_gib for gpu in visible_gpus()), default=0.0)
    import psutil

    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may have just ended
            total += process.memory_full_info().pss
    return total / 2**30
