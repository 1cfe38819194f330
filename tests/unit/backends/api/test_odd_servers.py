"""Servers that differ from OpenAI's: each answer or refusal is read as what it is, by every role."""

import gzip
import json
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from llm_server import completion, serve
from sec_world import EXAMPLE

from eval.lampqa import rubric_judge
from pgenrm_train.backends.api import endpoint as limits
from pgenrm_train.backends.api.chat_api import retry_after
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.generator import EndpointGenerator
from pgenrm_train.backends.api.roles import LlmTeacher
from pgenrm_train.backends.protocols import GenerationRequest
from pgenrm_train.chains.chain import JSON_END, JSON_START, ParseFailure, parse_chain, write_chain
from pgenrm_train.chains.rejection import reason_to_reject
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import BackendError
from pgenrm_train.rewards import judging, synthetic_criteria

ASK = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "hello"}]
THOUGHT = "<think>\nHmm, <JSON_START> first.\n</think>\n\n"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(limits, "MAX_WAIT_SECONDS", 0.02)


def endpoint(server, cache=None, **more) -> Endpoint:
    settings = {"attempts": 2, "timeout_seconds": 5.0} | ({"base_url": server.url} if server else {}) | more
    return Endpoint(EndpointConfig(kind="endpoint", name="stub", **settings), cache)


def requests(number, samples=1):
    messages = [({"role": "user", "content": f"q{i}"},) for i in range(number)]
    return [GenerationRequest(f"k{i}", messages[i], samples) for i in range(number)]


def both(server, **more):
    """(text, failure) of one call by teacher or judge, and by the model under test."""
    reply = endpoint(server, **more).complete(ASK)
    [generation] = EndpointGenerator(endpoint(server, **more))(
        [GenerationRequest("k", tuple(ASK))], temperature=0.7
    )
    return (reply.text, reply.failure), (generation.text, generation.failure)


def several(body, number):
    choices = [completion("hi")["choices"][0] for _ in range(body.get("n", 1))]
    return {"completion": completion("") | {"choices": choices}}


# ---- answers ----


@pytest.mark.parametrize(
    "content",
    [
        "hi",
        [{"type": "text", "text": "hi"}],
        [{"type": "text", "text": "h"}, {"type": "output_text", "text": "i"}],
        ["hi"],
        {"type": "text", "text": "hi"},
        [{"type": None, "text": "hi"}, None, {"type": "text", "text": None}],
        [{"type": "text", "text": {"value": "hi", "annotations": []}}],
        "◁think▷Hmm◁/think▷hi",
        [{"type": "thinking", "thinking": [{"type": "text", "text": "hmm"}]}, {"type": "text", "text": "hi"}],
        THOUGHT + "hi",
        "Hmm, first.</think>hi",
        "<THINKING>Hmm</THINKING>hi",
        "[THINK]Hmm[/THINK]hi",
        [{"type": "text", "text": THOUGHT}, {"type": "text", "text": "hi"}],
    ],
)
def test_an_answer_is_its_text_without_reasoning(content):
    with serve(lambda body, n: {"completion": completion(content)}) as server:
        assert both(server) == (("hi", None), ("hi", None))


def test_a_gateway_may_send_long_headers_and_a_byte_order_mark():
    form = {"raw": b"\xef\xbb\xbf" + json.dumps(completion("hi")).encode()}
    form["headers"] = {"content-security-policy": "x" * 30_000}
    with serve(lambda body, n: form) as server:
        assert both(server) == (("hi", None), ("hi", None))


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (completion(None, reasoning_content="I wonder"), "reasoning"),
        (completion("", reasoning="I wonder"), "reasoning"),
        (completion("<think>I wonder"), "reasoning"),
        (completion([{"type": "thinking", "thinking": "hmm"}]), "reasoning"),
        (completion(None, refusal="I cannot help"), "refusal"),
        (completion("half", "content_filter"), "content_filter"),
        (completion([]), "empty"),
    ],
)
def test_a_paid_answer_without_text_says_why_and_is_not_bought_again(answer, failure, tmp_path):
    with serve(lambda body, n: {"completion": answer}) as server:
        assert both(server) == ((None, failure), (None, failure))
        replies = [endpoint(server, tmp_path).complete(ASK) for _ in range(2)]
        assert [reply.cached for reply in replies] == [False, True] and len(server.bodies) == 3


