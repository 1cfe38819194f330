"""The run folder: complete files, stages that continue only their own work, manifests without secrets."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pgenrm_train.config import ROOT, Config, to_dict
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import (
    atomic,
    fingerprint,
    read_json,
    replace_folder,
    sha256_file,
    write_json,
    write_table,
    write_text,
)
from pgenrm_train.run import folder as artifacts
from pgenrm_train.run.folder import StageFolder, set_aside, weights_digest
from pgenrm_train.stages.stage import prepare

# ---- files ----


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with atomic(path) as temporary:
        temporary.write_text("half")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "half" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_rest(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half of the new")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_table_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match=r"mix|convert"):
        write_table(tmp_path / "t.parquet", [{"a": 1}, {"a": {"b": "c"}}])
    assert list(tmp_path.iterdir()) == []


def test_tables_from_rows_and_frames(tmp_path):
    rows = [{"a": 1, "b": ["x"]}, {"a": None, "b": []}]
    write_table(tmp_path / "rows.parquet", rows)
    assert pd.read_parquet(tmp_path / "rows.parquet")["b"].map(list).tolist() == [["x"], []]
    write_table(tmp_path / "frame.parquet", pd.DataFrame({"a": [1, 2]}, index=[7, 9]))
    assert list(pd.read_parquet(tmp_path / "frame.parquet").columns) == ["a"]


def test_json_is_read_back_or_reported_as_broken(tmp_path):
    write_json(tmp_path / "a.json", {"ü": [1, None], "path": tmp_path})
    assert read_json(tmp_path / "a.json") == {"ü": [1, None], "path": str(tmp_path)}
    (tmp_path / "a.json").write_text('{"half": ')
    with pytest.raises(ArtifactError, match=r"a\.json is not JSON .*delete it"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match="does not exist"):
        read_json(tmp_path / "b.json")


def test_a_folder_is_published_in_place_of_the_old_one(tmp_path):
    for version in ("one", "two"):
        write_text(tmp_path / "staging" / f"{version}.txt", version)
        replace_folder(tmp_path / "staging", tmp_path / "checkpoint")
        assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == [f"{version}.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_hash_of_a_file(tmp_path):
    write_text(tmp_path / "a", "abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---- fingerprints ----


def test_fingerprints_are_stable_over_key_order_processes_and_versions():
    settings = {"b": [1, 2.5, None], "a": {"y": True, "x": "ü"}}
    turned = {"a": {"x": "ü", "y": True}, "b": [1, 2.5, None]}
    assert fingerprint(settings, {}) == fingerprint(turned, {}) == "29c98950ff01b00e"
    code = f"from pgenrm_train.run.folder import fingerprint; print(fingerprint({settings!r}, {{}}))"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == fingerprint(settings, {})


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": 1, "b": None}, {}])
def test_other_settings_have_other_fingerprints(other):
    assert fingerprint({"a": 1}, {}) != fingerprint(other, {})
    assert fingerprint({"a": 1}, {}) != fingerprint({}, {"a": 1})


# ---- a stage's folder ----

SETTINGS = {"psi": {"learning_rate": 0.1, "epochs": 1.0}, "seed": 0}
INPUTS = {"build_sec": "abc"}


def begun(run_dir, settings=SETTINGS, inputs=INPUTS) -> StageFolder:
    folder = StageFolder.read(run_dir, "psi")
    folder.begin(config={"seed": 0}, settings=settings, inputs=inputs, seed=0)
    return folder


def test_an_absent_folder_is_read_without_being_made(tmp_path):
    folder = StageFolder.read(tmp_path, "psi")
    assert not folder.complete and not folder.made_from(SETTINGS, INPUTS) and not (tmp_path / "psi").exists()


def test_begin_and_finish(tmp_path):
    folder = begun(tmp_path)
    running = read_json(tmp_path / "psi" / "manifest.json")
    assert (running["status"], running["stage"], running["starts"], running["seed"]) == (
        "running",
        "psi",
        1,
        0,
    )
    assert yaml.safe_load((tmp_path / "psi" / "config.yaml").read_text()) == {"seed": 0}
    folder.finish(steps=7)
    found = StageFolder.read(tmp_path, "psi")
    assert found.complete and found.made_from(SETTINGS, INPUTS) and found.manifest.facts["steps"] == 7
    assert not found.made_from({**SETTINGS, "seed": 1}, INPUTS) and not found.made_from(
        SETTINGS, {"build_sec": "def"}
    )


def test_an_interrupted_stage_continues_and_its_seconds_add_up(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(artifacts.time, "monotonic", lambda: now[0])
    first = begun(tmp_path)
    now[0] += 20
    first.interrupted("KeyboardInterrupt")
    found = StageFolder.read(tmp_path, "psi")
    assert (
        not found.complete
        and found.manifest.facts["reason"] == "KeyboardInterrupt"
        and found.manifest.wall_seconds == 20
    )
    now[0] += 1000
    again = begun(tmp_path)
    assert again.manifest.starts == 2 and "reason" not in again.manifest.facts
    now[0] += 5
    again.finish()
    assert StageFolder.read(tmp_path, "psi").manifest.wall_seconds == 25


@pytest.mark.parametrize(
    "settings,inputs,said",
    [
        ({"psi": {"learning_rate": 0.2, "epochs": 1.0}, "seed": 0}, INPUTS, "psi.learning_rate: 0.1 → 0.2"),
        ({**SETTINGS, "seed": 5}, INPUTS, "seed: 0 → 5"),
        ({**SETTINGS, "lora": 8}, INPUTS, "lora: None → 8"),
        (SETTINGS, {"build_sec": "def"}, "input build_sec: abc → def"),
        ({"psi": {"learning_rate": 1, "epochs": 2, "a": 1, "b": 1, "c": 1}, "seed": 1}, INPUTS, "and 3 more"),
    ],
)
@pytest.mark.parametrize("end", ["finish", "interrupted", "killed"])
def test_other_settings_are_refused_and_the_changed_key_is_named(tmp_path, settings, inputs, said, end):
    folder = begun(tmp_path)
    write_text(folder.path / "steps" / "weights", "hours of work")
    {"finish": folder.finish, "interrupted": lambda: folder.interrupted("x"), "killed": lambda: None}[end]()
    before = (tmp_path / "psi" / "manifest.json").read_text()
    with pytest.raises(ArtifactError) as error:
        begun(tmp_path, settings, inputs)
    assert said in str(error.value) and "run_dir=" in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "psi" / "manifest.json").read_text() == before


@pytest.mark.parametrize("end", ["interrupted", "killed"])
def test_a_start_that_made_nothing_binds_the_folder_to_nothing(tmp_path, end):
    first = begun(tmp_path, {**SETTINGS, "data.path": "typo.jsonl"})
    (first.path / "wandb").mkdir()
    if end == "interrupted":
        first.interrupted("DataError: typo.jsonl does not exist")
    again = begun(tmp_path)
    assert again.manifest.settings == SETTINGS and again.manifest.starts == 1
    again.finish()
    with pytest.raises(
        ArtifactError, match=r"data\.path"
    ):  # a complete stage is work, with or without products
        begun(tmp_path, {**SETTINGS, "data.path": "other.jsonl"})


def test_a_broken_manifest_is_reported(tmp_path):
    write_text(tmp_path / "psi" / "manifest.json", '{"stage": "ps')
    with pytest.raises(ArtifactError, match="not JSON"):
        StageFolder.read(tmp_path, "psi")


# ---- a run's folder ----


def test_resume_false_sets_the_old_run_aside(tmp_path, capsys):
    run_dir = tmp_path / "run"
    prepare(Config(recipe="psi", run_dir=str(run_dir)))
    write_text(run_dir / "precious.txt", "weeks of work")
    config = Config(recipe="psi", run_dir=str(run_dir), resume=False)
    prepare(config)
    assert config.resume and not (run_dir / "precious.txt").exists()
    (old,) = (p for p in tmp_path.iterdir() if p != run_dir)
    assert (old / "precious.txt").read_text() == "weeks of work" and str(old) in capsys.readouterr().out
    prepare(config)  # later stages of the same run set nothing aside
    assert len(list(tmp_path.iterdir())) == 2


def test_resume_false_twice_within_a_second_loses_nothing(tmp_path):
    for number in range(3):
        write_text(tmp_path / "run" / f"{number}.txt", "x")
        set_aside(tmp_path / "run")
    assert sorted(p.name for p in tmp_path.rglob("*.txt")) == ["0.txt", "1.txt", "2.txt"]
    assert set_aside(tmp_path / "run") is None


def test_a_run_folder_is_one_process_s(tmp_path):
    """The error names the process at work; a start succeeds once that process ends, even by kill -9."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    config = Config(recipe="psi", run_dir=str(tmp_path / "run"))
    for resume in (True, False):
        config.resume = resume
        with pytest.raises(
            ArtifactError, match=f"run_dir={tmp_path}/run is in use by process {holder.pid}; wait for it"
        ):
            prepare(config)
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "nothing was set aside"
    holder.kill()
    holder.wait()
    prepare(config)
    prepare(config)  # the stages of one process share the lock


