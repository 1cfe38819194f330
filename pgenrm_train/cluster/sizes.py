"""Batch, passes, steps and learning rate of training stages, and the piece size of PSI's loss.

The planner and the engines both use them.  Settings that are given stay.  Null ones follow from the number N
of examples: kept chains in PSI, training pairs in CRE and the curriculum.

    batch B   128, halved down to 16 while P·N/B < 50 steps;  P = 3 in PSI, 16 in GRPO
    passes    as 200 steps need, but at least 1 and at most P

128 is RM-R1's batch.  PSI makes whole passes, and B is a multiple that processes and micro-batches divide.
GRPO samples new chains in every pass, so it may see a pair more often; one step is one update.

PSI's peak learning rate is 5e-6 where B = 128 makes 50 steps or more, that of RM-R1's SFT (8,700 chains in
batches of 128), and else 1e-5, as in SFT on 1,000 examples in batches of 16 to 32 (s1: Muennighoff et al.
2025; LIMA: Zhou et al. 2023).  LoRA takes ten times the rate (Schulman et al. 2025, "LoRA Without Regret").

Nano starts from random weights and learns its language first: 2 passes of PSI, or up to 20 until 750 steps.
"""

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from pgenrm_train.config import Config, GrpoConfig, StageName, cuts_by_tokens, places_of, psi_cluster
from pgenrm_train.config.setting import known

