"""What the machine lacks is said in one sentence before the stage starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgenrm_train.config import Config
from pgenrm_train.errors import PreflightError
from pgenrm_train.preflight import check_machine


def config(tmp_path: Path) -> Config:
    made = Config(recipe="psi", run_dir=str(tmp_path / "not" / "there" / "yet"))
    made.cluster.min_free_memory_gib = made.cluster.min_free_disk_gib = 0.0
    return made


def test_enough_of_everything_passes(tmp_path: Path) -> None:
    check_machine(config(tmp_path), "psi")


def test_too_little_memory_names_the_need_and_the_remedy(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    wanting.cluster.min_free_memory_gib = 1e6
    with pytest.raises(PreflightError, match=r"GiB of memory are free, and psi needs cluster\.min_free_memory_gib=1e\+06"):
        check_machine(wanting, "psi")


def test_light_stages_do_not_ask_for_memory(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    wanting.cluster.min_free_memory_gib = 1e6
    check_machine(wanting, "build_data")


def test_too_little_disk_is_said_for_every_stage(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    wanting.cluster.min_free_disk_gib = 1e6
    with pytest.raises(PreflightError, match=r"GiB of disk are free at run_dir="):
        check_machine(wanting, "build_data")


def test_missing_gpus_are_named(tmp_path: Path) -> None:
    import torch

    wanting = config(tmp_path)
    wanting.cluster.device, wanting.cluster.name = "cuda", "gpu8"
    wanting.cluster.processes_per_node = torch.cuda.device_count() + 1
    with pytest.raises(PreflightError, match="cluster=gpu8 needs"):
        check_machine(wanting, "psi")
