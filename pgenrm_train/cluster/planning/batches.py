"""Batch arithmetic: divisions of a batch, and those that leave a rest."""

from dataclasses import dataclass

from pgenrm_train.cluster.planning.memory import grpo_of
from pgenrm_train.config import GRPO_STAGES, Config, StageName
from pgenrm_train.config.checks import psi_problems


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
    ranks, psi = config.cluster.ranks, config.psi
    facts = {
        "sequences a step": psi.batch_size,
        "processes": ranks,
        "micro-batch": psi.micro_batch_size,
        "accumulation": psi.batch_size * psi.sequence_parallel // (psi.micro_batch_size * ranks),
    }
    return Batches(facts, tuple(psi_problems(config)))


def grpo_batches(config: Config, stage: StageName) -> Batches:
    """rollouts = prompts × group; one mini-batch is one update, divided over processes and micro-batches."""
    grpo, ranks = grpo_of(config, stage), config.cluster.ranks
    rollouts = grpo.mini_batch_prompts * grpo.group_size
    facts = {
        "prompts a step": grpo.prompts_per_step,
        "group": grpo.group_size,
        "rollouts a step": grpo.prompts_per_step * grpo.group_size,
        "updates a step": grpo.prompts_per_step // grpo.mini_batch_prompts,
        "rollouts a process and update": rollouts // ranks,
        "micro-batch": grpo.micro_batch_size,
        "accumulation": rollouts // ranks // grpo.micro_batch_size,
        "vLLM replicas": max(1, ranks // config.cluster.tensor_parallel),
    }
    return Batches(facts, tuple(grpo_problems(config, stage)))


def grpo_problems(config: Config, stage: StageName) -> list[str]:
    """One sentence, with its keys, per division of a GRPO step that leaves a rest."""
    grpo, ranks, tensor_parallel = (
        grpo_of(config, stage),
        config.cluster.ranks,
        config.cluster.tensor_parallel,
    )
    rollouts = grpo.mini_batch_prompts * grpo.group_size
    problems = []
    if rollouts % ranks:
        problems.append(
            f"{stage}.mini_batch_prompts × {stage}.group_size = {rollouts} must be a multiple of "
            "cluster.nodes × "
            f"cluster.processes_per_node = {ranks}"
        )
    if (rollouts // ranks) % grpo.micro_batch_size:
        problems.append(
            f"{stage}.micro_batch_size={grpo.micro_batch_size} must divide the {rollouts // ranks} rollouts "
            "of a process "
            f"({stage}.mini_batch_prompts × {stage}.group_size over {ranks} processes)"
        )
    if ranks % tensor_parallel:
        problems.append(
            f"cluster.tensor_parallel={tensor_parallel} must divide the {ranks} processes of "
            "cluster.processes_per_node"
        )
    return problems