HOLD = """
import sys, time
from pgenrm_train.config import Config
from pgenrm_train.stages.stage import prepare
prepare(Config(recipe="psi", run_dir=sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_resume_true_keeps_what_is_there(tmp_path):
    write_text(tmp_path / "run" / "psi" / "x.txt", "x")
    prepare(Config(recipe="psi", run_dir=str(tmp_path / "run")))
    assert (tmp_path / "run" / "psi" / "x.txt").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["recipe"] == "psi"


def test_a_run_dir_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="run_dir="):
        prepare(Config(recipe="psi", run_dir=str(tmp_path / "file" / "run")))


def test_manifests_hold_no_variable_no_host_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVER_KEY", "sk-very-secret-0123456789")
    monkeypatch.setenv("WANDB_API_KEY", "wandb-secret-0123456789")
    monkeypatch.setenv("SOME_VARIABLE", "a-value-like-no-other")
    config = Config(recipe="psi", run_dir=str(tmp_path))
    config.teacher.api_key_env = "MY_SERVER_KEY"
    folder = StageFolder.read(tmp_path, "psi")
    folder.begin(config=to_dict(config), settings={"teacher": to_dict(config.teacher)}, inputs={}, seed=0)
    folder.finish(steps=1)
    for path in tmp_path.rglob("*.*"):
        written = path.read_text()
        for private in ("sk-very-secret", "wandb-secret", "a-value-like-no-other", "SOME_VARIABLE"):
            assert private not in written
    manifest = (tmp_path / "psi" / "manifest.json").read_text()
    node = platform.node()
    words = set(
        json.dumps(json.loads(manifest)).replace('"', " ").replace("-", " ").replace(",", " ").split()
    )
    assert len(node) < 4 or node not in manifest
    assert str(Path.home()) not in words and sys.prefix not in manifest


def test_manifests_hold_versions_and_git_state(tmp_path):
    folder = begun(tmp_path)
    for key in ("python", "platform", "cpus", "packages", "git"):
        assert key in folder.manifest.facts
    assert folder.manifest.facts["packages"]["transformers"]


def test_weights_of_one_size_have_different_hashes_and_copies_have_equal_ones(tmp_path):
    start, end = b"x" * 100, b"y" * 500
    contents = {"a": start + b"1" + end, "same": start + b"1" + end, "other": start + b"2" + end}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    digests = {name: weights_digest(tmp_path / name) for name in contents}
    assert digests["a"] == digests["same"] != digests["other"]
    (tmp_path / "same" / "model-2.safetensors").write_bytes(b"")
    assert weights_digest(tmp_path / "same") != digests["a"]


def test_a_model_path_without_a_checkpoint_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    config = Config(recipe="evaluate", run_dir=str(tmp_path / "run"))
    config.model.path = str(tmp_path / "nothing")
    with pytest.raises(
        ArtifactError,
        match=r"^model\.path=\S+nothing is not a Hugging Face checkpoint: there is no such folder$",
    ):
        prepare(config)
    assert not (tmp_path / "run").exists()
