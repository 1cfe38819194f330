"""Time of a request under Ray Serve, relative to an echo deployment in the same run.

    python benchmarks/serving/ray_cost.py                  # bar: ratio of the medians at most 1.5
    python benchmarks/serving/ray_cost.py --requests 20

Both are a front and one replica behind it, on one local Ray.  The service's replica is a stub that writes a
chain after `--delay` seconds; the echo's front sends the body to its replica, which returns it after the same
time.  One request at a time, the two in turns.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
import httpx  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from ray import serve  # noqa: E402
from serving_world import VOTE, StubEngine  # noqa: E402

from pgenrm_train.backends.ray.cluster import connect  # noqa: E402
from pgenrm_train.config import Config, load  # noqa: E402
from pgenrm_train.stages.stage import with_totals  # noqa: E402
from recipes.wiring.service.local import checkpoint_of  # noqa: E402
from recipes.wiring.service.ray_replicas import application_of  # noqa: E402

DELAY = "STUB_SECONDS"
app = FastAPI()


class StubReplica:
    """A stub in the place of a vLLM engine."""

    def __init__(self, config: Config, checkpoint: str) -> None:
        self._engine = StubEngine(seconds=float(os.environ[DELAY]))

    async def generate(self, request: Any, temperature: float) -> Any:
        return await self._engine.generate(request, temperature)


class Echo:
    def __init__(self, delay: float) -> None:
        self._delay = delay

    async def generate(self, body: Any) -> Any:
        await asyncio.sleep(self._delay)
        return body


@serve.ingress(app)
class EchoFront:
    def __init__(self, echo: Any) -> None:
        self._echo = echo

    @app.post("/")
    async def answer(self, request: Request) -> Any:
        return await self._echo.generate.remote(await request.json())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds of the replicas")
    parser.add_argument("--requests", type=int, default=300)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seconds: dict[str, list[float]] = {"echo": [], "service": []}
    with tempfile.TemporaryDirectory() as folder:
        config = load(
            "recipe=serve",
            f"model.path={ROOT / 'tests/data/psi_nano'}",
            f"run_dir={folder}",
            f"serve.store=sqlite:///{folder}/users.db",
        )
        checkpoint = checkpoint_of(config)
        paths = f"{ROOT}:{ROOT / 'tests' / 'support'}:{ROOT / 'benchmarks' / 'serving'}"
        close = connect(config, 2, {"PYTHONPATH": paths, DELAY: str(arguments.delay)})
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            service = application_of(with_totals(config, checkpoint), str(checkpoint.resolve()), StubReplica)
            serve.run(service, name="pgenrm")
            echo = serve.deployment(Echo).options(ray_actor_options={"num_cpus": 0}).bind(arguments.delay)
            front = serve.deployment(EchoFront).options(ray_actor_options={"num_cpus": 0}).bind(echo)
            serve.run(front, name="echo", route_prefix="/echo")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                client.put("/v1/users/ann/votes", json={"votes": [VOTE] * 5}).raise_for_status()
                for number in range(-5, arguments.requests):  # the first ones warm up
                    query = f"Question {number}?"
                    body = {"user_id": "ann", "query": query, "responses": ["Short.", "Longer."]}
                    for name, path in (("echo", "/echo/"), ("service", "/v1/score")):
                        start = time.perf_counter()
                        client.post(path, json=body).raise_for_status()
                        if number >= 0:
                            seconds[name].append(time.perf_counter() - start)
        finally:
            serve.shutdown()
            close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report = {f"{name}, median ms": round(1000 * value, 2) for name, value in medians.items()}
    print(json.dumps({**report, "ratio": round(medians["service"] / medians["echo"], 3)}, indent=2))


if __name__ == "__main__":
    main()
