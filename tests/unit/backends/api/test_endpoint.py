"""An endpoint over real HTTP: retries, failures, cost, and the reasons to stop."""

from __future__ import annotations

import threading
import time

import pytest
from llm_server import Server, completion, serve, slowly

from pgenrm_train.backends.api import endpoint as module
from pgenrm_train.backends.api.chat_api import refusal
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.usage import dollars
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import ConfigError
from pgenrm_train.run.concurrency import concurrently

ASK = [{"role": "user", "content": "hello"}]


def to(server: Server, **more) -> EndpointConfig:
    settings = {
        "kind": "endpoint",
        "base_url": server.url,
        "name": "stub",
        "timeout_seconds": 1.0,
        "attempts": 3,
    } | more
    return EndpointConfig(**settings)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "MAX_WAIT_SECONDS", 0.05)


def test_an_answer_is_text_and_its_cost():
    with serve(lambda body, n: "hi") as server:
        one = Endpoint(to(server, dollars_per_million_in=1.0, dollars_per_million_out=2.0))
        reply = one.complete(ASK, sample=3)
        assert (reply.text, reply.failure, reply.prompt_tokens, reply.completion_tokens) == (
            "hi",
            None,
            10,
            5,
        )
        assert server.bodies[0]["messages"] == ASK and server.bodies[0]["seed"] == 3
        assert dollars(one.settings, *one.usage.paid) == pytest.approx(20e-6)


def test_half_an_emoji_in_an_answer_is_a_mark_that_files_can_hold():
    with serve(lambda body, n: "well \ud83d done \U0001f44d") as server:
        assert Endpoint(to(server)).complete(ASK).text == "well \ufffd done \U0001f44d"


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 429, "headers": {"retry-after": "0"}},
        {"status": 500},
        {"status": 503},
        {"status": 408},
        {"reset": True},
    ],
)
def test_passing_trouble_is_retried(trouble):
    with serve(lambda body, n: trouble if n < 2 else "at last") as server:
        one = Endpoint(to(server))
        assert one.complete(ASK).text == "at last"
        assert (one.usage.calls, one.usage.tries, dict(one.usage.failures)) == (1, 3, {})


@pytest.mark.parametrize(
    ("trouble", "failure", "tries"),
    [
        ({"status": 500}, "http_500", 3),
        # The second one greets the server, to see whether the prompt is at fault.
        ({"status": 400}, "http_400", 2),
        ({"status": 401}, "http_401", 1),
        ({"reset": True}, "connection", 3),
        ({"raw": b"<html>gateway</html>"}, "html", 1),
        ({"raw": b'{"choices": []}'}, "malformed", 1),
        ({"raw": b"[" * 100_000}, "malformed", 1),
        ({"completion": completion("half a", "length")}, "length", 1),
        ({"completion": completion(None)}, "empty", 1),
        ({"completion": completion("x") | {"choices": []}}, "empty", 1),
        ({"completion": completion(" \n")}, "empty", 1),
    ],
)
def test_what_cannot_be_had_is_a_reply_with_its_reason(trouble, failure, tries):
    with serve(lambda body, n: trouble) as server:
        one = Endpoint(to(server))
        reply = one.complete(ASK)
        assert (reply.text, reply.failure) == (None, failure)
        assert len(server.bodies) == tries and one.usage.failures == {failure: 1}


def test_a_server_that_hangs_is_a_timeout():
    with serve(lambda body, n: slowly(1.5, "late")) as server:
        assert Endpoint(to(server, timeout_seconds=0.2, attempts=2)).complete(ASK).failure == "timeout"


def test_a_server_that_sends_blanks_and_no_answer_is_a_timeout():
    with serve(lambda body, n: {"blanks": 50}) as server:
        began = time.monotonic()
        assert Endpoint(to(server, timeout_seconds=0.4, attempts=1)).complete(ASK).failure == "timeout"
        assert time.monotonic() - began < 3


def test_a_missing_server_is_a_connection_failure():
    with serve(lambda body, n: "x") as server:
        settings = to(server)
    assert Endpoint(settings).complete(ASK).failure == "connection"


def test_answers_are_paid_for_once_and_failures_are_asked_again(tmp_path):
    with serve(lambda body, n: {"status": 404} if n == 0 else f"answer {n}") as server:
        first = Endpoint(to(server), tmp_path / "cache")
        assert first.complete(ASK).failure == "http_404"
        assert first.complete(ASK).text == "answer 1"
        first.close()
        again = Endpoint(to(server), tmp_path / "cache")
        reply = again.complete(ASK)
        assert (reply.text, reply.cached) == ("answer 1", True)
        assert again.complete(ASK, sample=1).text == "answer 2", "another sample is another question"
        assert Endpoint(to(server, temperature=0.1), tmp_path / "cache").complete(ASK).text == "answer 3"
        assert (again.usage.calls, again.usage.cached, again.usage.tries) == (2, 1, 1)


