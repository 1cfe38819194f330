"""The typed configuration: the only home of defaults.

YAML files under `configs/` hold sparse overrides of these dataclasses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pgenrm_train.config.cluster import ClusterConfig, PlanConfig, PreflightConfig, RayConfig
from pgenrm_train.config.data import DataConfig, MaskingConfig
from pgenrm_train.config.endpoints import JudgeConfig, TeacherConfig
from pgenrm_train.config.evaluation import EvalConfig, ScoreConfig
from pgenrm_train.config.grpo import CurriculumConfig, GrpoConfig
from pgenrm_train.config.model import ModelConfig
from pgenrm_train.config.prototypes import PrototypesConfig
from pgenrm_train.config.psi import PsiConfig
from pgenrm_train.config.sec import SecConfig
from pgenrm_train.config.setting import setting
from pgenrm_train.config.stage_names import StageName

BUDGETS = ("smoke", "demo", "full")


@dataclass
class PipelineConfig:
    """The size of a run."""

    budget: str = setting(
        "demo",
        "smoke: minutes, from a shipped checkpoint; demo: the README's run; full: everything",
        choices=BUDGETS,
    )


@dataclass
class TrackingConfig:
    """Weights & Biases; offline keeps its files on disk."""

    kind: str = setting(
        "offline", "where metrics go, next to metrics.jsonl", choices=("offline", "wandb", "none")
    )
    project: str = setting("pgenrm-train", "project of the runs")
    group: str | None = setting(None, "group of the stages; null: the run folder's name")
    entity: str | None = setting(None, "team or user; null: the account's default")


@dataclass
class Config:
    """Keys of all recipes."""

    recipe: str = setting("???", "what to run; must be given")
    run_dir: str = setting(
        "runs/${data.name}-${model.label}-${pipeline.budget}", "a folder, or any fsspec URL (s3://…, gs://…)"
    )
    mirror: str = setting("runs/mirror", "where this machine keeps its copies of runs at URLs")
    store: str | None = setting(None, "the URL; follows from run_dir, which then is the mirror's folder")
    seed: int = setting(0, "seed of data, training and evaluation")
    resume: bool = setting(True, "false sets an existing run folder aside and starts again")
    pipeline: PipelineConfig = setting(PipelineConfig())
    data: DataConfig = setting(DataConfig())
    model: ModelConfig = setting(ModelConfig())
    cluster: ClusterConfig = setting(ClusterConfig())
    teacher: TeacherConfig = setting(TeacherConfig())
    judge: JudgeConfig = setting(JudgeConfig())
    masking: MaskingConfig = setting(MaskingConfig())
    tracking: TrackingConfig = setting(TrackingConfig())
    sec: SecConfig = setting(SecConfig())
    psi: PsiConfig = setting(PsiConfig())
    cre: GrpoConfig = setting(GrpoConfig())
    curriculum: CurriculumConfig = setting(CurriculumConfig())
    prototypes: PrototypesConfig = setting(PrototypesConfig())
    eval: EvalConfig = setting(EvalConfig())
    score: ScoreConfig = setting(ScoreConfig())
    preflight: PreflightConfig = setting(PreflightConfig())
    plan: PlanConfig = setting(PlanConfig())
    ray: RayConfig = setting(RayConfig())


def gpus_per_node(config: Config, *stages: str) -> int:
    """GPUs that a node needs for these stages.

    A served judge runs next to training, so both count; a served teacher runs before it.
    All nodes count the same, although a served model is on one of them.
    """
    rewards = {
        StageName.CRE: config.cre.process_weight,
        StageName.CURRICULUM: config.curriculum.process_weight,
    }
    judged = any(weight for stage, weight in rewards.items() if stage in stages)
    judge = config.judge.gpus if judged and config.judge.kind == "vllm" else 0
    teacher = config.teacher.gpus if StageName.BUILD_SEC in stages and config.teacher.kind == "vllm" else 0
    return max(config.cluster.processes_per_node + judge, teacher)


def masking_of(config: Config, stage: str) -> str:
    """The masking policy of a stage: `masking=` if given, else its own."""
    return config.masking.policy or str(getattr(config, stage).masking)


def seed_of(config: Config, stage: str) -> int:
    """The seed of a GRPO stage: its own if given, else the run's."""
    own = getattr(config, stage).seed
    return config.seed if own is None else int(own)


def get(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def to_dict(config: Any) -> dict[str, object]:
    """A configuration or a section of it as nested plain values."""
    return dataclasses.asdict(config)
