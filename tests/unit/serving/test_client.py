"""The client against the service over real HTTP, as verl, TRL and OpenRLHF call it."""

import asyncio
import inspect
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from llm_server import serve
from serving_world import QUESTION, VOTE, StubEngine, by_length, configured, running, service_of, shown

from pgenrm_train import client
from pgenrm_train.client import (
    PersonalReward,
    ScoringError,
    compute_score,
    openrlhf_reward,
    trl_reward,
    trl_reward_async,
)

ROOT = Path(__file__).resolve().parents[3]
RESPONSES = ["x" * 4 * n for n in (3, 1, 2)]


ANSWER = {
    "scores": [1],
    "verified": [True],
    "probabilities": [None],
    "ranking": [0],
    "failures": [],
    "usage": {},
    "model": "m",
}


@pytest.fixture
def engine():
    return StubEngine(lambda r, s: None if any("broken" in t for t in shown(r)) else by_length(shown(r), s))


@pytest.fixture
def service(tmp_path, engine):
    return service_of(configured(tmp_path), engine)


@pytest.fixture
def url(service):
    with running(service) as connection:
        connection.put("/v1/users/ann/votes", json={"votes": [VOTE]})
        yield str(connection.base_url)


def test_score_and_rank(url):
    reward = PersonalReward(url)
    scores = reward.score(user_id="ann", **QUESTION)
    assert scores.scores == [7.5, 4.5] and scores.usage["chains"] == 2
    assert reward.rank(history=[VOTE], query="q", responses=RESPONSES) == [1, 2, 0]
    assert asyncio.run(reward.score_async(user_id="ann", **QUESTION)).scores == scores.scores
    with pytest.raises(ScoringError, match="no stored votes") as caught:
        reward.score(user_id="nobody", **QUESTION)
    assert (caught.value.kind, caught.value.status) == ("unknown_user", 404)
    with pytest.raises(ScoringError, match="of 2 responses 0 have scores"):
        reward.rank(user_id="ann", query="q", responses=["broken", "x"])


def test_votes(url):
    reward = PersonalReward(url)
    reward.put_votes("org/bob", [VOTE])
    reward.add_votes("org/bob", [VOTE])
    assert reward.score(user_id="org/bob", **QUESTION).ranking == [0, 1]
    reward.delete_user("org/bob")
    with pytest.raises(ScoringError, match="unknown_user"):
        reward.score(user_id="org/bob", **QUESTION)


def test_a_busy_server_is_asked_again(url):
    def busy(body, number):
        return (
            {"status": 429, "headers": {"retry-after": "0.01"}}
            if number < 2
            else {"raw": json.dumps(ANSWER).encode()}
        )

    with serve(busy) as server:
        reward = PersonalReward(server.url.removesuffix("/v1"), "key")
        assert reward.score(user_id="ann", **QUESTION).scores == [1]
        assert len(server.bodies) == 3 and server.keys == {"Bearer key"}
    with pytest.raises(ScoringError, match="does not answer"):
        PersonalReward("http://127.0.0.1:9", attempts=2).score(user_id="ann", **QUESTION)
    assert "key" not in repr(reward)


def test_votes_are_not_appended_twice():
    """The connection is closed after the request, so nobody knows whether the votes are stored."""
    requests = []

    def close(server):
        while True:
            connection, _ = server.accept()
            requests.append(connection.recv(4096)[:4])
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=close, args=(server,), daemon=True).start()
        reward = PersonalReward(f"http://127.0.0.1:{server.getsockname()[1]}", attempts=2)
        for call, expected in ((reward.add_votes, 1), (reward.put_votes, 2)):
            requests.clear()
            with pytest.raises(ScoringError, match="does not answer"):
                call("ann", [VOTE])
            assert len(requests) == expected


