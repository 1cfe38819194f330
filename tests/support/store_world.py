"""For tests of runs at URLs: small run folders, machines that share a store, stores in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pgenrm_train.config import Config
from pgenrm_train.config.places import place
from pgenrm_train.files import write_json, write_text
from pgenrm_train.run import folder as artifacts
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.store import publisher as publishing
from pgenrm_train.run.store import snapshots
from pgenrm_train.run.store.objects import Store
from pgenrm_train.run.store.publisher import Publisher

SETTINGS: dict[str, Any] = {"psi": {"epochs": 1}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short waits, and nothing left open or in memory."""
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
    made.open()
    return made


def stage(run_dir: Path, name: str = "psi", complete: bool = True, **files: str) -> StageFolder:
    """A stage's folder with small files: `a__b_c="text"` is the file a/b.c."""
    folder = StageFolder.read(run_dir, name)
    folder.begin(config={}, settings=SETTINGS, inputs={}, seed=0)
    for file, text in files.items():
        write_text(folder.path / file.replace("__", "/").replace("_", "."), text)
    if complete:
        folder.finish()
    return folder


def step(run_dir: Path, number: int, best: int | None = None, form: str = "psi/steps/checkpoint-") -> Path:
    """A complete step checkpoint."""
    checkpoint = run_dir / f"{form}{number}"
    write_text(checkpoint / "model.safetensors", f"weights {number}")
    write_json(checkpoint / "trainer_state.json", {"best_global_step": best})
    write_json(checkpoint / "complete.json", {"step": number})
    return checkpoint


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def held(url: str) -> set[str]:
    """Names of all objects at the URL."""
    fs, root = fsspec.url_to_fs(url)
    return {str(path).partition(f"{root}/")[2] for path in fs.find(root)}
