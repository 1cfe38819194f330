"""Generation by several vLLM engines, a Ray actor each.  All of them pull from one queue, so that the load balances itself."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pgenrm_train.backends.base import Generation, GenerationRequest, Generator
from pgenrm_train.backends.ray_cluster import connect, last_line
from pgenrm_train.backends.vllm_engine import VllmGenerator, environment
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError

BLOCK = 16  # requests that travel together: neighbours share a history, and so a prefix in one engine's cache
AHEAD = 4  # blocks an engine that wait in the queue


def local_generator(config: Config, checkpoint: Path | str) -> Generator:
    """A local checkpoint on as many engines as the cluster's processes hold: one is started here, several as Ray actors."""
    engines = config.cluster.nodes * config.cluster.processes_per_node // config.cluster.tensor_parallel
    return VllmReplicas(config, checkpoint, engines) if engines > 1 else VllmGenerator(config, checkpoint)


class VllmReplicas:
    """A `Generator` over `engines` vLLM engines of `cluster.tensor_parallel` GPUs each, anywhere on the Ray cluster.

    Seeded per request as `VllmGenerator`, so results depend neither on the number of engines nor on who serves what.  Raises
    ConfigError for several nodes without `ray.address`, BackendError when an engine is lost: what was answered has been yielded.
    """

    def __init__(self, config: Config, checkpoint: Path | str, engines: int) -> None:
        self._close = connect(config, engines, environment(config))
        try:
            import ray

            gpus = config.cluster.tensor_parallel if config.cluster.device == "cuda" else 0
            actor = ray.remote(num_cpus=1, num_gpus=gpus)(_Engine)
            self._engines = [actor.remote(config, str(Path(checkpoint).resolve())) for _ in range(engines)]
        except BaseException:
            self._close()
            raise

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        """Yield every sample of every request, a request's samples in order, as requests finish on any engine."""
        import ray
        from ray.util.queue import Queue

        queue = Queue(maxsize=AHEAD * len(self._engines), actor_options={"num_cpus": 0})
        feed = _Feed(queue, requests, len(self._engines))
        run = [engine.run.options(num_returns="streaming").remote(queue, temperature) for engine in self._engines]
        try:
            while run:
                ready, _ = ray.wait(run)
                try:
                    yield ray.get(next(ready[0]))
                except StopIteration:
                    run.remove(ready[0])
        except ray.exceptions.RayError as error:
            raise BackendError(f"a vLLM engine failed ({last_line(error)}); the same command asks what is left") from error
        finally:
            queue.shutdown(force=True)
        feed.check()

    def close(self) -> None:
        """End the engines, and the Ray that was started for them."""
        self._close()


class _Engine:
    """The actor: one `VllmGenerator`, fed from the queue until it finds None there."""

    def __init__(self, config: Config, checkpoint: str) -> None:
        self._generator = VllmGenerator(config, checkpoint)

    def run(self, queue: Any, temperature: float) -> Iterator[Generation]:
        yield from self._generator(itertools.chain.from_iterable(iter(queue.get, None)), temperature=temperature)


class _Feed(threading.Thread):
    """Writes prompts into the queue while answers are read; one None for each engine ends it."""

    def __init__(self, queue: Any, requests: Iterable[GenerationRequest], engines: int) -> None:
        super().__init__(name="feed", daemon=True)
        self._queue, self._requests, self._engines = queue, iter(requests), engines
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):  # the queue is gone: its reader has given up
            for block in self._blocks():
                self._queue.put(block)
            for _ in range(self._engines):
                self._queue.put(None)

    def _blocks(self) -> Iterator[list[GenerationRequest]]:
        try:
            while block := list(itertools.islice(self._requests, BLOCK)):
                yield block
        except Exception as error:  # of a prompt; `check` raises it to the reader
            self._error = error

    def check(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error
