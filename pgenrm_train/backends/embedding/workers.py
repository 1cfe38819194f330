"""Embedding of large sets by several Ray actors, each with the model on its own device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pgenrm_train.backends.embedding.embedder import SentenceEmbedder
from pgenrm_train.backends.ray.cluster import connect
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError, last_line


class EmbedderWorkers:
    """Distribute the work of a `SentenceEmbedder` over `workers` actors, for sets of at least `least` texts.

    The actors live for one call, and so does the local Ray without `ray.address`: afterwards the devices are
    free.
    """

    def __init__(self, config: Config, workers: int, least: int) -> None:
        self.config, self.workers, self.least = config, workers, least

    def __call__(
        self, embedder: SentenceEmbedder, blocks: Iterable[Sequence[str]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number, vectors) of blocks as they finish.  Raises BackendError if an actor is lost."""
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
                f"an embedding worker failed ({last_line(error)}); repeat the command to embed the rest"
            ) from error
        finally:
            close()


class _Worker:
    def __init__(self, embedder: SentenceEmbedder) -> None:
        self._embedder = embedder

    def embed(self, number: int, texts: Sequence[str]) -> tuple[int, np.ndarray]:
        return number, self._embedder.encode(texts)


def _worker_variables() -> dict[str, str]:
    """Variables of the model hub, which workers on other nodes do not inherit."""
    hub = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ}
    return {"TOKENIZERS_PARALLELISM": "false", **hub}
