"""The policy example end to end: a service, our client in veRL's own trainer, two steps of GRPO, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from serving_world import StubEngine, configured, running, service_of, shown

from pgenrm_train.chains.chain import write_chain
from pgenrm_train.run.process import child_environment

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "tests" / "data" / "psi_nano"
QUERIES, GROUP, STEPS = 1, 4, 2


def score(text: str) -> int:
    return 1 + len(text) % 9


def test_a_policy_is_trained_by_the_service_and_measured(tmp_path):
    out = tmp_path / "run"
    (out / "sft").mkdir(parents=True)
    # As a policy, a model that writes chains: all its answers are outside the language.
    (out / "sft" / "checkpoint").symlink_to(NANO)
    engine = StubEngine(lambda r, _: write_chain("length", [("length", 100)], [[score(t)] for t in shown(r)]))
    command = [
        sys.executable, "-m", "examples.policy.train", "--out", str(out), "--users", "2", "--no-control",
        "--queries", str(QUERIES), f"cre.steps={STEPS}", "cre.prompts_per_step=2", "cre.mini_batch_prompts=2",
        f"cre.group_size={GROUP}", "cre.micro_batch_size=8", "model.max_response_tokens=8",
    ]  # fmt: skip
    with running(service_of(configured(tmp_path), engine)) as connection:
        url = ["--url", str(connection.base_url)]
        done = subprocess.run(
            [*command, *url], cwd=ROOT, env=child_environment(), capture_output=True, text=True
        )
        stored = connection.get("/v1/users/u01.work/votes").json()["votes"]
    log = out / "own" / "verl.log"
    assert done.returncode == 0, done.stderr[-1500:] + (log.read_text()[-3000:] if log.exists() else "")
    assert f"own: step {STEPS}/{STEPS} reward" in done.stdout and len(stored) == 6
    results, answers = json.loads((out / "results.json").read_text()), 2 * 3 * QUERIES * GROUP
    for signs in results["signs"].values():
        assert (signs["utility"], signs["foreign"], signs["unscored"]) == (0, 1, 0)
    assert len(results["training"]["own"]) == STEPS
    assert results["utility"]["own: after − before"] == {"mean": 0, "low": 0, "high": 0}
    evaluated = (out / "own" / "evaluation" / f"{STEPS}.jsonl").read_text().splitlines()
    rollouts = (out / "own" / "rollouts" / f"{STEPS}.jsonl").read_text().splitlines()
    assert len(evaluated) == answers and len(rollouts) == 2 * GROUP
    for row in map(json.loads, (*evaluated, *rollouts)):
        assert row["score"] == score(row["output"]), "veRL has the service's scores, each with its own answer"
    # A finished run is read again: neither service nor trainer is needed.
    again = subprocess.run(
        [*command, "--url", "http://127.0.0.1:9"], cwd=ROOT, env=child_environment(), capture_output=True
    )
    assert again.returncode == 0 and json.loads((out / "results.json").read_text()) == results
