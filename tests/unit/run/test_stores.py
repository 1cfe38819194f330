"""Content of a URL is checked or refused in one sentence, and a URL holds no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from store_world import held, machine, quick, run_at, stage, url

from pgenrm_train.cluster.preflight.reach import check_store
from pgenrm_train.config import ROOT, Config, load, parse, to_dict
from pgenrm_train.errors import ArtifactError, ConfigError, PreflightError
from pgenrm_train.files import write_text
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.store import objects as stores
from pgenrm_train.run.store import publisher as publishing
from pgenrm_train.run.store.objects import MARKER, Store, StoreLost

__all__ = ["quick", "url"]  # fixtures


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


# ---- the start ----


def test_resume_false_touches_no_store_that_holds_a_run(tmp_path: Path, url: str) -> None:
    config = run_at(url, tmp_path)
    publishing.refuse_to_replace(config)
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", weights="x")
    first.close()
    with pytest.raises(ArtifactError, match=f"resume=false: {url} holds a run"):
        publishing.refuse_to_replace(config)


def test_a_store_that_cannot_be_written_is_reported_at_the_start_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = run_at(f"file://{tmp_path}/file/run", tmp_path / "m")
    write_text(Path(config.run_dir) / "config.yaml", "")
    with pytest.raises(
        ArtifactError,
        match=rf"run_dir=file://{tmp_path}/file/run cannot be used .*; "
        rf"mend that, or continue without it: run_dir={config.run_dir}",
    ):
        publishing.begin(config)


@pytest.mark.parametrize(
    "url,error,said",
    [
        ("foo://bucket/x", ConfigError, "fsspec cannot open .*Protocol not known: foo"),
        ("gs://bucket/x", PreflightError, "needs a package that is not installed: .*gcsfs"),
    ],
)
def test_a_protocol_that_is_unknown_or_not_installed_is_one_sentence(
    url: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as found:
        Store(url)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "place,said",
    [("file/run", "NotADirectoryError"), ("gs://bucket/x", "needs a package that is not installed")],
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


def test_a_recipe_that_only_reads_fetches_what_is_missing_and_publishes_nothing(
    tmp_path: Path, url: str
) -> None:
    first = machine(tmp_path, "a", url)
    stage(tmp_path / "a", weights="x")
    first.close()
    before = held(url)
    config = run_at(url, tmp_path / "m")
    publishing.fetch(config)
    assert (
        StageFolder.read(Path(config.run_dir), "psi").complete
        and held(url) == before
        and publishing._OPEN == {}
    )
    fsspec.url_to_fs(url)[0].rm(fsspec.url_to_fs(url)[1], recursive=True)
    publishing.fetch(config)  # local stages are not fetched


def test_a_secret_of_the_endpoint_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"file://{tmp_path}/run")

    def unreachable(_: str) -> bytes:
        raise ConnectionError("no answer from http://me:hidden@host:1/bucket,\nnor from http://host")

    monkeypatch.setattr(store.fs, "cat_file", unreachable)
    with pytest.raises(
        StoreLost, match=r"^ConnectionError: no answer from http://…@host:1/bucket, nor from http://host$"
    ):
        store.read("psi")


# ---- the configuration ----


@pytest.mark.parametrize(
    "url,folder",
    [
        ("s3://bucket/runs/arena", "s3/bucket/runs/arena"),
        ("S3://bucket//runs/arena/", "s3/bucket/runs/arena"),
        ("gs://bucket/a", "gs/bucket/a"),
        ("abfs://box@account.dfs.core.windows.net/a", "abfs/box@account.dfs.core.windows.net/a"),
        ("file:///mnt/runs/a", "file/mnt/runs/a"),
    ],
)
def test_a_url_has_a_mirror_of_its_own(url: str, folder: str) -> None:
    config = load("recipe=psi", f"run_dir={url}", "mirror=/scratch/m")
    assert config.run_dir == f"/scratch/m/{folder}"
    assert config.store == {"S3://bucket//runs/arena/": "s3://bucket/runs/arena"}.get(url, url)
    assert parse(to_dict(config)) == config, "a child of the pipeline reads it again"


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAID:hidden/part@bucket/x",
        "ftp://me:hidden@host/x",
        "abfs://box/x?sig=hidden",
        "s3://bucket/x#hidden",
        "https://u:hidden@h:1/x",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="credentials come from the environment") as error:
        parse(to_dict(Config(recipe="psi", run_dir=url)))
    assert "hidden" not in str(error.value) and "AKIAID" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_dir": "s3:/bucket/x"}, r"did you mean s3://bucket/x\?"),
        (
            {"run_dir": "s3://bucket/x", "mirror": "s3://bucket/m"},
            "mirror=s3://bucket/m must be a folder of this machine",
        ),
    ],
)
def test_a_mistyped_place_is_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(to_dict(Config(recipe="psi")) | changes)


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
    done = subprocess.run(
        [*command, f"run_dir=file://{tmp_path}/store", f"mirror={tmp_path}/m"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"job-0", "job-1"} and {
        p.name for p in tmp_path.iterdir()
    } == {"store", "m"}
    marker = json.loads((tmp_path / "store" / "job-1" / "build_data" / MARKER).read_text())
    assert marker["state"].startswith("complete ") and len(marker["files"]) > 3
    assert stores.Publication.parse("build_data", json.dumps(marker).encode()).attempt == marker["attempt"]
