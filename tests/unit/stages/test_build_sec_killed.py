"""build_sec as a user starts it, against a server that fails in every way, killed and started again."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from llm_server import serve, slowly

from pgenrm_train.chains.chain import write_chain
from pgenrm_train.config import ROOT

VOTES, IN_FLIGHT = 30, 8
QUESTIONS = 2 * VOTES  # both orders
TROUBLES = [
    {"status": 500},
    {"status": 429, "headers": {"retry-after": "0"}},
    {"reset": True},
    {"raw": b"<html>"},
    {"hang": True},
]


class Teacher:
    """Server that prefers texts beginning with `good`; every third call fails.

    Counts paid completions by question.
    """

    def __init__(self) -> None:
        self.paid: Counter[str] = Counter()

    def __call__(self, body, number):
        trouble = TROUBLES[number // 3 % len(TROUBLES)] if number % 3 == 0 else None
        if trouble:
            return slowly(1.5, {"reset": True}) if "hang" in trouble else trouble
        question = json.dumps([body["messages"], body["seed"]])
        self.paid[question] += 1
        name = hashlib.sha256(question.encode()).hexdigest()
        first = "<response_1>good" in body["messages"][1]["content"]
        scores = [[8, 8], [3, 3]] if first else [[3, 3], [8, 8]]
        return slowly(0.15, write_chain(f"About {name}.", [("brevity", 70), ("wit", 30)], scores))

    @property
    def paid_again(self) -> int:
        return sum(count - 1 for count in self.paid.values())


def command(folder: Path, url: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pgenrm_train", "recipe=build_sec", f"run_dir={folder / 'run'}"),
        *("data=pairs", f"data.path={folder / 'votes.jsonl'}", "sec.orders_per_pair=2", "tracking=none"),
        *("teacher=endpoint", f"teacher.base_url={url}", "teacher.name=stub"),
        *(f"teacher.max_in_flight={IN_FLIGHT}", "teacher.timeout_seconds=1", "teacher.attempts=3"),
        *("teacher.dollars_per_million_in=100", "teacher.dollars_per_million_out=100"),
    ]


def test_a_killed_factory_goes_on_and_pays_twice_for_nothing_but_what_was_in_flight(tmp_path):
    rows = [
        {"user_id": f"u{n % 6}", "context": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"}
        for n in range(VOTES)
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = Teacher()
    with serve(teacher) as server:
        first = subprocess.Popen(
            command(tmp_path, server.url), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 200
        while len(teacher.paid) < QUESTIONS // 2 and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
        known = len(teacher.paid)
        assert QUESTIONS // 2 <= known < QUESTIONS, "killed in the middle"
        done = subprocess.run(
            command(tmp_path, server.url), cwd=ROOT, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-2000:]
        asked = len(server.bodies)
        again = subprocess.run(
            command(tmp_path, server.url), cwd=ROOT, capture_output=True, text=True, timeout=400
        )
        assert again.returncode == 0 and len(server.bodies) == asked, "a complete stage asks nothing"
    assert teacher.paid_again <= IN_FLIGHT, "only what was in flight is paid twice"
    folder = tmp_path / "run/build_sec"
    kept = pq.read_table(folder / "sec.parquet").to_pylist()
    rejected = pq.read_table(folder / "rejected.parquet").to_pylist()
    asked_about = {(row["pair_id"], row["order"]) for row in [*kept, *rejected] if row["pair_id"]}
    assert (
        len(kept) == len({(row["pair_id"], row["order"]) for row in kept}) and len(asked_about) == QUESTIONS
    ), "nothing is lost"
    assert all(row["reason"].startswith("teacher:") for row in rejected if row["reason"]), (
        "nothing was wrong with what came back"
    )
    facts = json.loads((folder / "yield.json").read_text())
    assert facts["chains"] == len(kept) >= 0.9 * QUESTIONS
    # Calls that the kill cut off were paid unseen; all others are in the report.
    paid = sum(teacher.paid.values())
    assert paid - IN_FLIGHT <= facts["teacher"]["dollars"] / 15e-4 <= paid
    assert facts["teacher"]["from cache"] >= known - IN_FLIGHT
