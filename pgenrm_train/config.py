"""The typed configuration: the only home of defaults and of checks that span several keys.

YAML files under `configs/` hold sparse overrides of these dataclasses.  Values that depend on the size of the run use the
resolver `${budget:SMOKE,DEMO,FULL}`, which picks by `pipeline.budget`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgenrm_train.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CONFIG_DIR = ROOT / "configs"
BUDGETS = ("smoke", "demo", "full")
ANSWER_KEYS = (
    "kind",
    "name",
    "max_tokens",
    "temperature",
    "structured",
    "instructions",
)  # of teacher and judge: what an answer depends on
NULL_POLICIES = ("drop_process_for_group", "group_mean", "stop")
STAGES = ("build_data", "build_sec", "psi", "cre", "curriculum", "prototypes", "evaluate")


@dataclass
class PipelineConfig:
    budget: str = "demo"  # smoke: minutes, from a shipped checkpoint · demo: the README's run · full: everything there is


@dataclass
class DataConfig:
    name: str = "personaworld"  # builder in data_builders/
    path: str | None = None  # file or folder of the raw source
    history_size: int = 3  # h, the paper's best (METHOD §1)
    history_policy: str = "random"  # random (paper) · recent · same_scenario (one item shares the query's scenario)
    history_kind: str | None = None  # draw history only from pairs of this kind
    max_train_pairs: int | None = None
    max_val_pairs: int | None = None
    max_test_pairs: int | None = None
    on_bad_row: str = "fail"  # fail · skip (counted and listed)
    only: dict[str, Any] = field(default_factory=dict)  # keep rows whose column has this value, e.g. {shared_context: "True"}
    # PRISM
    min_rating_gap: float = 10.0  # points between two ratings that make a pair
    split_by: str = "within_user"  # within_user · user_disjoint
    # PersonaWorld
    users: int = 3000
    heldout_users: int = 300
    pairs_per_user: int = 12


@dataclass
class NanoConfig:
    """The from-scratch model of the CPU default: a Qwen2 of well under a million parameters with its own tokenizer."""

    layers: int = 3
    hidden: int = 96
    heads: int = 3  # head_dim 32, the least that vLLM on CPU takes
    intermediate: int = 256
    vocabulary: int = 4096
    positions: int = 1024


@dataclass
class LoraConfig:
    rank: int = 0  # 0: full-parameter training
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class ModelConfig:
    kind: str = "nano"  # nano · hf · endpoint · baseline
    name: str = "nano"  # hub id, served model name or baseline name
    label: str = "nano"  # short name for folders and tables
    path: str | None = None  # a local checkpoint; overrides what the run folder holds
    base_url: str | None = None
    api_key_env: str | None = None
    instructions: bool = True  # system message with the task; nano learns the task from its chains instead
    max_prompt_tokens: int = 4096
    max_text_tokens: int | None = None  # longer queries and responses are cut to this and counted
    max_response_tokens: int = 8192
    dtype: str = "bfloat16"
    attention: str = "sdpa"  # flash_attention_2 where flash-attn is installed: packing without padding on veRL
    lora: LoraConfig = field(default_factory=LoraConfig)
    nano: NanoConfig = field(default_factory=NanoConfig)


@dataclass
class ClusterConfig:
    name: str = "cpu"
    device: str = "cpu"  # cpu · cuda
    nodes: int = 1
    processes_per_node: int = 1  # ranks of FSDP and DeepSpeed; on cuda: GPUs
    zero_stage: int = 0  # DeepSpeed
    offload_optimizer: bool = False
    tensor_parallel: int = 1  # of a vLLM replica
    gpu_memory_utilization: float = 0.6  # of vLLM while it shares a GPU with the actor
    min_free_memory_gib: float = 6.0
    min_free_disk_gib: float = 3.0


@dataclass
class EndpointConfig:
    """Who writes chains (teacher) or rates them (judge): a rule, a model behind an OpenAI-compatible API, or nobody."""

    kind: str = "none"  # teacher: oracle · features · endpoint · vllm;  judge: oracle · none · endpoint · vllm
    base_url: str | None = None
    name: str | None = None
    api_key_env: str | None = None
    gpus: int = 1  # of a vLLM that is served here
    instructions: bool = True  # of a teacher: false for a model that has learnt the task from chains
    max_in_flight: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # of prompts and answers together
    timeout_seconds: float = 120.0
    attempts: int = 5  # of a call, with exponential backoff, on 429, 5xx, time-outs and lost connections
    give_up_after: int = 20  # calls that failed one after the other: the server is taken to be down
    max_tokens: int = 2048
    max_tokens_field: str = "max_tokens"  # max_completion_tokens for OpenAI's reasoning models
    temperature: float = 0.7
    structured: str = "json_schema"  # json_schema · json_object · none: how a judge's answer is constrained
    dollars_per_million_in: float = 0.0
    dollars_per_million_out: float = 0.0
    max_dollars: float | None = None  # the run stops when this much was spent; what was answered stays in the cache
    max_total_tokens: int | None = None


@dataclass
class MaskingConfig:
    policy: str | None = None  # null: each stage's own (psi.masking, cre.masking, curriculum.masking, eval.masking)
    show_probability: float = 0.5  # of the criteria under `mixed`, of the whole history under `history_dropout`


@dataclass
class TrackingConfig:
    kind: str = "offline"  # offline (W&B files on disk) · wandb · none
    project: str = "pgenrm-train"
    group: str | None = None
    entity: str | None = None


@dataclass
class SecConfig:
    """build_sec: structured evaluation chains by a teacher, filtered by rejection sampling (METHOD §3)."""

    samples_per_pair: int = 4  # tries until one is kept
    orders_per_pair: int = 1  # presentation orders asked a pair: 1 (balanced over pairs) or 2
    max_chains: int | None = None


@dataclass
class PsiConfig:
    """SFT on the kept chains.  The paper gives no values; 8B defaults follow RM-R1's SFT (lr 5e-6, batch 128, 1 epoch)."""

    masking: str = "full"
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 5e-6
    batch_size: int = 128  # sequences an optimiser step, over all processes
    micro_batch_size: int = 1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    beta2: float = 0.999
    min_learning_rate_ratio: float = 0.0
    gradient_checkpointing: bool = True
    save_every: int = 200
    log_every: int = 10
    keep_checkpoints: int = 2
    nano_start: str | None = None  # nano only: a shipped checkpoint to go on from instead of random weights


