"""One stage of GRPO: its description, sent as JSON to the training process, and its state there."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pgenrm_train.backends.grpo.scoring import JudgeSpec
from pgenrm_train.backends.protocols import Trained
from pgenrm_train.config import Config, GrpoConfig, StageName, seed_of
from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import read_json, write_json
from pgenrm_train.rewards.reward import DEFAULT_WEIGHTS, RewardWeights
from pgenrm_train.rewards.training_rows import GrpoRow

REPORT = "verl_report.json"  # of a session, for the process that launched it
TRAINED_FILE = "trained.json"


class ChainRequest(NamedTuple):
    """Request for `samples` chains of a row; `uid` seeds them, and has no underscore (`rollout.Prompt`)."""

    uid: str
    row: GrpoRow
    samples: int


@dataclass(frozen=True)
class HardnessSource:
    """How a curriculum learns which pairs are hard.

    `signals`: parquet of model-free signals per row, enough for a start without mining.  `samples`: chains
    per row that measure hardness before training, 0 for none.  Half of them use `mirror`, the rows in the
    other presentation order, if it is given.
    """

    signals: Path | None = None
    samples: int = 0
    mirror: Path | None = None


@dataclass(frozen=True)
class Phase:
    """One stage of GRPO.

    `section`: cre or curriculum, whose settings apply.  `start`: checkpoint in Hugging Face format; None
    takes that of the phase before.  `rows`: parquet of `rewards.training_rows.GrpoRow`.  `steps`: optimiser
    steps of the complete phase.  `judge`: None for no process reward.
    `gold`: a second judge, of validation chains alone.  `validation`: rows with each pair in
    both orders, sampled every `<section>.validate_every` steps.  `truth`: `module:function` that makes a
    `ChainReader` of the validation's chains from the configuration; None for data whose truth is unknown.
    `settings`: keys of the section in which this phase differs from the configuration, so that one session
    serves several arms.
    """

    section: StageName
    start: Path | None
    rows: Path
    work_dir: Path
    steps: int
    weights: RewardWeights = DEFAULT_WEIGHTS
    judge: JudgeSpec | None = None
    gold: JudgeSpec | None = None
    hardness: HardnessSource | None = None
    validation: Path | None = None
    truth: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.work_dir / "checkpoint"

    def config(self, config: Config) -> Config:
        """The configuration with this phase's settings."""
        changed = dataclasses.replace(config)
        setattr(changed, self.section, dataclasses.replace(getattr(config, self.section), **self.settings))
        return changed

    def trained(self) -> Trained | None:
        """The report of a complete phase, else None.  Raises ArtifactError if its number of steps differs."""
        if not ((self.work_dir / TRAINED_FILE).exists() and (self.checkpoint / "config.json").exists()):
            return None
        report = read_json(self.work_dir / TRAINED_FILE)
        if report["steps"] != self.steps:
            raise ArtifactError(
                f"{self.work_dir} holds a {self.section} of {report['steps']} steps and {self.steps} are "
                "planned; use another run_dir"
            )
        return Trained(report["steps"], self.checkpoint, report["metrics"])

    def seconds(self) -> float | None:
        """Seconds that the phase took; None if it is not complete."""
        report = self.work_dir / TRAINED_FILE
        return float(read_json(report)["seconds"]) if report.exists() else None


PHASES = TypeAdapter(list[Phase])  # of a job file


@dataclass(frozen=True)
class Draw:
    """Rows of one step, and the shares of hard pairs at its draw (None under `uniform`)."""

    rows: list[int]
    target: float | None = None
    realised: float | None = None


class PhaseRun:
    """A phase in progress: its settings, rows, sampler and clock."""

    def __init__(self, phase: Phase, config: Config, beat: Callable[..., None] = lambda *_: None) -> None:
        self.phase, self.config = phase, phase.config(config)
        self.grpo: GrpoConfig = getattr(self.config, phase.section)
        self.seed = seed_of(self.config, phase.section)
        self.table = pq.read_table(phase.rows)
        extras = self.table["extra_info"].to_pylist()
        self.pair_ids, self.user_ids = ([extra[name] for extra in extras] for name in ("pair_id", "user_id"))
        self.opened = self.started = time.monotonic()
        self.first_step = 0
        self.last: Mapping[str, float | None] = {}  # metrics of the newest step
        self.draws: dict[int, Draw] = {}  # of steps that are not trained yet
        self.warned: set[str] = set()  # warnings that were printed
        self.sampler: CurriculumSampler  # set once hardness is known
        # (step, doing, part), for the watchdog and the time line
        self.beat = functools.partial(beat, phase.section)

    def draw(self, step: int) -> Draw:
        """The step's rows; a step that a checkpoint has stored is not drawn again."""
        if step not in self.draws:
            rows = self.sampler.next_batch(step)
            self.draws[step] = Draw(rows, self.sampler.target, self.sampler.realised)
        return self.draws[step]

    def state_dict(self) -> dict[str, Any]:
        """The sampler, and the steps drawn ahead; verl stores it in data.pt, we read it from the marker."""
        ahead = {str(step): dataclasses.asdict(draw) for step, draw in self.draws.items()}
        return self.sampler.state_dict() | {"ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)
        # Checkpoints of older versions have no steps ahead.
        self.draws = {int(step): Draw(**draw) for step, draw in state.get("ahead", {}).items()}

    def write_report(self) -> None:
        """Write `trained.json`, which makes the phase complete."""
        write_json(
            self.phase.work_dir / TRAINED_FILE,
            {
                "steps": self.phase.steps,
                "metrics": {name: value for name, value in self.last.items() if value is not None},
                "seconds": round(time.monotonic() - self.opened, 1),
            },
        )
