"""PSI on two logical nodes of a Ray cluster on this machine; one of them is lost in the middle and comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_psi import CHANGED, NANO, rows

from pgenrm_train.backends import deepspeed_sft
from pgenrm_train.config import Config, load
from pgenrm_train.errors import ConfigError
from pgenrm_train.tracking import METRICS

__all__ = ["rows"]  # the fixture
STEPS = 30


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield made
    made.shutdown()


def test_a_lost_node_costs_what_was_not_saved(cluster: Any, rows: Path, tmp_path: Path) -> None:
    lost = cluster.add_node(num_cpus=1)
    config = _config(f"ray.address={cluster.address}", nodes=2)
    back: list[subprocess.Popen[bytes]] = []
    accident = threading.Thread(target=_lose_a_node, args=(cluster, lost, tmp_path / "nodes" / "steps", back))
    accident.start()
    trained = deepspeed_sft.train(config, rows, start=NANO, work_dir=tmp_path / "nodes")
    accident.join()
    back[0].terminate()
    assert trained.steps == STEPS
    assert list((tmp_path / "nodes" / "ray_train").rglob("*")), "Ray Train kept its state in the run folder"

    deepspeed_sft.train(_config(nodes=1, processes=2), rows, start=NANO, work_dir=tmp_path / "whole")
    again, whole = _losses(tmp_path / "nodes"), _losses(tmp_path / "whole")
    assert sorted(again) == sorted(whole) == list(range(1, STEPS + 1))
    assert again == pytest.approx(whole, rel=1e-4)


def test_several_nodes_need_an_address(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster.nodes=2 needs ray.address="):
        deepspeed_sft.train(_config(nodes=2), rows, start=NANO, work_dir=tmp_path)


def _lose_a_node(cluster: Any, node: Any, steps: Path, back: list[Any]) -> None:
    """Take the node away once a checkpoint is whole, and bring another up a little later."""
    while not list(steps.glob(f"checkpoint-*/{deepspeed_sft.COMPLETE}")):
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    time.sleep(3)
    # as a user would, and `add_node` sets signal handlers, which a thread may not
    ray = Path(sys.executable).parent / "ray"
    back.append(subprocess.Popen([ray, "start", f"--address={cluster.address}", "--num-cpus=1", "--block"]))


def _config(*overrides: str, nodes: int, processes: int = 1) -> Config:
    config = load("recipe=psi", "model=llama31_8b", "cluster=multi_node", *overrides)
    changes = {"cluster.nodes": nodes, "cluster.processes_per_node": processes, "psi.max_steps": STEPS, "psi.save_every": 5}
    for key, value in (CHANGED | changes).items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    return config


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return {line["step"]: line["psi/loss"] for line in lines}
