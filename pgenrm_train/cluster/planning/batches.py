"""Batch arithmetic: what is divided by what, and where it does not divide."""

from __future__ import annotations

from dataclasses import dataclass

from pgenrm_train.config import Config, GrpoConfig
from pgenrm_train.config.checks import psi_problems


@dataclass(frozen=True, slots=True)
class Batches:
    """One optimiser step of a stage, as the engine will cut it."""

    stage: str
    facts: dict[str, int]
    problems: tuple[str, ...]


def batches_of(config: Config, stage: str) -> Batches | None:
    if stage == "psi":
        return psi_batches(config)
    return grpo_batches(config, stage) if stage in ("cre", "curriculum") else None


def psi_batches(config: Config) -> Batches:
    """batch = micro-batch × processes × accumulation, of processes that have a sequence of their own."""
    ranks, psi = config.cluster.nodes * config.cluster.processes_per_node, config.psi
    facts = {
        "sequences a step": psi.batch_size,
        "processes": ranks,
        "micro-batch": psi.micro_batch_size,
        "accumulation": psi.batch_size * psi.sequence_parallel // (psi.micro_batch_size * ranks),
    }
    return Batches("psi", facts, tuple(psi_problems(config)))


def grpo_batches(config: Config, section: str) -> Batches:
    """rollouts = prompts × group; a mini-batch of them is one optimiser update, divided over processes and micro-batches."""
    grpo: GrpoConfig = getattr(config, section)
    cluster = config.cluster
    ranks = cluster.nodes * cluster.processes_per_node
    rollouts = grpo.mini_batch_prompts * grpo.group_size
    facts = {
        "prompts a step": grpo.prompts_per_step,
        "group": grpo.group_size,
        "rollouts a step": grpo.prompts_per_step * grpo.group_size,
        "updates a step": grpo.prompts_per_step // grpo.mini_batch_prompts,
        "rollouts a process and update": rollouts // ranks,
        "micro-batch": grpo.micro_batch_size,
        "accumulation": rollouts // ranks // grpo.micro_batch_size,
        "vLLM replicas": max(1, ranks // cluster.tensor_parallel),
    }
    return Batches(section, facts, tuple(grpo_problems(config, section)))


def grpo_problems(config: Config, section: str) -> list[str]:
    """Divisibility of a GRPO step; each problem is one sentence that names its keys."""
    grpo: GrpoConfig = getattr(config, section)
    cluster = config.cluster
    ranks = cluster.nodes * cluster.processes_per_node
    rollouts = grpo.mini_batch_prompts * grpo.group_size
    problems = []
    if rollouts % ranks:
        problems.append(
            f"{section}.mini_batch_prompts × {section}.group_size = {rollouts} must be a multiple of cluster.nodes × "
            f"cluster.processes_per_node = {ranks}"
        )
    if (rollouts // ranks) % grpo.micro_batch_size:
        problems.append(
            f"{section}.micro_batch_size={grpo.micro_batch_size} must divide the {rollouts // ranks} rollouts of a process "
            f"({section}.mini_batch_prompts × {section}.group_size over {ranks} processes)"
        )
    if ranks % cluster.tensor_parallel:
        problems.append(
            f"cluster.tensor_parallel={cluster.tensor_parallel} must divide the {ranks} processes of cluster.processes_per_node"
        )
    return problems
