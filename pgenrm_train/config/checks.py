"""What a configuration must satisfy: choices, ranges and rules that span several keys."""

from __future__ import annotations

from collections.abc import Iterable

from pgenrm_train.config.schema import (
    BASELINES,
    BUDGETS,
    NULL_POLICIES,
    PROBES,
    PROMPTS,
    STAGES,
    ClusterConfig,
    Config,
    CurriculumConfig,
    EndpointConfig,
    GrpoConfig,
    get,
    sizes,
)
from pgenrm_train.errors import ConfigError

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "pipeline.budget": BUDGETS,
    "data.history_policy": ("random", "recent", "most_similar", "same_scenario"),
    "data.split_by": ("source", "within_user", "user_disjoint", "pair"),
    "data.on_overlap": ("drop", "fail"),
    "data.on_bad_row": ("fail", "skip"),
    "model.kind": ("nano", "hf", "endpoint", "baseline", "reward_head", "callable"),
    "model.prompt": PROMPTS,
    "model.dtype": ("bfloat16", "float32"),
    "model.attention": ("sdpa", "flash_attention_2", "eager"),
    "cluster.device": ("cpu", "cuda"),
    "teacher.kind": ("oracle", "features", "endpoint", "vllm"),
    "judge.kind": ("oracle", "none", "endpoint", "vllm"),
    **{f"{who}.structured": ("json_schema", "json_object", "none") for who in ("teacher", "judge")},
    **{f"{who}.max_tokens_field": ("max_tokens", "max_completion_tokens") for who in ("teacher", "judge")},
    "tracking.kind": ("offline", "wandb", "none"),
    "eval.protocol": ("strict", "release", "both_orders", "user_disjoint"),
    "eval.split": ("train", "val", "test"),
    "eval.scores": ("declared", "verified"),
    "plan.stage": (*STAGES[1:], "all"),
    "plan.emit": (None, "slurm", "rayjob"),
    **{f"{stage}.null_policy": NULL_POLICIES for stage in ("cre", "curriculum")},
    "curriculum.schedule": ("linear", "cosine", "step", "self_paced", "uniform", "anti"),
    "curriculum.hard_by": ("hardness", "history", "scenario"),
    **{
        f"{stage}.masking": ("full", "masked", "history_dropout", "mixed")
        for stage in ("psi", "cre", "curriculum", "eval")
    },
}
PREFLIGHT = (
    "disk", "store", "memory", "versions", "gpus", "shared_memory", "ports", "ray", "data", "model", "wandb", "teacher", "judge",
    "model_endpoint", "ring",
)  # fmt: skip
_POSITIVE = (
    "data.history_size", "psi.batch_size", "psi.micro_batch_size", "psi.learning_rate", "psi.save_every", "psi.epochs",
    "psi.sequence_parallel",
    "psi.max_steps", "psi.log_every", "psi.score_weight", "psi.evaluate_pairs", "psi.patience", "sec.samples_per_pair",
    "cre.steps", "cre.prompts_per_step", "cre.learning_rate", "curriculum.steps", "curriculum.prompts_per_step",
    "curriculum.learning_rate", "cre.validate_pairs", "curriculum.validate_pairs", "eval.seeds", "score.ind", "eval.probe_pairs",
    "eval.max_in_flight", "eval.draws", "eval.grid_seeds", "prototypes.analyses_per_user", "prototypes.max_users", "cluster.nodes",
    "cluster.processes_per_node", "cluster.engines", "model.max_prompt_tokens", "model.max_response_tokens", "model.nano.layers", "model.nano.hidden", "plan.mfu", "plan.bandwidth_use",
    "plan.tokens_per_second", "plan.prompt_tokens", "plan.response_tokens", "plan.pairs", "plan.test_pairs",
    *(f"{who}.{what}" for who in ("teacher", "judge") for what in ("max_in_flight", "timeout_seconds", "attempts", "max_tokens",
                                                                   "give_up_after", "gpus", "requests_per_minute",
                                                                   "tokens_per_minute")),
)  # fmt: skip


