"""Quantiles of the time of a request at 80 % load: a stub engine of known delay.

    python benchmarks/serving/tail.py                      # bar: p99 at most 2 × p50
    python benchmarks/serving/tail.py --seconds 5 --clients 8

The service runs in a process of its own.  First `--clients` clients that wait for their answers measure the
most requests per second; then requests arrive at random times at 80 % of this rate.
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

sys.path[:0] = [
    str(Path(__file__).resolve().parents[2]),
    str(Path(__file__).resolve().parents[2] / "tests" / "support"),
]
from load import Load, quantiles  # noqa: E402
from serving_world import StubEngine, configured, running, service_of  # noqa: E402

LOAD = 0.8


def serve(folder: str, delay: float, pipe: Connection) -> None:
    """Run the service until the other end of the pipe writes."""
    # More requests may wait than the default: none is refused here.
    config = configured(Path(folder), serve__max_waiting=10_000)
    with running(service_of(config, StubEngine(seconds=delay))) as client:
        pipe.send(str(client.base_url))
        pipe.recv()


async def measure(settings: argparse.Namespace) -> dict[str, object]:
    first = Load(settings)
    await first.store_users()
    start = time.perf_counter()
    await first.run()
    most = len(first.seconds) / (time.perf_counter() - start)
    settings.rate = LOAD * most
    loaded = Load(settings)
    await loaded.run()
    report = {"most requests per second": round(most, 2), "requests": len(loaded.seconds)}
    return {**report, **quantiles(loaded.seconds), "outcomes": dict(loaded.kinds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds of the stub engine")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two parts")
    parser.add_argument("--clients", type=int, default=64)
    settings = parser.parse_args()
    vars(settings).update(rate=None, users=100, responses=2, ind=1, kill=False)
    here, there = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        service = multiprocessing.get_context("spawn").Process(
            target=serve, args=(folder, settings.delay, there), daemon=True
        )
        service.start()
        settings.url = here.recv()
        print(json.dumps(asyncio.run(measure(settings)), indent=2))
        here.send(None)
        service.join()


if __name__ == "__main__":
    main()