def test_reasoning_in_answers_of_an_older_run_is_dropped(tmp_path):
    with serve(lambda body, n: "hi") as server:
        one = endpoint(server, tmp_path)
        one.complete(ASK)
        [key] = [key for key in one._cache._cache if key != "paid"]
        one._cache._cache.set(key, {"text": THOUGHT + "hi", "in": 1, "out": 1})
        assert one.complete(ASK).text == "hi"


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": "12", "completion_tokens": "1.5"}, (12, 1)),
        ({"prompt_tokens": None, "completion_tokens": -3}, (0, 0)),
        ({"prompt_tokens": "nan", "completion_tokens": [1]}, (0, 0)),
        ([], (0, 0)),
        (None, (0, 0)),
        ("many", (0, 0)),
    ],
)
def test_usage_in_any_form_is_no_reason_to_lose_an_answer(usage, tokens):
    with serve(lambda body, n: {"completion": completion("hi") | {"usage": usage}}) as server:
        one = endpoint(server)
        assert one.complete(ASK).text == "hi" and one.usage.paid == tokens


LEFT, RIGHT = [[8, 8], [3, 3]], (8.0, 3.0)
CHAIN = write_chain("Short is better.", [("brevity", 70), ("wit", 30)], LEFT)


def marked(start, end):
    return CHAIN.replace(JSON_START, start).replace(JSON_END, end)


@pytest.mark.parametrize(
    ("written", "read", "as_teacher"),
    [
        (CHAIN, (RIGHT, ()), None),
        (f"```\n{CHAIN}\n```", (RIGHT, ("trailing_text",)), None),
        (f"<answer>{CHAIN}</answer>", (RIGHT, ("trailing_text",)), None),
        (f"{CHAIN}\n\nIn summary, Response 1 is better.", (RIGHT, ("trailing_text",)), "issue:trailing_text"),
        (marked("\\<JSON_START\\>", "\\<JSON_END\\>"), "no_markers", "parse:no_markers"),
        (marked("&lt;JSON_START&gt;", "&lt;JSON_END&gt;"), "no_markers", "parse:no_markers"),
        (marked(JSON_START, ""), "no_markers", "parse:no_markers"),
        (CHAIN.replace('": 8.0', '": "8.0/10"'), "scores_not_numbers", "parse:scores_not_numbers"),
        (
            CHAIN.replace('": 8.0', '": 7').replace('": 3.0', '": 7'),
            ((7.0, 7.0), ("declared_differs",)),
            "tie",
        ),
    ],
)
def test_a_chain_in_another_form_is_read_as_what_it_is(written, read, as_teacher):
    with serve(lambda body, n: written) as server:
        [generation] = EndpointGenerator(endpoint(server))(
            [GenerationRequest("k", tuple(ASK))], temperature=0.7
        )
        chain = parse_chain(generation.text)
        assert (chain.kind if isinstance(chain, ParseFailure) else (chain.scores, chain.issues)) == read
        text = LlmTeacher(endpoint(server)).write(EXAMPLE, 0).text
        assert reason_to_reject(parse_chain(text), 0, text) == as_teacher


def test_a_compressed_answer_is_read():
    form = {"raw": gzip.compress(json.dumps(completion("hi")).encode())}
    form["headers"] = {"content-encoding": "gzip"}
    with serve(lambda body, n: form) as server:
        assert both(server) == (("hi", None), ("hi", None))


