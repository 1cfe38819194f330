"""The queue of a model behind an API, over real HTTP: n per call, failures as data, back-pressure."""

from __future__ import annotations

import contextlib
from itertools import count

import pytest
from llm_server import completion, serve, slowly

from pgenrm_train.backends.api import endpoint as limits
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.generator import EndpointGenerator
from pgenrm_train.backends.protocols import GenerationRequest
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import BackendError


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(limits, "MAX_WAIT_SECONDS", 0.02)


def requests(number: int, samples: int = 1, seed: int = 0):
    return [
        GenerationRequest(f"k{i}", ({"role": "user", "content": f"q{i}"},), samples, seed)
        for i in range(number)
    ]


def generator(server, **more) -> EndpointGenerator:
    settings = {
        "kind": "endpoint",
        "base_url": server.url,
        "name": "stub",
        "attempts": 3,
        "max_in_flight": 8,
        "timeout_seconds": 5.0,
    }
    return EndpointGenerator(Endpoint(EndpointConfig(**settings | more)))


def several(body, number):
    """A server that takes n; choice i holds the question and the number of the sample."""
    texts = [f"{body['messages'][0]['content']}/{body['seed'] + i}" for i in range(body.get("n", 1))]
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"content": text}} for i, text in enumerate(texts)
    ]
    return {
        "completion": completion("")
        | {"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 4 * len(texts)}}
    }


def sorted_fields(answers):
    return sorted((a.key, a.sample, a.text, a.failure) for a in answers)


EXPECTED = sorted((f"k{i}", s, f"q{i}/{40 + s}", None) for i in range(5) for s in range(4))


def test_all_samples_of_a_prompt_are_one_call():
    with serve(several) as server:
        one = generator(server)
        answers = list(one(requests(5, 4, seed=40), temperature=0.7))
        assert (
            sorted_fields(answers) == EXPECTED
            and len(server.bodies) == 5
            and {body["n"] for body in server.bodies} == {4}
        )
        assert (
            one.endpoint.usage.calls,
            one.endpoint.usage.prompt_tokens,
            one.endpoint.usage.completion_tokens,
        ) == (5, 35, 80)
        assert {a.tokens for a in answers} == {4}


def test_half_an_emoji_in_an_answer_is_a_mark_that_files_can_hold():
    with serve(lambda body, n: "well \ud83d") as server:
        (answer,) = generator(server)(requests(1), temperature=0.7)
        assert answer.text == "well \ufffd"


@pytest.mark.parametrize("refusal", [{"status": 400}, {"status": 422}, "one choice"])
def test_a_server_without_n_is_asked_sample_by_sample(refusal):
    def behaviour(body, number):
        if body.get("n", 1) > 1 and refusal != "one choice":
            return refusal
        return several(body | {"n": 1}, number)

    with serve(behaviour) as server:
        answers = list(generator(server, max_in_flight=4)(requests(5, 4, seed=40), temperature=0.7))
        assert sorted_fields(answers) == EXPECTED
        assert sum("n" in body for body in server.bodies) == 1, "it is not asked for n again"


def test_a_refused_prompt_is_no_reason_to_give_n_up():
    with serve(
        lambda body, n: {"status": 400} if body["messages"][0]["content"] == "q0" else several(body, n)
    ) as server:
        answers = list(generator(server, max_in_flight=4)(requests(5, 4), temperature=0.7))
        assert {a.failure for a in answers if a.key == "k0"} == {"prompt_refused"} and len(answers) == 20
        assert sum("n" in body for body in server.bodies) == 5


def until_it_ends(answers):
    with contextlib.suppress(BackendError):
        yield from answers


@pytest.mark.parametrize("trouble", [{"status": 500}, {"raw": b"log in"}, {"status": 400}])
def test_a_queue_that_found_no_api_at_all_ends_in_a_sentence(trouble):
    """A short queue raises too: an evaluation of such failures alone must not count as complete."""
    with serve(lambda body, n: trouble) as server:
        answers = generator(server, attempts=1)(requests(3), temperature=0.7)
        with pytest.raises(BackendError, match="failed 3 calls in a row"):
            assert len(list(answers)) == 3


@pytest.mark.parametrize(
    ("trouble", "failure"),
    [
        ({"status": 500}, "engine:http_500"),
        ({"status": 401}, "engine:http_401"),
        ({"reset": True}, "engine:connection"),
        ({"raw": b"not JSON"}, "engine:malformed"),
        ({"raw": b'{"choices": []}'}, "engine:malformed"),
        ({"raw": b"[1]"}, "engine:malformed"),
        ({"completion": completion("  ")}, "empty"),
        ({"completion": completion("half a", "length")}, "length"),
    ],
)
def test_a_sample_that_could_not_be_had_is_a_failure_with_its_reason(trouble, failure):
    with serve(lambda body, n: trouble) as server:
        one = generator(server, give_up_after=100)
        answers = list(until_it_ends(one(requests(3), temperature=0.7)))
        assert [a.failure for a in answers] == [failure] * 3
        assert one.endpoint.usage.failures == {failure.removeprefix("engine:"): 3}
        assert len(server.bodies) == (9 if failure in ("engine:http_500", "engine:connection") else 3)


def test_slow_answers_time_out_and_passing_trouble_passes():
    with serve(
        lambda body, n: slowly(1.0, "late") if n < 1 else {"status": 503} if n < 2 else several(body, n)
    ) as server:
        answers = list(generator(server, timeout_seconds=0.3)(requests(1), temperature=0.7))
        assert sorted_fields(answers) == [("k0", 0, "q0/0", None)] and len(server.bodies) == 3


def test_requests_are_taken_only_as_there_is_room():
    """A slow caller slows down the queue: memory holds the calls in flight, not the full evaluation."""
    taken = count()
    endless = (
        GenerationRequest(f"k{next(taken)}", ({"role": "user", "content": "q"},), 2) for _ in iter(int, 1)
    )
    with serve(several) as server:
        answers = generator(server)(endless, temperature=0.7)
        for _ in range(6):
            next(answers)
        answers.close()
        assert next(taken) <= 4 + 6 and server.most_busy <= 4


def test_samples_in_flight_when_a_server_dies_are_yielded():
    with serve(lambda body, n: several(body, n) if n < 10 else {"status": 404}) as server:
        answers, one = [], generator(server, give_up_after=5)
        with pytest.raises(BackendError, match="the same command continues from there"):
            for answer in one(requests(60), temperature=0.7):
                answers.append(answer)  # noqa: PERF402
        assert sum(a.failure is None for a in answers) == 10
        assert len(answers) == len(server.bodies), "every call has its row"


def test_an_interrupted_caller_leaves_no_call_behind():
    with serve(lambda body, n: slowly(0.2, several(body, n))) as server:
        answers = generator(server)(requests(50), temperature=0.7)
        next(answers)
        answers.close()
        before = len(server.bodies)
        assert list(generator(server)(requests(2), temperature=0.7)) and len(server.bodies) <= before + 2


def test_another_temperature_than_the_endpoint_s_is_a_mistake_of_ours():
    with serve(several) as server, pytest.raises(ValueError, match=r"temperature 0\.7, not 0\.0"):
        list(generator(server)(requests(1), temperature=0.0))
