"""Measurement and verdict of gpu_check.

Each recipe runs in a process of its own, and its time, peak memory and steps are measured from outside.
Memory comes from NVML on GPUs, and from the kernel's share of each process on a CPU.  The report shows the
measurements next to the plan's numbers, and the verdict.
"""

import copy
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from pgenrm_train.cluster.planning.plan import Plan, plan_of
from pgenrm_train.cluster.preflight.checks import stages_of
from pgenrm_train.cluster.preflight.gpus import visible_gpus
from pgenrm_train.cluster.sizes import with_sizes
from pgenrm_train.config import TRAINED, Config, StageName
from pgenrm_train.config.places import beneath
from pgenrm_train.config.setting import known
from pgenrm_train.errors import PGenRMError
from pgenrm_train.files import read_json
from pgenrm_train.run.folder import StageFolder, environment_facts
from pgenrm_train.run.tracking import METRICS
from pgenrm_train.stages.stage import launch

MINUTES = 30.0  # longer is the verdict SLOW
STEPS = stages_of("gpu_check")
LORA_RANK = 8
WITH_MODEL = (StageName.PSI, StageName.CRE, StageName.EVALUATE)


def passes(config: Config) -> dict[str, tuple[Config, str]]:
    """Name → (configuration, recipe): all steps, then training of a Qwen3 with adapters."""
    lora = copy.deepcopy(config)
    beneath(lora, "qwen3_lora")
    lora.model.nano.family, lora.model.lora.rank = "qwen3", LORA_RANK
    second = {f"{recipe} (Qwen3, LoRA)": (lora, recipe) for recipe in (StageName.PSI, StageName.CRE)}
    return {recipe: (config, recipe) for recipe in STEPS} | second


@dataclass
class Measurement:
    """One recipe: seconds, peak GiB, times of lines of metrics, and failure."""

    seconds: float = 0.0
    peak_gib: float = 0.0
    steps: list[float] = field(default_factory=list)
    error: str | None = None


def measure(config: Config, recipe: str, seconds: float, late: str) -> Measurement:
    """Run a recipe in its own process; after `seconds`, kill it with `late` as failure.

    A failure is kept for the verdict.
    """
    measurement, began = Measurement(), time.monotonic()
    with watching(config, recipe, measurement, end=began + seconds, late=late):
        try:
            launch(config, recipe)
        except PGenRMError as error:
            measurement.error = measurement.error or str(error)
        except SystemExit:
            measurement.error = measurement.error or "see its message above"
    measurement.seconds = time.monotonic() - began
    return measurement


@contextmanager
def watching(
    config: Config,
    recipe: str,
    measurement: Measurement,
    *,
    every: float = 0.25,
    end: float = float("inf"),
    late: str = "",
) -> Iterator[None]:
    """During the block, sample memory and the times of new lines in metrics.jsonl.

    From the time `end` on all child processes are killed.
    """
    ended, metrics = threading.Event(), Path(config.run_dir) / recipe / METRICS
    before = used_gib(config)

    def watch() -> None:
        while not ended.wait(every):
            measurement.peak_gib = max(measurement.peak_gib, used_gib(config) - before)
            text = metrics.read_text() if metrics.exists() else ""
            lines = text.count("\n") - text.count('"eval/accuracy"')  # of steps alone
            measurement.steps += [time.monotonic()] * (lines - len(measurement.steps))
            if time.monotonic() > end:
                measurement.error = late
                for process in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def used_gib(config: Config) -> float:
    """GiB in use on the fullest visible GPU, or by all child processes."""
    if config.cluster.device == "cuda":
        return max((gpu.memory_gib - gpu.free_gib for gpu in visible_gpus()), default=0.0)
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may have just ended
            total += process.memory_full_info().pss
    return total / 2**30