@dataclass
class GrpoConfig:
    """GRPO on veRL (METHOD §4).  8B defaults follow RM-R1 on verl: lr 1e-6, 1,024 rollouts a step, mini-batches of 128 prompts."""

    masking: str = "masked"
    seed: int | None = None  # null: the run's; another one repeats the stage on the same data
    rows: int = 8192  # training pairs to draw from
    steps: int = 200
    prompts_per_step: int = 128
    group_size: int = 8
    mini_batch_prompts: int = 128
    micro_batch_size: int = 1
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 0.01
    kl_coefficient: float = 0.001
    clip_ratio: float = 0.2
    entropy_coefficient: float = 0.0
    temperature: float = 1.0
    outcome_weight: float = 1.0
    process_weight: float = 0.5
    format_error: float = -0.1
    null_policy: str = "drop_process_for_group"  # a judge without a verdict: see rewards; or group_mean, stop
    max_null_share: float = 0.5  # of a step's judged chains without a verdict: more end the run, resumably
    save_every: int = 50
    validate_every: int = 0
    keep_checkpoints: int = 2
    stall_seconds: float = 1800.0  # the watchdog ends a run that made no progress for this long


@dataclass
class CurriculumConfig(GrpoConfig):
    """Hard-negative-aware GRPO (METHOD §5): outcome and format only, the share of hard negatives grows."""

    process_weight: float = 0.0
    schedule: str = "linear"  # linear · cosine · step · uniform
    hard_share_start: float = 0.3
    hard_share_end: float = 0.8
    mining_samples: int = 4  # K chains a pair from the CRE model, on all of `rows`
    hard_low: float = 0.25  # a pair is hard when the share of its chains that rank chosen first lies between these;
    hard_high: float = 0.75  # below, the model contradicts the vote: suspect, and left in its natural share among the rest