def check(config: Config) -> None:
    """Choices, ranges and cross-field rules; each failure is one sentence that names the keys."""
    for key, valid in _CHOICES.items():
        if (value := get(config, key)) not in valid:
            raise ConfigError(not_one_of(key, value, valid))
    if config.masking.policy is not None and config.masking.policy not in _CHOICES["psi.masking"]:
        raise ConfigError(not_one_of("masking.policy", config.masking.policy, _CHOICES["psi.masking"]))
    _check_eval(config)
    if (k := config.prototypes.k) != "auto" and not (isinstance(k, int) and k > 0):
        raise ConfigError(f"prototypes.k={k} must be a number from 1, or auto")
    if not 0 < config.prototypes.retained_mass <= 1:
        raise ConfigError(
            f"prototypes.retained_mass={config.prototypes.retained_mass} must be above 0 and at most 1"
        )
    if config.score.pro < 0:
        raise ConfigError(f"score.pro={config.score.pro} must be at least 0")
    if config.cluster.max_failures < 0:
        raise ConfigError(f"cluster.max_failures={config.cluster.max_failures} must be at least 0")
    _check_engines(config.cluster)
    if config.sec.orders_per_pair not in (1, 2):
        raise ConfigError(f"sec.orders_per_pair={config.sec.orders_per_pair} is not one of 1, 2")
    if not 0 < config.sec.near_duplicate <= 1:
        raise ConfigError(f"sec.near_duplicate={config.sec.near_duplicate} must be above 0 and at most 1")
    if not 0 <= config.masking.show_probability <= 1:
        raise ConfigError(
            f"masking.show_probability={config.masking.show_probability} must be within 0 and 1"
        )
    if config.model.max_text_tokens is not None and config.model.max_text_tokens < 1:
        raise ConfigError(
            f"model.max_text_tokens={config.model.max_text_tokens} must be at least 1, or null for no limit"
        )
    for key in _POSITIVE:
        if (value := get(config, key)) is not None and value <= 0:
            raise ConfigError(f"{key}={get(config, key)} must be above 0")
    if unknown := [name for name in config.preflight.skip if name not in PREFLIGHT]:
        raise ConfigError(not_one_of("preflight.skip", unknown[0], PREFLIGHT))
    for key in ("plan.mfu", "plan.bandwidth_use"):
        if (value := get(config, key)) is not None and value > 1:
            raise ConfigError(f"{key}={value} is a share and must be at most 1")
    if config.plan.card not in config.plan.cards:
        raise ConfigError(not_one_of("plan.card", config.plan.card, config.plan.cards))
    if config.data.name == "pairs" and not config.data.path:
        raise ConfigError(
            "data=pairs needs data.path=FILE, a parquet or JSONL file in PersonalRewardBench's schema"
        )
    if config.data.only and config.data.name not in ("pairs", "chatbot_arena", "prism_personalized"):
        raise ConfigError(
            f"data.only picks rows of votes, and data={config.data.name} is made of something else; leave it out"
        )
    for section in ("cre", "curriculum"):
        _check_grpo(section, getattr(config, section))
    for section in ("teacher", "judge"):
        endpoint = getattr(config, section)
        _check_endpoint(section, endpoint)
        if endpoint.kind == "oracle" and config.data.name != "personaworld":
            raise ConfigError(
                f"{section}=oracle knows data=personaworld only, and this is data={config.data.name}; use another {section}="
            )
    if config.sec.synthesize_criteria:
        _check_synthesis(config)
    _check_model(config)
    if (config.recipe, config.model.kind, config.pipeline.budget) == (
        "pipeline",
        "nano",
        "smoke",
    ) and config.data.name != "personaworld":
        raise ConfigError(
            f"pipeline.budget=smoke is too short for nano to learn a chain from data={config.data.name}; use pipeline.budget=demo"
        )
    _check_curriculum(config.curriculum)
    _check_psi(config)
    if config.recipe in ("psi", "pipeline") and (problems := psi_problems(config)):
        raise ConfigError(problems[0])


