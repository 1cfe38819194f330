"""Embedder and refinement of prototypes, shared out over processes if there is much to do."""

from __future__ import annotations

import functools
from pathlib import Path

from pgenrm_train.backends.embedding.embedder import EmbedderWorkers, SentenceEmbedder
from pgenrm_train.backends.embedding.refine_processes import refine_in_processes
from pgenrm_train.config import Config
from pgenrm_train.prototypes.refinement import refine
from pgenrm_train.stages.prototypes import Refine

LARGE = 20_000  # analyses, or texts to embed, from which on several processes pay for their start


def make_embedder(config: Config, name: str | None = None, workers: int = 1) -> SentenceEmbedder:
    """The embedder `name`, by default that of the prototypes.

    `workers` above 1: Ray actors share large sets; nothing else may hold the devices then.
    """
    return SentenceEmbedder(
        name or config.prototypes.embedder,
        device=config.cluster.device,
        cache_dir=Path(config.run_dir) / "embeddings",
        shared=EmbedderWorkers(config, workers, LARGE) if workers > 1 else None,
    )


def refiner(config: Config, analyses: int) -> Refine:
    """`refine`, for large sets on all processes of this node."""
    if analyses < LARGE or config.cluster.processes_per_node == 1:
        return refine
    return functools.partial(refine_in_processes, processes=config.cluster.processes_per_node)