@dataclass
class PrototypesConfig:
    """User prototypes (METHOD §6)."""

    k: int = 50
    embedder: str = "Qwen/Qwen3-Embedding-0.6B"
    analyses_per_user: int = 2
    max_users: int | None = None
    refine_epochs: int = 5
    learning_rate: float = 1e-3
    rho: float = 1.0
    lambda_query: float = 0.1
    lambda_summary: float = 0.1
    lambda_centre: float = 0.1
    lambda_trajectory: float = 0.1


@dataclass
class EvalConfig:
    protocol: str = "strict"
    split: str = "test"
    masking: str = "masked"
    seeds: int = 5
    ind: Any = 1  # m own samples a pair and order: a number, or a list for a grid beside the Ind-1 headline
    pro: Any = 0  # n chains from the histories of similar users: a number or a list
    one_pair_ind: list[int] = field(default_factory=list)  # a second grid, for users of whom one history pair is known
    one_pair_pro: list[int] = field(default_factory=list)
    grid_pairs: int | None = None  # pairs of the grids; null: all
    temperature: float = 0.7  # as in training, chains are sampled; 0 is greedy, for one sample a question only
    max_in_flight: int = 256
    draws: int = 2000  # of the bootstrap
    probes: bool = True
    baselines: list[str] = field(default_factory=lambda: ["random", "longer", "shorter", "majority"])
    compare: list[str] = field(default_factory=list)
    chains_in_report: int = 12


@dataclass
class ScoreConfig:
    input: str | None = None
    dry_run: bool = False


@dataclass
class PreflightConfig:
    only: bool = False


@dataclass
class PlanConfig:
    emit: str | None = None


@dataclass
class RayConfig:
    address: str | None = None


