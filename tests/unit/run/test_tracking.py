"""metrics.jsonl is always written; a tracking service is optional, never stops a run, gets no secret."""

import json
import math
import os
import re
import subprocess
import sys
import time

import pytest
from wandb_server import serve

from pgenrm_train.config import ROOT, Config, TrackingConfig, to_dict
from pgenrm_train.files import write_json, write_table
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import Tracker, _public, _short, samples_file
from pgenrm_train.stages.stage import _recorded, steps_before


def lines(path) -> list[dict]:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def silent(folder, stage="psi") -> Tracker:
    return Tracker(Config(recipe="psi", tracking=TrackingConfig(kind="none")), stage, folder)


def test_one_json_object_a_line(tmp_path):
    tracker = silent(tmp_path / "psi")
    tracker.log(1, {"psi/loss": 2.5, "psi/learning_rate": 1e-3})
    tracker.log(2, {"psi/loss": 2})
    tracker.close()
    assert lines(tmp_path / "psi" / "metrics.jsonl") == [
        {"step": 1, "stage": "psi", "psi/loss": 2.5, "psi/learning_rate": 1e-3},
        {"step": 2, "stage": "psi", "psi/loss": 2},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    tracker = silent(tmp_path)
    tracker.log(1, {"a": value, "b": 1.0})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "stage": "psi", "a": None, "b": 1.0}]


def test_a_second_start_appends(tmp_path):
    for step in (1, 2):
        silent(tmp_path).log(step, {"a": 1.0})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_is_to_happen_after_a_log_happens(tmp_path):
    tracker, beats = silent(tmp_path), []
    tracker.after_log = lambda: beats.append(1)
    tracker.log(1, {"a": 1.0})
    assert beats == [1]


class Service:
    """In place of wandb's run: it records, or fails from the n-th call on."""

    def __init__(self, fails_from: int = 10**9) -> None:
        self.logged, self.fails_from = [], fails_from

    def log(self, numbers, step):
        if len(self.logged) + 1 >= self.fails_from:
            raise OSError("disk full")
        self.logged.append((step, numbers))

    def finish(self):
        if self.fails_from < 10**9:
            raise OSError("disk full")


def test_a_service_that_breaks_is_reported_once_and_training_continues(tmp_path, capsys):
    tracker = silent(tmp_path)
    tracker._wandb = service = Service(fails_from=2)
    for step in range(5):
        tracker.log(step, {"a": 1.0})
    tracker.close()
    assert len(service.logged) == 1 and len(lines(tmp_path / "metrics.jsonl")) == 5
    assert capsys.readouterr().err.count("warning: W&B logging stopped") == 1


def test_a_service_that_breaks_at_the_end_is_reported(tmp_path, capsys):
    tracker = silent(tmp_path)
    tracker._wandb = Service(fails_from=100)
    tracker.log(1, {"a": 1.0})
    tracker.close()
    assert "disk full" in capsys.readouterr().err


def test_lines_of_another_process_are_forwarded_once_and_whole(tmp_path):
    tracker, engine = silent(tmp_path / "cre", "cre"), tmp_path / "engine.jsonl"
    tracker._wandb = service = Service()
    with tracker.follow(engine, every=0.02):
        for step in range(3):
            with engine.open("a") as file:
                file.write(
                    json.dumps({"step": step, "stage": "cre", "cre/reward": 0.5, "cre/kl": None}) + "\n"
                )
            time.sleep(0.05)
        with engine.open("a") as file:
            file.write('{"step": 3, "half a li')
    assert service.logged == [(step, {"cre/reward": 0.5}) for step in range(3)]


def test_a_validation_of_the_same_step_is_forwarded_too_with_its_sample_chains(tmp_path):
    tracker, engine = silent(tmp_path / "psi", "psi"), tmp_path / "engine.jsonl"
    tracker._wandb = service = Service()
    write_table(samples_file(engine, 50), [{"pair_id": "a", "text": "a chain"}])
    records = [
        {"step": 50, "stage": "psi", "psi/loss": 0.5},
        {"step": 50, "stage": "psi", "eval/accuracy": 0.7},
    ]
    with tracker.follow(engine, every=0.02):
        engine.write_text("".join(json.dumps(record) + "\n" for record in records))
        time.sleep(0.2)
        with engine.open("a") as file:  # a resumed engine writes a step again
            file.write(json.dumps(records[0]) + "\n")
    (first, second) = service.logged
    assert first == (50, {"psi/loss": 0.5})
    table = second[1].pop("eval/chains")
    assert second == (50, {"eval/accuracy": 0.7}) and table.data == [["a", "a chain"]]


