"""Requests join and leave a running batch; a failed engine fails all of them."""

import time

import pytest

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.backends.vllm.continuous import ContinuousEngine
from pgenrm_train.errors import DataError, EngineLostError


class Batch:
    """Each request takes as many steps as its message is long."""

    def __init__(self):
        self.left, self.requests, self.aborted, self.most, self.fails = {}, {}, [], 0, False

    def add(self, request, temperature):
        text = request.messages[0]["content"]
        if text == "too long":
            return [Generation(request.key, s, None, "prompt_too_long") for s in range(request.samples)]
        if text == "refused":
            raise OverflowError("too large")
        self.left[request.key], self.requests[request.key] = len(text), request
        self.most = max(self.most, len(self.left))
        return []

    def step(self):
        time.sleep(0.001)
        if self.fails:
            raise RuntimeError("out of memory")
        for key in list(self.left):
            self.left[key] -= 1
            if not self.left[key]:
                del self.left[key]
                yield [Generation(key, s, "text") for s in reversed(range(self.requests[key].samples))]

    def abort(self, key):
        self.left.pop(key)
        self.aborted.append(key)

    def close(self): ...


def request(text, samples=1):
    return GenerationRequest("same key", ({"role": "user", "content": text},), samples)


@pytest.fixture
def batch():
    return Batch()


@pytest.fixture
def engine(batch):
    engine = ContinuousEngine(batch)
    yield engine
    engine.close()


def test_a_late_request_joins_and_may_end_first(engine, batch):
    long = engine.submit(request("x" * 200), 0.0)
    short = engine.submit(request("xx", samples=3), 0.0)
    assert [g.sample for g in short.result(5)] == [0, 1, 2]
    assert not long.done() and batch.most == 2
    assert long.result(5)[0].text == "text"
    assert engine.submit(request("too long", samples=2), 0.0).result(5)[1].failure == "prompt_too_long"


def test_a_refused_request_fails_alone(engine, batch):
    waiting = engine.submit(request("x" * 100), 0.0)
    with pytest.raises(DataError, match=r"refuses the prompt \(too large\)"):
        engine.submit(request("refused"), 0.0).result(5)
    assert waiting.result(5) and engine.lost() is None


def test_a_cancelled_request_leaves_the_batch(engine, batch):
    endless = engine.submit(request("x" * 10**6), 0.0)
    while not batch.left:
        time.sleep(0.001)
    assert endless.cancel()
    assert engine.submit(request("x"), 0.0).result(5) and not batch.left and len(batch.aborted) == 1


def test_a_failed_engine_fails_every_request(engine, batch):
    waiting = engine.submit(request("x" * 10**6), 0.0)
    batch.fails = True
    with pytest.raises(EngineLostError, match="out of memory"):
        waiting.result(5)
    with pytest.raises(EngineLostError, match="out of memory"):
        engine.submit(request("x"), 0.0)
    assert "out of memory" in str(engine.lost())


def test_a_closed_engine_answers_nobody(batch):
    engine = ContinuousEngine(batch)
    waiting = engine.submit(request("x" * 10**6), 0.0)
    engine.close()
    with pytest.raises(EngineLostError, match="closed"):
        waiting.result(5)
