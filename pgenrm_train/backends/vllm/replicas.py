"""Generation by several vLLM engines, a Ray actor each.  All of them pull from one queue, so that the load balances itself."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pgenrm_train.backends.protocols import Generation, GenerationRequest, Generator
from pgenrm_train.backends.ray.cluster import connect, last_line
from pgenrm_train.backends.vllm.engine import VllmGenerator, vllm_variables
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError

BLOCK = 16  # requests, or answers, that travel together: neighbours share a history, and so a prefix in one engine's cache
AHEAD = 4  # blocks an engine that wait in the queue
Item = TypeVar("Item")


@contextlib.contextmanager
def local_engines(config: Config) -> Iterator[Callable[[Path | str], Generator]]:
    """Yield what loads a local checkpoint, one after another, and end with the block what was started for them.

    `cluster.engines`, or as many as the processes hold: one is started here, several are Ray actors that outlive a checkpoint, since
    a new process takes longer to import vLLM than to load weights.  Nothing starts before the first checkpoint.
    """
    processes = config.cluster.nodes * config.cluster.processes_per_node
    engines = config.cluster.engines or processes // config.cluster.tensor_parallel
    with contextlib.ExitStack() as stack:
        start = functools.cache(lambda: _actors(config, engines, stack))
        yield (
            lambda checkpoint: (
                VllmReplicas(start(), checkpoint) if engines > 1 else VllmGenerator(config, checkpoint)
            )
        )


def _actors(config: Config, engines: int, stack: contextlib.ExitStack) -> list[Any]:
    """Raises ConfigError for several nodes without `ray.address`."""
    stack.callback(connect(config, engines, vllm_variables(config)))
    import ray

    gpus = config.cluster.tensor_parallel if config.cluster.device == "cuda" else 0
    actor = ray.remote(num_cpus=1, num_gpus=gpus)(_Engine)
    return [actor.remote(config) for _ in range(engines)]


class VllmReplicas:
    """A `Generator` over one checkpoint in several engines of `cluster.tensor_parallel` GPUs each, anywhere on the Ray cluster.

    Seeded per request as `VllmGenerator`, so results depend neither on the number of engines nor on who serves what, but for the
    rounding of batches of another size.  Raises BackendError when an engine is lost: what was answered has been yielded.
    """

    def __init__(self, engines: Sequence[Any], checkpoint: Path | str) -> None:
        self._engines = engines
        self._of_all(
            "load", str(Path(checkpoint).resolve())
        )  # or the first one up would take all that it can hold

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        """Yield every sample of every request, a request's samples in order, as requests finish on any engine."""
        import ray
        from ray.util.queue import Queue

        queue = Queue(maxsize=AHEAD * len(self._engines), actor_options={"num_cpus": 0})
        feed = _Feed(queue, requests, len(self._engines))
        run = [
            engine.run.options(num_returns="streaming").remote(queue, temperature) for engine in self._engines
        ]
        try:
            while run:
                ready, _ = ray.wait(run)
                try:
                    yield from ray.get(next(ready[0]))
                except StopIteration:
                    run.remove(ready[0])
        except ray.exceptions.RayError as error:
            raise _lost(error) from error
        finally:
            queue.shutdown(force=True)
        feed.check()

    def close(self) -> None:
        """Drop the checkpoint and its KV caches; the engines wait for another."""
        self._of_all("unload")

    def _of_all(self, method: str, *arguments: Any) -> None:
        import ray

        try:
            ray.get([getattr(engine, method).remote(*arguments) for engine in self._engines])
        except ray.exceptions.RayError as error:
            raise _lost(error) from error


def _lost(error: Exception) -> BackendError:
    return BackendError(f"a vLLM engine failed ({last_line(error)}); the same command asks what is left")


class _Engine:
    """The actor: one `VllmGenerator` at a time, fed from the queue until it finds None there."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def load(self, checkpoint: str) -> None:
        self._generator = VllmGenerator(self._config, checkpoint)

    def run(self, queue: Any, temperature: float) -> Iterator[list[Generation]]:
        yield from _blocks(
            self._generator(itertools.chain.from_iterable(iter(queue.get, None)), temperature=temperature)
        )

    def unload(self) -> None:
        self._generator.close()
        del self._generator


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
            for block in self._written():
                self._queue.put(block)
            for _ in range(self._engines):
                self._queue.put(None)

    def _written(self) -> Iterator[list[GenerationRequest]]:
        try:
            yield from _blocks(self._requests)
        except Exception as error:  # of a prompt; `check` raises it to the reader
            self._error = error

    def check(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error


def _blocks(items: Iterator[Item]) -> Iterator[list[Item]]:
    """`items` in lists of `BLOCK`: one message is cheaper than sixteen."""
    while block := list(itertools.islice(items, BLOCK)):
        yield block
