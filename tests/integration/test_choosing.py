"""recipe=label and recipe=best_of_n with a real model: a killed start, data set, results and report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
BOTH = """
import sys
from pgenrm_train.config import load
from recipes.choosing import best_of_n, label
best_of_n.run(load("recipe=best_of_n", *sys.argv[1:]))
label.run(load("recipe=label", "label.max_prompts=10", *sys.argv[1:]))
"""


def test_best_of_n_resumes_after_a_kill_and_labels_share_the_run(tmp_path):
    words = [
        "pipeline.budget=smoke", f"model.path={ROOT / 'tests/data/psi_nano'}", "data.users=20",
        "data.heldout_users=8", "cluster.engines=1", "tracking=none", "eval.draws=100",
        "best_of_n.sizes=[2,4]", "best_of_n.prompts=12", f"run_dir={tmp_path}",
    ]  # fmt: skip
    folder, python = tmp_path / "best_of_n", sys.executable
    process = subprocess.Popen(
        [python, "-m", "pgenrm_train", "recipe=best_of_n", *words], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(folder.rglob("part-*.parquet")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.read_bytes() for path in folder.rglob("part-*.parquet")}
    done = subprocess.run([python, "-c", BOTH, *words], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert before and all(path.read_bytes() == content for path, content in before.items())
    assert "Circle and knockout at equal chains" in done.stdout and "Best of 4 by the model" in done.stdout
    results = json.loads((folder / "results.json").read_text())
    of = {(row["n"], row["chooser"]): row for row in results["chosen"]}
    assert {n for n, _ in of} == {2, 4} and results["prompts"] == 12 and results["users"] == 8
    for n in (2, 4):
        best = of[n, "best"]["utility"]
        assert all(of[n, name]["utility"] <= best for name in ("model", "model, knockout", "ideal", "random"))
        assert of[n, "ideal"]["gain over random"] > 0
    report = (folder / "report.html").read_text()
    assert 'class="chain"' in report and "PolyCollection" in report
    made = tmp_path / "label"
    facts = json.loads((made / "results.json").read_text())
    rows = datasets.load_dataset(str(made / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == facts["labels"] == facts["agreement"]["compared labels"]
    assert facts["labels"] + sum(facts["left_out"].values()) >= facts["prompts"] == 10
