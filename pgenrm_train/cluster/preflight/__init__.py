"""What a stage needs of the machine and of what it talks to, found out before it starts: all failures at once, each with its remedy.

Every check is a function of (configuration, stage) in `CHECKS`; it yields one sentence a failure, and nothing when all is well.  Each
has a row in docs/troubleshooting.md, and `preflight.skip=[NAME]` passes over it.  On a CPU with the default settings they take
milliseconds: nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgenrm_train.cluster.preflight.machine import (
    check_disk,
    check_gpus,
    check_memory,
    check_ports,
    check_ring,
    check_shared_memory,
)
from pgenrm_train.cluster.preflight.reach import (
    check_data,
    check_judge,
    check_model,
    check_model_endpoint,
    check_ray,
    check_store,
    check_teacher,
    check_wandb,
)
from pgenrm_train.cluster.preflight.versions import check_versions
from pgenrm_train.config import Config
from pgenrm_train.errors import PreflightError

Check = Callable[[Config, str], Iterable[str]]
CHECKS: dict[str, Check] = {
    "disk": check_disk,
    "store": check_store,
    "memory": check_memory,
    "versions": check_versions,
    "gpus": check_gpus,
    "shared_memory": check_shared_memory,
    "ports": check_ports,
    "ray": check_ray,
    "data": check_data,
    "model": check_model,
    "wandb": check_wandb,
    "teacher": check_teacher,
    "judge": check_judge,
    "model_endpoint": check_model_endpoint,
    "ring": check_ring,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of one stage: its failures, none when it passed."""

    check: str
    stage: str
    problems: tuple[str, ...]


def check_machine(config: Config, stage: str) -> None:
    """Run every check of a stage.  Raises PreflightError, which lists all failures, each with its remedy."""
    failed = [problem for finding in findings(config, [stage]) for problem in finding.problems]
    if failed:
        numbered = (
            failed if len(failed) == 1 else [f"({n}) {problem}" for n, problem in enumerate(failed, start=1)]
        )
        raise PreflightError("; ".join(numbered))


def findings(config: Config, stages: Sequence[str]) -> Iterator[Finding]:
    """All checks of all stages; what an earlier stage found is not said again."""
    said: set[str] = set()
    for stage in stages:
        for name, check in CHECKS.items():
            if name not in config.preflight.skip:
                new = tuple(problem for problem in check(config, stage) if problem not in said)
                said.update(new)
                yield Finding(name, stage, new)


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages that a recipe runs, as far as they have needs of their own."""
    from pgenrm_train.config import STAGES

    known = {
        "pipeline": STAGES,
        "gpu_check": ("build_data", "build_sec", "psi", "cre", "evaluate"),
        "build_sec": ("build_data", "build_sec"),
        "psi": ("build_data", "build_sec", "psi"),
        "cre_and_curriculum": ("cre", "curriculum"),
    }
    return tuple(known.get(config.recipe, (config.recipe,)))


def still_to_do(config: Config, stages: Sequence[str]) -> list[str]:
    """Stages of this run that are not complete: a finished one needs nothing any more."""
    from pgenrm_train.run.folder import StageFolder

    return [stage for stage in stages if not StageFolder.read(Path(config.run_dir), stage).complete]
