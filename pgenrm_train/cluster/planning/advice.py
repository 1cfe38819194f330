"""Batches and problems of a stage, and the nearest change of the configuration that solves them.

Fewest changes come first, then the cheapest in time.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from pgenrm_train.cluster.planning.geometry import Geometry
from pgenrm_train.cluster.planning.memory import (
    Phase,
    grpo_of,
    longest,
    phases_of,
)
from pgenrm_train.cluster.planning.work import with_planned_sizes
from pgenrm_train.cluster.sizes import LORA_FACTOR, psi_unit
from pgenrm_train.config import (
    GRPO_STAGES,
    TRAINED,
    Config,
    EndpointConfig,
    StageName,
    places_of,
    psi_cluster,
    served_judges,
    tokens_per_pass,
)
from pgenrm_train.config.checks import divisor_of, grpo_problems, nearest_multiple, psi_problems
from pgenrm_train.config.setting import known

T = TypeVar("T")
Change = tuple[tuple[str, object], ...]  # keys and values that are set together
MOST_CHANGES = 3


@dataclass(frozen=True, slots=True)
class Batches:
    """One optimiser step of a stage, as the engine divides it."""

    facts: dict[str, int]
    problems: tuple[str, ...]


def batches_of(config: Config, stage: StageName) -> Batches | None:
    if stage == StageName.PSI:
        return psi_batches(config)
    return grpo_batches(config, stage) if stage in GRPO_STAGES else None


def psi_batches(config: Config) -> Batches:
    """batch = micro-batch × processes × accumulation, for processes that each have their own sequence."""
    ranks, psi = psi_cluster(config).ranks, config.psi
    facts = {"sequences per step": known(psi.batch_size), "processes": ranks}
    if psi.packs(config.cluster.device):
        facts["tokens per process and pass"] = max(psi.micro_batch_tokens, longest(config))
    else:
        facts["micro-batch"] = psi.micro_batch_size
        shared = known(psi.batch_size) * psi.sequence_parallel
        facts["accumulation"] = shared // (psi.micro_batch_size * ranks)
    return Batches(facts, tuple(psi_problems(config)))


def grpo_batches(config: Config, stage: StageName) -> Batches:
    """rollouts = prompts × group; one mini-batch is one update, divided over processes and micro-batches."""
    grpo, places = grpo_of(config, stage), places_of(config, stage)
    ranks, sampling = places.actor.cluster.ranks, places.sampler.cluster.ranks
    prompts, mini_batch = known(grpo.prompts_per_step), known(grpo.mini_batch_prompts)
    rollouts = mini_batch * grpo.group_size
    facts = {
        "prompts per step": prompts,
        "group": grpo.group_size,
        "rollouts per step": prompts * grpo.group_size,
        "updates per step": prompts // mini_batch,
        "rollouts per process and update": rollouts // ranks,
        "vLLM replicas": max(1, sampling // config.cluster.tensor_parallel),
    }
    if grpo.separate:
        facts |= {"GPUs of the actor": ranks, "GPUs of vLLM": sampling}
    if tokens := tokens_per_pass(config, stage):
        facts["tokens per process and pass"] = tokens
    else:
        facts["micro-batch"] = grpo.micro_batch_size
        facts["accumulation"] = rollouts // ranks // grpo.micro_batch_size
    return Batches(facts, tuple(grpo_problems(config, stage)))


def problems_of(config: Config, geometry: Geometry, stage: StageName) -> list[str]:
    """One sentence per reason why the stage cannot run."""
    config = with_planned_sizes(config)
    batches = batches_of(config, stage)
    problems = [
        *(_overfull(phase) for phase in phases_of(config, geometry, stage) if not phase.fits),
        *(batches.problems if batches else ()),
    ]
    if stage != StageName.BUILD_SEC and longest(config) > geometry.positions:
        problems.append(
            f"model.max_prompt_tokens + model.max_response_tokens = {longest(config)} exceeds the model's "
            f"{geometry.positions} positions"
        )
    if stage not in (StageName.PSI, StageName.BUILD_SEC):
        problems += _unequal_parts(config, geometry, stage)
    return problems


def _unequal_parts(config: Config, geometry: Geometry, stage: StageName) -> Iterator[str]:
    """Reasons why vLLM cannot split the model over `cluster.tensor_parallel` GPUs of one node."""
    parallel, processes = config.cluster.tensor_parallel, config.cluster.processes_per_node
    if parallel > processes:
        yield (
            f"{stage}: cluster.tensor_parallel={parallel} exceeds cluster.processes_per_node={processes}: "
            "a vLLM replica stays on one node"
        )
    if config.cluster.device == "cuda" and geometry.heads % parallel:
        yield (
            f"{stage}: cluster.tensor_parallel={parallel} does not divide the model's {geometry.heads} heads"
        )


def _overfull(phase: Phase) -> str:
    if phase.problem:
        return phase.problem
    largest = max(phase.parts, key=lambda name: phase.parts[name])
    return (
        f"{phase.stage}: {phase.name} needs {phase.total:.1f} GiB of {phase.available:g} GiB; the largest "
        "part is "
        f"{largest} with {phase.parts[largest]:.1f} GiB"
    )


def nearest_fit(config: Config, geometry: Geometry, stage: StageName) -> tuple[str, ...] | None:
    """Overrides under which the stage has no problem; None if no few known changes suffice."""
    possible = [*_splits(config, geometry), *_shorter(config, geometry), *changes(config, stage)]
    for number in range(1, MOST_CHANGES + 1):
        for chosen in itertools.combinations(possible, number):
            keys = [key for change in chosen for key, _ in change]
            if len(set(keys)) == len(keys) and not problems_of(apply(config, chosen), geometry, stage):
                return tuple(f"{key}={_text(value)}" for change in chosen for key, value in change)
    return None


def changes(config: Config, stage: StageName) -> Iterator[Change]:
    """Possible changes, from free ones to costly ones: other results, slower steps, more GPUs."""
    cluster, model, cuda = config.cluster, config.model, config.cluster.device == "cuda"
    yield from _smaller_passes(config, stage)
    if stage == StageName.PSI:
        yield from _psi_changes(config)
    if stage in GRPO_STAGES and cuda:
        for share in (0.7, 0.8, 0.5, 0.4, 0.3):
            if share != cluster.gpu_memory_utilization:
                yield (("cluster.gpu_memory_utilization", share),)
        if not cluster.offload_optimizer:
            yield (("cluster.offload_optimizer", True),)
        yield from _grpo_batches(config, stage)
    if cuda and stage not in (StageName.PSI, StageName.BUILD_SEC):
        yield from ((("cluster.tensor_parallel", tp),) for tp in (2, 4, 8) if tp > cluster.tensor_parallel)
    served: dict[str, EndpointConfig] = {**served_judges(config, stage)}
    if stage == StageName.BUILD_SEC and config.teacher.kind == "vllm":
        served["teacher"] = config.teacher
    for section, settings in served.items():
        if cuda:
            yield from (((f"{section}.gpus", gpus),) for gpus in (2, 4, 8) if gpus > settings.gpus)
    for response in (4096, 2048, 1024):
        if response < model.max_response_tokens:
            yield (("model.max_response_tokens", response),)
    if cuda and stage in TRAINED and not model.lora.rank:
        # PSI's default rate knows of adapters, GRPO's does not
        rates = [
            (f"{name}.learning_rate", LORA_FACTOR * getattr(config, name).learning_rate)
            for name in GRPO_STAGES
        ]
        yield (("model.lora.rank", 64), ("model.lora.alpha", 128), *rates)
    if cuda:
        yield from ((("cluster.processes_per_node", n),) for n in (2, 4, 8) if n > cluster.processes_per_node)
        if cluster.processes_per_node == 8:
            yield from ((("cluster.nodes", cluster.nodes * n),) for n in (2, 4))


def _splits(config: Config, geometry: Geometry) -> Iterator[Change]:
    """The nearest smaller number of GPUs per vLLM replica that node and heads divide by."""
    wanted = config.cluster.tensor_parallel
    possible = divisor_of(math.gcd(config.cluster.processes_per_node, geometry.heads), wanted)
    if possible < wanted:
        yield (("cluster.tensor_parallel", possible),)


def _shorter(config: Config, geometry: Geometry) -> Iterator[Change]:
    """Prompt and answer that the model's positions hold."""
    model = config.model
    if longest(config) <= geometry.positions:
        return
    if (prompt := geometry.positions - model.max_response_tokens) > 0:
        yield (("model.max_prompt_tokens", prompt),)
    half = geometry.positions // 2
    yield (("model.max_prompt_tokens", half), ("model.max_response_tokens", geometry.positions - half))


