"""Tokens, hours, dollars and disk of a stage, from stated rates and mean lengths.

Training: (1 + 2) forward passes per token, 1 + 1 with LoRA, whose frozen base has no weight gradients.

    hours = FLOPs / (mfu · peak · GPUs)

MFU (PaLM, appendix B) counts the model's FLOPs only, so the recomputation of checkpointing is inside
`plan.mfu`.

Generation: one step of a vLLM replica makes one token for each of its c sequences and reads weights and their
KV cache once,

    seconds = max( (weights + c · length · KV) / (bandwidth_use · bandwidth · TP),
                   c · forward FLOPs / (mfu · peak · TP) ),

c bounded by vLLM's sequence limit, by the number of requests, and by the KV cache.  The prompt of a group is
read once; its other chains find it in the prefix cache.

Not counted: start-up (minutes), saving, evaluation probes, waiting for the slowest sequence of a step, calls
to an API.
"""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pgenrm_train.cluster.planning.geometry import Geometry
from pgenrm_train.cluster.planning.memory import (
    GIB,
    VLLM_SHARE,
    card_of,
    element_bytes,
    grpo_of,
    kv_gib,
    trained_parameters,
    vllm_parts,
    with_zero_stage,
)
from pgenrm_train.cluster.sizes import sizes_of, with_sizes
from pgenrm_train.config import (
    GRPO_STAGES,
    TRAINED,
    Config,
    EndpointConfig,
    StageName,
    places_of,
    seeds_of_grid,
    sizes,
)
from pgenrm_train.config.grpo import VLLM_ALONE

# Published data sets (the paper, section on evaluation): (train, test) pairs, and users.
PUBLISHED = {
    "chatbot_arena": (305, 798),
    "rm_as_user": (8 * 60_819, 8 * 985),
    "personalized_rewardbench": (0, 2830),  # questions, as the next
    "rmgap": (0, 12 * 1097),
}
USERS = {"chatbot_arena": 131, "prism_personalized": 720, "prism": 1500, "rm_as_user": 8}
ASSUMED_PAIRS = (10_000, 1_000)
STATES = "optimizer states and weights"  # of the checkpoints that are kept
SEQUENCES = 256  # concurrent sequences of a vLLM replica of veRL


@dataclass(frozen=True, slots=True)
class Work:
    """Work of a stage: counts, tokens, hours on all nodes, GiB of disk at the end, dollars."""

    counts: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, float] = field(default_factory=dict)
    hours: Mapping[str, float] = field(default_factory=dict)
    disk: Mapping[str, float] = field(default_factory=dict)
    api_dollars: float = 0.0
    assumptions: tuple[str, ...] = ()

    @property
    def total_hours(self) -> float:
        return sum(self.hours.values())


def lengths(config: Config) -> tuple[int, int]:
    """Mean tokens of a prompt and of a chain."""
    plan, model = config.plan, config.model
    prompt = min(plan.prompt_tokens, model.max_prompt_tokens)
    return prompt, min(plan.response_tokens, model.max_response_tokens)


def pairs_of(config: Config) -> tuple[int, int, tuple[str, ...]]:
    """(training pairs, test pairs, assumptions)."""
    data, assumed = config.data, []
    if data.name == "personaworld":
        train, test = data.users * data.pairs_per_user, data.heldout_users * data.pairs_per_user
    elif data.name in PUBLISHED:
        train, test = PUBLISHED[data.name]
    elif (rows := _rows_of_file(data.path, data.split_by == "source")) is not None:
        train, test = rows
        assumed.append(f"{train:,} rows of {data.path} count as training pairs, and {test:,} as test pairs")
    else:
        train, test = ASSUMED_PAIRS
        assumed.append(f"{train:,} training and {test:,} test pairs (plan.pairs=, plan.test_pairs=)")
    if data.val_share:
        train -= round(train * data.val_share)
        assumed.append(f"data.val_share={data.val_share:g} holds out that share of the pairs")
    train = config.plan.pairs or min(train, data.max_train_pairs or train)
    test = config.plan.test_pairs or min(test, data.max_test_pairs or test)
    return train, test, () if config.plan.pairs and config.plan.test_pairs else tuple(assumed)


def _rows_of_file(path: str | None, splits: bool) -> tuple[int, int] | None:
    if path is None or not Path(path).is_file():
        return None
    return _count(path, splits, Path(path).stat().st_mtime_ns)


@functools.cache
def _count(path: str, splits: bool, changed: int) -> tuple[int, int]:
    """Training and test rows of a file, counted once for all changes that are tried.

    Without `splits`, in JSONL and without a column `split` all rows count as both.
    """
    if Path(path).suffix != ".parquet":
        with Path(path).open("rb") as lines:
            rows = sum(1 for line in lines if line.strip())
        return rows, rows
    import pyarrow.parquet as pq

    if not splits or "split" not in pq.read_schema(path).names:
        rows = int(pq.read_metadata(path).num_rows)
        return rows, rows
    named = Counter(pq.read_table(path, columns=["split"])["split"].to_pylist())
    return named["train"] + named[None], named["test"]


