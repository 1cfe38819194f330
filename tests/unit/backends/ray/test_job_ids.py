"""Two Rays on one machine: verl's names for their sockets differ, and agree within a Ray."""

import os
import subprocess
import sys

from pgenrm_train.config import ROOT

SCRIPT = """
import ray
import pgenrm_train.backends.ray.job_ids

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)

@ray.remote
def of_worker():
    import pgenrm_train.backends.ray.job_ids
    return ray.get_runtime_context().get_job_id()

print("id", ray.get(of_worker.remote()), ray.get_runtime_context().get_job_id())
"""


def test_the_jobs_of_two_rays_have_different_ids_that_their_workers_share() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    ids = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        ids.append(next(line for line in done.stdout.splitlines() if line.startswith("id ")).split()[1:])
    (worker, driver), (other, _) = ids
    assert worker == driver != other
    # a Unix socket's path holds 107 characters
    assert len(f"/tmp/rl-colocate-zmq-{worker}-replica-100-rank-100.sock") < 100
