"""The report of gpu_check: measurements next to the plan's numbers, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pgenrm_train.cluster.planning import Plan, plan_of
from pgenrm_train.cluster.preflight import stages_of
from pgenrm_train.config import TRAINED, Config, StageName
from pgenrm_train.files import read_json
from pgenrm_train.run.folder import StageFolder, environment_facts
from pgenrm_train.run.tracking import METRICS
from recipes.wiring.gpu_check.measure import Measurement

MINUTES = 20.0  # promised duration
STEPS = stages_of("gpu_check")
MEASURED = (StageName.PSI, StageName.CRE, StageName.EVALUATE)


@dataclass(frozen=True, slots=True)
class Row:
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
        return f"  {self.recipe:10} {self.seconds:7.1f} s  {' · '.join(facts)}"


@dataclass(frozen=True, slots=True)
class Report:
    """Rows of all recipes that ran."""

    config: Config
    plan: Plan
    rows: tuple[Row, ...]
    minutes: float

    @property
    def finished(self) -> bool:
        return len(self.rows) == len(STEPS) and not any(row.error for row in self.rows)

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
        where = f"cluster={self.config.cluster.name}"
        title = f"{self.config.model.label}: {millions:,.1f} M random weights on {where}"
        if self.passed:
            verdict = f"PASSED in {minutes} minutes"
        elif self.finished:
            verdict = f"SLOW: everything works, in {minutes} minutes instead of {MINUTES:g}"
        else:
            verdict = f"FAILED at {self.rows[-1].recipe}; the same command resumes there"
        return "\n".join([title, *(row.text() for row in self.rows), f"verdict: {verdict}"])


def report_of(config: Config, measurements: Mapping[str, Measurement]) -> Report:
    plan = plan_of(config)
    planned = {s.stage: max((phase.total for phase in s.phases), default=0.0) for s in plan.stages}
    rows = []
    for recipe, measured in measurements.items():
        numbers: dict[str, float] = {}
        if recipe in MEASURED:
            numbers = {
                "peak_gib": round(measured.peak_gib, 2),
                "planned_gib": round(planned[StageName(recipe)], 2),
                **throughput(config, recipe, measured),
            }
        rows.append(Row(recipe, round(measured.seconds, 1), measured.error, **numbers))
    return Report(config, plan, tuple(rows), sum(m.seconds for m in measurements.values()) / 60)


def throughput(config: Config, recipe: str, measured: Measurement) -> dict[str, float]:
    """Seconds per step of training, tokens per second of rollouts, chains per second of the evaluation."""
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
        tokens = config.cre.prompts_per_step * config.cre.group_size * last["cre/response_length"]
        return {
            "seconds_per_step": round(last["cre/time/step"], 2),
            "generated_per_second": round(tokens / last["cre/time/gen"], 1),
        }
    steps = measured.steps
    return {"seconds_per_step": round((steps[-1] - steps[0]) / (len(steps) - 1), 2)} if len(steps) > 1 else {}