def test_steps_of_a_later_stage_follow_those_of_the_stages_before(tmp_path):
    tracker = Tracker(Config(recipe="cre", tracking=TrackingConfig(kind="none")), "cre", tmp_path, 40)
    tracker._wandb = service = Service()
    tracker.log(2, {"eval/accuracy": 0.5})
    assert service.logged == [(42, {"eval/accuracy": 0.5})]
    assert lines(tmp_path / "metrics.jsonl")[0]["step"] == 2, "files count the steps of their stage"


def test_a_stage_takes_over_the_tracker_of_the_joint_session_and_sends_no_line_twice(tmp_path):
    config = Config(recipe="cre", run_dir=str(tmp_path), tracking=TrackingConfig(kind="none"))
    folder, service = StageFolder.read(tmp_path, "curriculum"), Service()
    early = Tracker.begin_early(config, "curriculum", folder.path, 7)
    early._wandb = service
    record = json.dumps({"step": 1, "stage": "curriculum", "eval/accuracy": 0.5}) + "\n"
    with early.follow(early.path, every=0.01):
        early.path.write_text(record)
    assert service.logged == [(8, {"eval/accuracy": 0.5})], "live, before the stage begins"
    folder.begin(config={}, settings={}, inputs={}, seed=0)
    with _recorded(config, folder) as tracker:
        assert tracker is early and not Tracker.early
        with tracker.follow(tracker.path, every=0.01):
            pass
    assert len(service.logged) == 1


def test_the_step_of_a_stage_begins_after_the_complete_training_stages(tmp_path):
    config = Config(recipe="curriculum", run_dir=str(tmp_path))
    for stage, status in (("psi", "complete"), ("cre", "interrupted")):
        write_json(tmp_path / stage / "manifest.json", {"stage": stage, "status": status, "steps": 30})
    assert [steps_before(config, stage) for stage in ("build_sec", "psi", "curriculum")] == [0, 0, 30]


def test_settings_that_are_sent_hold_no_address_and_no_name_of_a_credential():
    config = Config(recipe="psi")
    config.teacher.api_key_env, config.teacher.base_url = "MY_KEY", "http://user:password@host/v1"
    sent = json.dumps(_public(to_dict(config)))
    assert "MY_KEY" not in sent and "password" not in sent and "learning_rate" in sent


@pytest.mark.parametrize("length", [5, 128, 129, 400])
def test_a_name_that_wandb_finds_too_long_is_shortened_and_stays_its_own(length):
    names = [_short("é" * length + end, "/psi") for end in "ab"]
    assert names[0] != names[1] and all(len(name) <= 128 and name.endswith("/psi") for name in names)
    assert (names[0] == "é" * length + "a/psi") == (length == 5)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


TRACK = """
import sys
from pathlib import Path
from pgenrm_train.config import Config, TrackingConfig
from pgenrm_train.run.tracking import Tracker
config = Config(recipe="psi", run_dir="run", tracking=TrackingConfig(kind={kind!r}))
tracker = Tracker(config, "psi", Path({folder!r}))
tracker.log(1, {{"psi/loss": 1.0, "psi/nan": float("nan")}})
tracker.close()
print("wandb" in sys.modules)
"""


def test_no_tracking_imports_no_wandb(tmp_path):
    done = python(TRACK.format(kind="none", folder=str(tmp_path)))
    assert done.stdout.strip() == "False" and done.stderr == ""
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_offline_tracking_leaves_files_and_prints_nothing(tmp_path):
    done = python(TRACK.format(kind="offline", folder=str(tmp_path)))
    assert done.returncode == 0 and done.stdout.strip() == "True" and "warning" not in done.stderr, (
        done.stderr
    )
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


SYSTEM = """
import sys
from pathlib import Path
from pgenrm_train.config import Config, TrackingConfig
from pgenrm_train.run.tracking import Tracker
config = Config(recipe="psi", run_dir="run", tracking=TrackingConfig(kind="offline"))
config.cluster.device = sys.argv[2]
tracker = Tracker(config, "psi", Path(sys.argv[1]))
print("hidden", tracker._wandb.settings.x_disable_stats)
tracker.close()
"""


