"""The policy example end to end: our service, our client in veRL's own trainer, two steps of GRPO, the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pgenrm_train.run.process import child_environment

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "tests" / "data" / "psi_nano"
USERS, QUERIES, GROUP, STEPS = 2, 1, 4, 2


def test_a_policy_is_trained_by_the_service_and_measured(tmp_path):
    out = tmp_path / "run"
    (out / "sft").mkdir(parents=True)
    # A model that writes chains: as a policy, its texts are outside the language of the answers.
    (out / "sft" / "checkpoint").symlink_to(NANO)
    command = [
        sys.executable, "-m", "examples.policy.train", "--out", str(out), "--reward-model", str(NANO),
        "--users", str(USERS), "--queries", str(QUERIES), "--no-control", f"cre.steps={STEPS}",
        "cre.prompts_per_step=2", "cre.mini_batch_prompts=2", f"cre.group_size={GROUP}", "cre.micro_batch_size=8",
        "model.max_prompt_tokens=64",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True)
    log = out / "own" / "verl.log"
    assert done.returncode == 0, done.stderr[-1500:] + (log.read_text()[-3000:] if log.exists() else "")
    results, asked = json.loads((out / "results.json").read_text()), USERS * 3 * QUERIES * GROUP
    for signs in results["signs"].values():
        assert -1 <= signs["utility"] <= 1 and signs["unscored"] < asked / 2
        assert 1 <= signs["reward"] <= 10, "scores of the service, not numbers in place of missing ones"
    assert len(results["training"]["own"]) == STEPS
    assert set(results["utility"]) == {"own: after − before"}
    assert f"own: step {STEPS}/{STEPS}" in done.stdout
    dump = [json.loads(line) for line in (out / "own" / "rollouts" / "2.jsonl").read_text().splitlines()]
    assert {row["gts"].partition(".")[0] for row in dump} <= {"u00", "u01"} and len(dump) <= 2 * GROUP
    # A finished run is read again: neither service nor trainer starts.
    again = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True)
    assert again.returncode == 0 and "own: step" not in again.stdout
    assert json.loads((out / "results.json").read_text()) == results
