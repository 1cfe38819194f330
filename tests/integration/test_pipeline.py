"""The whole method at smoke size, as a user runs it, with real engines; then killed in every stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
import wandb_server

from pgenrm_train.config import ROOT

TIMEOUT = 1500


def start(run_dir: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "pgenrm_train",
        "recipe=pipeline",
        "pipeline.budget=smoke",
        f"run_dir={run_dir}",
        *more,
    ]
    log = (run_dir.parent / f"{run_dir.name}.log").open("a")
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=True, preexec_fn=_hear_ctrl_c
    )


def _hear_ctrl_c() -> None:
    """A shell that runs the tests in the background has made them, and so their children, deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def words(run_dir: Path) -> str:
    return (run_dir.parent / f"{run_dir.name}.log").read_text()[-4000:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pipeline") / "run"
    assert start(run_dir).wait(timeout=TIMEOUT) == 0, words(run_dir)
    return run_dir


def test_run_folder_holds_what_interfaces_promise(finished: Path) -> None:
    for name in (
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "predictions.parquet",
        "results.json",
        "report.html",
        "checkpoint",
    ):
        assert (finished / name).exists(), name
    results = json.loads((finished / "results.json").read_text())
    promised = {
        "accuracy", "stderr", "ci95", "macro_accuracy", "n_pairs", "n_users", "ties", "failures",
        "order_flip_rate", "protocol", "ind", "pro", "model", "data", "seeds",
    }  # fmt: skip
    assert promised <= results.keys()
    assert list(results["stages"]) == ["psi", "cre", "curriculum"]
    assert 0 <= results["accuracy"] <= 1 and results["n_pairs"] >= 40
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all({"step", "stage"} <= line.keys() for line in lines)
    for stage in ("psi", "cre", "curriculum"):
        measured = [line for line in lines if line["stage"] == stage and "eval/accuracy" in line]
        shares = [
            line[f"eval/truth/{name}"] for line in measured for name in ("allowed", "recalled", "votes")
        ]
        assert shares and all(0 <= share <= 1 for share in shares)


def test_a_question_is_scored_with_samples_of_ones_own_and_of_similar_users(finished: Path) -> None:
    question = finished.parent / "question.json"
    chosen, rejected = (
        "No worries. Tests confirm. Stay strong. Rather muddled.",
        "Respectfully yours. Grandma did. Done. Partly wrong.",
    )
    history = [{"query": "Plan my report?", "chosen": chosen, "rejected": rejected}]
    responses = [
        "No worries. Grandma did. Stay strong. Partly wrong.",
        "Kindly note. Studies agree. Noted. Fully correct.",
    ]
    question.write_text(
        json.dumps(
            {"user_id": "ann", "query": "Explain my slides?", "responses": responses, "history": history}
        )
    )
    command = [
        sys.executable,
        "-m",
        "pgenrm_train",
        "recipe=score",
        f"run_dir={finished}",
        f"score.input={question}",
    ]
    done = subprocess.run(
        [*command, "score.ind=16", "score.pro=2"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    for source, asked in (("own", 16), ("similar", 2)):
        assert (
            facts[source]["asked"] == asked == facts[source]["used"] + sum(facts[source]["failures"].values())
        )
    assert len(set(facts["similar"]["users"])) == 2 and facts["scores"].keys() == {
        "response_1",
        "response_2",
    }


def test_the_checkpoint_of_psi_served_by_vllm_answers_with_chains_that_parse(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())["stages"]["psi"]
    assert found["failed_orders"] <= 0.05 * 2 * found["n_pairs"], found["failures"]


def test_every_stage_trained_and_its_checkpoint_loads(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = []
    for stage, steps in (("psi", 20), ("cre", 3), ("curriculum", 3)):
        manifest = json.loads((finished / stage / "manifest.json").read_text())
        assert manifest["status"] == "complete" and manifest["steps"] == steps
        model = AutoModelForCausalLM.from_pretrained(finished / stage / "checkpoint")
        card = (finished / stage / "checkpoint" / "README.md").read_text()
        assert (
            f"- {stage}\n" in card and f"| optimiser steps | {steps} |" in card and str(finished) not in card
        )
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(finished / stage / "checkpoint"))
        weights.append(next(model.parameters()).detach())
        assert not list((finished / stage / "checkpoint").glob("*.bin")), "no pickles"
    assert (weights[0] != weights[1]).any() and (weights[1] != weights[2]).any()


def test_the_offline_runs_of_wandb_show_accuracy_of_all_stages_on_one_axis(
    finished: Path, tmp_path: Path
) -> None:
    """`wandb sync` opens each run and sends it to a stub of W&B's server."""
    steps = {}
    for stage in ("psi", "cre", "curriculum"):
        (run,) = (finished / stage).glob("wandb/offline-run-*")
        command = [sys.executable, "-m", "wandb", "sync", str(shutil.copytree(run, tmp_path / run.name))]
        with wandb_server.serve() as server:
            done = subprocess.run(
                command,
                cwd=tmp_path,
                env={**os.environ, "HOME": str(tmp_path), **server.environment},
                capture_output=True,
                text=True,
                timeout=120,
            )
        assert done.returncode == 0, done.stderr
        rows = [row for row in server.history if "eval/accuracy" in row]
        assert all(
            row["eval/accuracy_low"] <= row["eval/accuracy"] <= row["eval/accuracy_high"] for row in rows
        )
        assert all(row["eval/chains"]["nrows"] > 0 for row in rows)
        steps[stage] = [row["_step"] for row in rows]
    assert steps == {"psi": [0, 10, 20], "cre": [20, 23], "curriculum": [23, 26]}


def test_a_second_start_changes_nothing(finished: Path) -> None:
    before = (finished / "evaluate" / "results.json").stat().st_mtime_ns
    assert start(finished).wait(timeout=120) == 0, words(finished)
    assert (finished / "evaluate" / "results.json").stat().st_mtime_ns == before


def test_two_engines_evaluate_every_checkpoint_as_one_does(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(
        finished, tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns("evaluate", ".lock")
    )
    command = [
        sys.executable,
        "-m",
        "pgenrm_train",
        "recipe=evaluate",
        "pipeline.budget=smoke",
        f"run_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(
        [*command, "cluster.engines=2"], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    index = ["model", "study", "key", "sample"]
    one, two = (
        pd.read_parquet(folder / "evaluate" / "predictions.parquet")
        .fillna({"study": ""})
        .set_index(index)
        .sort_index()
        for folder in (finished, tmp_path / "run")
    )
    assert one.index.equals(two.index) and {"psi", "cre", "curriculum"} <= set(
        one.index.get_level_values("model")
    )
    written = one["text"].notna()  # by a model: baselines give scores alone
    assert (one["text"] == two["text"])[written].groupby("model").mean().min() > 0.9


def test_other_settings_are_refused_in_one_sentence(finished: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pgenrm_train",
        "recipe=psi",
        "pipeline.budget=smoke",
        f"run_dir={finished}",
        "psi.learning_rate=1e-5",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "psi.learning_rate: 0.0003 → 1e-05" in done.stderr and "Traceback" not in done.stderr


def _exists(pattern: str) -> Callable[[Path], bool]:
    return lambda run_dir: any(run_dir.glob(pattern))


STAGES = {  # stage → what shows that it is at work
    "build_data": _exists("build_data/manifest.json"),
    "build_sec": _exists("build_sec/manifest.json"),
    "psi": _exists("psi/steps/checkpoint-*"),
    "cre": _exists("cre/metrics.jsonl"),
    "curriculum": _exists("curriculum/metrics.jsonl"),
    "prototypes": _exists("prototypes/manifest.json"),
    "evaluate": _exists("evaluate/psi/predictions-*/part-*.parquet"),
}


def test_the_time_line_covers_the_run(finished: Path) -> None:
    spent = json.loads((finished / "timeline.json").read_text())
    trained = {"start-up", "generation", "log-probabilities", "update", "weight sync", "validation", "export"}
    assert trained <= set(spent["cre"]) and trained <= set(spent["curriculum"]) | {"start-up"}
    assert {"start-up", "update", "checkpoints", "export"} <= set(spent["psi"])
    assert {"start-up", "generation", "statistics and report"} <= set(spent["evaluate"])
    stages = json.loads((finished / "manifest.json").read_text())["stages"].values()
    wall = sum(stage["wall_seconds"] for stage in stages)  # without the imports of their processes
    assert wall < sum(sum(parts.values()) for parts in spent.values()) < 1.5 * wall
    assert "Where the time went" in (finished / "report.md").read_text()


def test_killed_in_every_stage_and_rerun_ends_in_the_same_table(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for stage, at_work in STAGES.items():
        process = start(run_dir)
        wait_until(lambda at_work=at_work: at_work(run_dir), process, run_dir, stage)
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, f"left behind after kill -9 in {stage}: {alive}"
    assert start(run_dir).wait(timeout=TIMEOUT) == 0, words(run_dir)
    same, again = (json.loads((d / "results.json").read_text()) for d in (finished, run_dir))
    for stage in same["stages"]:
        assert again["stages"][stage]["n_pairs"] == same["stages"][stage]["n_pairs"]
        assert again["stages"][stage]["accuracy"] == pytest.approx(
            same["stages"][stage]["accuracy"], abs=1e-9
        ), stage


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str], run_dir: Path, what: str
) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, f"ended before {what} was at work:\n{words(run_dir)}"
        assert time.monotonic() < end, f"{what} never started:\n{words(run_dir)}"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_an_ended_run_can_be_resumed_and_leaves_no_process(how: str, tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches all processes, a scheduler's SIGTERM the first one."""
    run_dir = tmp_path / "run"
    process = start(run_dir, "psi.max_steps=200")
    wait_until(lambda: STAGES["psi"](run_dir), process, run_dir, "psi")
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT) if how == "Ctrl-C" else process.terminate()
    assert process.wait(timeout=60) == 130
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    manifest = json.loads((run_dir / "psi" / "manifest.json").read_text())
    assert manifest["status"] == "interrupted" and manifest["wall_seconds"] > 0
    log = run_dir.parent / "run.log"
    assert "error: interrupted; the same command continues the run" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert "Writing model shards" not in log.read_text()  # a bar that Ctrl-C interrupts prints a traceback
