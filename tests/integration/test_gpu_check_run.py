"""gpu_check on a CPU, tiny: every engine starts, memory is compared with the plan, the verdict is PASSED."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgenrm_train.config import ROOT

TINY = [
    "data.users=60",
    "sec.max_chains=100",
    "cre.prompts_per_step=4",
    "cre.mini_batch_prompts=4",
    "cre.group_size=4",
    "cre.micro_batch_size=16",
    "cre.rows=16",
    "data.max_test_pairs=4",
]


@pytest.mark.timeout(1800)
@pytest.mark.slow  # the engines and settings are those of the pipeline's test
def test_the_recipe_of_the_first_day_passes_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pgenrm_train", "recipe=gpu_check", f"run_dir={tmp_path / 'run'}", *TINY]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("verdict: PASSED")
    report = json.loads((tmp_path / "run" / "gpu_check.json").read_text())
    rows = {row["recipe"]: row for row in report["recipes"]}
    measured = ("psi", "cre", "evaluate", "psi (Qwen3, LoRA)", "cre (Qwen3, LoRA)")
    assert all(rows[stage]["peak_gib"] > 0.1 and rows[stage]["planned_gib"] > 0.1 for stage in measured)
    assert all(rows[stage]["seconds_per_step"] > 0 for stage in measured if stage != "evaluate")
    assert rows["cre"]["generated_per_second"] > 0 and rows["evaluate"]["chains_per_second"] > 0
