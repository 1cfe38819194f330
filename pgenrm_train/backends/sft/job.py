"""Training job: the facts that every process of one training needs, and the checkpoints that it leaves."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgenrm_train.config import Config, PsiConfig, parse, to_dict
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import read_json, write_json
from pgenrm_train.run.checkpoints import COMPLETE, newest_complete
from pgenrm_train.run.tracking import METRICS

STEPS = "checkpoint-*"  # as transformers names them
MARK_NAMES = {"ranks": "number of processes", "zero_stage": "ZeRO stage", "model": "model or adapter"}


@dataclass(frozen=True)
class Mark:
    """Written into each checkpoint; training resumes only from a checkpoint with an equal mark."""

    ranks: int
    zero_stage: int
    model: str


@dataclass(frozen=True)
class Job:
    """One training.  Paths are absolute: a process on another node has another working directory.

    `start` is a folder or a hub id.  `validator` is `module:function`; null trains without validation.
    """

    config: Config
    start: str
    work_dir: Path
    mark: Mark
    validator: str | None

    @property
    def chats(self) -> Path:
        return self.work_dir / "chats.parquet"

    @property
    def steps(self) -> Path:
        return self.work_dir / "steps"

    @property
    def metrics(self) -> Path:
        return self.work_dir / METRICS

    def write(self) -> Path:
        """Write the job file that `read` reads."""
        path = self.work_dir / "job.json"
        write_json(path, {**self.__dict__, "config": to_dict(self.config), "mark": asdict(self.mark)})
        return path

    @classmethod
    def read(cls, path: Path) -> "Job":
        job = read_json(path)
        config, mark = parse(job["config"]), Mark(**job["mark"])
        return cls(config, job["start"], Path(job["work_dir"]), mark, job["validator"])


def check_resumable(checkpoint: Path, mark: Mark) -> None:
    """Raise ArtifactError unless `mark` is the one that the checkpoint was written with."""
    marker = read_json(checkpoint / COMPLETE)
    for key, value in asdict(mark).items():
        if marker.get(key) != value:
            raise ArtifactError(
                f"{checkpoint} was written with another {MARK_NAMES[key]} ({marker.get(key)}, now {value}); "
                "restore the old setting, or use another run_dir="
            )


def zero_stage_of(work_dir: Path) -> int | None:
    """ZeRO stage of the newest complete checkpoint; None if there is none."""
    newest = newest_complete(work_dir / "steps", STEPS, clean=False)
    return int(read_json(newest / COMPLETE)["zero_stage"]) if newest else None


def state_of(checkpoint: Path) -> Any:
    from transformers import TrainerState

    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def is_over(psi: PsiConfig, state: Any) -> bool:
    """Whether all planned steps are made, or validation has ended training."""
    return bool(state.global_step >= state.max_steps > 0) or stopped_early(psi, state)


def stopped_early(psi: PsiConfig, state: Any) -> bool:
    """Whether `psi.patience` validations have passed since the best one; depends on the state alone."""
    if not psi.patience or not psi.evaluate_every or not state.best_global_step:
        return False
    return bool(state.global_step - state.best_global_step >= psi.patience * psi.evaluate_every)
