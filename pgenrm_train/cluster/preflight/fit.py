"""Verdict of the plan before a start: memory, the model's positions, vLLM's splits, steps and passes."""

import dataclasses
from collections.abc import Iterator, Sequence

from pgenrm_train.cluster.planning.advice import nearest_fit, problems_of
from pgenrm_train.cluster.planning.geometry import geometry_of
from pgenrm_train.cluster.planning.memory import card_name, with_zero_stage
from pgenrm_train.cluster.planning.work import examples_of, with_planned_sizes
from pgenrm_train.cluster.preflight.gpus import visible_gpus
from pgenrm_train.cluster.sizes import size_warnings, sizes_of
from pgenrm_train.config import TRAINED, Config, StageName
from pgenrm_train.config.setting import known
from pgenrm_train.config.stage_names import PLANNED
from pgenrm_train.errors import ConfigError


def check_fit(config: Config, stage: str) -> Iterator[str]:
    """The plan's problems of a stage on the memory of this machine; none for a model that it cannot plan."""
    if stage not in PLANNED or config.model.kind not in ("nano", "hf"):
        return
    try:
        geometry = geometry_of(config)
    except ConfigError:
        return
    name, here = StageName(stage), with_memory_of(config, memory_here(config))
    if problems := problems_of(here, geometry, name):
        change = nearest_fit(here, geometry, name)
        better = f"the nearest that fits is {' '.join(change)}" if change else "use another cluster="
        yield (
            f"the plan of {stage} does not fit: {', and '.join(problems)}; {better} "
            "(preflight.skip=[fit] starts anyway)"
        )


def memory_here(config: Config) -> float | None:
    """GiB of the smallest visible GPU, or of a CPU machine; None on a Ray head without GPUs."""
    if config.cluster.device == "cpu":
        import psutil

        return float(psutil.virtual_memory().total) / 2**30
    return min((gpu.memory_gib for gpu in visible_gpus()), default=None)


def with_memory_of(config: Config, memory_gib: float | None) -> Config:
    """The configuration whose planned card has this memory; None: that of `plan.card`."""
    if memory_gib is None:
        return config
    name = card_name(config)
    card = dataclasses.replace(config.plan.cards[name], memory_gib=round(memory_gib, 1))
    plan = dataclasses.replace(config.plan, cards={**config.plan.cards, name: card})
    return dataclasses.replace(config, plan=plan)


def zero_stage_here(config: Config) -> int:
    """PSI's ZeRO stage by the plan with the memory of this machine; 3 for a model that it cannot plan."""
    if (given := config.cluster.zero_stage) is not None:
        return given
    try:
        geometry = geometry_of(config)
    except ConfigError:
        return 3
    here = with_planned_sizes(with_memory_of(config, memory_here(config)))
    return known(with_zero_stage(here, geometry).cluster.zero_stage)


def planned_warnings(config: Config, stages: Sequence[str]) -> Iterator[str]:
    """Warnings about few steps or many passes of stages that are still to do."""
    for stage in TRAINED:
        if stage in stages and config.model.kind == "hf":
            sized, examples = with_planned_sizes(config), examples_of(config, stage)
            yield from size_warnings(sized, sizes_of(sized, stage, examples))
