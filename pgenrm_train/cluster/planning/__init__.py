"""What a stage needs before it starts: memory by part, batches, tokens, hours, dollars, disk, and what to change when it does not fit.

Pure arithmetic over the typed configuration and the model's geometry; formulas and their sources stand in the docstrings of
`geometry` (parameters, FLOPs), `memory` (bytes), `work` (time) and in docs/plan.md, with the errors against measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pgenrm_train.cluster.planning.advice import nearest_fit
from pgenrm_train.cluster.planning.batches import Batches, batches_of
from pgenrm_train.cluster.planning.geometry import Geometry, geometry_of
from pgenrm_train.cluster.planning.memory import Phase, phases_of, ranks_of
from pgenrm_train.cluster.planning.work import Work, card_of, work_of
from pgenrm_train.config import Config, gpus_per_node

STAGES = ("build_sec", "psi", "cre", "curriculum", "prototypes", "evaluate")
__all__ = ["STAGES", "Plan", "StagePlan", "plan_of"]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage of the plan."""

    stage: str
    phases: tuple[Phase, ...]
    batches: Batches | None
    work: Work
    problems: tuple[str, ...]
    change: tuple[str, ...] | None  # overrides under which it fits; None: it fits, or nothing known helps

    @property
    def fits(self) -> bool:
        return not self.problems


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
        """Of the stages that fit: the time of one that cannot run means nothing."""
        return sum(stage.work.total_hours for stage in self.stages if stage.fits)

    @property
    def dollars(self) -> float:
        """GPUs by the hour, and what APIs ask."""
        node = gpus_per_node(self.config, *(stage.stage for stage in self.stages))
        gpus = self.config.cluster.nodes * node * card_of(self.config).dollars_per_hour * self.hours
        return gpus + sum(stage.work.api_dollars for stage in self.stages)

    @property
    def disk_gib(self) -> float:
        return sum(sum(stage.work.disk.values()) for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values, memory in GiB."""
        config = self.config
        return {
            "model": {"name": config.model.label, "parameters": self.geometry.parameters, **asdict(self.geometry)},
            "cluster": {"name": config.cluster.name, "nodes": config.cluster.nodes, "processes": ranks_of(config),
                        "card": "cpu" if config.cluster.device == "cpu" else config.plan.card, **asdict(card_of(config))},
            "fits": self.fits,
            "hours": self.hours,
            "dollars": self.dollars,
            "disk_gib": self.disk_gib,
            "assumptions": {"mfu": config.plan.mfu, "bandwidth_use": config.plan.bandwidth_use,
                            "prompt_tokens": config.plan.prompt_tokens, "response_tokens": config.plan.response_tokens},
            "stages": [_stage_json(stage) for stage in self.stages],
        }  # fmt: skip


def plan_of(config: Config) -> Plan:
    """Plan `plan.stage` of a configuration.  Raises ConfigError when the model's geometry is not known."""
    geometry = geometry_of(config)
    stages = STAGES if config.plan.stage == "all" else (config.plan.stage,)
    return Plan(config, geometry, tuple(plan_stage(config, geometry, stage) for stage in stages))


def plan_stage(config: Config, geometry: Geometry, stage: str) -> StagePlan:
    phases, batches = tuple(phases_of(config, geometry, stage)), batches_of(config, stage)
    problems = [
        *(_overfull(phase) for phase in phases if not phase.fits),
        *(batches.problems if batches else ()),
    ]
    length = config.model.max_prompt_tokens + config.model.max_response_tokens
    if stage != "build_sec" and length > geometry.positions:
        problems.append(
            f"model.max_prompt_tokens + model.max_response_tokens = {length} exceeds the {geometry.positions} positions"
        )
    if (
        stage not in ("psi", "build_sec")
        and config.cluster.tensor_parallel > config.cluster.processes_per_node
    ):
        problems.append(
            f"{stage}: cluster.tensor_parallel={config.cluster.tensor_parallel} exceeds cluster.processes_per_node="
            f"{config.cluster.processes_per_node}: a vLLM replica stays on one node"
        )
    change = nearest_fit(config, geometry, stage) if problems else None
    return StagePlan(stage, phases, batches, work_of(config, geometry, stage), tuple(problems), change)


def _overfull(phase: Phase) -> str:
    if phase.problem:
        return phase.problem
    largest = max(phase.parts, key=lambda name: phase.parts[name])
    return (
        f"{phase.stage}: {phase.name} needs {phase.total:.1f} GiB of {phase.available:g} GiB; the largest part is {largest} "
        f"with {phase.parts[largest]:.1f} GiB"
    )


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "fits": stage.fits,
        "problems": list(stage.problems),
        "change": list(stage.change) if stage.change else None,
        "memory": [{"phase": p.name, "total": p.total, "available": p.available, "parts": p.parts, "host_parts": p.host_parts,
                    "notes": list(p.notes)} for p in stage.phases],
        "batches": stage.batches.facts if stage.batches else None,
        **{key: getattr(stage.work, key) for key in ("counts", "tokens", "hours", "disk", "api_dollars")},
        "assumptions": list(stage.work.assumptions),
    }  # fmt: skip
