"""Use of a machine while a stage trains."""

import time

from pgenrm_train.cluster.preflight.gpus import Gpu
from pgenrm_train.cluster.utilization import Utilization


def test_use_of_gpus_is_averaged_since_the_last_reading() -> None:
    gpus = [Gpu("H200", 140.0, 40.0, (9, 0), busy=0.5), Gpu("H200", 140.0, 30.0, (9, 0), busy=1.0)]
    meter = Utilization(every=0.01, gpus=lambda: gpus)
    deadline = time.monotonic() + 10
    while not meter.samples and time.monotonic() < deadline:
        time.sleep(0.01)
    assert meter.read() == {"perf/gpu_utilization": 0.75, "perf/gpu_memory_gib": 110.0}


def test_a_machine_without_gpus_has_the_use_of_its_cpu() -> None:
    meter = Utilization(gpus=list)
    assert 0 <= meter.read()["perf/cpu_utilization"] <= 1
