"""gpu_check's own arithmetic: measurements, their comparison with the plan, and the verdict.

The recipe itself runs in tests/integration.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgenrm_train.config import load
from pgenrm_train.errors import BackendError, PreflightError
from recipes import gpu_check
from recipes.wiring import gpu_check as measuring
from recipes.wiring.gpu_check import Measurement, measure, passes, report_of, watching


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    return load("recipe=gpu_check", f"run_dir={tmp_path_factory.mktemp('run')}")


def complete(folder: Path, stage: str, **files: str) -> None:
    (folder / stage).mkdir(exist_ok=True)
    (folder / stage / "manifest.json").write_text('{"status": "complete"}')
    for name, text in files.items():
        (folder / stage / name.replace("_json", ".json")).write_text(text)


def test_three_steps_of_everything_are_configured(shipped) -> None:  # type: ignore[no-untyped-def]
    assert (shipped.psi.max_steps, shipped.cre.steps, shipped.psi.nano_start, shipped.judge.kind) == (
        3,
        3,
        None,
        "oracle",
    )
    big = load("recipe=gpu_check", "model=nano_1b", "cluster=gpu8")
    assert (
        big.model.dtype == "bfloat16"
        and big.model.kind == "nano"
        and big.model.nano.hidden // big.model.nano.heads == 128
    )


def test_the_second_pass_trains_adapters_of_another_family(shipped) -> None:  # type: ignore[no-untyped-def]
    config, recipe = passes(shipped)["cre (Qwen3, LoRA)"]
    assert recipe == "cre" and config.run_dir == f"{shipped.run_dir}/qwen3_lora"
    assert config.model.nano.family == "qwen3" and config.model.lora.rank > 0 == shipped.model.lora.rank
    assert load("recipe=gpu_check", "model=nano_1b").model.nano.family == "llama"


def test_the_verdict(shipped) -> None:  # type: ignore[no-untyped-def]
    folder = Path(shipped.run_dir)
    complete(folder, "psi")
    complete(folder, "cre")
    (folder / "cre" / "metrics.jsonl").write_text(
        json.dumps({"step": 3, "cre/response_length": 50.0, "cre/time/step": 4.0, "cre/time/gen": 2.0}) + "\n"
    )
    complete(folder, "evaluate", results_json='{"n_pairs": 20}')
    report = report_of(
        shipped, {recipe: Measurement(60.0, 2.5, [1.0, 3.0, 5.0]) for recipe in passes(shipped)}
    )
    written = json.loads(json.dumps(report.as_json()))
    by_name = {row["recipe"]: row for row in written["recipes"]}
    assert written["passed"] and written["minutes"] == 7.0
    assert by_name["build_data"] == {"recipe": "build_data", "seconds": 60.0, "error": None}
    assert by_name["psi"]["seconds_per_step"] == 2.0 and by_name["psi"]["planned_gib"] > 0
    assert by_name["cre"]["generated_per_second"] == 16 * 8 * 50 / 2
    assert by_name["evaluate"]["chains_per_second"] == round(80 / 60, 3), "both models, both orders"
    assert report.text().splitlines()[-1] == "verdict: PASSED in 7.0 minutes"
    slow = report_of(shipped, {recipe: Measurement(600.0) for recipe in passes(shipped)})
    assert not slow.passed and "SLOW" in slow.text()
    failed = report_of(
        shipped,
        {
            "build_data": Measurement(1.0),
            "build_sec": Measurement(1.0),
            "psi": Measurement(1.0, error="out of memory"),
        },
    )
    assert (
        not failed.passed
        and "FAILED: out of memory" in failed.text()
        and "FAILED at psi" in failed.text().splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("raised", "kept"),
    [(BackendError("torchrun ended"), "torchrun ended"), (SystemExit(2), "see its message above")],
)
def test_a_failed_recipe_is_kept_for_the_verdict(shipped, raised, kept, monkeypatch):
    def fails(*_: object) -> None:
        raise raised

    monkeypatch.setattr(measuring, "launch", fails)
    assert kept in (measure(shipped, "psi", 60.0, "too late").error or "")


def test_a_recipe_that_hangs_is_ended_with_all_that_it_started(shipped, monkeypatch):
    import psutil

    started: list[psutil.Process] = []

    def hangs(*_: object) -> None:
        shell = subprocess.Popen(["bash", "-c", "sleep 60 & wait"])
        while not (children := psutil.Process(shell.pid).children()):
            time.sleep(0.01)
        started.extend(children)
        raise BackendError(f"ended with code {shell.wait()}")

    monkeypatch.setattr(measuring, "launch", hangs)
    measurement = measure(shipped, "cre", 0.5, "too late")
    assert measurement.error == "too late" and measurement.seconds < 30
    assert not psutil.wait_procs(started, timeout=10)[1]


def test_memory_of_children_and_times_of_steps_are_seen(shipped) -> None:  # type: ignore[no-untyped-def]
    measurement, metrics = Measurement(), Path(shipped.run_dir) / "prototypes" / "metrics.jsonl"
    metrics.parent.mkdir()
    with watching(shipped, "prototypes", measurement, every=0.02):
        code = "b = bytearray(200 << 20); print('ready', flush=True); input()"
        pipe = subprocess.PIPE
        child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
        assert child.stdout is not None
        child.stdout.readline()
        metrics.write_text('{}\n{"eval/accuracy": 1.0}\n{}\n')
        end = time.monotonic() + 20
        while (len(measurement.steps) < 2 or measurement.peak_gib < 0.19) and time.monotonic() < end:
            time.sleep(0.02)
        child.communicate(b"\n")
    assert len(measurement.steps) == 2 and 0.19 < measurement.peak_gib < 0.4


def test_preflight_comes_first(tmp_path: Path) -> None:
    lacking = load("recipe=gpu_check", f"run_dir={tmp_path / 'run'}", "cluster.min_free_disk_gib=1e6")
    with pytest.raises(PreflightError, match="GiB of disk are free"):
        gpu_check.run(lacking)
