"""Generation by several vLLM engines, one Ray actor each; a common queue balances the load."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pgenrm_train.backends.protocols import Generation, GenerationRequest, Generator
from pgenrm_train.backends.ray.cluster import connect
from pgenrm_train.backends.vllm.engine import VllmGenerator, vllm_variables
from pgenrm_train.config import Config
from pgenrm_train.errors import BackendError, last_line
from pgenrm_train.run.timeline import Part, mark

# Requests, or answers, per message.  Neighbours share a history, and so a prefix in the cache of one engine.
BLOCK = 16
AHEAD = 4  # blocks per engine that wait in the queue
Item = TypeVar("Item")


@contextlib.contextmanager
def local_engines(config: Config) -> Iterator[Callable[[Path | str], Generator]]:
    """Yield a loader of local checkpoints, one at a time, and stop its engines with the block.

    `cluster.engines` sets their number; by default they fill the processes.  A single engine runs in this
    process.  Several are Ray actors that outlive a checkpoint, since a new process takes longer to import
    vLLM than to load weights.  Nothing starts before the first checkpoint.
    """
    cluster = config.cluster
    engines = cluster.engines or cluster.nodes * (cluster.processes_per_node // cluster.tensor_parallel)
    with contextlib.ExitStack() as stack:
        start = functools.cache(lambda: _actors(config, engines, stack))

        def load(checkpoint: Path | str) -> Generator:
            mark(Part.START)
            several = engines > 1
            engine = VllmReplicas(start(), checkpoint) if several else VllmGenerator(config, checkpoint)
            mark(Part.GENERATION)
            return engine

        yield load


def _actors(config: Config, engines: int, stack: contextlib.ExitStack) -> list[Any]:
    """Raises ConfigError for several nodes without `ray.address`."""
    stack.callback(connect(config, engines, vllm_variables(config.cluster.device)))
    import ray

    gpus = config.cluster.tensor_parallel if config.cluster.device == "cuda" else 0
    actor = ray.remote(num_cpus=1, num_gpus=gpus)(_Engine)
    return [actor.remote(config) for _ in range(engines)]


class VllmReplicas:
    """A `Generator` over one checkpoint in several engines, anywhere on the Ray cluster.

    Each engine has `cluster.tensor_parallel` GPUs.  Sampling is seeded per request as in `VllmGenerator`.  So
    results depend neither on the number of engines nor on the choice of engine, except for rounding in
    batches of another size.  If an engine is lost, all finished answers are yielded before BackendError.
    """

    def __init__(self, engines: Sequence[Any], checkpoint: Path | str) -> None:
        self._engines = engines
        # wait for all, or the first engine would take as many requests as it can hold
        self._call_all("load", str(Path(checkpoint).resolve()))

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        """Yield the samples of each request in order, as requests finish on any engine."""
        import ray
        from ray.util.queue import Queue

        queue = Queue(maxsize=AHEAD * len(self._engines), actor_options={"num_cpus": 0})
        feeding = ThreadPoolExecutor(1).submit(_feed, queue, requests, len(self._engines))
        streams = [
            engine.run.options(num_returns="streaming").remote(queue, temperature) for engine in self._engines
        ]
        try:
            while streams:
                ready, _ = ray.wait(streams)
                try:
                    yield from ray.get(next(ready[0]))
                except StopIteration:
                    streams.remove(ready[0])
        except ray.exceptions.RayError as error:
            raise _lost_error(error) from error
        finally:
            queue.shutdown(force=True)
        feeding.result()  # raises an error of the requests

    def close(self) -> None:
        """Drop the checkpoint and its KV caches; the engines wait for another."""
        self._call_all("unload")

    def _call_all(self, method: str, *arguments: Any) -> None:
        import ray

        try:
            ray.get([getattr(engine, method).remote(*arguments) for engine in self._engines])
        except ray.exceptions.RayError as error:
            raise _lost_error(error) from error


def _lost_error(error: Exception) -> BackendError:
    return BackendError(
        f"a vLLM engine failed ({last_line(error)}); repeat the command to request the missing answers"
    )


class _Engine:
    """Actor with one `VllmGenerator` at a time."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def load(self, checkpoint: str) -> None:
        self._generator = VllmGenerator(self._config, checkpoint)

    def run(self, queue: Any, temperature: float) -> Iterator[list[Generation]]:
        yield from _blocks(self._generator(_read(queue), temperature=temperature))

    def unload(self) -> None:
        self._generator.close()
        del self._generator


def _read(queue: Any) -> Iterator[GenerationRequest | None]:
    """The requests of the queue until its None; yields None while the next block is on its way."""
    import ray

    coming = queue.actor.get.remote()
    while True:
        while not ray.wait([coming], timeout=0)[0]:
            yield None
        if (block := ray.get(coming)) is None:
            return
        coming = queue.actor.get.remote()  # arrives while this block is encoded
        yield from block


def _feed(queue: Any, requests: Iterable[GenerationRequest], engines: int) -> None:
    """Fill the queue while answers are read; one None per engine ends it, also after an error."""
    from ray.exceptions import RayError

    with contextlib.suppress(RayError):  # the reader has given up and closed the queue
        try:
            for block in _blocks(iter(requests)):
                queue.put(block)
        finally:
            for _ in range(engines):
                queue.put(None)


def _blocks(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Cut `items` into lists of `BLOCK`: one message is cheaper than sixteen."""
    while block := list(itertools.islice(items, BLOCK)):
        yield block