def test_a_dead_server_opens_the_circuit_and_a_rest_closes_it(monkeypatch):
    with serve(lambda body, n: {"status": 500} if n < 4 else "back") as server:
        one = Endpoint(to(server, attempts=1, give_up_after=4))
        assert [one.complete(ASK).failure for _ in range(6)] == ["http_500"] * 4 + ["circuit_open"] * 2
        assert len(server.bodies) == 4
        last = "4 × http_500, 2 × circuit_open; the server's message: no"
        assert one.stopped.startswith(
            f"stub at {server.url} failed 4 calls in a row ({last}); its answers are kept"
        )
        rested = time.monotonic() + 31
        monkeypatch.setattr(module.time, "monotonic", lambda: rested)
        assert one.complete(ASK).text == "back" and one.stopped is None


def test_a_page_in_place_of_an_api_opens_the_circuit_too():
    with serve(lambda body, n: {"raw": b"<html>log in</html>"}) as server:
        one = Endpoint(to(server, give_up_after=3))
        assert [one.complete(ASK, sample=i).failure for i in range(5)] == ["html"] * 3 + ["circuit_open"] * 2


def test_a_paid_answer_without_choices_counts():
    with serve(lambda body, n: {"completion": completion("x") | {"choices": []}}) as server:
        one = Endpoint(to(server))
        one.complete(ASK)
        assert sum(one.usage.paid) > 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "the context\\n is too long"}}', "the context is too long"),
        (b'{"error": "no model"}', "no model"),
        (b"<html>bad gateway</html>", "<html>bad gateway</html>"),
        (b"[" * 100_000, "[" * 200),
        (b"\xff" * 3, "\ufffd" * 3),
    ],
)
def test_a_refusal_repeats_the_server_s_message(body, said):
    assert refusal(body) == said


def test_an_error_hides_a_key_that_the_server_repeats(monkeypatch, capsys):
    monkeypatch.setenv("STUB_KEY", "sk-very-secret")
    with serve(lambda body, n: {"status": 401, "words": "wrong key sk-very-secret"}) as server:
        one = Endpoint(to(server, api_key_env="STUB_KEY", give_up_after=1))
        one.complete(ASK)
        assert "the server's message: wrong key …" in one.stopped
        printed = capsys.readouterr()
        assert "very-secret" not in printed.err + printed.out + str(one.spending())


def test_a_spent_budget_stops_everything(tmp_path):
    with serve(lambda body, n: "hi") as server:
        one = Endpoint(to(server, dollars_per_million_in=1e5, max_dollars=2.5), tmp_path)
        assert [one.complete(ASK, sample=i).failure for i in range(5)] == [None] * 3 + ["budget"] * 2
        assert one.stopped.startswith("the budget of stub is spent: 3.00 dollars and 45 tokens")
        assert one.complete(ASK, sample=0).text == "hi", "an answer on disk costs nothing"
        assert Endpoint(to(server, max_total_tokens=15)).complete(ASK).text == "hi"


def test_a_budget_holds_over_restarts_and_a_higher_one_goes_on(tmp_path):
    price = {"dollars_per_million_in": 1e5}  # one dollar per call
    with serve(lambda body, n: "hi") as server:
        for limit, failures in (
            (2, [None, None, "budget"]),
            (2, [None, None, "budget"]),
            (3, [None, None, None]),
        ):
            one = Endpoint(to(server, max_dollars=limit, **price), tmp_path)
            assert [one.complete(ASK, sample=i).failure for i in range(3)] == failures
            one.close()
        assert len(server.bodies) == 3 and one.spending().dollars == 3.0
        assert (one.spending().prompt_tokens, one.usage.prompt_tokens) == (30, 10), (
            "of all starts, and of this one"
        )


@pytest.mark.parametrize("answer", [completion("half a", "length"), completion(None)])
def test_what_was_paid_for_and_is_no_answer_is_not_bought_again(tmp_path, answer):
    with serve(lambda body, n: {"completion": answer}) as server:
        for _ in range(2):
            one = Endpoint(to(server), tmp_path)
            reply = one.complete(ASK)
            assert reply.text is None and reply.failure in ("length", "empty")
            one.close()
        assert len(server.bodies) == 1 and reply.cached and one.usage.paid == (10, 5)
        assert Endpoint(to(server, max_tokens=9999), tmp_path).complete(ASK).cached is False, (
            "a higher limit is another question"
        )


