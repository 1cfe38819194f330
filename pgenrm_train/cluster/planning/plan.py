"""Needs of a stage before it starts: memory, batches, tokens, hours, dollars, disk, and a change that fits.

Pure arithmetic over the typed configuration and the model's geometry.  Formulas and sources are in the
docstrings of `geometry` (parameters, FLOPs), `memory` (bytes) and `work` (time).  docs/plan.md has the errors
against measurements.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pgenrm_train.cluster.planning.advice import Batches, batches_of, nearest_fit, problems_of
from pgenrm_train.cluster.planning.geometry import Geometry, geometry_of
from pgenrm_train.cluster.planning.memory import Phase, card_name, card_of, phases_of
from pgenrm_train.cluster.planning.needs import host_parts, idle_warnings
from pgenrm_train.cluster.planning.work import Work, examples_of, with_planned_sizes, work_of
from pgenrm_train.cluster.sizes import Sizes, size_warnings, sizes_of
from pgenrm_train.config import TRAINED, Config, StageName, machines
from pgenrm_train.config.stage_names import PLANNED


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of the plan."""

    stage: StageName
    phases: tuple[Phase, ...]
    batches: Batches | None
    work: Work
    sizes: Sizes | None  # of a training
    warnings: tuple[str, ...]
    host: Mapping[str, float]  # GiB of a node's own memory by part; empty on CPUs
    problems: tuple[str, ...]
    change: tuple[str, ...] | None  # overrides under which it fits; None: it fits, or no known change helps

    @property
    def fits(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, object]:
        work = self.work
        return {
            "stage": self.stage,
            "fits": self.fits,
            "problems": self.problems,
            "change": self.change,
            "memory": [
                {
                    "phase": phase.name,
                    "total": phase.total,
                    "available": phase.available,
                    "parts": phase.parts,
                    "host_parts": phase.host_parts,
                    "notes": phase.notes,
                }
                for phase in self.phases
            ],
            "sizes": asdict(self.sizes) if self.sizes else None,
            "warnings": self.warnings,
            "host_memory": self.host,
            "batches": self.batches.facts if self.batches else None,
            "counts": work.counts,
            "tokens": work.tokens,
            "hours": work.hours,
            "disk": work.disk,
            "api_dollars": work.api_dollars,
            "assumptions": work.assumptions,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a configuration."""

    config: Config
    geometry: Geometry
    stages: tuple[StagePlan, ...]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    @property
    def hours(self) -> float:
        """Hours of the stages that fit: the time of one that cannot run means nothing."""
        return sum(stage.work.total_hours for stage in self.stages if stage.fits)

    @property
    def dollars(self) -> float:
        """Cost of GPUs by the hour, and of APIs."""
        gpus = machines(self.config, *(stage.stage for stage in self.stages)).all
        hour = gpus * card_of(self.config).dollars_per_hour
        return hour * self.hours + sum(stage.work.api_dollars for stage in self.stages)

    @property
    def disk_gib(self) -> float:
        return sum(sum(stage.work.disk.values()) for stage in self.stages)

    def as_json(self) -> dict[str, object]:
        """Everything as plain values, memory in GiB."""
        model, cluster, plan = self.config.model, self.config.cluster, self.config.plan
        return {
            "model": {"name": model.label, "parameters": self.geometry.parameters, **asdict(self.geometry)},
            "cluster": {
                "name": cluster.name,
                "nodes": cluster.nodes,
                "processes": cluster.ranks,
                "card": card_name(self.config),
                **asdict(card_of(self.config)),
            },
            "fits": self.fits,
            "hours": self.hours,
            "dollars": self.dollars,
            "disk_gib": self.disk_gib,
            "assumptions": {
                "mfu": plan.mfu,
                "bandwidth_use": plan.bandwidth_use,
                "prompt_tokens": plan.prompt_tokens,
                "response_tokens": plan.response_tokens,
            },
            "stages": [stage.as_json() for stage in self.stages],
        }


def plan_of(config: Config) -> Plan:
    """Plan `plan.stage` of a configuration.  Raises ConfigError if the model's geometry is unknown."""
    geometry = geometry_of(config)
    stages = PLANNED if config.plan.stage == "all" else (StageName(config.plan.stage),)
    return Plan(config, geometry, tuple(plan_stage(config, geometry, stage) for stage in stages))


def plan_stage(config: Config, geometry: Geometry, stage: StageName) -> StagePlan:
    problems = tuple(problems_of(config, geometry, stage))
    sized = with_planned_sizes(config)
    sizes = sizes_of(sized, stage, examples_of(config, stage)) if stage in TRAINED else None
    return StagePlan(
        stage,
        tuple(phases_of(sized, geometry, stage)),
        batches_of(sized, stage),
        work_of(sized, geometry, stage),
        sizes,
        (*idle_warnings(config, stage), *(size_warnings(sized, sizes) if sizes else ())),
        {} if config.cluster.device == "cpu" else host_parts(config, stage),
        problems,
        nearest_fit(config, geometry, stage) if problems else None,
    )
