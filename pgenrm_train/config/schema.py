"""The typed configuration: the only home of defaults.

YAML files under `configs/` hold sparse overrides of these dataclasses.
"""

import dataclasses
from dataclasses import dataclass, replace
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, NamedTuple

from pgenrm_train.config.cluster import ClusterConfig, PlanConfig, PreflightConfig, RayConfig
from pgenrm_train.config.data import DataConfig, MaskingConfig
from pgenrm_train.config.endpoints import JudgeConfig, TeacherConfig
from pgenrm_train.config.evaluation import (
    BestOfNConfig,
    EvalConfig,
    LabelConfig,
    LeaderboardConfig,
    ScoreConfig,
)
from pgenrm_train.config.grpo import CurriculumConfig, GrpoConfig
from pgenrm_train.config.model import ModelConfig
from pgenrm_train.config.prototypes import PrototypesConfig
from pgenrm_train.config.psi import PsiConfig, SecConfig
from pgenrm_train.config.serving import PublishConfig, ServeConfig
from pgenrm_train.config.setting import setting
from pgenrm_train.config.stage_names import GRPO_STAGES, StageName
from pgenrm_train.errors import ConfigError

NODE_GPUS = 8  # of the usual machine
FLASH = "flash_attention_2"
BUDGETS = ("smoke", "demo", "full")


@dataclass
class PipelineConfig:
    budget: str = setting(
        "demo",
        "sizes of nano and PersonaWorld; smoke: minutes, from a shipped checkpoint; demo: the README's run",
        choices=BUDGETS,
    )


@dataclass
class TrackingConfig:
    kind: str = setting(
        "offline", "where metrics go in addition to metrics.jsonl", choices=("offline", "wandb", "none")
    )
    project: str = setting("pgenrm-train", "project of the runs")
    group: str | None = setting(None, "group of the stages; null: the run folder's name")
    entity: str | None = setting(None, "team or user; null: the account's default")
    sample_chains: int = setting(
        8, "chains in the table of each validation; 0: none, because chains hold users' words", ge=0
    )


@dataclass
class Config:
    recipe: str = setting("???", "what to run; must be given")
    run_dir: str = setting(
        "runs/${data.name}-${model.label}-${pipeline.budget}",
        "a folder, or any fsspec URL (s3://…, gs://…)",
    )
    mirror: str = setting("runs/mirror", "folder for the local copies of runs at URLs")
    store: str | None = setting(
        None, "set by the program: the URL given as run_dir, which becomes a folder in mirror"
    )
    seed: int = setting(0, "seed of data, training and evaluation", ge=0, le=2**32 - 1)
    resume: bool = setting(True, "false renames an existing run folder and starts again")
    pipeline: PipelineConfig = setting(PipelineConfig(), "the size of a run")
    data: DataConfig = setting(DataConfig(), "the source of votes, and how it becomes records")
    model: ModelConfig = setting(ModelConfig(), "the model to train or evaluate")
    cluster: ClusterConfig = setting(ClusterConfig(), "the machines of a run")
    teacher: TeacherConfig = setting(
        TeacherConfig(), "the writer of chains, and of criteria that users did not state"
    )
    judge: JudgeConfig = setting(JudgeConfig(), "the rater of chains for the process reward")
    judge_gold: JudgeConfig = setting(JudgeConfig(), "a second rater, of validation chains alone")
    masking: MaskingConfig = setting(MaskingConfig(), "criteria and history that a prompt shows")
    tracking: TrackingConfig = setting(TrackingConfig(), "Weights & Biases; offline keeps its files on disk")
    sec: SecConfig = setting(SecConfig(), "chains by a teacher, filtered by rejection sampling (METHOD §3)")
    psi: PsiConfig = setting(PsiConfig(), "SFT on the kept chains; 8B defaults follow RM-R1's SFT")
    cre: GrpoConfig = setting(GrpoConfig(), "GRPO on veRL (METHOD §4); 8B defaults follow RM-R1 on verl")
    curriculum: CurriculumConfig = setting(
        CurriculumConfig(), "GRPO on more and more hard negatives, by outcome and format only (METHOD §5)"
    )
    prototypes: PrototypesConfig = setting(
        PrototypesConfig(), "user prototypes (METHOD §6; equations in prototypes/refinement.py)"
    )
    eval: EvalConfig = setting(EvalConfig(), "the protocol of an evaluation, its samples and its studies")
    leaderboard: LeaderboardConfig = setting(LeaderboardConfig(), "one page for the results of many runs")
    score: ScoreConfig = setting(ScoreConfig(), "one user, one query, several responses")
    label: LabelConfig = setting(LabelConfig(), "chosen and rejected responses for DPO; docs/using.md")
    best_of_n: BestOfNConfig = setting(BestOfNConfig(), "the gain of choosing by the model; docs/using.md")
    serve: ServeConfig = setting(ServeConfig(), "the scoring service; docs/serving.md")
    publish: PublishConfig = setting(PublishConfig(), "a model card with results, for the Hugging Face hub")
    preflight: PreflightConfig = setting(PreflightConfig(), "checks of the machine before a stage starts")
    plan: PlanConfig = setting(
        PlanConfig(), "memory, hours and cost of a run; each plan prints these assumptions"
    )
    ray: RayConfig = setting(RayConfig(), "an existing Ray cluster")