# ---- rates ----


def training_seconds(
    config: Config, geometry: Geometry, tokens: float, length: float, passes: float
) -> float:
    """Seconds of `passes` forward-equivalents (3: full training, 2: LoRA, 1: forward) on all processes."""
    flops = tokens * passes * geometry.forward_flops(length)
    return flops / (config.plan.mfu * card_of(config).tflops * 1e12 * config.cluster.ranks)


def passes_of(config: Config) -> float:
    return 2.0 if config.model.lora.rank else 3.0


def generation_rate(
    config: Config, geometry: Geometry, utilization: float, limit: int, requests: float
) -> float:
    """Tokens per second of all nodes while vLLM generates with at most `limit` sequences per replica."""
    plan, card, tp = config.plan, card_of(config), config.cluster.tensor_parallel
    ranks = config.cluster.ranks
    if plan.tokens_per_second:
        return plan.tokens_per_second * ranks
    prompt, response = lengths(config)
    length, b = prompt + response / 2, element_bytes(config)
    cache = vllm_parts(config, geometry, StageName.EVALUATE, utilization, tp)["vLLM KV cache"]
    room = cache / (kv_gib(geometry, b, tp) * (prompt + response))
    replicas = max(1.0, ranks / tp)
    at_once = max(1.0, min(limit, room, requests / replicas))
    read = (geometry.parameters * b + at_once * length * geometry.kv_bytes(b)) / (
        plan.bandwidth_use * card.terabytes_per_second * 1e12 * tp
    )
    computed = at_once * geometry.forward_flops(length) / (plan.mfu * card.tflops * 1e12 * tp)
    return at_once / max(read, computed) * replicas


# ---- stages ----


def work_of(config: Config, geometry: Geometry, stage: StageName) -> Work:
    if stage in GRPO_STAGES:
        return grpo_work(config, geometry, stage)
    if stage == StageName.BUILD_SEC:
        return sec_work(config)
    work = {
        StageName.PSI: psi_work,
        StageName.PROTOTYPES: prototypes_work,
        StageName.EVALUATE: evaluate_work,
    }
    return work[stage](config, geometry)


def sec_work(config: Config) -> Work:
    train, _, assumed = pairs_of(config)
    chains = min(train * config.sec.orders_per_pair, config.sec.max_chains or train * 2)
    calls = chains * config.sec.samples_per_pair
    prompt, response = lengths(config)
    written = min(response, config.teacher.max_tokens)
    tokens = {"read": float(calls * prompt), "written": float(calls * written)}
    language_model = config.teacher.kind in ("endpoint", "vllm")
    return Work(
        {"chains requested at most": calls},
        tokens if language_model else {},
        api_dollars=_api_dollars(config.teacher, tokens) if language_model else 0.0,
        assumptions=assumed,
    )


def examples_of(config: Config, stage: StageName) -> int:
    """Chains of PSI, or pairs of a GRPO stage."""
    train, _, _ = pairs_of(config)
    if stage != StageName.PSI:
        return min(train, grpo_of(config, stage).rows)
    chains = train * config.sec.orders_per_pair
    return min(chains, config.sec.max_chains or chains)


def with_planned_sizes(config: Config) -> Config:
    """The configuration with batch and steps of every stage for the planned data."""
    for stage in TRAINED:
        config = with_sizes(config, stage, examples_of(config, stage))
    return config


def psi_work(config: Config, geometry: Geometry) -> Work:
    _, _, assumed = pairs_of(config)
    config = with_zero_stage(config, geometry)
    psi, length = config.psi, sum(lengths(config))
    sizes = sizes_of(config, StageName.PSI, examples_of(config, StageName.PSI))
    tokens = sizes.passes * sizes.examples * length
    b = element_bytes(config)
    states = trained_parameters(config, geometry) * (b + (12 if config.cluster.zero_stage or b == 2 else 8))
    return Work(
        {"chains": sizes.examples, "optimizer steps": sizes.steps},
        {"trained on": tokens},
        {"training": training_seconds(config, geometry, tokens, length, passes_of(config)) / 3600},
        {
            STATES: psi.keep_checkpoints * states / GIB,
            "checkpoint": geometry.parameters * b / GIB,
        },
        assumptions=(*assumed, "every pair gives a kept chain"),
    )