@pytest.mark.parametrize(("device", "hidden"), [("cuda", "False"), ("cpu", "True")])
def test_wandb_records_the_gpus(device, hidden, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SYSTEM, str(tmp_path), device],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split()[-2:] == ["hidden", hidden], done.stderr


def test_a_wandb_that_cannot_start_does_not_stop_the_run(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('broken installation')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = python(TRACK.format(kind="offline", folder=str(tmp_path / "psi")), PYTHONPATH=path)
    assert done.returncode == 0 and done.stderr.count("warning: W&B logging stopped") == 1
    assert len(lines(tmp_path / "psi" / "metrics.jsonl")) == 1


# ---- a real client and a stub of W&B's server ----

ONLINE = """
import sys
from pathlib import Path
from pgenrm_train.run import tracking
from pgenrm_train.config import Config, TrackingConfig
tracking.START_SECONDS = tracking.FINISH_SECONDS = 4.0
config = Config(recipe="psi", run_dir="runs/mine", tracking=TrackingConfig(kind={kind!r}, project="ours"))
config.teacher.base_url = "http://user:password@host/v1"
tracker = tracking.Tracker(config, "psi", Path({folder!r}))
tracker.log(1, {{"psi/loss": 2.0, "eval/accuracy": 0.75}})
print("logged", flush=True)
sys.stdin.readline()
tracker.log(2, {{"psi/loss": 1.0, "eval/accuracy": 0.5}})
if {link}:
    tracker.link({{"steps": 2}})
tracker.close()
"""


def tracked(folder, server, kind="wandb", link=True) -> subprocess.Popen:
    """A stage that waits for a line after its first step."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder.parent), **server.environment}
    code = ONLINE.format(kind=kind, folder=str(folder), link=link)
    pipe = subprocess.PIPE
    found = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert found.stdout.readline() == "logged\n", found.stderr.read()
    return found


def sync(command: str, home, server) -> None:
    """The command that the warning names."""
    environment = {**os.environ, "HOME": str(home), **server.environment}
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def made(folder) -> None:
    """Files of a finished stage."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "model.safetensors").write_text("weights")
    (folder / "predictions.parquet").write_text("rows")
    (folder / "report.html").write_text("<html>")


ARTIFACTS = {("mine-psi-" + kind, kind) for kind in ("config", "predictions", "report")}


def test_a_run_arrives_with_its_group_its_accuracy_and_what_was_made(tmp_path):
    made(tmp_path / "psi")
    with serve() as server:
        _, err = tracked(tmp_path / "psi", server).communicate("\n", timeout=60)
        assert "warning" not in err
        (run, *_) = server.runs
        assert (run["project"], run["groupName"], run["jobType"], run["displayName"]) == (
            "ours",
            "mine",
            "psi",
            "mine/psi",
        )
        assert "password" not in json.dumps(server.runs) and "learning_rate" in run["config"]
        assert [row["eval/accuracy"] for row in server.history] == [0.75, 0.5]
        assert server.summary["eval/accuracy"] == 0.75, "of the published checkpoint"
        assert set(server.artifacts) == ARTIFACTS | {("mine-psi-checkpoint", "model")}


def test_without_the_network_a_run_starts_offline_and_is_sent_later(tmp_path):
    made(tmp_path / "psi")
    with serve() as server:
        pass
    _, err = tracked(tmp_path / "psi", server).communicate("\n", timeout=60)
    (warning,) = [line for line in err.splitlines() if line.startswith("warning")]
    command = re.search(
        r"W&B is not reached .*; tracking continues offline, and (wandb sync \S+) sends it later", warning
    )
    assert command and len(lines(tmp_path / "psi" / "metrics.jsonl")) == 2
    with serve(server.port) as server:
        sync(command[1], tmp_path, server)
        assert len(server.history) == 2 and set(server.artifacts) >= ARTIFACTS


def test_a_network_that_is_lost_on_the_way_costs_nothing(tmp_path):
    with serve() as server:
        stage = tracked(tmp_path / "psi", server, link=False)
    _, err = stage.communicate("\n", timeout=60)
    assert stage.returncode == 0 and len(lines(tmp_path / "psi" / "metrics.jsonl")) == 2
    command = re.search(r"metrics.jsonl is complete, and (wandb sync .*) sends the rest", err)
    assert command, err
    with serve(server.port) as server:
        sync(command[1], tmp_path, server)
        assert [row["eval/accuracy"] for row in server.history] == [0.75, 0.5]