@dataclass
class Config:
    recipe: str = "???"
    run_dir: str = "runs/${data.name}-${model.label}-${pipeline.budget}"
    seed: int = 0
    resume: bool = True
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    teacher: EndpointConfig = field(default_factory=EndpointConfig)
    judge: EndpointConfig = field(default_factory=EndpointConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sec: SecConfig = field(default_factory=SecConfig)
    psi: PsiConfig = field(default_factory=PsiConfig)
    cre: GrpoConfig = field(default_factory=GrpoConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    prototypes: PrototypesConfig = field(default_factory=PrototypesConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    ray: RayConfig = field(default_factory=RayConfig)


_CHOICES: dict[str, tuple[str, ...]] = {
    "pipeline.budget": BUDGETS,
    "data.history_policy": ("random", "recent", "same_scenario"),
    "data.split_by": ("within_user", "user_disjoint"),
    "data.on_bad_row": ("fail", "skip"),
    "model.kind": ("nano", "hf", "endpoint", "baseline"),
    "cluster.device": ("cpu", "cuda"),
    "teacher.kind": ("oracle", "features", "endpoint", "vllm"),
    "judge.kind": ("oracle", "none", "endpoint", "vllm"),
    **{f"{who}.structured": ("json_schema", "json_object", "none") for who in ("teacher", "judge")},
    **{f"{who}.max_tokens_field": ("max_tokens", "max_completion_tokens") for who in ("teacher", "judge")},
    "tracking.kind": ("offline", "wandb", "none"),
    "eval.protocol": ("strict", "release", "both_orders", "user_disjoint"),
    "eval.split": ("train", "val", "test"),
    **{f"{stage}.null_policy": NULL_POLICIES for stage in ("cre", "curriculum")},
    "curriculum.schedule": ("linear", "cosine", "step", "uniform"),
    **{f"{stage}.masking": ("full", "masked", "history_dropout", "mixed") for stage in ("psi", "cre", "curriculum", "eval")},
}
_POSITIVE = (
    "data.history_size", "psi.batch_size", "psi.micro_batch_size", "psi.learning_rate", "psi.save_every", "sec.samples_per_pair",
    "cre.steps", "cre.prompts_per_step", "cre.learning_rate", "curriculum.steps", "curriculum.prompts_per_step",
    "curriculum.learning_rate", "prototypes.k", "eval.seeds", "eval.max_in_flight", "eval.draws", "cluster.nodes",
    "cluster.processes_per_node", "model.max_prompt_tokens", "model.max_response_tokens",
    *(f"{who}.{what}" for who in ("teacher", "judge") for what in ("max_in_flight", "timeout_seconds", "attempts", "max_tokens",
                                                                   "give_up_after", "gpus", "requests_per_minute",
                                                                   "tokens_per_minute")),
)  # fmt: skip


def register_resolvers() -> None:
    """Make `${budget:…}` and the schema known to OmegaConf and Hydra (idempotent)."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("budget", _by_budget, replace=True)
    ConfigStore.instance().store(name="schema", node=Config)


def load(*overrides: str) -> Config:
    """Compose and check a configuration as the command line would, e.g. `load("recipe=psi", "model=nano")`."""
    from hydra import compose, initialize_config_dir

    register_resolvers()
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return parse(compose("config", overrides=list(overrides)))


def _by_budget(smoke: Any, demo: Any, full: Any, *, _root_: Any) -> Any:
    budget = _root_.pipeline.budget
    if budget not in BUDGETS:
        raise ConfigError(_not_one_of("pipeline.budget", budget, BUDGETS))
    from omegaconf import OmegaConf

    value = {"smoke": smoke, "demo": demo, "full": full}[budget]
    return OmegaConf.create(value) if isinstance(value, list) else value


def parse(composed: Any) -> Config:
    """A composed OmegaConf tree → the typed, resolved, checked `Config`.  Raises ConfigError, and OmegaConf's for unknown keys."""
    from omegaconf import OmegaConf

    register_resolvers()
    # Plain values: merging the tree itself would take over keys that `+key=` put past the schema.
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True) if OmegaConf.is_config(composed) else composed
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(config, Config)
    check(config)
    return config


def check(config: Config) -> None:
    """Choices, ranges and cross-field rules; each failure is one sentence that names the keys."""
    for key, valid in _CHOICES.items():
        if (value := get(config, key)) not in valid:
            raise ConfigError(_not_one_of(key, value, valid))
    if config.masking.policy is not None and config.masking.policy not in _CHOICES["psi.masking"]:
        raise ConfigError(_not_one_of("masking.policy", config.masking.policy, _CHOICES["psi.masking"]))
    for key in ("eval.ind", "eval.pro"):
        value = get(config, key)
        if not all(isinstance(n, int) and n >= 0 for n in (value if isinstance(value, list) else [value])) or value == []:
            raise ConfigError(f"{key}={value} must be a number from 0 or a list of them")
    if max(sizes(config.eval.ind)) + max(sizes(config.eval.pro)) == 0:
        raise ConfigError("eval.ind=0 needs eval.pro above 0: a score takes at least one chain")
    if config.eval.temperature < 0:
        raise ConfigError(f"eval.temperature={config.eval.temperature} must be at least 0")
    if config.eval.temperature == 0 and (max(sizes(config.eval.ind)) > 1 or config.eval.seeds > 1):
        raise ConfigError("eval.temperature=0 gives the same chain each time; it needs eval.ind=1 and eval.seeds=1")
    if config.sec.orders_per_pair not in (1, 2):
        raise ConfigError(f"sec.orders_per_pair={config.sec.orders_per_pair} is not one of 1, 2")
    if not 0 <= config.masking.show_probability <= 1:
        raise ConfigError(f"masking.show_probability={config.masking.show_probability} must be within 0 and 1")
    if config.model.max_text_tokens is not None and config.model.max_text_tokens < 1:
        raise ConfigError(f"model.max_text_tokens={config.model.max_text_tokens} must be at least 1, or null for no limit")
    for key in _POSITIVE:
        if (value := get(config, key)) is not None and value <= 0:
            raise ConfigError(f"{key}={get(config, key)} must be above 0")
    if config.data.name == "pairs" and not config.data.path:
        raise ConfigError("data=pairs needs data.path=FILE, a parquet or JSONL file in PersonalRewardBench's schema")
    for section in ("cre", "curriculum"):
        _check_grpo(section, getattr(config, section))
    for section in ("teacher", "judge"):
        endpoint = getattr(config, section)
        _check_endpoint(section, endpoint)
        if endpoint.kind == "oracle" and config.data.name != "personaworld":
            raise ConfigError(
                f"{section}=oracle knows data=personaworld only, and data={config.data.name}; use another {section}="
            )
    if config.model.kind == "endpoint":
        if config.recipe not in ("build_data", "evaluate", "score"):
            raise ConfigError(f"model=endpoint is a model to evaluate; recipe={config.recipe} needs one with weights")
        if not config.model.base_url:
            raise ConfigError("model=endpoint needs model.base_url (e.g. http://localhost:8000/v1)")
    if (config.recipe, config.model.kind, config.pipeline.budget) == (
        "pipeline",
        "nano",
        "smoke",
    ) and config.data.name != "personaworld":
        raise ConfigError(
            f"pipeline.budget=smoke is too short for nano to learn a chain from data={config.data.name}; use pipeline.budget=demo"
        )
    low, high = config.curriculum.hard_low, config.curriculum.hard_high
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"curriculum.hard_low={low:g} and curriculum.hard_high={high:g} must be in this order within 0 and 1")
    ranks = config.cluster.nodes * config.cluster.processes_per_node
    if config.recipe in ("psi", "pipeline") and config.psi.batch_size % (config.psi.micro_batch_size * ranks):
        raise ConfigError(
            f"psi.batch_size={config.psi.batch_size} must be a multiple of psi.micro_batch_size × processes = "
            f"{config.psi.micro_batch_size} × {ranks}"
        )


def _check_endpoint(section: str, endpoint: EndpointConfig) -> None:
    if endpoint.kind == "endpoint" and not (endpoint.base_url and endpoint.name):
        raise ConfigError(
            f"{section}=endpoint needs {section}.base_url (e.g. http://localhost:8000/v1) and {section}.name (the served model)"
        )
    if endpoint.kind == "vllm" and not endpoint.name:
        raise ConfigError(f"{section}=vllm needs {section}.name, a checkpoint folder or a hub name to serve")


def _check_grpo(section: str, grpo: GrpoConfig) -> None:
    if grpo.group_size < 2:
        raise ConfigError(f"{section}.group_size={grpo.group_size} must be at least 2: GRPO compares samples of one prompt")
    if grpo.prompts_per_step % grpo.mini_batch_prompts:
        raise ConfigError(
            f"{section}.prompts_per_step={grpo.prompts_per_step} must be a multiple of {section}.mini_batch_prompts={grpo.mini_batch_prompts}"
        )


def sizes(value: Any) -> tuple[int, ...]:
    """`eval.ind` or `eval.pro` as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def masking_of(config: Config, stage: str) -> str:
    """The masking policy of a stage: `masking=` when given, else the stage's own."""
    return config.masking.policy or str(getattr(config, stage).masking)


def seed_of(config: Config, stage: str) -> int:
    """The seed of a GRPO stage: its own when given, else the run's."""
    own = getattr(config, stage).seed
    return config.seed if own is None else int(own)


def get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _not_one_of(key: str, value: object, valid: tuple[str, ...]) -> str:
    return f"{key}={value} is not one of {', '.join(valid)}"
