"""Child process of `supervisor.launch`: train the phases of a job.

python -m pgenrm_train.backends.grpo.child verl_job.json
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from pgenrm_train.backends.grpo.engine import train
from pgenrm_train.backends.grpo.phase import PHASES
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError, EngineLostError, PGenRMError
from pgenrm_train.files import read_json, write_json
from pgenrm_train.run.process import die_with_parent, end_on_sigterm


def main(job_path: Path) -> int:
    """Train the phases of the job and write its report; returns the exit code."""
    from omegaconf import OmegaConf

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
        message = f"veRL failed with {type(error).__name__}: {error}"
        write_json(report, {"error": kind.__name__, "message": message})
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
