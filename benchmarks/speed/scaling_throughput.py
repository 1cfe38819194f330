"""Time of test-time user-based scaling over an API: our client against one that works user by user.

    python benchmarks/speed/scaling_throughput.py [--users 131] [--pairs 798] [--ind 16] [--pro 8]
        [--chain-seconds 0.25] [--user-share 0.25]

The server is a stub in a process of its own with 64 slots.  It encodes a prompt in one slot at a fixed
speed, less the part in a prefix cache of recent histories.  Then every sample takes a slot for a
log-normal time (mean `--chain-seconds`, deviation 35 %).  An 8B model needs about 10 s, so times are
scaled down, and the client's own overhead counts 40 times as much as it would.  The server's *own bound*
is the sum of all slot seconds that the requests need, divided by the slots.  Plain scoring, one sample
per pair:

    python benchmarks/speed/scaling_throughput.py --pairs 8000 --ind 1 --pro 0 --chain-seconds 0.5
        --user-share 0.02

Both clients send the same questions: every pair once, in one order as the released script does, `--ind`
samples from the user's own history, then one from each of `--pro` similar users' histories.

- `user by user`: one user after another, with a pool of 36 threads over the user's pairs.  A thread
  requests the pair's own samples in one call (n), then its similar users one after another, each on
  kept-alive connections.  The released script's pauses, and its workbook that is read and written for
  every row, are left out.  Timed on a share of the users, of few and of many pairs, and scaled to all of
  them: users take about as long with few pairs as with many. `--user-share 1` times all (7 minutes).
- `ours`: `eval.ask.harness.ask` and `eval.studies.scaling_study.sample_pool` as the evaluation runs them,
  with prompts, parsing and parquet.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import tempfile
import time
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from eval.ask.harness import PredictionStore, ask
from eval.studies.scaling_study import Similar, Study, sample_pool
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.generator import EndpointGenerator
from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import EndpointConfig
from pgenrm_train.prompts.masking import MaskedView
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records.pairs import HistoryItem, Message, PreferencePair

PREFILL_SHARE = (
    0.05  # of a chain's time, for a prompt without a cached prefix; half of a prompt is its history
)
CACHED_HISTORIES = 256
THREADS = 36  # the released script's default


# --- server ---


class Stub:
    """An OpenAI-compatible server that only waits."""

    def __init__(self, slots: int, chain_seconds: float) -> None:
        self.slots, self.chain_seconds = asyncio.Semaphore(slots), chain_seconds
        self.cache: OrderedDict[str, None] = OrderedDict()
        self.busy = 0.0
        self.text = write_chain("Someone who reads.", [("clear", 60), ("short", 40)], [[8, 6], [4, 3]])

    async def complete(self, request: Any) -> Any:
        from aiohttp import web

        body = await request.json()
        n, prompt = body.get("n", 1), body["messages"][-1]["content"]
        history = prompt[: prompt.index("<current>")]
        cost = self.chain_seconds * PREFILL_SHARE * (0.5 if history in self.cache else 1.0)
        self.cache[history] = None
        self.cache.move_to_end(history)
        if len(self.cache) > CACHED_HISTORIES:
            self.cache.popitem(last=False)
        await self.occupy(cost)
        draw = random.Random(f"{prompt} {body['seed']}")
        await asyncio.gather(
            *(self.occupy(self.chain_seconds * draw.lognormvariate(-0.06, 0.35)) for _ in range(n))
        )
        choices = [{"index": i, "finish_reason": "stop", "message": {"content": self.text}} for i in range(n)]
        used = {"prompt_tokens": 1000, "completion_tokens": 500 * n}
        return web.json_response({"choices": choices, "usage": used})

    async def occupy(self, seconds: float) -> None:
        async with self.slots:
            start = time.perf_counter()
            await asyncio.sleep(seconds)
            self.busy += time.perf_counter() - start

    async def reset(self, _request: Any) -> Any:
        """Slot seconds since the last call; forgets the cache."""
        from aiohttp import web

        busy, self.busy = self.busy, 0.0
        self.cache.clear()
        return web.json_response({"busy": busy})


def run_server(port: Connection, slots: int, chain_seconds: float) -> None:
    from aiohttp import web

    async def main() -> None:
        stub, app = Stub(slots, chain_seconds), web.Application()
        app.add_routes([web.post("/v1/chat/completions", stub.complete), web.post("/reset", stub.reset)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(main())


# --- world ---


def world(
    users: int, pairs: int, seed: int = 0
) -> tuple[list[PreferencePair], dict[str, tuple[HistoryItem, ...]]]:
    """Votes of all users, and a history per vote; every user votes at least once, some much more often."""
    rng = random.Random(seed)
    eager = [rng.lognormvariate(0, 0.8) for _ in range(users)]
    owners = sorted([*range(users), *rng.choices(range(users), eager, k=pairs - users)])
    vocabulary = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]

    def words(n: int) -> str:
        return " ".join(rng.choices(vocabulary, k=n))

    def item() -> HistoryItem:
        return HistoryItem(words(12), words(80), words(80))

    taste = {u: (item(), item(), item()) for u in range(users)}
    votes = [
        PreferencePair(f"p{i}", f"u{u}", (Message("user", words(12)),), words(80), words(80))
        for i, u in enumerate(owners)
    ]
    return votes, {p.pair_id: taste[u] for p, u in zip(votes, owners)}


def similar_of(pair: PreferencePair, votes: list[PreferencePair], histories: Any, n: int) -> list[Similar]:
    """n other users, the same for all pairs of a user: their analyses share one prototype."""
    first = {p.user_id: p for p in votes}
    others = [u for u in first if u != pair.user_id]
    chosen = random.Random(pair.user_id).sample(others, n)
    return [Similar(u, histories[first[u].pair_id]) for u in chosen]


def messages_of(pair: PreferencePair, history: tuple[HistoryItem, ...]) -> list[dict[str, str]]:
    return chat_messages(MaskedView(pair.context, history, (pair.chosen, pair.rejected)))


# --- clients ---


def ours(url: str, votes: list[PreferencePair], histories: Any, ind: int, pro: int, folder: Path) -> int:
    settings = EndpointConfig(kind="endpoint", base_url=f"{url}/v1", name="stub", max_in_flight=256)
    generator = EndpointGenerator(Endpoint(settings))

    def answer(questions: Any) -> Any:
        return ask(
            questions,
            lambda: generator,
            chat_messages,
            PredictionStore(folder, "stub"),
            masking="masked",
            temperature=0.7,
            progress=lambda items, *_: items,
            what="",
        )

    by_user = {p.user_id: similar_of(p, votes, histories, pro) for p in votes} if pro else {}
    pool = sample_pool(
        Study("scaling", (ind,), (pro,)),
        votes,
        histories,
        answer,
        lambda _texts, users, n: [by_user[u][:n] for u in users],
        orders=(0,),
    )
    generator.close()
    assert pool["failure"].isna().all()
    return len(pool)


def user_by_user(
    url: str, votes: list[PreferencePair], histories: Any, ind: int, pro: int, every: list[PreferencePair]
) -> int:
    import httpx

    by_user: dict[str, list[PreferencePair]] = {}
    for pair in votes:
        by_user.setdefault(pair.user_id, []).append(pair)
    client = httpx.Client(
        timeout=120.0, limits=httpx.Limits(max_connections=THREADS, max_keepalive_connections=THREADS)
    )

    def call(messages: list[dict[str, str]], n: int) -> int:
        body = {"model": "stub", "messages": messages, "n": n, "seed": 0, "temperature": 0.7}
        return len(
            client.post(f"{url}/v1/chat/completions", content=json.dumps(body))
            .raise_for_status()
            .json()["choices"]
        )

    def score(pair: PreferencePair) -> int:
        own = call(messages_of(pair, histories[pair.pair_id]), ind)
        return own + sum(
            call(messages_of(pair, one.history), 1) for one in similar_of(pair, every, histories, pro)
        )

    done = 0
    for pairs in by_user.values():
        with ThreadPoolExecutor(THREADS) as pool:
            done += sum(pool.map(score, pairs))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=131)
    parser.add_argument("--pairs", type=int, default=798)
    parser.add_argument("--ind", type=int, default=16)
    parser.add_argument("--pro", type=int, default=8)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--chain-seconds", type=float, default=0.25)
    parser.add_argument(
        "--user-share",
        type=float,
        default=0.25,
        help="share of the users for the client that works user by user",
    )
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=run_server, args=(sender, args.slots, args.chain_seconds), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{receiver.recv()}"
    votes, histories = world(args.users, args.pairs)
    counts = Counter(p.user_id for p in votes)
    step = max(1, round(1 / args.user_share))
    some = set(
        sorted(counts, key=lambda u: (counts[u], u))[step // 2 :: step]
    )  # users of few and of many pairs
    part = [p for p in votes if p.user_id in some]

    import aiohttp  # noqa: F401  imports are not timed
    import httpx

    def timed(what: str, run: Any, pairs: list[PreferencePair]) -> float:
        """Seconds."""
        httpx.post(f"{url}/reset")
        start, cpu = time.perf_counter(), time.process_time()
        samples = run()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        bound = httpx.post(f"{url}/reset").json()["busy"] / args.slots
        print(
            f"{what:14} {len({p.user_id for p in pairs}):4} users {len(pairs):4} pairs {samples:6} samples "
            f"{seconds:7.1f} s, {seconds / bound:.2f} × the server's bound of {bound:.1f} s "
            f"({bound / seconds:.1%} of the slots busy); client CPU {cpu:.1f} s",
            flush=True,
        )
        return seconds

    with tempfile.TemporaryDirectory() as folder:
        fast = timed("ours", lambda: ours(url, votes, histories, args.ind, args.pro, Path(folder)), votes)
    slow = timed("user by user", lambda: user_by_user(url, part, histories, args.ind, args.pro, votes), part)
    slow *= len(counts) / len(some)
    print(f"ours is {slow / fast:.1f} times as fast; user by user, all {len(counts)} users take {slow:.0f} s")
    server.terminate()


if __name__ == "__main__":
    main()