def test_an_empty_answer_that_was_cut_off_is_cut_off():
    with serve(lambda body, n: {"completion": completion("", "length")}) as server:
        assert both(server) == ((None, "length"), ("", "length"))


def test_a_server_that_ignores_n_is_asked_for_single_samples():
    with serve(lambda body, n: f"answer {n}") as server:
        one = EndpointGenerator(endpoint(server))
        answers = list(one(requests(5, 4), temperature=0.7))
        assert sorted((a.key, a.sample) for a in answers) == [
            (f"k{i}", s) for i in range(5) for s in range(4)
        ]
        assert len({a.text for a in answers}) == 20 == len(server.bodies) == one.endpoint.usage.calls


# ---- failures ----


@pytest.mark.parametrize(
    ("form", "failure", "words"),
    [
        ({"raw": b"<!doctype html><html><title>Sign in</title></html>"}, "html", "Sign in"),
        ({"raw": b'data: {"choices": []}\n\ndata: [DONE]\n\n'}, "event_stream", "data: {"),
        ({"raw": b": keep-alive\n\ndata: {}\n\n"}, "event_stream", "keep-alive"),
        ({"raw": b""}, "malformed", "an empty body"),
        ({"raw": b'{"error": {"message": "busy", "code": 502}}'}, "http_502", "busy"),
        ({"raw": b'{"error": {"message": "slow", "type": "rate_limit_error"}}'}, "http_429", "slow"),
        ({"raw": b'{"error": {"message": "bad", "code": "401"}}'}, "http_401", "bad"),
        ({"raw": b'{"error": "out of order"}'}, "error", "out of order"),
        ({"raw": b'{"object": "error", "message": "gone", "code": 404}'}, "http_404", "gone"),
        ({"raw": b'[{"error": {"message": "quota", "code": 429}}]'}, "http_429", "quota"),
        ({"raw": b'{"detail": [{"msg": "field required"}]}', "status": 404}, "http_404", "field required"),
        ({"status": 302, "headers": {"location": "https://other/login"}}, "redirect", "https://other/login"),
        ({"status": 307, "headers": {"location": "http://127.0.0.9:1/v1"}}, "redirect", "127.0.0.9"),
        ({"status": 403, "words": "no such model"}, "http_403", "no such model"),
        ({"status": 403, "words": "\x1b[2Jno\x07 access"}, "http_403", "[2Jno access"),
        ({"status": 307, "headers": {"location": ""}}, "redirect", "307"),
    ],
)
def test_a_failure_is_named_as_what_it_is_in_the_server_s_words(form, failure, words, capsys):
    with serve(lambda body, n: form) as server:
        one = endpoint(server)
        reply = one.complete(ASK)
        assert (reply.text, reply.failure) == (None, failure) and words in reply.words
        tries = len(server.bodies)
        assert tries == (2 if failure in ("http_502", "http_429") else 1)
        with pytest.raises(BackendError, match=failure):
            for generation in EndpointGenerator(endpoint(server))(requests(1), temperature=0.7):
                assert generation.failure == f"engine:{failure}" and words in generation.words
        assert words in one.troubles and words in one.spending().for_manifest()["messages"][failure]
        assert f"warning: stub at {server.url}: {failure}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "place", ["http://[::1:bad/v1", "http://127.0.0.1:bad/v1", "mailto:a@b", "http://[/"]
)
def test_a_redirect_to_no_address_is_a_failed_call_of_every_role(place):
    with serve(lambda body, n: {"status": 308, "headers": {"location": place}}) as server:
        assert endpoint(server, attempts=1).complete(ASK).failure in ("redirect", "connection")
        with pytest.raises(BackendError, match=r"redirect|connection"):
            list(EndpointGenerator(endpoint(server, attempts=1))(requests(1), temperature=0.7))


