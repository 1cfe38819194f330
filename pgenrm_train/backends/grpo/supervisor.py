"""Run GRPO in a child process, which is started again if its engine or a node of the cluster was lost.

The child runs `main` of this module, in an environment set before anything heavy is imported there:

    launch(config, [Phase(StageName.CRE, start, rows, cre_dir, 80),
                    Phase(StageName.CURRICULUM, None, rows, curriculum_dir, 60)])
"""

import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from pgenrm_train import errors
from pgenrm_train.backends.grpo.config import verl_variables
from pgenrm_train.backends.grpo.phase import PHASES, REPORT, Phase
from pgenrm_train.backends.protocols import Trained
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError, EngineLostError, PGenRMError
from pgenrm_train.files import read_json, write_json
from pgenrm_train.run.process import die_with_parent, end_on_sigterm, run_child
from pgenrm_train.run.tracking import append

ENGINE_LOG, RESTARTS, JOB = "engine.log", "restarts.jsonl", "verl_job.json"


def launch(config: Config, phases: Sequence[Phase]) -> list[Trained]:
    """Run `engine.train` in a child process, at most 1 + `cluster.max_failures` times.

    A new start waits for a lost node to come back.  Raises the errors of `train`, and EngineLostError if the
    child was killed.
    """
    log = phases[0].work_dir / RESTARTS
    return with_restarts(lambda: _run_child(config, phases), config.cluster.max_failures, log)


def with_restarts(work: Callable[[], list[Trained]], allowed: int, log: Path) -> list[Trained]:
    """`work`, repeated after an EngineLostError up to `allowed` times; each restart is printed and logged."""
    for restart in range(1, allowed + 1):
        try:
            return work()
        except EngineLostError as error:
            print(f"{error}\nstarting again from the newest checkpoint ({restart} of {allowed})", flush=True)
            append(log, {"time": time.time(), "reason": str(error)})
    return work()


def _run_child(config: Config, phases: Sequence[Phase]) -> list[Trained]:
    folder = phases[0].work_dir
    folder.mkdir(parents=True, exist_ok=True)
    job, report = folder / JOB, folder / REPORT
    report.unlink(missing_ok=True)
    write_json(
        job,
        {
            "config": dataclasses.asdict(config),
            "phases": [dataclasses.asdict(phase) for phase in phases],
            "report": str(report),
        },
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | verl_variables(config)
    shown = ("cluster:", *(f"{phase.section}{sign}" for phase in phases for sign in " :"))
    code = run_child(
        [sys.executable, "-m", "pgenrm_train.backends.grpo.supervisor", str(job)],
        env,
        patience=40.0,
        relay=lambda lines: _relay(lines, folder / ENGINE_LOG, shown),
    )
    return read_report(report, code)


def _relay(lines: IO[str], log: Path, shown: tuple[str, ...]) -> None:
    """Append the output of Ray, veRL and vLLM to a file; print the lines that begin with one of `shown`."""
    with log.open("a", encoding="utf-8") as out:
        for line in lines:
            out.write(line)
            out.flush()
            if line.startswith(shown):
                print(line, end="", flush=True)


def read_report(report: Path, code: int) -> list[Trained]:
    """The child's report.  Raises the error in it, or one for a child that ended without a report."""
    if not report.exists():
        # SIGINT and SIGTERM come from a user or a scheduler; any other signal is an accident.
        killed = code < 0 and -code not in (signal.SIGINT, signal.SIGTERM)
        kind = EngineLostError if killed else BackendError
        raise kind(
            f"veRL's process exited with code {code} and no report; see the end of "
            f"{report.with_name(ENGINE_LOG)}"
        )
    content = read_json(report)
    if "error" in content:
        kind = getattr(errors, content["error"], BackendError)
        raise kind(content["message"])
    return [Trained(t["steps"], Path(t["checkpoint"]), t["metrics"]) for t in content["trained"]]


def main(job_path: Path) -> int:
    """Train the phases of a job and write its report, in the child; returns the exit code."""
    from omegaconf import OmegaConf

    from pgenrm_train.backends.grpo.engine import train

    die_with_parent(signal.SIGTERM)
    end_on_sigterm()
    job = read_json(job_path)
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), job["config"]))
    report = Path(job["report"])
    try:
        trained = train(config, PHASES.validate_python(job["phases"]), report)
    except PGenRMError as error:
        write_json(report, {"error": type(error).__name__, "message": str(error)})
        return 2
    except Exception as error:
        traceback.print_exc()
        kind = EngineLostError if process_lost(error) else BackendError
        write_json(
            report,
            {"error": kind.__name__, "message": f"veRL failed with {type(error).__name__}: {error}"},
        )
        return 1
    write_json(report, {"trained": [dataclasses.asdict(t) for t in trained]})
    return 0


def process_lost(error: Exception) -> bool:
    """Whether a process or machine of the session is gone, as opposed to an error in its code."""
    from ray import exceptions

    return isinstance(
        error, exceptions.RayActorError | exceptions.NodeDiedError | exceptions.WorkerCrashedError
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
