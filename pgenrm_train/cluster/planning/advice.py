"""The nearest change of the configuration under which a stage fits: fewest changes first, then the cheapest in time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from pgenrm_train.cluster.planning.batches import batches_of
from pgenrm_train.cluster.planning.geometry import Geometry
from pgenrm_train.cluster.planning.memory import phases_of, ranks_of
from pgenrm_train.config import Config

Change = tuple[tuple[str, object], ...]  # keys and values that are set together
MOST_CHANGES = 3


def nearest_fit(config: Config, geometry: Geometry, stage: str) -> tuple[str, ...] | None:
    """Overrides under which every phase fits and every batch divides; None when no few of the known changes do it."""
    known = list(changes(config, stage))
    for number in range(1, MOST_CHANGES + 1):
        for chosen in itertools.combinations(known, number):
            keys = [key for change in chosen for key, _ in change]
            if len(set(keys)) < len(keys):
                continue
            tried = apply(config, chosen)
            if fits(tried, geometry, stage):
                return tuple(f"{key}={_text(value)}" for change in chosen for key, value in change)
    return None


def fits(config: Config, geometry: Geometry, stage: str) -> bool:
    batches = batches_of(config, stage)
    length = config.model.max_prompt_tokens + config.model.max_response_tokens
    if (
        stage not in ("psi", "build_sec")
        and config.cluster.tensor_parallel > config.cluster.processes_per_node
    ):
        return False
    return (
        all(phase.fits for phase in phases_of(config, geometry, stage))
        and not (batches and batches.problems)
        and length <= geometry.positions
    )


def changes(config: Config, stage: str) -> Iterator[Change]:
    """What could be changed, from what costs nothing to what costs most: other results, slower steps, more GPUs."""
    cluster, model, cuda = config.cluster, config.model, config.cluster.device == "cuda"
    settings = getattr(config, stage, None)
    micro = getattr(settings, "micro_batch_size", 1)
    while micro > 1:
        micro //= 2
        yield ((f"{stage}.micro_batch_size", micro),)
    if stage == "psi":
        if not config.psi.gradient_checkpointing:
            yield (("psi.gradient_checkpointing", True),)
        yield from (
            (("cluster.zero_stage", z),)
            for z in range(cluster.zero_stage + 1, 4)
            if cuda or ranks_of(config) > 1
        )
        yield from _psi_batches(config)
        if cuda and not cluster.offload_optimizer:
            stage_of_zero = {} if cluster.zero_stage else {"cluster.zero_stage": 2}
            yield (("cluster.offload_optimizer", True), *stage_of_zero.items())
    if stage in ("cre", "curriculum") and cuda:
        yield from (
            (("cluster.gpu_memory_utilization", u),)
            for u in (0.7, 0.8, 0.5, 0.4, 0.3)
            if u != cluster.gpu_memory_utilization
        )
        if not cluster.offload_optimizer:
            yield (("cluster.offload_optimizer", True),)
        yield from _grpo_batches(config, stage)
    if cuda and stage != "psi":
        yield from ((("cluster.tensor_parallel", tp),) for tp in (2, 4, 8) if tp > cluster.tensor_parallel)
    for response in (4096, 2048, 1024):
        if response < model.max_response_tokens:
            yield (("model.max_response_tokens", response),)
    if cuda and stage in ("psi", "cre", "curriculum") and not model.lora.rank:
        yield (("model.lora.rank", 64), ("model.lora.alpha", 128))
    if cuda:
        yield from ((("cluster.processes_per_node", n),) for n in (2, 4, 8) if n > cluster.processes_per_node)
        yield from (
            (("cluster.nodes", cluster.nodes * n),) for n in (2, 4) if cluster.processes_per_node == 8
        )


def _psi_batches(config: Config) -> Iterator[Change]:
    unit = max(1, config.psi.micro_batch_size * ranks_of(config) // config.psi.sequence_parallel)
    if config.psi.batch_size % unit:
        yield (("psi.batch_size", max(unit, config.psi.batch_size // unit * unit)),)


def _grpo_batches(config: Config, stage: str) -> Iterator[Change]:
    grpo, ranks = getattr(config, stage), ranks_of(config)
    if grpo.mini_batch_prompts * grpo.group_size % ranks:
        prompts = max(ranks, grpo.mini_batch_prompts // ranks * ranks)
        yield ((f"{stage}.mini_batch_prompts", prompts), (f"{stage}.prompts_per_step", prompts))


def apply(config: Config, chosen: tuple[Change, ...]) -> Config:
    """A copy with other values; sections that nothing changes are shared."""
    for key, value in itertools.chain.from_iterable(chosen):
        config = _with(config, key, value)
    return config


def _with(node: Any, key: str, value: object) -> Any:
    name, _, rest = key.partition(".")
    changed = copy.copy(node)
    setattr(changed, name, _with(getattr(node, name), rest, value) if rest else value)
    return changed


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