def test_half_an_answer_that_a_router_broke_off_is_no_answer():
    broken = completion("half")["choices"][0] | {"finish_reason": "error"}

    def answer(body, number):
        choices = [completion("hi")["choices"][0], broken, broken | {"error": {"message": "gone"}}]
        return {"completion": completion("") | {"choices": choices[: body["n"]] if "n" in body else [broken]}}

    with serve(answer) as server:
        generations = list(EndpointGenerator(endpoint(server))(requests(1, samples=3), temperature=0.7))
        assert [(g.text, g.failure) for g in generations] == [("hi", None), *[(None, "engine:error")] * 2]
        assert generations[2].words == "gone"
        assert endpoint(server).complete(ASK).failure == "http_502" and len(server.bodies) == 3


def test_an_error_without_a_code_may_be_a_refusal_of_n():
    def answer(body, number):
        return {"raw": b'{"error": "n is not implemented"}'} if "n" in body else "hi"

    with serve(answer) as server:
        generations = list(EndpointGenerator(endpoint(server))(requests(2, samples=2), temperature=0.7))
        assert [g.text for g in generations] == ["hi"] * 4


def test_an_error_under_http_200_may_pass():
    busy = {"raw": b'{"error": {"message": "busy", "code": 502}}'}
    with serve(lambda body, n: busy if n % 2 == 0 else "hi") as server:
        assert both(server) == (("hi", None), ("hi", None))


def test_a_redirect_that_keeps_the_call_is_followed_once_on_the_same_host():
    with serve(lambda body, n: "hi") as server:
        target = {"status": 308, "headers": {"location": f"{server.url}/chat/completions"}}
        with serve(lambda body, n: target) as moved:
            one = endpoint(moved)
            assert [one.complete(ASK, sample=i).text for i in range(3)] == ["hi"] * 3
            assert len(moved.bodies) == 1 and len(server.bodies) == 3


def test_tls_is_named_and_is_not_tried_again(tmp_path):
    with serve(lambda body, n: "hi") as server:
        one = endpoint(server, base_url=server.url.replace("http:", "https:"))
        reply = one.complete(ASK)
        assert reply.failure == "tls" and "http://" in reply.words and one.usage.tries == 1
    with tls_server(tmp_path) as url:
        for run in (
            lambda: endpoint(None, base_url=url).complete(ASK).words,
            lambda: next(EndpointGenerator(endpoint(None, base_url=url))(requests(1), temperature=0.7)).words,
        ):
            words = run()
            assert "CERTIFICATE_VERIFY_FAILED" in words and "SSL_CERT_FILE" in words


class tls_server:
    """A server whose certificate nobody signed; it answers nothing."""

    def __init__(self, folder):
        self.files = folder / "cert.pem", folder / "key.pem"

    def __enter__(self):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC).replace(tzinfo=None)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        cert = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now)
            .not_valid_after(now + timedelta(days=1))
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        self.files[0].write_bytes(cert.public_bytes(pem))
        self.files[1].write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.files)
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._refuse, args=(context,), daemon=True).start()
        return f"https://127.0.0.1:{self.socket.getsockname()[1]}/v1"

    def _refuse(self, context):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

    def __exit__(self, *_):
        self.socket.close()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("6", 6.0),
        ("0.5", 0.5),
        ("Thu, 01 Jan 2026 00:00:06 GMT", 6.0),
        ("Wed, 31 Dec 2025 00:00:00 GMT", 0.0),
        ("-1", 0.0),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(value, seconds):
    headers = {"retry-after": value, "date": "Thu, 01 Jan 2026 00:00:00 GMT"}
    assert retry_after(headers) == seconds


# ---- refusals of n ----


