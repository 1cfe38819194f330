"""Requests that join a running vLLM batch at any time, from any thread: the engine of the scoring service.

One thread advances the batch.  A request whose future is cancelled leaves the batch.  A request that the
engine refuses raises DataError.  If the engine fails, all waiting and later requests raise EngineLostError.
"""

import asyncio
import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple, Protocol

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.errors import DataError, EngineLostError, last_line

Answer = Future[list[Generation]]


class Batch(Protocol):
    """A running batch, as of `VllmGenerator`."""

    def add(self, request: GenerationRequest, temperature: float) -> list[Generation]: ...

    def step(self) -> Iterator[list[Generation]]: ...

    def abort(self, key: str) -> None: ...

    def close(self) -> None: ...


class _Job(NamedTuple):
    """A request with its future; `None` for a key that leaves."""

    key: str
    request: GenerationRequest | None
    temperature: float
    answer: Answer


class ContinuousEngine:
    """A thread that runs a batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: dict[str, Answer] = {}
        self._lost: EngineLostError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, temperature: float) -> Answer:
        """The future samples of a request; raises EngineLostError if the engine has failed."""
        key, answer = f"{next(self._numbers)}", Answer()
        answer.add_done_callback(lambda done: self._leave(key, done) if done.cancelled() else None)
        with self._lock:
            if self._lost:
                raise self._lost
            self._inbox.put(_Job(key, replace(request, key=key), temperature, answer))
        return answer

    async def generate(self, request: GenerationRequest, temperature: float) -> list[Generation]:
        """The samples of a request, in order; cancelling this takes the request out of the batch."""
        return await asyncio.wrap_future(self.submit(request, temperature))

    def lost(self) -> EngineLostError | None:
        """The reason why the engine answers no more."""
        return self._lost

    def close(self) -> None:
        """End the thread and drop the engine; requests that still wait raise EngineLostError."""
        self._inbox.put(None)
        self._thread.join()
        self._batch.close()

    def _leave(self, key: str, answer: Answer) -> None:
        self._inbox.put(_Job(key, None, 0.0, answer))

    def _run(self) -> None:
        reason = "the engine is closed"
        try:
            while self._admit():
                for generations in self._batch.step() if self._running else ():
                    self._deliver(generations)
        except Exception as error:  # an engine may raise anything; every request learns of it
            reason = f"the engine failed ({last_line(error)})"
        with self._lock:
            self._lost = EngineLostError(reason)
        while not self._inbox.empty():
            if (job := self._inbox.get()) and job.request:
                self._running[job.key] = job.answer
        for answer in self._running.values():
            if answer.set_running_or_notify_cancel():
                answer.set_exception(self._lost)

    def _admit(self) -> bool:
        """Admit new requests; wait for one if none is running.  Returns False when the engine shall close."""
        while not self._running or not self._inbox.empty():
            job = self._inbox.get()
            if job is None:
                return False
            if job.request is None:
                if self._running.pop(job.key, None):
                    self._batch.abort(job.key)
                continue
            self._running[job.key] = job.answer
            try:
                refused = self._batch.add(job.request, job.temperature)
            except Exception as error:  # of this request alone
                del self._running[job.key]
                if job.answer.set_running_or_notify_cancel():
                    job.answer.set_exception(DataError(f"the engine refuses the prompt ({last_line(error)})"))
                continue
            if refused:
                self._deliver(refused)
        return True

    def _deliver(self, generations: list[Generation]) -> None:
        answer = self._running.pop(generations[0].key)
        if answer.set_running_or_notify_cancel():
            answer.set_result(sorted(generations, key=lambda generation: generation.sample))