@dataclass(frozen=True, slots=True)
class RecipeRow:
    """Measurements of one recipe; None for a number that it does not have."""

    recipe: str
    seconds: float
    error: str | None
    peak_gib: float | None = None
    planned_gib: float | None = None
    seconds_per_step: float | None = None
    generated_per_second: float | None = None
    chains_per_second: float | None = None

    def text(self) -> str:
        rates = {
            "seconds per step": self.seconds_per_step,
            "generated per second": self.generated_per_second,
            "chains per second": self.chains_per_second,
        }
        facts = [f"{name} {rate:g}" for name, rate in rates.items() if rate is not None]
        if self.peak_gib is not None:
            facts.append(f"peak {self.peak_gib:.2f} GiB, planned {self.planned_gib:.2f}")
        facts += [f"FAILED: {self.error}"] if self.error else []
        return f"  {self.recipe:20} {self.seconds:7.1f} s  {' · '.join(facts)}"


@dataclass(frozen=True, slots=True)
class Report:
    """Rows of all recipes that ran."""

    config: Config
    plan: Plan
    rows: tuple[RecipeRow, ...]
    minutes: float

    @property
    def finished(self) -> bool:
        return len(self.rows) == len(passes(self.config)) and not any(row.error for row in self.rows)

    @property
    def passed(self) -> bool:
        return self.finished and self.minutes <= MINUTES

    def as_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "finished": self.finished,
            "minutes": round(self.minutes, 1),
            "cluster": self.config.cluster.name,
            "model": self.config.model.label,
            "parameters": self.plan.geometry.parameters,
            "attention": self.config.model.attention,
            "recipes": [
                {key: value for key, value in asdict(row).items() if value is not None or key == "error"}
                for row in self.rows
            ],
            **environment_facts(),
        }

    def text(self) -> str:
        """The report for people; its last line is the verdict."""
        millions, minutes = self.plan.geometry.parameters / 1e6, round(self.minutes, 1)
        place = f"cluster={self.config.cluster.name}"
        title = f"{self.config.model.label}: {millions:,.1f} M random weights on {place}"
        if self.passed:
            verdict = f"PASSED in {minutes} minutes"
        elif self.finished:
            verdict = f"SLOW: everything works, in {minutes} minutes instead of {MINUTES:g}"
        else:
            verdict = f"FAILED at {self.rows[-1].recipe}; the same command resumes there"
        return "\n".join([title, *(row.text() for row in self.rows), f"verdict: {verdict}"])


def report_of(config: Config, measurements: Mapping[str, Measurement]) -> Report:
    rows = []
    for name, measured in measurements.items():
        (pass_config, recipe), numbers = passes(config)[name], dict[str, float]()
        if recipe in WITH_MODEL:
            planned = {stage.stage: stage.phases for stage in plan_of(pass_config).stages}[StageName(recipe)]
            numbers = {
                "peak_gib": round(measured.peak_gib, 2),
                "planned_gib": round(max((phase.total for phase in planned), default=0.0), 2),
                **throughput(pass_config, recipe, measured),
            }
        rows.append(RecipeRow(name, round(measured.seconds, 1), measured.error, **numbers))
    return Report(config, plan_of(config), tuple(rows), sum(m.seconds for m in measurements.values()) / 60)


def throughput(config: Config, recipe: str, measured: Measurement) -> dict[str, float]:
    """Seconds per training step, tokens per second of rollouts, chains per second of evaluation."""
    run_dir = Path(config.run_dir)
    folder = StageFolder.read(run_dir, recipe)
    if not folder.complete:
        return {}
    if recipe == StageName.EVALUATE:
        models = sum(StageFolder.read(run_dir, stage).complete for stage in TRAINED if stage in STEPS)
        chains = 2 * models * read_json(folder.path / "results.json")["n_pairs"]
        return {"chains_per_second": round(chains / measured.seconds, 3)}
    if recipe == StageName.CRE:
        last = json.loads((folder.path / METRICS).read_text().splitlines()[-1])
        cre = with_sizes(config, StageName.CRE, config.cre.rows).cre
        tokens = known(cre.prompts_per_step) * cre.group_size * last["cre/response_length"]
        return {
            "seconds_per_step": round(last["cre/time/step"], 2),
            "generated_per_second": round(tokens / last["cre/time/gen"], 1),
        }
    steps = measured.steps
    if len(steps) < 2 or steps[-1] == steps[0]:  # all lines were there at the start: it was complete
        return {}
    return {"seconds_per_step": round((steps[-1] - steps[0]) / (len(steps) - 1), 2)}