@pytest.fixture
def fresh_connections(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    client._http.cache_clear()
    yield
    client._http.cache_clear()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_this_machine_is_never_asked_through_a_proxy(host, monkeypatch, fresh_connections):
    for variable in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9" if variable == "HTTP_PROXY" else "socks://nowhere")
    with serve(lambda body, n: {"raw": json.dumps(ANSWER).encode()}) as server:
        url = f"http://{host}:{server.server_address[1]}"
        assert PersonalReward(url, attempts=1).score(user_id="ann", **QUESTION).scores == [1]


def test_other_hosts_are_asked_through_the_proxy(monkeypatch, fresh_connections):
    with serve(lambda body, n: {"raw": json.dumps(ANSWER).encode()}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        reward = PersonalReward("http://scores.example", attempts=1)
        assert reward.score(user_id="ann", **QUESTION).scores == [1] and len(proxy.bodies) == 1
    client._http.cache_clear()
    monkeypatch.setenv("HTTP_PROXY", "socks://nowhere")
    with pytest.raises(ScoringError, match=r"scores\.example cannot be called: .*socks"):
        reward.score(user_id="ann", **QUESTION)


@pytest.mark.parametrize("wait", ["Thu, 01 Jan 2026 00:00:06 GMT", "soon", "", "nan", "-1"])
def test_any_retry_after_is_a_wait(wait, monkeypatch):
    monkeypatch.setattr(client, "MAX_WAIT_SECONDS", 0.01)
    with serve(
        lambda body, n: (
            {"raw": json.dumps(ANSWER).encode()} if n else {"status": 503, "headers": {"retry-after": wait}}
        )
    ) as server:
        assert PersonalReward(server.url.removesuffix("/v1")).score(user_id="ann", **QUESTION).scores == [1]


@pytest.mark.parametrize("page", [b"<html>Sign in</html>", b"", b"[1]", b"null"])
def test_another_service_is_no_scoring_service(page):
    with (
        serve(lambda body, n: {"raw": page}) as server,
        pytest.raises(ScoringError, match="no scoring service"),
    ):
        PersonalReward(server.url.removesuffix("/v1")).score(user_id="ann", **QUESTION)


async def as_verl(url, prompts, **settings):
    """As the reward loop calls it: one coroutine per rollout, extra_info from a data frame."""
    from verl.trainer.ppo.reward import _call_with_kwargs_async

    settings = {"url": url, "group_size": 3, "gather_seconds": 0.2, **settings}
    calls = [
        _call_with_kwargs_async(
            compute_score,
            settings,
            data_source="personaworld",
            solution_str=text,
            ground_truth="",
            extra_info={"index": 1, "user_id": "ann", "query": query, "num_turns": 2},
            reward_router_address=None,
        )
        for query, texts in prompts.items()
        for text in texts
    ]
    return await asyncio.gather(*calls, return_exceptions=True)


def test_verl_sends_the_rollouts_of_a_prompt_once(url, service):
    assert inspect.iscoroutinefunction(compute_score)
    results = asyncio.run(as_verl(url, {"a": RESPONSES, "b": RESPONSES[:2]}))
    scores = [result["score"] for result in results]
    assert scores[1] > scores[2] > scores[0] and scores[4] > scores[3]
    sent = service.metrics.requests.labels("/v1/score", "200")._value.get()
    assert sent == 2, "one request per prompt, also for a group that is not full"


def test_verl_gets_an_error_or_nan(url):
    prompts = {"a": ["broken", "x", "y"], "b": ["x"]}
    failed, first, second, alone = asyncio.run(as_verl(url, prompts))
    assert (failed.kind, alone.kind) == ("no_score", "single_rollout") and "length" in failed.message
    assert first["score"] == second["score"], "the pair without the failed response counts"
    numbers = asyncio.run(as_verl(url, prompts, on_failure="nan"))
    assert [math.isnan(result["score"]) for result in numbers] == [True, False, False, True]


def test_verl_takes_a_history_from_a_data_frame(url):
    info = {"history": np.array([VOTE], dtype=object), "query": "q"}

    async def both():
        calls = [compute_score("d", t, "", info, url=url, group_size=2) for t in RESPONSES[:2]]
        return await asyncio.gather(*calls)

    first, second = asyncio.run(both())
    assert second["score"] > first["score"]


@pytest.mark.parametrize("make", [trl_reward, trl_reward_async])
def test_trl(url, engine, make):
    function = pickle.loads(pickle.dumps(make(url)))  # noqa: S301
    assert function.__name__ == "personal_reward"
    assert asyncio.iscoroutinefunction(function) == (make is trl_reward_async)
    turn = [{"role": "user", "content": "Fix my report?"}]
    prompts = [turn, turn, "Another?", "Another?"]
    completions = [
        [{"role": "assistant", "content": "xxxx" * 4}],
        [{"role": "assistant", "content": "x"}],
        "x",
        "broken",
    ]
    columns = {"user_id": ["ann"] * 4, "completion_ids": [[1]] * 4, "trainer_state": None}
    rewards = function(prompts=prompts, completions=completions, **columns)
    rewards = asyncio.run(rewards) if inspect.isawaitable(rewards) else rewards
    assert rewards[1] > rewards[0] and rewards[2:] == [None, None]


def test_openrlhf_s_reward_file(url, tmp_path):
    import importlib.util

    import torch

    file = tmp_path / "reward_func.py"
    file.write_text(
        f"from pgenrm_train.client import openrlhf_reward\nreward_func = openrlhf_reward({url!r})\n"
    )
    spec = importlib.util.spec_from_file_location("reward_func", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompts = ["Q "] * 3
    answer = module.reward_func([f"Q {text}" for text in RESPONSES], prompts, ["ann"] * 3)
    assert torch.argsort(answer["rewards"], descending=True).tolist() == [1, 2, 0]
    assert answer["extra_logs"]["missing"].sum() == 0
    with pytest.raises(ScoringError):
        openrlhf_reward(url)(["Q broken", "Q x"], prompts[:2], ["ann"] * 2)
    with pytest.raises(ScoringError, match="does not contain its prompt"):
        openrlhf_reward(url)(["P x", "<s>Q x"], prompts[:2], ["ann"] * 2)
    nan = openrlhf_reward(url, on_failure="nan")(["Q broken", "Q x"], prompts[:2], ["ann"] * 2)
    assert torch.isnan(nan["rewards"]).all() and nan["extra_logs"]["missing"].tolist() == [1, 1]


def test_the_wheel_with_httpx_alone_scores(url, tmp_path):
    """Python without site-packages sees the wheel and what httpx needs, and nothing else."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    needed = tmp_path / "needed"
    needed.mkdir()
    for name in ("httpx", "httpcore", "h11", "anyio", "sniffio", "certifi", "idna", "typing_extensions"):
        origin = Path(find_spec(name).origin)
        origin = origin.parent if origin.name == "__init__.py" else origin
        (needed / origin.name).symlink_to(origin)
    program = f"""
import sys
sys.path += [{str(wheel)!r}, {str(needed)!r}]
from pgenrm_train.client import PersonalReward
print(PersonalReward({url!r}).rank(user_id="ann", query="q", responses=["xxxxxxxx", "x"]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[1, 0]\n", done.stderr
