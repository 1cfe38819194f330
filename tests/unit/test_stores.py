"""A run's copy at a URL: what counts there is whole, what was cut off or changed is passed over or refused, and nothing secret is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pgenrm_train import artifacts, publishing, snapshots, stores
from pgenrm_train.artifacts import StageFolder, write_json, write_text
from pgenrm_train.config import ROOT, Config, load, parse, to_dict
from pgenrm_train.config.places import place
from pgenrm_train.errors import ArtifactError, ConfigError, PreflightError
from pgenrm_train.preflight.reach import check_store
from pgenrm_train.publishing import Publisher
from pgenrm_train.stores import MARKER, Store, StoreLost

SETTINGS: dict[str, Any] = {"psi": {"epochs": 1}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(publishing, "LAST_WAITS", (0.0,))
    monkeypatch.setattr(publishing, "LOOK", 0.05)
    monkeypatch.setattr(publishing, "WAIT", 0.05)
    monkeypatch.setattr(snapshots, "SETTLED", 0.0)
    monkeypatch.setattr(artifacts, "_git_state", lambda: None)
    yield
    publishing._OPEN.clear()
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}/run" if request.param == "memory" else f"file://{tmp_path}/store/run"


def run_at(url: str, mirror: Path) -> Config:
    config = Config(recipe="psi", run_dir=url, mirror=str(mirror))
    place(config)
    return config


def machine(tmp_path: Path, name: str, url: str) -> Publisher:
    """A publisher without its thread, with a run folder of its own."""
    folder = tmp_path / name
    write_text(folder / "config.yaml", "seed: 0\n")
    made = Publisher(Store(url), folder)
    made._keep_up = lambda: None  # type: ignore[method-assign]
    made._thread = publishing.threading.Thread(target=lambda: None)
    made.open()
    return made


def stage(run_dir: Path, name: str = "psi", complete: bool = True, **files: str) -> StageFolder:
    folder = StageFolder.read(run_dir, name)
    folder.begin(config={}, settings=SETTINGS, inputs={}, seed=0)
    for file, text in files.items():
        write_text(folder.path / file.replace("__", "/").replace("_", "."), text)
    if complete:
        folder.finish()
    return folder


def step(run_dir: Path, number: int, text: str = "weights", best: int | None = None) -> Path:
    checkpoint = run_dir / "psi" / "steps" / f"checkpoint-{number}"
    write_text(checkpoint / "model.safetensors", f"{text} {number}")
    write_json(checkpoint / "trainer_state.json", {"best_global_step": best})
    write_json(checkpoint / "complete.json", {"step": number})
    return checkpoint


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def held(url: str) -> set[str]:
    fs, root = fsspec.url_to_fs(url)
    return {str(path).partition(f"{root}/")[2] for path in fs.find(root)}


# ---- publish and fetch ----


def test_a_complete_stage_is_on_a_fresh_machine_what_it_was(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", checkpoint__model_safetensors="w", metrics_jsonl="{}\n", pairs_parquet__part_0="rows")
    (tmp_path / "a" / "psi" / "wandb").mkdir()
    write_text(tmp_path / "a" / "psi" / "wandb" / "log", "x")
    step(tmp_path / "a", 3)
    assert first.close() == []
    machine(tmp_path, "b", url)
    here = content(tmp_path / "a" / "psi")
    assert content(tmp_path / "b" / "psi") == {k: v for k, v in here.items() if not k.startswith(("wandb/", "steps/"))}
    assert StageFolder.read(tmp_path / "b", "psi").complete


def test_what_did_not_change_is_sent_once_and_what_counts_no_more_is_removed(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False, rows_parquet="many rows", metrics_jsonl="1\n")
    step(tmp_path / "a", 2, best=2)
    assert first.round()
    before = first.published["psi"]
    step(tmp_path / "a", 4, best=2)
    with (tmp_path / "a" / "psi" / "metrics.jsonl").open("a") as lines:
        lines.write("2\n")
    assert first.round()
    after = first.published["psi"]
    assert before and after and before.attempt != after.attempt
    places = {file.name: file.at.partition("/")[0] for file in after.files}
    assert {name for name, at in places.items() if at == before.attempt} >= {
        "rows.parquet",
        "steps/checkpoint-2/model.safetensors",
    }
    assert {places["metrics.jsonl"], places["steps/checkpoint-4/model.safetensors"]} == {after.attempt}
    assert held(url) == {"config.yaml", f"psi/{MARKER}", *(f"psi/{file.at}" for file in after.files)}
    step(tmp_path / "a", 6, best=6)
    assert first.round()
    assert not any("checkpoint-2" in path or "checkpoint-4" in path for path in held(url))
    machine(tmp_path, "b", url)
    assert (tmp_path / "b" / "psi" / "metrics.jsonl").read_text() == "1\n2\n"
    assert [path.name for path in (tmp_path / "b" / "psi" / "steps").iterdir()] == ["checkpoint-6"]


def test_a_half_written_step_and_an_open_database_stay_at_home(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False, judge__cache_db="sqlite", judge__cache_db_wal="sqlite", rows_parquet_tmp="half")
    write_text(tmp_path / "a" / "psi" / "steps" / "checkpoint-2" / "model.safetensors", "half")
    assert first.round() and held(url) == {"config.yaml"}, "nothing to go on from"
    step(tmp_path / "a", 1)
    assert first.round() and first.published["psi"]
    names = {file.name for file in first.published["psi"].files}
    assert names == {
        "config.yaml",
        "manifest.json",
        *(f"steps/checkpoint-1/{n}" for n in ("model.safetensors", "trainer_state.json", "complete.json")),
    }


def test_a_checkpoint_that_is_removed_meanwhile_is_not_published(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False)
    step(tmp_path / "a", 1, best=1)
    step(tmp_path / "a", 2, best=1)
    monkeypatch.setattr(
        snapshots.time, "sleep", lambda _: (tmp_path / "a/psi/steps/checkpoint-1/model.safetensors").unlink(missing_ok=True)
    )
    assert not first.round() and held(url) == {"config.yaml"} and first.lost is None
    shutil.rmtree(tmp_path / "a" / "psi" / "steps" / "checkpoint-1")
    assert first.round()


# ---- killed on the way ----


KILLED = """
import os, sys
from pathlib import Path
from pgenrm_train import artifacts, publishing, stores
from pgenrm_train.publishing import Publisher
put = stores.Store.put
def put_or_die(self, name, content):
    if name.endswith(stores.MARKER):
        os.kill(os.getpid(), 9)
    put(self, name, content)
