"""Time that the service adds to a request: a stub engine of known delay, one request at a time.

    python benchmarks/serving/own_cost.py                  # bar: median at most 3 ms above the delay
    python benchmarks/serving/own_cost.py --delay 0.1 --requests 500

The app runs with uvicorn in this process as under `serve.local=true`, the client over real HTTP.  Users are
stored, and no question occurs twice, so that each request reads votes and writes to the cache.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[2]),
    str(Path(__file__).resolve().parents[2] / "tests" / "support"),
]
from serving_world import VOTE, StubEngine, configured, running, service_of  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds of the stub engine")
    parser.add_argument("--requests", type=int, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = service_of(configured(Path(folder)), StubEngine(seconds=arguments.delay))
        times = []
        with running(service) as client:
            client.put("/v1/users/ann/votes", json={"votes": [VOTE] * 5})
            for number in range(arguments.requests):
                body = {"user_id": "ann", "query": f"Question {number}?", "responses": ["Short.", "Longer."]}
                start = time.perf_counter()
                client.post("/v1/score", json=body).raise_for_status()
                times.append(time.perf_counter() - start - arguments.delay)
    cost = [1000 * seconds for seconds in sorted(times)]
    print(
        json.dumps(
            {"median ms": round(statistics.median(cost), 2), "p99 ms": round(cost[-len(cost) // 100], 2)}
        )
    )


if __name__ == "__main__":
    main()
