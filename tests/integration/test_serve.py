"""recipe=serve with a real model: the command, real HTTP, SIGTERM while a request is open."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "tests" / "data" / "psi_nano"
VOTES = [
    {
        "query": "Plan my contract?",
        "chosen": "Dear reader. Go ahead. Noted. Quite right.",
        "rejected": "Yo friend. Move slowly. Noted. Well researched.",
    }
]
BODY = {
    "query": "Fix my report?",
    "responses": [
        "Hey there. Check first. Step one. Quite right.",
        "Respectfully yours. Mind risks. It flows. Quite right.",
        "Dear reader. Check first. Noted. Quite right.",
    ],
}


@contextmanager
def served(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    command = [
        sys.executable, "-m", "pgenrm_train", "recipe=serve", f"model.path={NANO}",
        f"run_dir={folder}", f"serve.store=sqlite:///{folder}/users.db", *words,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KEY": "secret"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"serving .* at (http://\S+)", line):
                break
        else:
            pytest.fail("".join(lines))
        with httpx.Client(
            base_url=match[1], headers={"authorization": "Bearer secret"}, timeout=120
        ) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def test_a_real_model_scores_and_drains(tmp_path):
    with served(tmp_path, "serve.local=true", "serve.port=0", "serve.api_key_env=KEY") as (process, client):
        assert client.get("/ready").status_code == 200
        assert client.put("/v1/users/ann/votes", json={"votes": VOTES}).status_code == 200
        first = client.post("/v1/score", json={"user_id": "ann", **BODY, "return_chains": True}).json()
        assert first["usage"]["chains"] == 6 and first["chains"][0]["text"], first
        assert len(first["scores"]) == 3 and not {0.0, 0.5} & set(first["scores"])
        asked = {"history": VOTES, **BODY, "ind": 4}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/score", json=asked).json(), range(8)))
        assert len({str(answer["scores"]) for answer in answers}) == 1, "sampling is seeded by the prompt"
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(client.post, "/v1/score", json=asked | {"ind": 32})
            while "pgenrm_requests_in_flight 1.0" not in client.get("/metrics").text:
                pass
            process.send_signal(signal.SIGTERM)
            assert late.result().status_code == 200, "open requests end"
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["serve.api_key_env=ABSENT"], "serve.api_key_env=ABSENT: the environment variable is not set"),
        (["serve.store=sqlite:////nowhere/users.db"], "serve.store=sqlite:////nowhere/users.db cannot be"),
        (["score.pro=2"], "score.pro=2 needs user prototypes"),
        (["model.path=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_end_in_a_sentence(tmp_path, words, sentence):
    done = subprocess.run(
        [
            sys.executable, "-m", "pgenrm_train", "recipe=serve", "serve.local=true", f"model.path={NANO}",
            "serve.port=0", f"run_dir={tmp_path}", f"serve.store=sqlite:///{tmp_path}/u.db", *words,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_ray_serve_scores_and_drains(tmp_path):
    with served(tmp_path, f"serve.port={free_port()}", "serve.api_key_env=KEY") as (process, client):
        assert client.get("/ready").status_code == 200
        assert client.put("/v1/users/ann/votes", json={"votes": VOTES}).status_code == 200
        asked = {"user_id": "ann", **BODY, "ind": 2}
        first = client.post("/v1/score", json=asked).json()
        assert first["usage"]["chains"] == 12 and len(first["scores"]) == 3, first
        again = client.post("/v1/score", json=asked).json()
        assert again["scores"] == first["scores"] and again["usage"]["cached_chains"] == 12
        assert client.post("/v1/score", content=b"x" * 3_000_000).status_code == 413
        assert client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    assert (tmp_path / "users.db").exists()