def grpo_work(config: Config, geometry: Geometry, stage: StageName) -> Work:
    """Rollouts, log-probabilities of the old policy and the reference, and the update (METHOD §4)."""
    grpo = grpo_of(config, stage)
    prompt, response = lengths(config)
    sizes = sizes_of(config, stage, examples_of(config, stage))
    prompts, length = sizes.steps * sizes.batch, prompt + response
    rollouts, mined = prompts * grpo.group_size, sizes.examples * getattr(grpo, "mining_samples", 0)
    actor, sampler = places_of(config, stage)
    utilization = VLLM_ALONE if grpo.separate else config.cluster.gpu_memory_utilization
    rate, mining_rate = (
        generation_rate(sampler, geometry, utilization, SEQUENCES, chains)
        for chains in (sizes.batch * grpo.group_size, mined)
    )
    # A server reads the prompt of a group once; mining reads each pair in both orders.
    prefills = prompts + (sizes.examples * min(2, mined // sizes.examples) if mined else 0)
    read, cached = (float(count) * prompt for count in (prefills, rollouts + mined - prefills))
    trained_on = float(rollouts) * length
    # With one update per rollout the sampler's own log-probabilities are those of the old policy, but veRL
    # takes them with LoRA too.
    several = bool(config.model.lora.rank) or sizes.updates > sizes.steps
    recomputed = config.cluster.device != "cpu" and several
    passes = recomputed + (grpo.kl_coefficient > 0)
    seconds = {
        "prefill": training_seconds(sampler, geometry, read, prompt, 1),
        "generation": rollouts * response / rate + mined * response / mining_rate,
        "log-probabilities": training_seconds(actor, geometry, trained_on * passes, length, 1),
        "update": training_seconds(actor, geometry, trained_on, length, passes_of(config)),
    }
    if grpo.separate:  # vLLM samples the next step meanwhile
        updating = seconds["log-probabilities"] + seconds["update"]
        seconds["generation"] -= min(rollouts * response / rate, updating)
    judged = rollouts if grpo.process_weight and config.judge.kind in ("endpoint", "vllm") else 0
    judge_tokens = {"read": float(judged) * (response + 500), "written": judged * 50.0}
    trained, parameters = trained_parameters(config, geometry), geometry.parameters
    saved = 2 * parameters + 12 * trained if config.model.lora.rank else 4 * parameters + 8 * trained
    return Work(
        {
            "pairs": sizes.examples,
            "steps": sizes.steps,
            "rollouts": rollouts,
            "chains for mining": mined,
            "calls to the judge": judged,
        },
        {
            "read": read,
            "from the prefix cache": cached,
            "generated": float(rollouts + mined) * response,
            "trained on": trained_on,
        },
        {name: spent / 3600 for name, spent in seconds.items() if spent},
        {
            STATES: grpo.keep_checkpoints * saved / GIB,
            "checkpoint": parameters * element_bytes(config) / GIB,
        },
        _api_dollars(config.judge, judge_tokens) if judged else 0.0,
        (
            f"vLLM generates {rate / sampler.cluster.ranks:,.0f} tokens per second and process "
            "(plan.tokens_per_second= when measured)",
            *(["the generation of a step overlaps with the update before it"] if grpo.separate else []),
        ),
    )


def prototypes_work(config: Config, geometry: Geometry) -> Work:
    train, _, assumed = pairs_of(config)
    data = config.data
    users = data.users if data.name == "personaworld" else USERS.get(data.name, max(1, train // 10))
    chains = min(config.prototypes.max_users or users, users) * config.prototypes.analyses_per_user
    return _generated(config, geometry, chains, assumed)


def evaluate_work(config: Config, geometry: Geometry) -> Work:
    """Both orders of every test pair for each seed and model, one greedy, and the grids of the last model."""
    _, test, assumed = pairs_of(config)
    models = 3 if config.plan.stage == "all" else 1
    ev = config.eval
    grid = min(test, ev.grid_pairs or test)
    ind, pro = max(sizes(ev.ind)), max(sizes(ev.pro))
    more = seeds_of_grid(ev) * (ind + pro) if ind > 1 or pro else 0
    one_pair = (
        ev.grid_seeds * (max(ev.one_pair_ind) + max(ev.one_pair_pro, default=0)) if ev.one_pair_ind else 0
    )
    own = ev.seeds + (ev.greedy and ev.temperature > 0)
    chains = 2 * (models * test * own + grid * (more + one_pair))
    if config.data.name == "lampqa":  # a question with all its answers at once, in another order per sample
        chains = models * test * ind
    return _generated(config, geometry, chains, assumed)


def _generated(config: Config, geometry: Geometry, chains: int, assumed: tuple[str, ...]) -> Work:
    """Work of a stage that only generates, on all replicas."""
    prompt, response = lengths(config)
    rate = generation_rate(config, geometry, VLLM_SHARE, config.eval.max_in_flight, chains)
    read = float(chains * prompt)
    hours = {
        "prefill": training_seconds(config, geometry, read, prompt, 1) / 3600,
        "generation": chains * response / rate / 3600,
    }
    tokens = {"read": read, "generated": float(chains * response)}
    return Work({"chains": chains}, tokens, hours, assumptions=assumed)


def _api_dollars(settings: EndpointConfig, tokens: Mapping[str, float]) -> float:
    read = tokens["read"] * settings.dollars_per_million_in
    return (read + tokens["written"] * settings.dollars_per_million_out) / 1e6
