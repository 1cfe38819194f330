"""Runs at an s3:// URL against a real S3 server over HTTP: a machine disappears, another one continues."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from pgenrm_train.config import ROOT
from pgenrm_train.run.store.objects import MARKER

SECRET = "secret-of-the-store-0123456789"
SMALL = ("data.users=60", "data.heldout_users=20", "tracking=none", "pipeline.budget=smoke")


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """A server with the bucket `votes`; yields the environment that reaches it."""
    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    keys = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    place = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    boto3.client(
        "s3",
        endpoint_url=place["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key=SECRET,
    ).create_bucket(Bucket="votes")
    yield keys | place
    made.stop()


@pytest.fixture
def fs(server: dict[str, str]) -> fsspec.AbstractFileSystem:
    keys = {"key": server["AWS_ACCESS_KEY_ID"], "secret": SECRET, "endpoint_url": server["AWS_ENDPOINT_URL"]}
    return fsspec.filesystem("s3", use_listings_cache=False, **keys)


def start(server: dict[str, str], mirror: Path, *keys: str) -> subprocess.Popen[str]:
    mirror.mkdir(parents=True, exist_ok=True)
    log = (mirror / "log").open("a")
    command = [sys.executable, "-m", "pgenrm_train", *keys, f"mirror={mirror}", *SMALL]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | server, stdout=log, stderr=log, text=True)


def said(server: dict[str, str], mirror: Path, *keys: str) -> str:
    code = start(server, mirror, *keys).wait(timeout=600)
    text = (mirror / "log").read_text()
    assert code == 0, text[-4000:]
    return text


def published(fs: fsspec.AbstractFileSystem, run: str) -> dict[str, str]:
    """Stage → valid attempt."""
    return {
        path.split("/")[-2]: json.loads(fs.cat_file(path))["attempt"]
        for path in fs.find(run)
        if path.endswith(MARKER)
    }


def test_a_fresh_machine_redoes_nothing(
    server: dict[str, str], fs: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    url = "run_dir=s3://votes/runs/first"
    baseline = ("recipe=evaluate", url, "model=baseline", "model.name=longer", "eval.baselines=[random]")
    said(server, tmp_path / "a", "recipe=build_sec", url)
    message = said(server, tmp_path / "a", *baseline)
    assert message.rstrip().endswith("published: s3://votes/runs/first")
    before, here = published(fs, "votes/runs/first"), tmp_path / "a" / "s3" / "votes" / "runs" / "first"
    assert list(before) == ["build_data", "build_sec", "evaluate"]
    results = (here / "evaluate" / "results.json").read_text()
    shutil.rmtree(tmp_path / "a")

    message = said(server, tmp_path / "b", *baseline)
    there = tmp_path / "b" / "s3" / "votes" / "runs" / "first"
    assert all(f"fetching {stage} from s3://votes/runs/first" in message for stage in before)
    assert f"[evaluate] complete in {there}/evaluate" in message
    assert (there / "evaluate" / "results.json").read_text() == results
    said(server, tmp_path / "b", "recipe=build_sec", url)
    starts = {stage: json.loads((there / stage / "manifest.json").read_text())["starts"] for stage in before}
    assert starts == dict.fromkeys(before, 1) and published(fs, "votes/runs/first") == before
    for path in (p for p in (tmp_path / "b").rglob("*") if p.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
    assert all(SECRET.encode() not in fs.cat_file(path) for path in fs.find("votes/runs/first"))


def test_training_that_was_killed_goes_on_elsewhere_from_the_step_that_was_saved(
    server: dict[str, str], fs: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    for steps in (200, 1000):  # if the kill came too late, a longer run
        run = f"votes/runs/killed-after-{steps}"
        keys = (
            "recipe=psi",
            f"run_dir=s3://{run}",
            f"psi.max_steps={steps}",
            "psi.save_every=10",
            "psi.log_every=1",
        )
        process = start(server, tmp_path / "a", *keys)
        try:
            wait_until(lambda at=f"{run}/psi/{MARKER}": fs.exists(at), process, tmp_path / "a" / "log")
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        shutil.rmtree(tmp_path / "a")
        marker = json.loads(fs.cat_file(f"{run}/psi/{MARKER}"))
        if (state := marker["state"]).startswith("steps/checkpoint-"):
            break
    saved = [f"{run}/psi/{file['at']}" for file in marker["files"] if file["name"].startswith("steps/")]
    assert state.startswith("steps/checkpoint-") and len(saved) > 3

    message = said(server, tmp_path / "b", *keys)
    folder = tmp_path / "b" / "s3" / run / "psi"
    assert f"resuming from {folder}/{state}\n" in message
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["steps"], manifest["starts"]) == ("complete", steps, 2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "psi/loss" in line] == list(range(1, steps + 1))
    assert fs.find(f"{run}/psi/{published(fs, run)['psi']}/checkpoint"), "the trained model is in the store"
    assert not [path for path in saved if fs.exists(path)], "and the step that led to it is not"


def test_a_bucket_that_does_not_exist_is_one_sentence_before_anything_is_done(
    server: dict[str, str], tmp_path: Path
) -> None:
    process = start(server, tmp_path, "recipe=build_data", "run_dir=s3://nobodys/runs/x")
    text = (tmp_path / "log").read_text() if process.wait(timeout=120) == 2 else ""
    assert (
        text.startswith("error: run_dir=s3://nobodys/runs/x cannot be used (")
        and "bucket does not exist" in text
    ), text
    assert text.count("\n") == 1 and f"run_dir={tmp_path}/s3/nobodys/runs/x" in text


def wait_until(condition, process: subprocess.Popen[str], log: Path) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.2)
