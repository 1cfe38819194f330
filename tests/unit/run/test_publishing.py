"""A run is published while it works, and another machine continues it, whatever is killed or lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from store_world import content, held, machine, quick, run_at, stage, step, url

from pgenrm_train.config import ROOT
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import write_text
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.store import publisher as publishing
from pgenrm_train.run.store import snapshots
from pgenrm_train.run.store.objects import MARKER, Store, StoreLost
from pgenrm_train.stages.stage import CHILD, prepare

__all__ = ["quick", "url"]  # fixtures


# ---- publish and fetch ----


def test_a_complete_stage_is_on_a_fresh_machine_what_it_was(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = machine(tmp_path, "a", url)
    stage(
        tmp_path / "a", checkpoint__model_safetensors="w", metrics_jsonl="{}\n", pairs_parquet__part_0="rows"
    )
    (tmp_path / "a" / "psi" / "wandb").mkdir()
    write_text(tmp_path / "a" / "psi" / "wandb" / "log", "x")
    step(tmp_path / "a", 3)
    assert first.close() == []
    assert (
        f"publishing the rest to {url}: psi\npublished psi (complete): {url}/psi/" in capsys.readouterr().out
    )
    machine(tmp_path, "b", url)
    here = content(tmp_path / "a" / "psi")
    assert content(tmp_path / "b" / "psi") == {
        k: v for k, v in here.items() if not k.startswith(("wandb/", "steps/"))
    }
    assert StageFolder.read(tmp_path / "b", "psi").complete


def test_what_did_not_change_is_sent_once_and_what_counts_no_more_is_removed(
    tmp_path: Path, url: str
) -> None:
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
    stage(
        tmp_path / "a",
        complete=False,
        judge__cache_db="sqlite",
        judge__cache_db_wal="sqlite",
        rows_parquet_tmp="half",
    )
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
    weights = tmp_path / "a/psi/steps/checkpoint-1/model.safetensors"
    # Not `time.sleep` itself: threads of other tests sleep too.
    monkeypatch.setattr(snapshots, "time", SimpleNamespace(sleep=lambda _: weights.unlink(missing_ok=True)))
    assert not first.round() and held(url) == {"config.yaml"} and first.lost is None
    shutil.rmtree(tmp_path / "a" / "psi" / "steps" / "checkpoint-1")
    assert first.round()


# ---- killed on the way ----


KILLED = """
import os, sys
from pathlib import Path
from pgenrm_train.run.store import objects as stores
from pgenrm_train.run.store.publisher import Publisher
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
        [sys.executable, "-c", KILLED, url, str(tmp_path / "a")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -9
    (cut_off,) = Store(url).left_over("psi")
    capsys.readouterr()
    machine(tmp_path, "b", url)
    assert f"ignoring {url}/psi/{cut_off}, which is half-published" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "b" / "psi" / "steps").iterdir()] == ["checkpoint-2"]
    again = machine(tmp_path, "a", url)  # the killed machine, and no other
    assert f"removing {url}/psi/{cut_off}" in capsys.readouterr().out and Store(url).left_over("psi") == {}
    assert (tmp_path / "a" / "psi" / "steps" / "checkpoint-4").exists(), "ahead of the store, and kept"
    assert again.close() == [] and any(
        at.at.endswith("checkpoint-4/model.safetensors") for at in again.published["psi"].files
    )  # type: ignore[union-attr]


def test_a_kill_right_after_the_marker_does_not_make_ones_own_work_a_stranger_s(
    tmp_path: Path, url: str
) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False)
    step(tmp_path / "a", 2)
    first.round()
    step(tmp_path / "a", 4)
    machine(tmp_path, "a", url)
    assert (tmp_path / "a" / "psi" / "steps" / "checkpoint-4").exists() and not list(
        (tmp_path / "a").glob("*.bak")
    )


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


def test_two_machines_at_once_are_reported_and_neither_spoils_the_other_s(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False)
    step(tmp_path / "a", 2)
    first.close()
    second = machine(tmp_path, "b", url)
    step(tmp_path / "b", 4)
    second.close()
    step(tmp_path / "a", 3)
    assert first.close() == ["psi"] and "another machine has published psi" in str(first.lost)
    monkeypatch.setattr(publishing, "_OPEN", {tmp_path / "a": first})
    refusal = pytest.raises(
        ArtifactError, match=r"another machine has published psi .* a new start sets it aside"
    )
    with refusal as error, publishing.kept():
        pass
    assert "publishes it" not in str(error.value)
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