made = Publisher(stores.Store(sys.argv[1]), Path(sys.argv[2]))
made.open()
stores.Store.put = put_or_die
made.close()
"""


def test_a_kill_between_the_files_and_the_marker_leaves_what_counted_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/store/run"
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False)
    step(tmp_path / "a", 2)
    assert first.close() == []
    step(tmp_path / "a", 4)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, url, str(tmp_path / "a")], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == -9
    (cut_off,) = Store(url).left_over("psi")
    capsys.readouterr()
    machine(tmp_path, "b", url)
    assert f"ignoring {url}/psi/{cut_off}, which is half-published" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "b" / "psi" / "steps").iterdir()] == ["checkpoint-2"]
    again = machine(tmp_path, "a", url)  # the machine that was killed: nobody else's
    assert f"removing {url}/psi/{cut_off}" in capsys.readouterr().out and Store(url).left_over("psi") == {}
    assert (tmp_path / "a" / "psi" / "steps" / "checkpoint-4").exists(), "ahead of the store, and kept"
    assert again.close() == [] and any(at.at.endswith("checkpoint-4/model.safetensors") for at in again.published["psi"].files)  # type: ignore[union-attr]


def test_a_kill_right_after_the_marker_does_not_make_ones_own_work_a_stranger_s(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False)
    step(tmp_path / "a", 2)
    first.round()
    step(tmp_path / "a", 4)
    machine(tmp_path, "a", url)
    assert (tmp_path / "a" / "psi" / "steps" / "checkpoint-4").exists() and not list((tmp_path / "a").glob("*.bak"))


# ---- what is wrong in the store ----


@pytest.mark.parametrize("harm", ["other", "longer", "gone"])
def test_a_file_that_is_not_what_was_published_is_refused(tmp_path: Path, url: str, harm: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", weights="hours of work")
    assert first.close() == [] and first.published["psi"]
    (at,) = (file.at for file in first.published["psi"].files if file.name == "weights")
    fs, root = fsspec.url_to_fs(url)
    fs.rm(f"{root}/psi/{at}") if harm == "gone" else fs.pipe_file(
        f"{root}/psi/{at}", {"other": b"hours of w0rk", "longer": b"x" * 99}[harm]
    )
    with pytest.raises(ArtifactError, match=rf"psi/{at} is not .*; remove {url}/psi/{MARKER}"):
        machine(tmp_path, "b", url)
    assert not (tmp_path / "b" / "psi").exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"attempt": "x"',
        "[]",
        "{}",
        '{"attempt": "x", "state": "s", "files": [{"name": "../../x", "size": 1, "sha256": "", "at": "x"}]}',
    ],
)
def test_a_marker_that_no_run_wrote_is_refused(tmp_path: Path, url: str, text: str) -> None:
    Store(url).put(f"psi/{MARKER}", text.encode())
    with pytest.raises(ArtifactError, match=rf"{url}/psi/{MARKER} is not what a run writes .*; remove it"):
        machine(tmp_path, "b", url)


# ---- two machines ----


def test_the_machine_that_is_behind_takes_over_what_the_other_did(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False)
    step(tmp_path / "a", 2)
    first.close()
    second = machine(tmp_path, "b", url)
    step(tmp_path / "b", 4)
    second.close()
    step(tmp_path / "a", 3)  # published nowhere
    capsys.readouterr()
    machine(tmp_path, "a", url)
    assert [path.name for path in (tmp_path / "a" / "psi" / "steps").iterdir()] == ["checkpoint-4"]
    (aside,) = (tmp_path / "a").glob("psi.*.bak")
    assert (
        aside / "steps" / "checkpoint-3"
    ).exists() and f"is ahead of this machine; its psi was moved to {aside}" in capsys.readouterr().out


def test_two_machines_at_once_are_told_so_and_neither_spoils_the_other_s(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False)
    step(tmp_path / "a", 2)
    first.close()
    second = machine(tmp_path, "b", url)
    step(tmp_path / "b", 4)
    second.close()
    step(tmp_path / "a", 3)
    assert first.close() == ["psi"] and "another machine has published psi" in str(first.lost)
    machine(tmp_path, "c", url)
    assert [path.name for path in (tmp_path / "c" / "psi" / "steps").iterdir()] == ["checkpoint-4"]


# ---- a store that is lost ----


class Broken:
    """The network: every call of the store's file system raises while it is down."""

    def __init__(self, fs: Any) -> None:
        self.fs, self.down, self.calls = fs, False, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.fs, name)
        if not callable(found) or name.startswith("_"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += name == "put_file"
            if self.down:
                raise ConnectionError("no route to host")
            return found(*args, **kwargs)

        return call


def test_a_lost_network_stops_nothing_is_told_and_the_end_names_what_is_missing(
    tmp_path: Path, url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = run_at(url, tmp_path)
    write_text(Path(config.run_dir) / "config.yaml", "seed: 0\n")
    with pytest.raises(ArtifactError) as error, publishing.kept():
        publishing.begin(config)
        (publisher,) = publishing._OPEN.values()
        publisher.store.fs = network = Broken(publisher.store.fs)
        network.down = True
        stage(Path(config.run_dir), "build_data", pairs="x")
        stage(Path(config.run_dir), "psi", weights="x")
        while "next try" not in (said := capfd.readouterr().err):
            pass
    assert "no route to host); the run goes on" in said
    assert f"the run is whole in {config.run_dir}, but {url} lacks build_data, psi (" in str(error.value)
    assert StageFolder.read(Path(config.run_dir), "psi").complete
    with publishing.kept():
        publishing.begin(config)  # the same command, the network is back
    machine(tmp_path, "b", url)
    assert StageFolder.read(tmp_path / "b", "psi").complete


def test_a_second_try_sends_the_rest(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", weights="x", more="y", most="z")
    first.store.fs = network = Broken(first.store.fs)
    real = first.store.put

    def lost(name: str, content: bytes | Path) -> None:
        raise StoreLost("no route to host")

    first.store.put = lost  # type: ignore[method-assign]
    assert not first.round() and network.calls == 5
    first.store.put = real  # type: ignore[method-assign]
    assert first.round() and network.calls == 5 and first.store.left_over("psi") == {}


def test_what_was_given_up_is_removed(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False)
    step(tmp_path / "a", 2)
    real, first.store.put = first.store.put, lambda *_: (_ for _ in ()).throw(StoreLost("down"))  # type: ignore[method-assign,assignment]
    assert not first.round()
    first.store.put = real  # type: ignore[method-assign]
    step(tmp_path / "a", 4)
    assert first.round() and first.store.left_over("psi") == {}
    assert not any("checkpoint-2" in path for path in held(url))


def test_later_stages_wait_for_the_earlier_ones(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", "build_sec", rows="x")
    stage(tmp_path / "a", "psi", rows="x")
    send = first.store._send
    monkeypatch.setattr(
        first.store, "_send", lambda p, s, f: (_ for _ in ()).throw(StoreLost("lost")) if s == "build_sec" else send(p, s, f)
    )
    assert not first.round() and first.close() == ["build_sec", "psi"] and held(url) == {"config.yaml"}


def test_a_failing_recipe_publishes_too_and_its_own_error_is_the_one(tmp_path: Path, url: str) -> None:
    config = run_at(url, tmp_path)
    write_text(Path(config.run_dir) / "config.yaml", "")
    with pytest.raises(KeyError, match="a bug"), publishing.kept():
        publishing.begin(config)
        stage(Path(config.run_dir), complete=False)
        step(Path(config.run_dir), 2)
        raise KeyError("a bug")
    assert Store(url).read("psi") is not None and publishing._OPEN == {}


# ---- the start ----


def test_resume_false_touches_no_store_that_holds_a_run(tmp_path: Path, url: str) -> None:
    config = run_at(url, tmp_path)
    publishing.refuse_to_replace(config)
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", weights="x")
    first.close()
    with pytest.raises(ArtifactError, match=f"resume=false: {url} holds a run"):
        publishing.refuse_to_replace(config)


def test_a_store_that_cannot_be_written_is_said_at_the_start_with_the_way_round_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = run_at(f"file://{tmp_path}/file/run", tmp_path / "m")
    write_text(Path(config.run_dir) / "config.yaml", "")
    with pytest.raises(
        ArtifactError,
        match=rf"run_dir=file://{tmp_path}/file/run cannot be used .*; mend that, or go on without it: run_dir={config.run_dir}",
    ):
        publishing.begin(config)


@pytest.mark.parametrize("url,error,said", [
    ("foo://bucket/x", ConfigError, "fsspec cannot open .*Protocol not known: foo"),
    ("gs://bucket/x", PreflightError, "needs a package that is not installed: .*gcsfs"),
])  # fmt: skip
def test_a_protocol_that_is_unknown_or_not_installed_is_one_sentence(url: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as found:
        Store(url)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "place,said", [("file/run", "NotADirectoryError"), ("gs://bucket/x", "needs a package that is not installed")]
)
def test_preflight_tries_the_store_out(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    config = run_at(place if "://" in place else f"file://{tmp_path}/{place}", tmp_path / "m")
    assert list(check_store(config, "psi")) == [], "a start finds out by itself"
    config.preflight.only = True
    (problem,) = check_store(config, "psi")
    assert problem.startswith(f"run_dir={config.store} cannot be read and written (") and said in problem
    config.store = f"file://{tmp_path}/store/run"
    assert list(check_store(config, "psi")) == [] and list((tmp_path / "store" / "run").iterdir()) == []


def test_a_recipe_that_only_reads_fetches_what_is_missing_and_publishes_nothing(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", weights="x")
    first.close()
    before = held(url)
    config = run_at(url, tmp_path / "m")
    publishing.fetch(config)
    assert StageFolder.read(Path(config.run_dir), "psi").complete and held(url) == before and publishing._OPEN == {}
    fsspec.url_to_fs(url)[0].rm(fsspec.url_to_fs(url)[1], recursive=True)
    publishing.fetch(config)  # what is here is not asked for


# ---- the configuration ----


@pytest.mark.parametrize("url,folder", [
    ("s3://bucket/runs/arena", "s3/bucket/runs/arena"), ("S3://bucket//runs/arena/", "s3/bucket/runs/arena"),
    ("gs://bucket/a", "gs/bucket/a"), ("abfs://box@account.dfs.core.windows.net/a", "abfs/box@account.dfs.core.windows.net/a"),
    ("file:///mnt/runs/a", "file/mnt/runs/a"),
])  # fmt: skip
def test_a_url_has_a_mirror_of_its_own(url: str, folder: str) -> None:
    config = load("recipe=psi", f"run_dir={url}", "mirror=/scratch/m")
    assert config.run_dir == f"/scratch/m/{folder}"
    assert config.store == {"S3://bucket//runs/arena/": "s3://bucket/runs/arena"}.get(url, url)
    assert parse(to_dict(config)) == config, "a child of the pipeline reads it again"


@pytest.mark.parametrize("url", [
    "s3://AKIAID:hidden/part@bucket/x", "ftp://me:hidden@host/x", "abfs://box/x?sig=hidden", "s3://bucket/x#hidden", "https://u:hidden@h:1/x",
])  # fmt: skip
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="credentials come from the environment") as error:
        parse(to_dict(Config(recipe="psi", run_dir=url)))
    assert "hidden" not in str(error.value) and "AKIAID" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_dir": "s3://"},
        {"run_dir": "s3://bucket/../other"},
        {"run_dir": "simplecache::s3://b/x"},
        {"run_dir": "s3://b/x::y"},
        {"store": "s3://b/x"},
    ],
)
def test_what_is_no_url_of_a_run_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="run_dir="):
        parse(to_dict(Config(recipe="psi")) | changes)


def test_jobs_of_a_multirun_have_a_url_each(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pgenrm_train",
        "-m",
        "recipe=build_data",
        "data.users=20,21",
        "data.heldout_users=10",
        "tracking=none",
    ]
    done = subprocess.run([*command, f"run_dir=file://{tmp_path}/store", f"mirror={tmp_path}/m"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"job-0", "job-1"} and {
        p.name for p in tmp_path.iterdir()
    } == {"store", "m"}
    marker = json.loads((tmp_path / "store" / "job-1" / "build_data" / MARKER).read_text())
    assert marker["state"].startswith("complete ") and len(marker["files"]) > 3
    assert stores.Publication.parse("build_data", json.dumps(marker).encode()).attempt == marker["attempt"]
