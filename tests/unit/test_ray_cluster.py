"""What travels to a cluster, and how often a stage starts again; nodes that are really lost are in tests/integration/test_nodes.py."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from pgenrm_train.backends import verl_grpo
from pgenrm_train.backends.ray_cluster import ALL_BUT_CODE, CODE, loss
from pgenrm_train.config import ROOT, Config
from pgenrm_train.errors import BackendError, NodeLostError


def test_the_package_holds_the_code_and_nothing_else(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True, excludes=ALL_BUT_CODE)
    names = zipfile.ZipFile(tmp_path / "package.zip").namelist()
    assert {name.split("/")[0] for name in names} == set(CODE)
    assert {"pgenrm_train/backends/verl_cpu.py", "recipes/psi.py", "configs/config.yaml", "eval/validation.py"} <= set(names)
    assert not any("__pycache__" in name for name in names)


@pytest.mark.parametrize(("losses", "starts"), [(0, 1), (2, 3), (4, 4)])
def test_a_stage_starts_again_as_often_as_is_allowed(
    losses: int, starts: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []

    def once(*_: object) -> list[object]:
        made.append(1)
        if len(made) <= losses:
            raise loss("10.0.0.2", "cre", 7)
        return []

    monkeypatch.setattr(verl_grpo, "_launch", once)
    config = Config(recipe="cre")
    if losses > config.cluster.max_failures:
        with pytest.raises(NodeLostError, match=r"cre: node 10\.0\.0\.2 of the Ray cluster was lost at step 7"):
            verl_grpo.launch(config, [])
    else:
        assert verl_grpo.launch(config, []) == []
    assert len(made) == starts
    assert capsys.readouterr().out.count("it goes on from its newest checkpoint once the node is back") == starts - 1


def test_another_failure_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def fails(*_: object) -> None:
        made.append(1)
        raise BackendError("out of memory")

    monkeypatch.setattr(verl_grpo, "_launch", fails)
    with pytest.raises(BackendError, match="out of memory"):
        verl_grpo.launch(Config(recipe="cre"), [])
    assert made == [1]
