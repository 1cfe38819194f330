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
WORDS = (
    "pipeline.budget=smoke", f"model.path={ROOT / 'tests/data/psi_nano'}", "data.users=20",
    "data.heldout_users=8", "cluster.engines=1", "tracking=none", "eval.draws=100",
)  # fmt: skip


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "pgenrm_train", *words, *WORDS, f"run_dir={folder}"]


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(folder, *words), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_best_of_n_resumes_after_a_kill_and_labels_share_the_run(tmp_path):
    words = ("recipe=best_of_n", "best_of_n.sizes=[2,4]", "best_of_n.prompts=12")
    folder = tmp_path / "best_of_n"
    process = subprocess.Popen(
        command(tmp_path, *words), env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(folder.rglob("part-*.parquet")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.read_bytes() for path in folder.rglob("part-*.parquet")}
    output = run(tmp_path, *words)
    assert before and all(path.read_bytes() == content for path, content in before.items())
    assert "Circle and knockout at equal chains" in output and "best of 4 by the model" in output.lower()
    results = json.loads((folder / "results.json").read_text())
    of = {(row["n"], row["chooser"]): row for row in results["chosen"]}
    assert {n for n, _ in of} == {2, 4} and results["prompts"] == 12 and results["users"] == 8
    for n in (2, 4):
        best = of[n, "best"]["utility"]
        assert all(of[n, name]["utility"] <= best for name in ("model", "model, knockout", "ideal", "random"))
        assert of[n, "ideal"]["gain over random"] > 0
    report = (folder / "report.html").read_text()
    assert 'class="chain"' in report and "PolyCollection" in report
    run(tmp_path, "recipe=label", "label.max_prompts=10")
    made = tmp_path / "label"
    facts = json.loads((made / "results.json").read_text())
    rows = datasets.load_dataset(str(made / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == facts["labels"] == facts["agreement"]["compared labels"]
    assert facts["labels"] + sum(facts["left_out"].values()) >= facts["prompts"] == 10