@pytest.mark.parametrize("status", [400, 404, 405, 409, 422, 500, 501, 505])
def test_a_refusal_of_n_costs_one_failed_call_and_never_a_run(status):
    def behaviour(body, n):
        return {"status": status, "words": "n must be 1"} if body.get("n", 1) > 1 else several(body, n)

    with serve(behaviour) as server:
        one = EndpointGenerator(endpoint(server, max_in_flight=256, give_up_after=3))
        for _ in range(2):
            answers = list(one(requests(12, 4), temperature=0.7))
            assert len(answers) == 48 and all(a.text == "hi" for a in answers)
        assert one.endpoint.usage.failures == {f"http_{status}": 1} and one.endpoint.stopped is None
        assert one.endpoint.usage.calls == 97
        refused = len([body for body in server.bodies if "n" in body])
        assert refused <= 24 and "n" not in server.bodies[-1], "a second queue does not try again"


def test_more_choices_than_requested_are_no_more_samples():
    with serve(lambda body, n: several({"n": 3}, n)) as server:
        answers = list(EndpointGenerator(endpoint(server))(requests(4, 4) + requests(5)[4:], temperature=0.7))
        assert sorted((a.key, a.sample) for a in answers) == [
            *((f"k{i}", s) for i in range(4) for s in range(4)),
            ("k4", 0),
        ]


@pytest.mark.parametrize("status", [401, 403, 408, 429, 503])
def test_other_failures_are_no_refusal_of_n(status):
    def behaviour(body, n):
        return {"status": status} if body.get("n", 1) > 1 else several(body, n)

    with serve(behaviour) as server:
        one = EndpointGenerator(endpoint(server))
        with pytest.raises(BackendError):
            list(one(requests(2, 4), temperature=0.7))
        assert all(body["n"] == 4 for body in server.bodies)


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("application/json", b"h\xffi", "h\ufffdi"),
        ("application/json; charset=utf-8", b"h\xe4\xb8", "h\ufffd"),
        ('application/json; charset="iso-8859-1"', "hé".encode("latin-1"), "hé"),
        ("application/json; charset=bogus-9", b"h\xff", "h\ufffd"),
    ],
)
def test_bytes_that_are_no_utf8_are_no_reason_to_lose_an_answer(kind, body, text):
    answer = json.dumps(completion("TEXT")).encode().replace(b"TEXT", body)
    with serve(lambda _, n: {"raw": answer, "headers": {"content-type": kind}}) as server:
        assert both(server) == ((text, None), (text, None))


# ---- refusals of prompts ----


def narrow(body, n):
    """A server with a small context."""
    long = len(body["messages"][-1]["content"]) > 100
    return {"status": 400, "words": "prompt too long"} if long else several(body, n)


def long_first(samples=1):
    return [
        GenerationRequest(
            f"k{i}", ({"role": "user", "content": ("long " * 99 if i < 30 else "short ") + str(i)},), samples
        )
        for i in range(40)
    ]


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("takes_n", [True, False])
def test_a_prompt_that_is_too_long_is_its_own_failure_and_final(samples, takes_n):
    def behaviour(body, n):
        return narrow(body, n) if takes_n or "n" not in body else {"status": 400}

    with serve(behaviour) as server:
        one = EndpointGenerator(endpoint(server, give_up_after=5))
        answers = list(one(long_first(samples), temperature=0.7))
        failures = [a for a in answers if a.failure]
        assert len(answers) == 40 * samples and len(failures) == 30 * samples
        assert {a.failure for a in failures} == {"prompt_refused"}
        assert {a.words for a in failures} == {"HTTP 400: prompt too long"}
        assert one.endpoint.usage.failures["prompt_refused"] == 30 and one.endpoint.stopped is None


def test_long_prompts_of_a_teacher_are_no_reason_to_stop():
    with serve(narrow) as server:
        one = endpoint(server, give_up_after=5)
        for request in long_first():
            for sample in range(2):
                one.complete(request.messages, sample=sample)
        assert one.usage.failures == {"prompt_refused": 30} and one.stopped is None and not one.down
        greetings = [body for body in server.bodies if body["messages"][-1]["content"] == "Hello."]
        assert len(greetings) == 1, "which showed that the prompts are at fault"
        assert len(server.bodies) == 30 + 10 * 2 + 1, "a refused prompt is not sent for another sample"


