"""Busy share of a server under `recipe=evaluate`; exit code 1 below 95 %.

    python benchmarks/speed/scoring_slots.py [--slots 64] [--seconds 0.5] [--rounds 60]

The server is a stub in a process of its own: a request waits for a slot, holds it for `--seconds`, and is
answered with a chain.  The client is the complete recipe: data built, prompts written, answers parsed,
stored and reported; every slot gives `--rounds` answers.

Busy share: the mean number of held slots from the first arrival to the last request, over all slots.
After that no request is left to take a slot.  `of the full time` is the same from the first arrival to
the last answer.
"""

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout, installed or not

from factory_slots import WORDS

from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import load
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.rows import pair_to_row

ENOUGH = 0.95


class Stub:
    """Server that holds a slot for `seconds` per request, and integrates the number of held slots."""

    def __init__(self, slots: int, seconds: float) -> None:
        self.free, self.seconds = asyncio.Semaphore(slots), seconds
        self.held, self.area, self.changed = 0, 0.0, 0.0
        self.first, self.last_arrival, self.area_at_arrival, self.requests = 0.0, 0.0, 0.0, 0
        self.text = write_chain("Someone who reads.", [("clear", 60), ("short", 40)], [[8, 6], [4, 3]])

    def now(self, by: int) -> float:
        now = time.monotonic()
        self.area += self.held * (now - self.changed) if self.changed else 0.0
        self.held, self.changed = self.held + by, now
        return now

    async def complete(self, request: Any) -> Any:
        from aiohttp import web

        await request.read()
        self.last_arrival = self.now(0)
        self.first, self.area_at_arrival = self.first or self.last_arrival, self.area
        self.requests += 1
        async with self.free:
            self.now(+1)
            await asyncio.sleep(self.seconds)
            self.now(-1)
        choice = {"index": 0, "finish_reason": "stop", "message": {"content": self.text}}
        return web.json_response(
            {"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 500}}
        )

    async def stats(self, _request: Any) -> Any:
        from aiohttp import web

        overall = self.area / max(self.changed - self.first, 1e-9)
        return web.json_response(
            {
                "busy": self.area_at_arrival / max(self.last_arrival - self.first, 1e-9),
                "overall": overall,
                "requests": self.requests,
            }
        )


def serve(port: Connection, slots: int, seconds: float) -> None:
    from aiohttp import web

    async def main() -> None:
        stub, app = Stub(slots, seconds), web.Application()
        app.add_routes([web.post("/v1/chat/completions", stub.complete), web.get("/stats", stub.stats)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(main())


def votes(tested: int) -> list[PreferencePair]:
    """`tested` test votes of a hundred users, with three earlier votes of each user as history."""

    def text(number: int, words: int) -> str:
        return " ".join(WORDS[(i * number) % len(WORDS)] for i in range(words))

    return [
        PreferencePair(
            f"p{n}",
            f"u{n % 100}",
            (Message("user", f"{n}: {text(n, 20)}"),),
            f"{n} {text(n + 1, 150)}",
            text(n + 2, 150),
            split="train" if n < 300 else "test",
        )
        for n in range(300 + tested)
    ]


def evaluate(url: str, count: int, folder: Path) -> float:
    """CPU seconds of the complete recipe on `count` pairs, each in both orders."""
    import pandas as pd

    from recipes import evaluate as recipe

    pd.DataFrame([pair_to_row(vote) for vote in votes(count)]).to_parquet(folder / "votes.parquet")
    began = time.process_time()
    recipe.run(
        load(
            "recipe=evaluate",
            "model=endpoint",
            "model.name=stub",
            f"model.base_url={url}/v1",
            "data=pairs",
            f"data.path={folder / 'votes.parquet'}",
            "eval.seeds=1",
            "eval.ind=1",
            "eval.probes=false",
            "eval.baselines=[]",
            "tracking=none",
            f"run_dir={folder / 'run'}",
        )
    )
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("slots", 64), ("seconds", 0.5), ("rounds", 60)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(sender, given.slots, given.seconds), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{receiver.recv()}"
    try:
        import httpx

        with tempfile.TemporaryDirectory() as folder:
            cpu = evaluate(url, given.slots * given.rounds // 2, Path(folder))
        stats = json.loads(httpx.get(f"{url}/stats").text)
    finally:
        server.terminate()
    busy, overall = stats["busy"] / given.slots, stats["overall"] / given.slots
    print(
        f"{busy:.1%} of {given.slots} slots busy, {overall:.1%} of the full time; "
        f"{stats['requests']} answers of {given.seconds} s; "
        f"{1000 * cpu / stats['requests']:.1f} ms CPU per answer, with build and report"
    )
    return int(busy < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