# Logits that PSI's loss makes at a time: 256 MiB in float32, 523 tokens of a vocabulary of 128,256.
PIECE = 2**26
LARGEST, SMALLEST = 128, 16  # batch
STEPS = 200  # as many as passes allow
FEW, FEWER = 50, 10  # fewer steps cause a warning
PASSES = {StageName.PSI: 3, StageName.CRE: 16, StageName.CURRICULUM: 16}
MANY_PASSES = 20
NANO_PASSES, NANO_STEPS = 2, 750  # at least, in PSI
RATE, RATE_OF_FEW, LORA_FACTOR = 5e-6, 1e-5, 10  # PSI's peak learning rate


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a stage: each of `steps` takes `batch` of the `examples`; `updates` are optimiser steps."""

    stage: StageName
    examples: int
    batch: int
    steps: int
    updates: int
    passes: float
    learning_rate: float

    def __str__(self) -> str:
        kind = "chains" if self.stage == StageName.PSI else "pairs"
        return (
            f"{self.stage}: {self.examples:,} {kind} in batches of {self.batch}, {self.updates:,} optimiser "
            f"steps, {self.passes:.1f} passes, learning rate {self.learning_rate:g}"
        )


def with_sizes(config: Config, stage: StageName, examples: int) -> Config:
    """A copy in which the sizes of `stage` (psi, cre or curriculum) are numbers."""
    sized = copy.copy(config)
    section = copy.copy(getattr(config, stage))
    setattr(sized, stage, section)
    if stage == StageName.PSI:
        section.batch_size = section.batch_size or _batch(stage, examples, psi_unit(config))
        nano, batch = config.model.kind == "nano", section.batch_size
        passes = _nano_passes(examples, batch) if nano else _passes(stage, examples, batch)
        section.epochs = section.epochs or float(math.ceil(passes))
        rate = RATE_OF_FEW if PASSES[stage] * examples / LARGEST < FEW else RATE
        section.learning_rate = section.learning_rate or rate * (LORA_FACTOR if config.model.lora.rank else 1)
        return sized
    unit = section.mini_batch_prompts or grpo_unit(config, stage)
    most = max(unit, examples // unit * unit)  # a step draws no pair twice
    section.prompts_per_step = section.prompts_per_step or min(most, _batch(stage, examples, unit))
    section.mini_batch_prompts = section.mini_batch_prompts or section.prompts_per_step
    passes = _passes(stage, examples, section.prompts_per_step)
    section.steps = section.steps or max(1, int(passes * examples / section.prompts_per_step))
    return sized


def sizes_of(config: Config, stage: StageName, examples: int) -> Sizes:
    """Sizes of a configuration in which they are numbers."""
    if stage == StageName.PSI:
        batch = known(config.psi.batch_size)
        per_pass = max(1, math.ceil(examples / batch))
        epochs, steps = known(config.psi.epochs), config.psi.max_steps
        if steps:
            epochs = steps / per_pass
        steps = steps or math.ceil(epochs * per_pass)  # the last step of a pass may be short
        return Sizes(stage, examples, batch, steps, steps, epochs, known(config.psi.learning_rate))
    grpo: GrpoConfig = getattr(config, stage)
    prompts, steps = known(grpo.prompts_per_step), known(grpo.steps)
    updates = steps * prompts // known(grpo.mini_batch_prompts)
    passes = steps * prompts / max(1, examples)
    return Sizes(stage, examples, prompts, steps, updates, passes, grpo.learning_rate)


def settle_sizes(config: Config, stage: StageName, examples: int) -> Config:
    """`with_sizes` that logs the sizes, and a warning if they are poor."""
    config = with_sizes(config, stage, examples)
    sizes = sizes_of(config, stage, examples)
    print(sizes, flush=True)
    for warning in size_warnings(config, sizes):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return config


def psi_unit(config: Config) -> int:
    """Smallest batch that processes, micro-batches and shared sequences divide."""
    packed = config.psi.packs(config.cluster.device)
    rows = (1 if packed else config.psi.micro_batch_size) * psi_cluster(config).ranks
    return rows // math.gcd(rows, config.psi.sequence_parallel)


def grpo_unit(config: Config, stage: StageName) -> int:
    """Smallest number of prompts whose samples processes and micro-batches divide."""
    grpo: GrpoConfig = getattr(config, stage)
    ranks = places_of(config, stage).actor.cluster.ranks
    rows = ranks * (1 if cuts_by_tokens(config) else grpo.micro_batch_size)
    return rows // math.gcd(rows, grpo.group_size)


def _batch(stage: StageName, examples: int, unit: int) -> int:
    batch = LARGEST
    while batch > SMALLEST and PASSES[stage] * examples / batch < FEW:
        batch //= 2
    return max(unit, batch // unit * unit)


def _passes(stage: StageName, examples: int, batch: int) -> float:
    return min(max(1.0, STEPS * batch / max(1, examples)), PASSES[stage])


def _nano_passes(examples: int, batch: int) -> float:
    return min(max(NANO_PASSES, NANO_STEPS * batch / max(1, examples)), MANY_PASSES)


def size_warnings(config: Config, sizes: Sizes) -> Iterator[str]:
    """One sentence with the nearest better setting if steps are few, passes many, or LoRA's rate is low.

    None for nano, whose sizes are those of a demonstration.
    """
    if config.model.kind == "nano":
        return
    low = sizes.stage != StageName.PSI and sizes.learning_rate <= GrpoConfig.learning_rate
    if low and config.model.lora.rank:
        better = f"{sizes.stage}.learning_rate={LORA_FACTOR * sizes.learning_rate:g}"
        yield (
            f"{sizes.stage}.learning_rate={sizes.learning_rate:g} is one of full parameters, and LoRA takes "
            f"{LORA_FACTOR} times as much; the nearest better setting is {better}"
        )
    if sizes.updates < FEW:
        limit, effect = (FEWER, "next to nothing") if sizes.updates < FEWER else (FEW, "little")
        yield (
            f"{sizes.stage} makes {sizes.updates} optimiser steps, and fewer than {limit} teach {effect}; "
            f"{_more_steps(config, sizes)}"
        )
    if sizes.passes > MANY_PASSES:
        yield (
            f"{sizes.stage} makes {sizes.passes:.0f} passes over {sizes.examples:,} examples, and more than "
            f"{MANY_PASSES} overfit them; {_fewer_passes(config, sizes)}"
        )


def _fewer_passes(config: Config, sizes: Sizes) -> str:
    steps = MANY_PASSES * sizes.examples // sizes.batch
    if sizes.stage != StageName.PSI and steps < FEW:
        return _more_steps(config, sizes)
    key = f"{sizes.stage}.steps={steps}"
    if sizes.stage == StageName.PSI:
        key = "psi.max_steps=null" if config.psi.max_steps else f"psi.epochs={MANY_PASSES}"
    return f"the nearest better setting is {key}"


def _more_steps(config: Config, sizes: Sizes) -> str:
    """The nearest setting with enough steps within the allowed passes."""
    stage, limit = sizes.stage, MANY_PASSES * sizes.examples
    unit = psi_unit(config) if stage == StageName.PSI else grpo_unit(config, stage)
    batches = [b for b in (sizes.batch, *range(sizes.batch // unit * unit, 0, -unit)) if b * FEW <= limit]
    if not batches:
        too_few = f"{sizes.examples:,} examples are too few for {config.cluster.ranks} processes"
        processes = min(limit // FEW, config.cluster.processes_per_node)
        if not processes or config.cluster.tensor_parallel > 1:
            return f"{too_few}: add data or use fewer GPUs"
        nodes = "cluster.nodes=1 " if config.cluster.nodes > 1 else ""
        return f"{too_few}; the nearest better setting is {nodes}cluster.processes_per_node={processes}"
    changes = []
    if stage == StageName.PSI:
        epochs = known(config.psi.epochs)
        enough = [b for b in batches if epochs * math.ceil(sizes.examples / b) >= FEW]
        batch = enough[0] if enough else batches[-1]
        if config.psi.max_steps and config.psi.max_steps < FEW:
            changes.append("psi.max_steps=null")
        if batch != sizes.batch:
            changes.append(f"psi.batch_size={batch}")
        if not enough:
            changes.append(f"psi.epochs={math.ceil(FEW / math.ceil(sizes.examples / batch))}")
    else:
        if batches[0] != sizes.batch:
            changes += [f"{stage}.prompts_per_step={batches[0]}", f"{stage}.mini_batch_prompts={batches[0]}"]
        changes.append(f"{stage}.steps={FEW}")
    return f"the nearest better setting is {' '.join(changes)}"
