"""One warm veRL session: Ray, workers and vLLM are started once and serve every phase given to it.

Start-up is most of a small run (Ray, four Python processes that import torch, verl and vLLM), so CRE and the
curriculum share it.  The trainer runs in the driver.  A watchdog thread ends the process if nothing has moved
for `stall_seconds`, because a Ray call on a dead vLLM worker never returns.  On a cluster another thread
checks that the nodes of the workers are alive.
"""

import faulthandler
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil

from pgenrm_train.backends.ray import guardian
from pgenrm_train.backends.ray.cluster import (
    NOTICE_SECONDS,
    await_gpus,
    dead_node,
    join,
    nodes_of,
)
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError, EngineLostError, NodeLostError, PGenRMError
from pgenrm_train.files import write_json
from pgenrm_train.run.timeline import Part, mark

# Least patience until the end of the session's first step: 70B loads and compiles without a beat.
STARTUP_SECONDS = 3600.0
STALLED = 3  # exit code of a run that the watchdog ended
# After the loss of a node: most calls fail by themselves, and one that does not is ended.
GRACE_SECONDS = 15.0


class Watchdog:
    """Call `on_stall` once `beat` was not called for `seconds`; `heartbeat.json` is kept in `folder`."""

    def __init__(self, seconds: float, on_stall: Callable[[PGenRMError], None], folder: Path) -> None:
        self.seconds, self.on_stall, self.folder = seconds, on_stall, folder
        self.stage, self.step, self.doing = "start-up", 0, "starting Ray, the actor and vLLM"
        self.last, self.stepped = time.monotonic(), False
        self.stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, stage: str, step: int, doing: str, part: Part | None = None) -> None:
        """The session works: `stage` at `step` is `doing` something, which is another `part` of its time."""
        if part is not None:
            mark(part, stage)
        # The first step of a session also imports and compiles: it has the patience of the start-up.
        self.stepped = self.stepped or (stage == self.stage and 0 < self.step < step)
        self.stage, self.step, self.doing, self.last = stage, step, doing, time.monotonic()
        record = {"time": time.time(), "stage": stage, "step": step, "doing": doing, "pid": os.getpid()}
        write_json(self.folder / "heartbeat.json", record)

    def _watch(self) -> None:
        while not self.stopped.wait(min(1.0, self.seconds / 4)):
            limit = self.seconds if self.stepped else max(self.seconds, STARTUP_SECONDS)
            silent = time.monotonic() - self.last
            if silent > limit:
                self.on_stall(
                    EngineLostError(
                        f"{self.stage} made no progress for {silent:.0f} s at step {self.step} while "
                        f"{self.doing}; the run was stopped and resumes from its newest checkpoint when "
                        "started again"
                    )
                )
                return


class Session(AbstractContextManager["Session"]):
    """Ray, `trainer` and vLLM.  Use it as a context manager; leaving it leaves no process behind.

    A stall ends the process, with its message in `report` and the heartbeat in the same folder.
    """

    def __init__(self, config: Config, verl: Any, stall_seconds: float, report: Path) -> None:
        self.config, self.report = config, report
        self.folder = Path(tempfile.mkdtemp(prefix="pg_", dir="/tmp"))  # AF_UNIX paths end at 107 characters
        self.watchdog = Watchdog(stall_seconds, self._end_stalled, report.parent)
        self.guardian = guardian.watch_over(self.folder)
        self.failed = True
        self.nodes: dict[str, str] = {}  # of a cluster, with workers of ours
        try:
            self._start_ray(verl)
            self._start_trainer(verl)
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
            await_gpus(self.config.cluster, lambda: self.watchdog.beat("start-up", 0, "waiting for nodes"))
            return
        os.environ.update(variables)
        cpu = self.config.cluster.device == "cpu"
        ranks = self.config.cluster.nodes * self.config.cluster.processes_per_node
        ray.init(
            # Logical CPUs: verl's actors request more than a small machine has.
            num_cpus=8 + 4 * ranks if cpu else None,
            num_gpus=ranks if cpu else None,
            include_dashboard=False,
            object_store_memory=256 * 1024**2 if cpu else None,
            _temp_dir=str(self.folder),
            log_to_driver=False,
            namespace=f"pgenrm-{os.getpid()}",
        )

    def _start_trainer(self, verl: Any) -> None:
        import transfer_queue

        from pgenrm_train.backends.grpo.trainer import ChainTrainer

        transfer_queue.init(verl.transfer_queue)
        self.trainer = ChainTrainer(verl)
        self.trainer.init()
        if self.config.ray.address is not None:
            self.nodes = nodes_of(self.trainer.placement_groups)
            threading.Thread(target=self._watch_nodes, name="nodes", daemon=True).start()

    def _watch_nodes(self) -> None:
        while not self.watchdog.stopped.wait(1.0):
            if gone := dead_node(self.nodes):
                if not self.watchdog.stopped.wait(GRACE_SECONDS):
                    self.watchdog.on_stall(self._loss(gone))
                return

    def _loss(self, address: str) -> PGenRMError:
        stage, step = self.watchdog.stage, self.watchdog.step
        return NodeLostError(f"{stage}: node {address} of the Ray cluster was lost at step {step}")

    def __exit__(self, kind: Any, error: BaseException | None, *_: object) -> None:
        """Close; raises NodeLostError in place of an error that the loss of a node has caused."""
        self.failed = kind is not None
        of_engine = isinstance(error, Exception) and (
            isinstance(error, BackendError) or not isinstance(error, PGenRMError)
        )
        gone = dead_node(self.nodes, NOTICE_SECONDS) if of_engine and self.nodes else None
        self.close()
        if gone:
            raise self._loss(gone) from error

    def close(self) -> None:
        """Stop Ray and every child of this process.  Worker logs are kept if the session failed."""
        self.watchdog.stopped.set()
        shut_down(self.folder, self.watchdog.folder if self.failed else None)
        guardian.dismiss(self.guardian)

    def _end_stalled(self, error: PGenRMError) -> None:
        print(error, file=sys.stderr, flush=True)
        write_json(self.report, {"error": type(error).__name__, "message": str(error)})
        with (self.report.parent / "stall_stacks.txt").open("w") as stacks:
            faulthandler.dump_traceback(file=stacks, all_threads=True)
        shut_down(self.folder, self.report.parent)
        os._exit(STALLED)


def shut_down(folder: Path, keep_logs: Path | None) -> None:
    """Shut Ray down, in a thread that may hang; then kill every remaining child."""
    import ray

    polite = threading.Thread(target=ray.shutdown, daemon=True)
    children = psutil.Process().children(recursive=True)
    polite.start()
    polite.join(timeout=10.0)
    # The agents of a dead raylet are no longer our children: their open files identify them.
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
