"""One warm veRL session: Ray, workers and vLLM are started once and serve every phase given to it.

Start-up is most of a small run (Ray, four Python processes that import torch, verl and vLLM), so CRE and the curriculum share it.
The trainer runs in the driver; a watchdog thread ends the process when nothing has moved for `stall_seconds`, because a Ray call
on a dead vLLM worker never returns.  On a cluster another one looks whether the nodes that hold the workers are still there.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pgenrm_train.backends.ray import guardian
from pgenrm_train.backends.ray.cluster import (
    NOTICE_SECONDS,
    await_gpus,
    dead_node,
    join,
    node_lost_error,
    nodes_of,
)
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError, EngineLostError, PGenRMError
from pgenrm_train.files import write_json

STARTUP_SECONDS = 900.0  # granted up to the end of the session's first step, whatever stall_seconds is
STALLED = 3  # exit code of a run that the watchdog ended
GRACE_SECONDS = (
    15.0  # after the loss of a node: most calls fail by themselves, and a call that does not is ended
)


class Watchdog:
    """Ends the process, and Ray with it, when `beat` was not called for `seconds`."""

    def __init__(self, seconds: float, on_stall: Callable[[PGenRMError], None]) -> None:
        self.seconds, self.on_stall = seconds, on_stall
        self.stage, self.step, self.doing = "start-up", 0, "starting Ray, the actor and vLLM"
        self.last, self.stepped = time.monotonic(), False
        self.file: Path | None = None
        self.stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def follow(self, file: Path) -> None:
        """Write the heartbeat to `file` from now on."""
        self.file = file

    def beat(self, stage: str, step: int, doing: str) -> None:
        # the first step of a session also imports and compiles: it has the patience of the start-up
        self.stepped = self.stepped or (stage == self.stage and 0 < self.step < step)
        self.stage, self.step, self.doing, self.last = stage, step, doing, time.monotonic()
        if self.file is not None:
            write_json(
                self.file,
                {"time": time.time(), "stage": stage, "step": step, "doing": doing, "pid": os.getpid()},
            )

    def stop(self) -> None:
        self.stopped.set()

    def _watch(self) -> None:
        while not self.stopped.wait(min(1.0, self.seconds / 4)):
            limit = self.seconds if self.stepped else max(self.seconds, STARTUP_SECONDS)
            silent = time.monotonic() - self.last
            if silent > limit:
                self.on_stall(
                    EngineLostError(
                        f"{self.stage} made no progress for {silent:.0f} s at step {self.step} while {self.doing}; the run was "
                        f"stopped and goes on from its newest checkpoint when started again"
                    )
                )
                return


class Session:
    """Ray, trainer and vLLM behind `run(phase …)`.  Use as a context manager; leaving it leaves no process behind."""

    def __init__(self, config: Config, verl: Any, watchdog: Watchdog) -> None:
        self.config, self.watchdog = config, watchdog
        self.folder = Path(
            tempfile.mkdtemp(prefix="pg_", dir="/tmp")
        )  # short: AF_UNIX paths end at 107 characters
        self.guardian = guardian.watch_over(self.folder)
        self.failed = True
        self.nodes: dict[str, str] = {}  # of a cluster, with workers of ours
        try:
            self._start_ray(verl)
            self._start_trainer(verl)
            self._look_after_nodes()
        except BaseException:
            self.close()
            raise

    def _start_ray(self, verl: Any) -> None:
        import ray
        from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

        variables = get_ppo_ray_runtime_env(verl)["env_vars"]
        address = self.config.ray.address
        if address is not None:
            from pgenrm_train.backends.grpo.config import verl_variables

            variables |= verl_variables(self.config)
            variables.pop("PYTHONPATH")
            join(address, variables)
            await_gpus(self.config, lambda: self.watchdog.beat("start-up", 0, "waiting for nodes"))
            return
        os.environ.update(variables)
        cpu = self.config.cluster.device == "cpu"
        ranks = self.config.cluster.nodes * self.config.cluster.processes_per_node
        ray.init(
            num_cpus=8 + 4 * ranks
            if cpu
            else None,  # logical: verl's actors ask for more than a small machine has
            num_gpus=ranks if cpu else None,
            include_dashboard=False,
            object_store_memory=256 * 1024**2 if cpu else None,
            _temp_dir=str(self.folder),
            log_to_driver=False,
            namespace=f"pgenrm-{os.getpid()}",
        )

    def _start_trainer(self, verl: Any) -> None:
        import transfer_queue

        from pgenrm_train.backends.grpo.trainer import ChainTrainer, use_direct_servers

        use_direct_servers()
        transfer_queue.init(verl.transfer_queue)
        self.trainer = ChainTrainer(verl)
        self.trainer.init()
        self.trainer.start_rollout()

    def _look_after_nodes(self) -> None:
        if self.config.ray.address is not None:
            pools = self.trainer.resource_pool_manager.resource_pool_dict.values()
            self.nodes = nodes_of([group for pool in pools for group in pool.pgs or ()])
            threading.Thread(target=self._watch_nodes, name="nodes", daemon=True).start()

    def _watch_nodes(self) -> None:
        while not self.watchdog.stopped.wait(1.0):
            if gone := dead_node(self.nodes):
                if not self.watchdog.stopped.wait(GRACE_SECONDS):
                    self.watchdog.on_stall(self._loss(gone))
                return

    def _loss(self, address: str) -> PGenRMError:
        return node_lost_error(address, self.watchdog.stage, self.watchdog.step)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: object) -> None:
        """Raises NodeLostError instead of what the loss of a node has led to."""
        self.failed = kind is not None
        engine_s = isinstance(error, Exception) and (
            isinstance(error, BackendError) or not isinstance(error, PGenRMError)
        )
        gone = dead_node(self.nodes, NOTICE_SECONDS) if engine_s and self.nodes else None
        self.close()
        if gone:
            raise self._loss(gone) from error

    def close(self) -> None:
        """Stop Ray and every child of this process.  Worker logs are kept when the session failed."""
        self.watchdog.stop()
        shut_down(
            self.folder, keep_logs=self.watchdog.file.parent if self.failed and self.watchdog.file else None
        )
        guardian.dismiss(self.guardian)


def shut_down(folder: Path, keep_logs: Path | None) -> None:
    """Ray's own shutdown first, in a thread that may hang; then every remaining child is killed."""
    import ray

    polite = threading.Thread(target=ray.shutdown, daemon=True)
    children = psutil.Process().children(recursive=True)
    polite.start()
    polite.join(timeout=10.0)
    # agents of a raylet that is already dead are nobody's children any more: their open files give them away
    guardian.kill(
        {*children, *psutil.Process().children(recursive=True), *guardian.holders(folder)}
        - {psutil.Process()}
    )
    psutil.wait_procs(children, timeout=5.0)
    logs = folder / "session_latest" / "logs"
    if keep_logs is not None and logs.exists():
        shutil.copytree(
            logs,
            keep_logs / "ray_logs",
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("old", "gcs*", "raylet*"),
        )
    shutil.rmtree(folder, ignore_errors=True)


def end_stalled(folder: Path, report: Path, why: PGenRMError) -> None:
    """The watchdog's last act: say it, keep the stacks, stop everything, leave with a code."""
    print(why, file=sys.stderr, flush=True)
    write_json(report, {"error": type(why).__name__, "message": str(why)})
    with (report.parent / "stall_stacks.txt").open("w") as stacks:
        faulthandler.dump_traceback(file=stacks, all_threads=True)
    shut_down(folder, keep_logs=report.parent)
    os._exit(STALLED)


def exit_on_terminate() -> None:
    """SIGTERM unwinds like Ctrl-C, so `Session.__exit__` runs."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
