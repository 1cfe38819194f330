"""Checks of the machine and of the network before a stage starts: all failures at once, each with its remedy.

Every check is a function of (configuration, stage) in `CHECKS` that yields one sentence per failure.  Each
sentence has a row in docs/troubleshooting.md, and `preflight.skip=[NAME]` skips a check.  On a CPU with the
default settings they take milliseconds: nothing heavy is imported.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgenrm_train.cluster.planning.needs import idle_warnings
from pgenrm_train.cluster.preflight.fit import check_fit, planned_warnings
from pgenrm_train.cluster.preflight.gpus import check_compilers, check_gpus, idle_gpus
from pgenrm_train.cluster.preflight.machine import (
    check_disk,
    check_memory,
    check_ports,
    check_ring,
    check_shared_memory,
    check_versions,
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
from pgenrm_train.config import GRPO_STAGES, STAGES, Config, StageName
from pgenrm_train.errors import PreflightError
from pgenrm_train.run.folder import StageFolder

Check = Callable[[Config, str], Iterable[str]]
CHECKS: dict[str, Check] = {
    "disk": check_disk,
    "store": check_store,
    "memory": check_memory,
    "versions": check_versions,
    "gpus": check_gpus,
    "fit": check_fit,
    "compilers": check_compilers,
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
    """One check of one stage with its failures; none if it passed."""

    check: str
    stage: str
    problems: tuple[str, ...]


def check_machine(config: Config, *stages: str, skip: Sequence[str] = ()) -> None:
    """Run the checks of some stages, and warn if they leave most GPUs idle.

    Raises PreflightError, which lists all failures with their remedies.
    """
    failed = [problem for finding in findings(config, stages, skip) for problem in finding.problems]
    if len(failed) > 1:
        failed = [f"({number}) {problem}" for number, problem in enumerate(failed, start=1)]
    if failed:
        raise PreflightError("; ".join(failed))
    _warn(idle(config, stages))


def fail_early(config: Config, stages: Sequence[str]) -> None:
    """Check all remaining stages now, so that a missing judge key fails in seconds.

    Sizes are those of the plan; each stage logs its own from the real data.
    """
    remaining = still_to_do(config, stages)
    check_machine(config, *remaining, skip=("ring",))
    _warn(planned_warnings(config, remaining))


def warn(config: Config, stages: Sequence[str]) -> None:
    """Warn about idle GPUs, few steps and many passes, without a check."""
    _warn((*idle(config, stages), *planned_warnings(config, stages)))


def idle(config: Config, stages: Sequence[str]) -> Iterator[str]:
    """Warnings about stages that leave most GPUs idle."""
    for stage in (name for name in StageName if name in stages):
        yield from idle_warnings(config, stage)
        yield from idle_gpus(config, stage)


def _warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def findings(config: Config, stages: Sequence[str], skip: Sequence[str] = ()) -> Iterator[Finding]:
    """All checks of all stages but those to skip; a failure of several stages is reported once."""
    reported: set[str] = set()
    for stage in stages:
        for name, check in CHECKS.items():
            if name not in (*config.preflight.skip, *skip):
                new = tuple(problem for problem in check(config, stage) if problem not in reported)
                reported.update(new)
                yield Finding(name, stage, new)


def stages_of(recipe: str) -> tuple[str, ...]:
    """Stages that a recipe runs, as far as they have needs of their own."""
    if recipe in (StageName.BUILD_SEC, StageName.PSI):  # these recipes run the stages before them, too
        return STAGES[: STAGES.index(StageName(recipe)) + 1]
    left_out = (StageName.CURRICULUM, StageName.PROTOTYPES)
    several: dict[str, tuple[str, ...]] = {
        "pipeline": STAGES,
        "gpu_check": tuple(stage for stage in STAGES if stage not in left_out),
        "cre_and_curriculum": GRPO_STAGES,
    }
    return several.get(recipe, (recipe,))


def still_to_do(config: Config, stages: Sequence[str]) -> list[str]:
    """Stages of this run that are not complete: a complete one needs nothing."""
    return [stage for stage in stages if not StageFolder.read(Path(config.run_dir), stage).complete]
