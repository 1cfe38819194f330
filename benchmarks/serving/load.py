"""Load on a running scoring service: many clients, stored users, every answer checked.

    python -m pgenrm_train recipe=serve serve.local=true model.path=tests/data/psi_nano &
    python benchmarks/serving/load.py --url http://127.0.0.1:8000 --clients 64 --seconds 600 --users 10000

Stores `--users` users with generated votes, then scores questions of random users.  Each client waits for
its answer before it sends again; with `--rate` requests arrive at random times instead.  Prints one JSON
object: requests, chains per second, quantiles of the time, failures by kind, and the memory of `--pid` at the
start and the end.  An answer that is neither scores nor an error with a kind counts as `lost`.  `--kill`
kills one engine of a service on Ray Serve at half the time.

Bars: nothing lost, also with `--kill`; memory flat.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter

import httpx
import psutil

ENGINE = "ServeReplica:pgenrm:engines"  # in the title of its process
WORDS = [
    "brief",
    "listed",
    "formal",
    "warm",
    "plain",
    "careful",
    "quick",
    "long",
    "exact",
    "kind",
    "calm",
    "direct",
]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


def vote(rng: random.Random) -> dict[str, str]:
    return {"query": text(rng, 4)[:-1] + "?", "chosen": text(rng, 8), "rejected": text(rng, 8)}


class Load:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
        self.client = httpx.AsyncClient(base_url=arguments.url, timeout=600, limits=limits)
        self.seconds: list[float] = []
        self.kinds: Counter[str] = Counter()
        self.chains = 0

    async def store_users(self) -> None:
        async def store(number: int) -> None:
            rng = random.Random(number)
            votes = {"votes": [vote(rng) for _ in range(5)]}
            (await self.client.put(f"/v1/users/load-{number}/votes", json=votes)).raise_for_status()

        for first in range(0, self.arguments.users, 64):
            await asyncio.gather(*map(store, range(first, min(first + 64, self.arguments.users))))

    async def score(self, rng: random.Random) -> None:
        body = {
            "user_id": f"load-{rng.randrange(self.arguments.users)}",
            "query": text(rng, 4),
            "responses": [text(rng, 8) for _ in range(self.arguments.responses)],
            "ind": self.arguments.ind,
        }
        start = time.perf_counter()
        try:
            answer = await self.client.post("/v1/score", json=body)
            content = answer.json()
            if answer.status_code == 200:
                kind = "scored" if None not in content["scores"] else "null"
                self.chains += content["usage"]["chains"]
            else:
                kind = content["error"]["kind"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            kind = f"lost: {type(error).__name__}"
        self.seconds.append(time.perf_counter() - start)
        self.kinds[kind] += 1

    async def kill_engine(self) -> None:
        """Kill one engine process of the service, any of them."""
        await asyncio.sleep(self.arguments.seconds / 2)
        processes = psutil.process_iter(["cmdline"])
        engine = next(p for p in processes if ENGINE in " ".join(p.info["cmdline"] or []))
        print(f"killing process {engine.pid}", flush=True)
        engine.kill()

    async def run(self) -> None:
        end = time.monotonic() + self.arguments.seconds
        accident = asyncio.create_task(self.kill_engine()) if self.arguments.kill else None
        await self._run(end)
        if accident:
            await accident

    async def _run(self, end: float) -> None:
        if self.arguments.rate is None:

            async def one_client(number: int) -> None:
                rng = random.Random(-1 - number)
                while time.monotonic() < end:
                    await self.score(rng)

            await asyncio.gather(*map(one_client, range(self.arguments.clients)))
            return
        rng, open_requests = random.Random(0), set()
        while time.monotonic() < end:
            open_requests.add(asyncio.create_task(self.score(random.Random(rng.random()))))
            await asyncio.sleep(rng.expovariate(self.arguments.rate))
        await asyncio.gather(*open_requests)


def quantiles(seconds: list[float]) -> dict[str, float]:
    times = sorted(seconds)
    found = {f"p{q}": round(times[int(len(times) * q / 100)], 4) for q in (50, 90, 99)}
    return {**found, "p99 / p50": round(found["p99"] / found["p50"], 3)}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rate", type=float, help="requests per second, instead of clients that wait")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--responses", type=int, default=2)
    parser.add_argument("--ind", type=int, default=1)
    parser.add_argument("--pid", type=int, help="process of the service, for its memory")
    parser.add_argument("--kill", action="store_true", help="kill an engine on Ray Serve at half the time")
    load = Load(parser.parse_args())
    await load.store_users()
    process = psutil.Process(load.arguments.pid) if load.arguments.pid else None
    before = process.memory_info().rss if process else None
    start = time.perf_counter()
    await load.run()
    seconds, times = time.perf_counter() - start, load.seconds
    report = {
        "requests": len(times),
        "requests per second": round(len(times) / seconds, 2),
        "chains per second": round(load.chains / seconds, 2),
        **quantiles(times),
        "outcomes": dict(load.kinds),
        "rss MiB": [x and x >> 20 for x in (before, process.memory_info().rss if process else None)],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