def test_a_lost_network_is_reported_and_the_end_names_what_is_missing(
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
        while "next try" not in (message := capfd.readouterr().err):
            pass
    assert "no route to host); the run continues" in message
    assert f"the run is complete in {config.run_dir}, but {url} lacks build_data, psi (" in str(error.value)
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
    real = first.store.put
    first.store.put = lambda *_: (_ for _ in ()).throw(StoreLost("down"))  # type: ignore[method-assign]
    assert not first.round()
    first.store.put = real  # type: ignore[method-assign]
    step(tmp_path / "a", 4)
    assert first.round() and first.store.left_over("psi") == {}
    assert not any("checkpoint-2" in path for path in held(url))


def test_an_attempt_whose_answer_was_lost_counts_and_is_no_stranger_s(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False)
    step(tmp_path / "a", 2)
    real = first.store.put

    def deaf(name: str, content: bytes | Path) -> None:
        real(name, content)
        raise StoreLost("timed out")

    for number in (2, 4):  # nothing new to publish afterwards; a new step
        step(tmp_path / "a", number)
        first.store.put = deaf  # type: ignore[method-assign]
        assert not first.round()
        first.store.put = real  # type: ignore[method-assign]
        if number == 4:
            step(tmp_path / "a", 6)
        assert first.round() and first.store.left_over("psi") == {}
    machine(tmp_path, "b", url)
    assert [path.name for path in (tmp_path / "b" / "psi" / "steps").iterdir()] == ["checkpoint-6"]


def test_removing_what_was_left_spares_what_still_counts(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", complete=False, rows_parquet="many rows")
    step(tmp_path / "a", 2)
    assert first.round() and first.published["psi"]
    attempt = first.published["psi"].attempt
    first.store.forget = lambda *_: None  # type: ignore[method-assign]
    step(tmp_path / "a", 4)
    assert first.round()
    assert any("checkpoint-2" in at for at in first.store.left_over("psi")[attempt])
    machine(tmp_path, "a", url)
    assert Store(url).left_over("psi") == {} and f"psi/{attempt}/rows.parquet" in held(url)
    machine(tmp_path, "b", url)


def test_a_name_like_a_pattern_is_a_name(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path, "a", url)
    folder = stage(tmp_path / "a", complete=False)
    for name in ("ind=[1]*.json", "ind=1.json"):
        write_text(folder.path / name, "{}")
    folder.finish()
    assert first.round() and {path.rpartition("/")[2] for path in held(url)} >= {
        "ind=1.json",
        "ind=[1]*.json",
    }
    (folder.path / "ind=[1]*.json").unlink()
    folder.finish(again=True)
    assert first.round()
    assert "ind=1.json" in {path.rpartition("/")[2] for path in held(url)} and not any(
        "[1]" in path for path in held(url)
    )
    machine(tmp_path, "b", url)


def test_a_phase_of_grpo_goes_on_elsewhere(tmp_path: Path, url: str) -> None:
    """The curriculum's folder, before it has a manifest: CRE's session is at work in it."""
    first = machine(tmp_path, "a", url)
    for number in (9, 10):
        step(tmp_path / "a", number, form="curriculum/verl/global_step_")
    write_text(tmp_path / "a" / "curriculum" / "verl" / "latest_checkpointed_iteration.txt", "10")
    write_text(tmp_path / "a" / "curriculum" / "batches.jsonl", "{}\n")
    assert first.close() == []
    machine(tmp_path, "b", url)
    assert {*content(tmp_path / "b" / "curriculum")} == {
        "batches.jsonl",
        *(
            f"verl/global_step_10/{name}"
            for name in ("model.safetensors", "trainer_state.json", "complete.json")
        ),
    }


def test_later_stages_wait_for_the_earlier_ones(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", "build_sec", rows="x")
    stage(tmp_path / "a", "psi", rows="x")
    send = first.store._send
    monkeypatch.setattr(
        first.store,
        "_send",
        lambda p, s, f: (_ for _ in ()).throw(StoreLost("lost")) if s == "build_sec" else send(p, s, f),
    )
    assert not first.round() and first.close() == ["build_sec", "psi"] and held(url) == {"config.yaml"}


def test_a_child_of_a_pipeline_leaves_the_store_to_its_parent(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_at(url, tmp_path)
    with publishing.kept():
        prepare(config)
        (publisher,) = publishing._OPEN.values()
        prepare(config)  # every stage of a recipe does
        assert [*publishing._OPEN.values()] == [publisher]
    before = held(url)
    monkeypatch.setenv(CHILD, "1")
    with publishing.kept():
        prepare(config)
        assert publishing._OPEN == {}
    assert held(url) == before == {"config.yaml"}


def test_a_failing_recipe_publishes_too_and_its_own_error_is_the_one(tmp_path: Path, url: str) -> None:
    config = run_at(url, tmp_path)
    write_text(Path(config.run_dir) / "config.yaml", "")
    with pytest.raises(KeyError, match="a bug"), publishing.kept():
        publishing.begin(config)
        stage(Path(config.run_dir), complete=False)
        step(Path(config.run_dir), 2)
        raise KeyError("a bug")
    assert Store(url).read("psi") is not None and publishing._OPEN == {}