def _smaller_passes(config: Config, stage: StageName) -> Iterator[Change]:
    """Smaller micro-batches; a pass by tokens holds at least one longest sequence."""
    if stage not in TRAINED:
        return
    section = getattr(config, stage)
    by_tokens = (
        section.packs(config.cluster.device) if stage == StageName.PSI else tokens_per_pass(config, stage)
    )
    key, least = ("micro_batch_tokens", longest(config)) if by_tokens else ("micro_batch_size", 1)
    size = getattr(section, key)
    while size > least:
        size = max(least, size // 2)
        yield ((f"{stage}.{key}", size),)


def _psi_changes(config: Config) -> Iterator[Change]:
    cluster, psi, cuda = config.cluster, config.psi, config.cluster.device == "cuda"
    if not psi.gradient_checkpointing:
        yield (("psi.gradient_checkpointing", True),)
    if cluster.zero_stage is not None and (cuda or cluster.ranks > 1):
        yield from ((("cluster.zero_stage", stage),) for stage in range(cluster.zero_stage + 1, 4))
    unit = psi_unit(config)
    if psi.batch_size and psi.batch_size % unit:
        yield (("psi.batch_size", nearest_multiple(psi.batch_size, unit, 1)),)
    if (ranks := psi_cluster(config).ranks) % psi.sequence_parallel:
        yield (("psi.sequence_parallel", divisor_of(ranks, psi.sequence_parallel)),)
    if cuda and not cluster.offload_optimizer:
        sharding = (("cluster.zero_stage", 2),) if cluster.zero_stage == 0 else ()
        yield (("cluster.offload_optimizer", True), *sharding)


def _grpo_batches(config: Config, stage: StageName) -> Iterator[Change]:
    grpo, ranks = grpo_of(config, stage), places_of(config, stage).actor.cluster.ranks
    if grpo.mini_batch_prompts and grpo.mini_batch_prompts * grpo.group_size % ranks:
        prompts = max(ranks, grpo.mini_batch_prompts // ranks * ranks)
        yield ((f"{stage}.mini_batch_prompts", prompts), (f"{stage}.prompts_per_step", prompts))


def apply(config: Config, chosen: tuple[Change, ...]) -> Config:
    """A copy with other values; unchanged sections are shared."""
    for key, value in itertools.chain.from_iterable(chosen):
        config = _with(config, key, value)
    return config


def _with(node: T, key: str, value: object) -> T:
    name, _, rest = key.partition(".")
    changed = copy.copy(node)
    setattr(changed, name, _with(getattr(node, name), rest, value) if rest else value)
    return changed


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