def gpus_per_node(config: Config, *stages: str) -> int:
    """GPUs that a node needs for these stages.

    Served judges run next to training, so all count; a served teacher runs before it.
    All nodes count the same, although a served model is on one of them.
    """
    judges = sum(judge.gpus for judge in served_judges(config, *stages).values())
    teacher = config.teacher.gpus if StageName.BUILD_SEC in stages and config.teacher.kind == "vllm" else 0
    return max(config.cluster.processes_per_node + judges, teacher)


def served_judges(config: Config, *stages: str) -> dict[str, JudgeConfig]:
    """Judges that vLLM serves during these stages, by section: `judge` and `judge_gold`."""
    trained = [getattr(config, stage) for stage in GRPO_STAGES if stage in stages]
    used = {
        "judge": any(grpo.process_weight for grpo in trained),
        "judge_gold": any(grpo.validate_every for grpo in trained),
    }
    judges: dict[str, JudgeConfig] = {section: getattr(config, section) for section in used if used[section]}
    return {section: judge for section, judge in judges.items() if judge.kind == "vllm"}


class Machines(NamedTuple):
    """Nodes of a run, and GPUs of each."""

    nodes: int
    gpus: int

    @property
    def all(self) -> int:
        return self.nodes * self.gpus


def machines(config: Config, *stages: str) -> Machines:
    """Nodes and GPUs that these stages need, those of served judges included.

    Judges that do not fit next to training take one more node.  Raises ConfigError if training takes all
    GPUs of a single node.
    """
    cluster, needed = config.cluster, gpus_per_node(config, *stages)
    if needed <= max(NODE_GPUS, cluster.processes_per_node, config.teacher.gpus) or cluster.device == "cpu":
        return Machines(cluster.nodes, needed)
    judges, gpus = served_judges(config, *stages), needed - cluster.processes_per_node
    if cluster.nodes > 1:
        return Machines(cluster.nodes + 1, max(cluster.processes_per_node, gpus))
    tp = cluster.tensor_parallel
    left = (NODE_GPUS - gpus) // tp * tp
    better = f"cluster.processes_per_node={left}" if left > 0 else f"{max(judges)}=endpoint"
    raise ConfigError(
        f"cluster={cluster.name} takes {cluster.processes_per_node} GPUs of its node and "
        f"{' and '.join(f'{section}=vllm' for section in judges)} {gpus} more, and a node has {NODE_GPUS}; "
        f"the nearest better setting is {better}"
    )


class Places(NamedTuple):
    """The configuration with the GPUs of a GRPO stage's actor, and with those of its vLLM."""

    actor: Config
    sampler: Config


def places_of(config: Config, stage: str) -> Places:
    """Where a GRPO stage trains and samples: on the same GPUs, unless its mode is `separate_async`."""
    if not getattr(config, stage).separate:
        return Places(config, config)
    actor, sampler = config.cluster.split()
    return Places(replace(config, cluster=actor), replace(config, cluster=sampler))


def psi_cluster(config: Config) -> ClusterConfig:
    """The cluster as PSI uses it: on a CPU it has at least `psi.cpu_processes` processes."""
    least = config.psi.cpu_processes if config.cluster.device == "cpu" else 1
    return replace(config.cluster, processes_per_node=max(least, config.cluster.processes_per_node))


def masking_of(config: Config, stage: str) -> str:
    """The masking policy of a stage: `masking=` if given, else its own."""
    return config.masking.policy or str(getattr(config, stage).masking)


def seed_of(config: Config, stage: str) -> int:
    """The seed of a GRPO stage: its own if given, else the run's."""
    return config.seed if (seed := getattr(config, stage).seed) is None else int(seed)


def attention_of(config: Config) -> str:
    """The attention of training on GPUs: the given one, or FlashAttention where it is installed."""
    if config.model.attention is not None:
        return config.model.attention
    able = config.cluster.device == "cuda" and config.model.dtype == "bfloat16"
    return FLASH if able and find_spec("flash_attn") is not None else "sdpa"


def cuts_by_tokens(config: Config) -> bool:
    """Whether GRPO cuts micro-batches by tokens.

    veRL can do so anywhere, but only rows without padding keep to them, and those take FlashAttention.
    """
    return config.cluster.device == "cuda" and attention_of(config) == FLASH


def tokens_per_pass(config: Config, stage: str) -> int | None:
    """Tokens per process and forward pass of a GRPO stage; None: `micro_batch_size` sequences."""
    if not cuts_by_tokens(config):
        return None
    longest = config.model.max_prompt_tokens + config.model.max_response_tokens
    return max(int(getattr(config, stage).micro_batch_tokens), longest)


def get(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    return attrgetter(key)(config)


def to_dict(config: Any) -> dict[str, object]:
    """A configuration or a section of it as nested plain values."""
    return dataclasses.asdict(config)