def test_closing_waits_for_what_is_in_flight_and_keeps_it(tmp_path):
    release = threading.Event()
    with serve(lambda body, n: "paid" if release.wait(20) else "late") as server:
        one = Endpoint(to(server, max_in_flight=4, timeout_seconds=20), tmp_path)
        replies = []
        threads = [
            threading.Thread(target=lambda i=i: replies.append(one.complete(ASK, sample=i))) for i in range(8)
        ]
        for thread in threads:
            thread.start()
        while len(server.bodies) < 4:
            time.sleep(0.01)
        threading.Timer(0.3, release.set).start()
        one.close()
        for thread in threads:
            thread.join()
        assert sorted(reply.failure or "answered" for reply in replies) == ["answered"] * 4 + ["closed"] * 4
        assert len(server.bodies) == 4 and Endpoint(to(server), tmp_path).usage.paid == (40, 20)


def test_a_call_that_waits_for_its_turn_is_not_made_once_closed():
    with serve(lambda body, n: "hi") as server:
        one = Endpoint(to(server, requests_per_minute=6, max_in_flight=2))
        one.complete(ASK)
        waiting = threading.Thread(target=one.complete, args=(ASK,), kwargs={"sample": 1})
        waiting.start()
        time.sleep(0.1)
        one.close()
        waiting.join(5)
        assert not waiting.is_alive() and len(server.bodies) == 1


def test_calls_in_flight_are_bounded_and_all_used():
    with serve(lambda body, n: slowly(0.05, "hi")) as server:
        one = Endpoint(to(server, max_in_flight=4))
        threads = [
            threading.Thread(target=one.complete, args=(ASK,), kwargs={"sample": i}) for i in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.most_busy == 4 and one.usage.calls == 16


def test_requests_keep_the_pace():
    with serve(lambda body, n: "hi") as server:
        one = Endpoint(to(server, requests_per_minute=600))
        began = time.monotonic()
        for i in range(4):
            one.complete(ASK, sample=i)
        assert time.monotonic() - began >= 0.3


def test_tokens_keep_the_pace_that_earlier_answers_give():
    with serve(lambda body, n: "hi") as server:
        one = Endpoint(to(server, max_tokens=50))
        one.complete(ASK)
        used = one.usage.prompt_tokens + one.usage.completion_tokens
        assert used > 0
        one.settings.tokens_per_minute = 600.0 * used  # ten calls per second
        began = time.monotonic()
        for i in range(1, 6):
            one.complete(ASK, sample=i)
        assert 0.4 <= time.monotonic() - began < 3.0


def test_the_first_call_is_taken_to_need_all_that_it_may():
    with serve(lambda body, n: "hi") as server:
        one = Endpoint(to(server, max_tokens=1000, tokens_per_minute=60_000))
        began = time.monotonic()
        for i in range(2):
            one.complete(ASK, sample=i)
        assert time.monotonic() - began >= 1.0  # a thousand tokens per second


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with serve(lambda body, n: {"status": 401} if n else "hi") as server:
        one = Endpoint(to(server, api_key_env="MY_KEY"), tmp_path / "cache")
        one.complete(ASK)
        one.complete(ASK, sample=1)
        assert server.keys == {"Bearer sk-very-secret"}
        assert "very-secret" not in str(one.spending()) + str(one.settings)
    assert not any(b"very-secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="environment variable MY_KEY named by api_key_env is not set"):
        Endpoint(to(server, api_key_env="MY_KEY"))


def test_structured_answers_are_asked_for_in_the_server_s_way():
    with serve(lambda body, n: "{}") as server:
        for structured in ("json_schema", "json_object", "none"):
            Endpoint(to(server, structured=structured, max_tokens_field="max_completion_tokens")).complete(
                ASK, schema={"type": "object"}
            )
        formats = [body.get("response_format", {}).get("type") for body in server.bodies]
        assert formats == ["json_schema", "json_object", None]
        assert all("max_completion_tokens" in body and "max_tokens" not in body for body in server.bodies)


# ---- concurrently ----


def test_results_come_as_they_finish_with_their_place():
    found = list(concurrently(lambda s: slowly(s, s), [0.3, 0.0, 0.1], 3))
    assert found == [(1, 0.0), (2, 0.1), (0, 0.3)]


def test_one_worker_is_no_thread():
    assert list(concurrently(lambda _: threading.current_thread(), range(2), 1)) == [
        (0, threading.main_thread()),
        (1, threading.main_thread()),
    ]


def test_few_more_items_are_taken_than_are_worked_on():
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield taken[-1]

    calls = concurrently(lambda i: i, endless(), 4)
    for _ in range(10):
        next(calls)
    calls.close()
    assert len(taken) <= 10 + 8


def test_an_exception_ends_the_rest():
    def call(i):
        if i == 3:
            raise ValueError("third")
        return i

    with pytest.raises(ValueError, match="third"):
        list(concurrently(call, range(100), 2))