def test_no_start_sends_a_prompt_again_that_an_earlier_one_saw_refused(tmp_path):
    with serve(narrow) as server:
        first = endpoint(server, tmp_path)
        assert {first.complete(r.messages).failure for r in long_first()} == {None, "prompt_refused"}
        first.close()
        sent = len(server.bodies)
        second = endpoint(server, tmp_path)
        long = long_first()[0]
        again = second.complete(long.messages, sample=1)
        assert (again.failure, again.words) == ("prompt_refused", "HTTP 400: prompt too long")
        [generation] = EndpointGenerator(second)([long], temperature=0.7)
        assert generation.failure == "prompt_refused" and len(server.bodies) == sent
        second.close()
        other = endpoint(server, tmp_path, max_tokens=7)
        other.complete(long.messages)
        assert len(server.bodies) > sent, "with fewer tokens of answer it might fit"


def test_a_server_that_refuses_every_prompt_stops_the_run_in_its_words():
    with serve(lambda body, n: {"status": 400, "words": "temperature is not accepted"}) as server:
        one = EndpointGenerator(endpoint(server))
        with pytest.raises(BackendError, match="temperature is not accepted; leave_out, max_tokens_field"):
            list(one(requests(3, 4), temperature=0.7))
        other = endpoint(server, give_up_after=4)
        assert [other.complete(ASK, sample=i).failure for i in range(5)] == ["http_400"] * 4 + [
            "circuit_open"
        ]


# ---- fields of requests ----


def test_any_field_can_be_left_out_renamed_or_added():
    more = {
        "leave_out": ["seed", "temperature", "system"],
        "max_tokens_field": "max_completion_tokens",
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
    }
    with serve(lambda body, n: "hi") as server:
        assert both(server, **more) == (("hi", None), ("hi", None))
        for body in server.bodies:
            assert body == {
                "model": "stub",
                "messages": [{"role": "user", "content": "Judge.\n\nhello"}],
                "max_completion_tokens": 2048,
                "chat_template_kwargs": {"enable_thinking": False},
            }


def test_samples_differ_also_where_no_seed_is_sent(tmp_path):
    with serve(lambda body, n: f"answer {n}") as server:
        one = endpoint(server, tmp_path, leave_out=["seed"])
        assert [one.complete(ASK, sample=i).text for i in (0, 1, 0)] == ["answer 0", "answer 1", "answer 0"]


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_judge_goes_on_where_response_format_is_refused(status, tmp_path):
    def behaviour(body, n):
        return {"status": status, "words": "what format?"} if "response_format" in body else "{}"

    with serve(behaviour) as server:
        one = endpoint(server, tmp_path, give_up_after=1)
        assert [one.complete(ASK, sample=i, schema=judging.SCHEMA).text for i in range(3)] == ["{}"] * 3
        assert sum("response_format" in body for body in server.bodies) == (2 if status == 500 else 1)
        assert one.usage.failures == {f"http_{status}": 1} and one.stopped is None
        one.close()
        assert endpoint(server, tmp_path).complete(ASK, schema=judging.SCHEMA).cached, "by the question asked"


@pytest.mark.parametrize("schema", [judging.SCHEMA, synthetic_criteria.SCHEMA, rubric_judge.SCHEMA])
def test_a_schema_passes_strict_servers(schema):
    def check(node):
        assert "type" in node and not {"minLength", "maxLength", "minItems", "maxItems"} & node.keys()
        if node["type"] == "object":
            assert node["additionalProperties"] is False and node["required"] == list(node["properties"])
        for child in [*node.get("properties", {}).values(), *([node["items"]] if "items" in node else [])]:
            check(child)

    check(json.loads(json.dumps(schema)))
