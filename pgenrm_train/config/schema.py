"""The typed configuration: the only home of defaults.

YAML files under `configs/` hold sparse overrides of these dataclasses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

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
PROBES = ("swapped_history", "empty_history", "shuffled_history", "padded", "injected", "paraphrased")
BASELINES = (
    "random",
    "longer",
    "shorter",
    "user_length",
    "majority",
    "features",
    "bradley_terry",
    "bradley_terry_user",
    "oracle",
)
PROMPTS = ("p_genrm", "judge", "judge_history", "persona")
STAGES = ("build_data", "build_sec", "psi", "cre", "curriculum", "prototypes", "evaluate")


@dataclass
class PipelineConfig:
    budget: str = "demo"  # smoke: minutes, from a shipped checkpoint · demo: the README's run · full: everything there is


@dataclass
class DataConfig:
    name: str = "personaworld"  # builder in data_builders/
    path: str | None = None  # file or folder of the raw source
    history_size: int = 3  # h, the paper's best (METHOD §1)
    history_policy: str = (
        "random"  # random (paper) · recent · most_similar (query) · same_scenario (of PersonaWorld)
    )
    history_kind: str | None = None  # draw history only from pairs of this kind
    max_train_pairs: int | None = None
    max_val_pairs: int | None = None
    max_test_pairs: int | None = None
    on_bad_row: str = "fail"  # fail · skip (counted and listed)
    on_overlap: str = (
        "fail"  # votes that a user casts again in a later split of the source: fail · drop (counted)
    )
    split_by: str = "source"  # source: what the records say · within_user · user_disjoint · pair (one split for all voters on it)
    near_duplicates: bool = True  # in the leak report; the slow part of it
    answers: str | None = None  # LaMP-QA: file of the models' answers
    only: dict[str, Any] = field(
        default_factory=dict
    )  # keep rows whose column has this value, e.g. {shared_context: "True"}
    # PRISM
    min_rating_gap: float = 10.0  # points between two ratings that make a pair
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
    kind: str = "nano"  # nano · hf · endpoint · baseline · reward_head · callable
    name: str = "nano"  # hub id, served model name, baseline name, or module:function
    label: str = "nano"  # short name for folders and tables
    path: str | None = None  # a local checkpoint; overrides what the run folder holds
    base_url: str | None = None
    api_key_env: str | None = None
    prompt: str = (
        "p_genrm"  # of evaluate and score: p_genrm · judge · judge_history · persona (see prompt_styles)
    )
    instructions: bool = True  # system message with the task; nano learns the task from its chains instead
    max_prompt_tokens: int = 4096
    max_text_tokens: int | None = None  # longer queries and responses are cut to this and counted
    max_response_tokens: int = 8192
    dtype: str = "bfloat16"
    attention: str = (
        "sdpa"  # flash_attention_2 where flash-attn is installed: packing without padding on veRL
    )
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
    max_failures: int = (
        3  # new starts of a training stage from its newest checkpoint after it has lost its engine or a node
    )
    tensor_parallel: int = 1  # of a vLLM replica
    engines: int | None = None  # vLLM replicas that evaluate; null: as many as the processes hold
    gpu_memory_utilization: float = 0.6  # of vLLM while it shares a GPU with the actor
    min_free_memory_gib: float = 6.0
    min_free_disk_gib: float = 3.0


@dataclass
class EndpointConfig:
    """Who writes chains (teacher) or rates them (judge): a rule, a model behind an OpenAI-compatible API, or nobody."""

    kind: str = (
        "none"  # teacher: oracle · features · endpoint · vllm;  judge: oracle · none · endpoint · vllm
    )
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
    max_dollars: float | None = (
        None  # the run stops when this much was spent; what was answered stays in the cache
    )
    max_total_tokens: int | None = None


@dataclass
class MaskingConfig:
    policy: str | None = (
        None  # null: each stage's own (psi.masking, cre.masking, curriculum.masking, eval.masking)
    )
    show_probability: float = (
        0.5  # of the criteria under `mixed`, of the whole history under `history_dropout`
    )


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
    second_chance: bool = (
        True  # the next try is told what was wrong with the form of the last, never that its ranking was
    )
    synthesize_criteria: bool = (
        False  # the teacher infers criteria of users who stated nothing, for CRE's judge (METHOD §4)
    )
    near_duplicate: float = (
        0.9  # similarity of two analyses (Jaccard, word triples) from which the second teaches nothing new
    )


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
    keep_checkpoints: int = 2  # and the one that validation liked best
    packing: bool | None = None  # sequences in one row without padding; null: on GPUs
    sequence_parallel: int = (
        1  # processes that share one sequence (Ulysses), for chats that one GPU cannot hold
    )
    score_weight: float = 1.0  # loss weight of a token from <JSON_START> on; those of the analysis have 1
    liger: bool = (
        False  # Liger's kernels for norms, rotations and activations, where the package is installed
    )
    evaluate_every: int = (
        0  # steps between validations by generation; 0: none, and the last checkpoint is published
    )
    evaluate_pairs: int = 64  # validation pairs asked, in both orders
    patience: int | None = None  # validations without a better accuracy that end training; null: never
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
    verified_weight: float = (
        0.0  # of the agreement of declared scores with the rubric's own sums; not in the paper
    )
    null_policy: str = "drop_process_for_group"  # a judge without a verdict: see rewards; or group_mean, stop
    resample: int = 0  # times that a group without advantage (all rewards equal) is sampled anew
    max_null_share: float = 0.5  # of a step's judged chains without a verdict: more end the run, resumably
    save_every: int = 50
    validate_every: int = 25  # steps between validations, the start and the end included; 0: none
    validate_pairs: int = (
        64  # of the validation split, asked in both orders with their own, another user's and no history
    )
    keep_checkpoints: int = 2
    stall_seconds: float = 1800.0  # the watchdog ends a run that made no progress for this long


@dataclass
class CurriculumConfig(GrpoConfig):
    """Hard-negative-aware GRPO (METHOD §5): outcome and format only, the share of hard negatives grows."""

    process_weight: float = 0.0
    schedule: str = "linear"  # linear · cosine · step · self_paced · uniform and anti (controls)
    hard_share_start: float = 0.3
    hard_share_end: float = 0.8
    hard_by: str = "hardness"  # hardness · history (short ones are hard) · scenario (rare ones are)
    mine: bool = True  # false: hardness from texts, ratings and other users' votes, without a model
    similarity: str = "trigrams"  # of the two responses: their character trigrams, or an embedder as prototypes.embedder names it
    mining_samples: int = (
        4  # K chains a pair from the CRE model, on all of `rows`, half of them in each order
    )
    hard_low: float = (
        0.25  # a pair is hard when the share of its chains that rank chosen first lies between these;
    )
    hard_high: float = (
        0.75  # below, the model contradicts the vote, and where it does so confidently the pair is suspect
    )
    suspect_weight: float = 0.5  # how often a suspect pair is drawn against another one that is not hard
    user_balanced: bool = False  # users take turns instead of pairs
    construct: bool = (
        False  # up to half of `rows`: votes against the majority of other users, and near-equal ratings
    )
    prototypes: str | None = (
        None  # a finished `prototypes` folder: construct also takes votes against another prototype's majority
    )


@dataclass
class PrototypesConfig:
    """User prototypes (METHOD §6)."""

    k: Any = 50  # a number, or auto: from the share of the singular values' sum that k of them hold
    retained_mass: float = 0.8  # that share; 8 to 12 prototypes hold it in PersonaWorld, which has 12 cells
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
    weights: list[float] = field(
        default_factory=lambda: [1.0, 1.0]
    )  # of the mean of own samples and of similar users' mean
    scores: str = (
        "declared"  # of a chain, or verified: recomputed from its own criteria; one that cannot be then fails
    )
    adaptive: float | None = (
        None  # error level at which sampling of a pair stops before eval.ind; null: all are drawn
    )
    one_pair_ind: list[int] = field(
        default_factory=list
    )  # a second grid, for users of whom one history pair is known
    one_pair_pro: list[int] = field(default_factory=list)
    grid_pairs: int | None = None  # pairs of the grids; null: all
    grid_seeds: int = (
        1  # pools of the grids: each draws every sample anew, and the standard error is over them
    )
    temperature: float = (
        0.7  # as in training, chains are sampled; 0 is greedy, for one sample a question only
    )
    max_in_flight: int = 256
    draws: int = 2000  # of the bootstrap
    probes: bool = True
    probe_kinds: list[str] = field(default_factory=lambda: list(PROBES))  # asked of the final model
    probe_pairs: int = 200  # pairs of these probes
    baselines: list[str] = field(default_factory=lambda: ["random", "longer", "shorter", "majority"])
    compare: list[str] = field(default_factory=list)  # two run folders: no evaluation, their comparison
    cache: str | None = None  # a folder of answers that several runs share; null: each run keeps its own
    chains_in_report: int = 12


@dataclass
class ScoreConfig:
    input: str | None = None
    ind: int = 1  # chains from the user's own history: one is the likeliest, several are sampled
    pro: int = 0  # chains from similar users' histories, one a user
    dry_run: bool = False


@dataclass
class PreflightConfig:
    only: bool = False  # check, print a table, start nothing
    skip: list[str] = field(default_factory=list)  # checks by name, see docs/troubleshooting.md
    ring: bool | None = (
        None  # an all-reduce over this node's processes; null: on GPUs, where there are several
    )


@dataclass
class CardConfig:
    """One accelerator of the price table: memory and peaks of the data sheet; the price is an assumption to replace with yours."""

    memory_gib: float
    tflops: float  # dense bf16
    terabytes_per_second: float  # of its memory
    dollars_per_hour: float


def _cards() -> dict[str, CardConfig]:
    return {
        "a100": CardConfig(80.0, 312.0, 2.04, 2.0),  # A100 SXM 80 GB
        "h100": CardConfig(79.6, 989.0, 3.35, 3.0),  # H100 SXM 80 GB
        "h200": CardConfig(140.4, 989.0, 4.8, 4.0),  # H200 SXM 141 GB
        "l40s": CardConfig(45.0, 362.0, 0.864, 1.2),
        "cpu": CardConfig(24.0, 0.3, 0.02, 0.0),  # a process of cluster=cpu: two cores
    }


@dataclass
class PlanConfig:
    """recipe=plan: what a run would need.  Rates, lengths and prices are assumptions, stated beside each plan."""

    stage: str = "all"  # build_sec · psi · cre · curriculum · prototypes · evaluate · all
    emit: str | None = None  # slurm · rayjob: print a launch file for the stage instead of the table
    json: bool = False  # print plan.json instead of the table
    card: str = "h100"  # of `cards`; cluster=cpu takes cpu
    cards: dict[str, CardConfig] = field(default_factory=_cards)
    mfu: float = 0.35  # model FLOPs of training and prefill over the card's peak
    bandwidth_use: float = 0.5  # of the card's memory bandwidth while tokens are generated
    tokens_per_second: float | None = (
        None  # generated by one GPU, when you have measured it; null: from the bandwidth
    )
    prompt_tokens: int = 2000  # mean lengths, at most the model's limits; memory is planned for the limits
    response_tokens: int = 1000
    pairs: int | None = None  # training pairs; null: what the data configuration or file tells
    test_pairs: int | None = None
    sbatch: list[str] = field(
        default_factory=list
    )  # more options for SLURM, e.g. ["--partition=gpu","--account=me"]
    image: str = "pgenrm-train:0.1.0"  # Kubernetes: the image of the Dockerfile,
    volume_claim: str = "pgenrm-runs"  # a ReadWriteMany claim that is mounted at /runs,
    secret: str = "pgenrm-secrets"  # and the secret that holds the keys, each under its variable's name


@dataclass
class RayConfig:
    address: str | None = None


@dataclass
class Config:
    recipe: str = "???"
    run_dir: str = (
        "runs/${data.name}-${model.label}-${pipeline.budget}"  # a folder, or any fsspec URL (s3://…, gs://…)
    )
    mirror: str = "runs/mirror"  # where this machine keeps its copies of runs at URLs
    store: str | None = None  # the URL; set from run_dir, which then is the mirror's folder
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


def sizes(value: Any) -> tuple[int, ...]:
    """`eval.ind` or `eval.pro` as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def gpus_per_node(config: Config, *stages: str) -> int:
    """GPUs that a node needs for these stages: those of training and of a judge that is served beside it, or those of a served
    teacher, which comes before.  All nodes are counted alike, though a served model is on one."""
    judged = any(stage in stages and getattr(config, stage).process_weight for stage in ("cre", "curriculum"))
    beside = config.judge.gpus if judged and config.judge.kind == "vllm" else 0
    before = config.teacher.gpus if "build_sec" in stages and config.teacher.kind == "vllm" else 0
    return max(config.cluster.processes_per_node + beside, before)


def seeds_of_grid(settings: EvalConfig) -> int:
    """Evaluation seeds of the Ind-m/Pro-n samples: all where one cell is the headline, `grid_seeds` where a grid is filled."""
    one_cell = not isinstance(settings.ind, list | tuple) and not isinstance(settings.pro, list | tuple)
    return settings.seeds if one_cell else settings.grid_seeds


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
