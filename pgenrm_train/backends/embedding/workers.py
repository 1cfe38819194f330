"""Embedding of large sets by several Ray actors, each with the model on a device of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pgenrm_train.backends.embedding.embedder import SentenceEmbedder
from pgenrm_train.backends.ray.cluster import connect, last_line
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError


class EmbedderWorkers:
    """Shares a `SentenceEmbedder`'s work out over `workers` actors, for sets of at least `least` texts.

    The actors, and the Ray of our own where `ray.address` names none, live for one call: afterwards the devices are free.
    """

    def __init__(self, config: Config, workers: int, least: int) -> None:
        self.config, self.workers, self.least = config, workers, least

    def __call__(
        self, embedder: SentenceEmbedder, blocks: Iterable[Sequence[str]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(number of a block, its vectors) as blocks are done.  Raises BackendError when an actor is lost."""
        import ray
        from ray.util import ActorPool

        close = connect(self.config, self.workers, _worker_variables())
        try:
            gpus = 1 if self.config.cluster.device == "cuda" else 0
            actor = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
            pool = ActorPool([actor.remote(embedder) for _ in range(self.workers)])
            yield from pool.map_unordered(
                lambda worker, block: worker.embed.remote(*block), enumerate(blocks)
            )
        except ray.exceptions.RayError as error:
            raise BackendError(
                f"an embedding worker failed ({last_line(error)}); the same command embeds what is left"
            ) from error
        finally:
            close()


class _Worker:
    def __init__(self, embedder: SentenceEmbedder) -> None:
        self._embedder = embedder

    def embed(self, number: int, texts: Sequence[str]) -> tuple[int, np.ndarray]:
        return number, self._embedder.encode(texts)


def _worker_variables() -> dict[str, str]:
    """What decides where a model is looked for, and what a worker of another node would not inherit."""
    passed = {
        name: value for name in ("HF_HUB_OFFLINE", "HF_HOME") if (value := os.environ.get(name)) is not None
    }
    return {"TOKENIZERS_PARALLELISM": "false", **passed}