def _check_eval(config: Config) -> None:
    for key in ("eval.ind", "eval.pro"):
        value = get(config, key)
        if (
            not all(isinstance(n, int) and n >= 0 for n in (value if isinstance(value, list) else [value]))
            or value == []
        ):
            raise ConfigError(f"{key}={value} must be a number from 0 or a list of them")
    if max(sizes(config.eval.ind)) + max(sizes(config.eval.pro)) == 0:
        raise ConfigError("eval.ind=0 needs eval.pro above 0: a score takes at least one chain")
    weights = config.eval.weights
    if len(weights) != 2 or min(weights) < 0 or not sum(weights):
        raise ConfigError(
            f"eval.weights={weights} must be two numbers from 0, of own and of similar users' chains, one above 0"
        )
    if config.eval.scores == "verified" and config.data.name == "lampqa":
        raise ConfigError("eval.scores=verified is for pairs; data=lampqa ranks by the declared scores")
    for kind in config.eval.probe_kinds:
        if kind not in PROBES:
            raise ConfigError(not_one_of("eval.probe_kinds", kind, PROBES))
    if config.eval.compare and len(config.eval.compare) != 2:
        raise ConfigError(
            f"eval.compare={config.eval.compare} must name two run folders: eval.compare=[runA,runB]"
        )
    if config.eval.adaptive is not None and not 0 < config.eval.adaptive < 1:
        raise ConfigError(
            f"eval.adaptive={config.eval.adaptive} is an error level and must lie between 0 and 1"
        )
    if config.eval.adaptive is not None and (
        isinstance(config.eval.ind, list) or isinstance(config.eval.pro, list)
    ):
        raise ConfigError(
            "eval.adaptive draws for one cell and needs eval.ind and eval.pro to be numbers, not lists"
        )
    if config.eval.adaptive is not None and max(sizes(config.eval.ind)) == 1:
        raise ConfigError("eval.adaptive stops the sampling of own chains and needs eval.ind above 1")
    if config.eval.temperature < 0:
        raise ConfigError(f"eval.temperature={config.eval.temperature} must be at least 0")
    if config.eval.temperature == 0 and (max(sizes(config.eval.ind)) > 1 or config.eval.seeds > 1):
        raise ConfigError(
            "eval.temperature=0 gives the same chain each time; it needs eval.ind=1 and eval.seeds=1"
        )


def _check_engines(cluster: ClusterConfig) -> None:
    gpus, asked = cluster.nodes * cluster.processes_per_node, (cluster.engines or 0) * cluster.tensor_parallel
    if cluster.device == "cuda" and asked > gpus:
        raise ConfigError(
            f"cluster.engines={cluster.engines} of cluster.tensor_parallel={cluster.tensor_parallel} would take {asked} GPUs of {gpus}"
        )


def psi_problems(config: Config) -> list[str]:
    """Divisibility of an optimiser step of PSI; each problem is one sentence that names its keys."""
    psi, ranks = config.psi, config.cluster.nodes * config.cluster.processes_per_node
    shared = psi.sequence_parallel
    problems = []
    if shared > 1 and psi.micro_batch_size > 1:
        problems.append(
            f"psi.sequence_parallel={shared} needs psi.micro_batch_size=1; it is {psi.micro_batch_size}"
        )
    if shared > 1 and psi.packing:
        problems.append(
            f"psi.sequence_parallel={shared} shares out one sequence at a time; psi.packing must be false or null"
        )
    if ranks % shared:
        problems.append(
            f"psi.sequence_parallel={shared} must divide the {ranks} processes of cluster.processes_per_node"
        )
    elif psi.batch_size * shared % (psi.micro_batch_size * ranks):
        unit = f"{psi.micro_batch_size} × {ranks}" + (f" ÷ {shared}" if shared > 1 else "")
        divisor = "psi.micro_batch_size × processes" + (" ÷ psi.sequence_parallel" if shared > 1 else "")
        problems.append(f"psi.batch_size={psi.batch_size} must be a multiple of {divisor} = {unit}")
    return problems


def _check_model(config: Config) -> None:
    model = config.model
    named = [("model.name", model.name)] if model.kind == "baseline" else []
    for key, name in (*named, *(("eval.baselines", name) for name in config.eval.baselines)):
        if name not in BASELINES:
            raise ConfigError(not_one_of(key, name, BASELINES))
        if name == "oracle" and config.data.name != "personaworld":
            raise ConfigError(
                f"{key}=oracle knows data=personaworld only, and not data={config.data.name}; leave it out"
            )
    asked = {"endpoint": ("evaluate", "score"), "reward_head": ("evaluate",), "callable": ("evaluate",)}.get(
        model.kind
    )
    if asked is not None and config.recipe not in ("build_data", *asked):
        raise ConfigError(
            f"model={model.kind} is for recipe={' or '.join(asked)}; recipe={config.recipe} needs one with weights that writes chains"
        )
    if model.kind == "endpoint" and not model.base_url:
        raise ConfigError("model=endpoint needs model.base_url (e.g. http://localhost:8000/v1)")
    if model.kind == "callable" and not all(part.strip() for part in model.name.partition(":")):
        raise ConfigError(f"model.name={model.name} must be MODULE:FUNCTION, e.g. my_model:score")
    if model.prompt != "p_genrm" and config.recipe not in ("build_data", "evaluate", "score"):
        raise ConfigError(
            f"model.prompt={model.prompt} is for recipe=evaluate and recipe=score; recipe={config.recipe} needs p_genrm"
        )
    if model.prompt == "persona" and model.kind != "endpoint":
        raise ConfigError(
            f"model.prompt=persona takes two calls and needs model=endpoint; model.kind={model.kind}"
        )
    if model.prompt == "persona" and config.eval.split == "train":
        raise ConfigError(
            "model.prompt=persona reads one history a user, which may hold pairs of eval.split=train; use val or test"
        )


