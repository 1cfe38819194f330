"""Training job: the facts that every process of one training needs, passed on as a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pgenrm_train.backends.sft.checkpoints import Mark
from pgenrm_train.config import Config, parse, to_dict
from pgenrm_train.files import read_json, write_json
from pgenrm_train.run.tracking import METRICS


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
    def read(cls, path: Path) -> Job:
        job = read_json(path)
        mark, work_dir = Mark(**job["mark"]), Path(job["work_dir"])
        return cls(parse(job["config"]), job["start"], work_dir, mark, job["validator"])
