"""Use of this machine while a stage trains: its GPUs as NVML reports them, else its CPU."""

import threading
import time
from collections.abc import Callable, Sequence

import psutil

from pgenrm_train.cluster.preflight.gpus import Gpu, visible_gpus


class Utilization:
    """Mean use since the last reading.

    `perf/gpu_utilization` is the mean over the visible GPUs, in [0, 1], and `perf/gpu_memory_gib` the largest
    use of one GPU, by all processes.  A machine without NVML has `perf/cpu_utilization` instead.
    """

    def __init__(self, every: float = 2.0, gpus: Callable[[], Sequence[Gpu]] = visible_gpus) -> None:
        self.gpus, self.on_gpus = gpus, bool(gpus())
        self.samples: list[tuple[float, float]] = []
        psutil.cpu_percent()  # the start of the first interval
        if self.on_gpus:
            threading.Thread(target=self._watch, args=(every,), daemon=True).start()

    def _watch(self, every: float) -> None:
        while True:
            time.sleep(every)
            if gpus := self.gpus():
                busy = sum(gpu.busy for gpu in gpus) / len(gpus)
                self.samples.append((busy, max(gpu.memory_gib - gpu.free_gib for gpu in gpus)))

    def read(self) -> dict[str, float]:
        samples, self.samples = self.samples, []
        if not samples:
            return {} if self.on_gpus else {"perf/cpu_utilization": psutil.cpu_percent() / 100}
        busy, used = zip(*samples, strict=True)
        return {"perf/gpu_utilization": sum(busy) / len(busy), "perf/gpu_memory_gib": max(used)}