def _check_psi(config: Config) -> None:
    psi = config.psi
    if psi.keep_checkpoints < 2:
        raise ConfigError(
            f"psi.keep_checkpoints={psi.keep_checkpoints} must be at least 2: a kill may leave the newest half-written"
        )
    if psi.evaluate_every < 0:
        raise ConfigError(f"psi.evaluate_every={psi.evaluate_every} must be at least 0")
    if psi.patience is not None and not psi.evaluate_every:
        raise ConfigError(
            f"psi.patience={psi.patience} needs psi.evaluate_every above 0: it counts validations"
        )


def _check_synthesis(config: Config) -> None:
    if config.teacher.kind == "oracle":
        raise ConfigError(
            "sec.synthesize_criteria=true needs teacher=features, endpoint or vllm: the oracle's users state theirs"
        )
    if config.recipe in ("cre", "pipeline") and config.judge.kind not in ("endpoint", "vllm"):
        raise ConfigError(
            f"sec.synthesize_criteria=true makes criteria for a judge to read, and judge={config.judge.kind} reads none; use "
            "judge=endpoint or vllm"
        )


def _check_endpoint(section: str, endpoint: EndpointConfig) -> None:
    if endpoint.kind == "endpoint" and not (endpoint.base_url and endpoint.name):
        raise ConfigError(
            f"{section}=endpoint needs {section}.base_url (e.g. http://localhost:8000/v1) and {section}.name (the served model)"
        )
    if endpoint.kind == "vllm" and not endpoint.name:
        raise ConfigError(f"{section}=vllm needs {section}.name, a checkpoint folder or a hub name to serve")


def _check_curriculum(curriculum: CurriculumConfig) -> None:
    low, high = curriculum.hard_low, curriculum.hard_high
    if not 0 <= low <= high <= 1:
        raise ConfigError(
            f"curriculum.hard_low={low:g} and curriculum.hard_high={high:g} must be in this order within 0 and 1"
        )
    for key in ("hard_share_start", "hard_share_end", "suspect_weight"):
        if not 0 <= getattr(curriculum, key) <= 1:
            raise ConfigError(f"curriculum.{key}={getattr(curriculum, key)} must be within 0 and 1")
    if curriculum.schedule == "self_paced" and curriculum.hard_by != "hardness":
        raise ConfigError(
            f"curriculum.schedule=self_paced sorts pairs by their pass rates; it needs curriculum.hard_by=hardness, not "
            f"{curriculum.hard_by}"
        )
    if curriculum.prototypes and not curriculum.construct:
        raise ConfigError(
            "curriculum.prototypes is read by curriculum.construct=true alone; give both or neither"
        )
    if curriculum.mine and curriculum.mining_samples < 2:
        raise ConfigError(
            f"curriculum.mining_samples={curriculum.mining_samples} must be at least 2, one chain in each order; or use "
            "curriculum.mine=false"
        )


def _check_grpo(section: str, grpo: GrpoConfig) -> None:
    for key in ("resample", "validate_every"):
        if getattr(grpo, key) < 0:
            raise ConfigError(f"{section}.{key}={getattr(grpo, key)} must be at least 0")
    if not 0 <= grpo.max_null_share <= 1:
        raise ConfigError(f"{section}.max_null_share={grpo.max_null_share} must be within 0 and 1")
    if grpo.group_size < 2:
        raise ConfigError(
            f"{section}.group_size={grpo.group_size} must be at least 2: GRPO compares samples of one prompt"
        )
    if grpo.prompts_per_step % grpo.mini_batch_prompts:
        raise ConfigError(
            f"{section}.prompts_per_step={grpo.prompts_per_step} must be a multiple of {section}.mini_batch_prompts={grpo.mini_batch_prompts}"
        )


def not_one_of(key: str, value: object, valid: Iterable[str | None]) -> str:
    return f"{key}={value} is not one of {', '.join(name or 'null' for name in valid)}"
