"""PSI and CRE on two logical nodes of a Ray cluster on this machine, one of which is lost and returns."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import verl_world
from test_psi import CHANGED, NANO, rows

from pgenrm_train.backends.grpo.config import verl_variables
from pgenrm_train.backends.grpo.phase import Phase
from pgenrm_train.backends.grpo.supervisor import launch
from pgenrm_train.backends.ray import cluster as ray_cluster
from pgenrm_train.backends.sft import engine as deepspeed_sft
from pgenrm_train.cluster.preflight.machine import check_ring
from pgenrm_train.cluster.preflight.reach import check_ray
from pgenrm_train.config import ROOT, Config, load
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.errors import BackendError, ConfigError
from pgenrm_train.run.checkpoints import COMPLETE
from pgenrm_train.run.tracking import METRICS

__all__ = ["rows"]  # the fixture
STEPS = 30
GRPO_STEPS = 2
LOGICAL = {"num_cpus": 16, "num_gpus": 1}  # of a node, for veRL's placement


@contextmanager
def started(**head: Any) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def cluster() -> Iterator[Any]:
    with started(num_cpus=1) as cluster:
        yield cluster


def test_a_lost_node_costs_what_was_not_saved(
    cluster: Any, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lost = cluster.add_node(num_cpus=1)
    config = _config(f"ray.address={cluster.address}", "preflight.ring=true", nodes=2)
    assert list(check_ring(config, "psi")) == [], "an all-reduce over both nodes"
    back: list[subprocess.Popen[bytes]] = []
    saved = tmp_path / "nodes" / "steps"
    where = (cluster, lost, saved, f"checkpoint-*/{COMPLETE}")
    accident = threading.Thread(target=_lose_a_node, args=(*where, back, ["--num-cpus=1"]), daemon=True)
    accident.start()
    trained = deepspeed_sft.train(config, rows, start=NANO, work_dir=tmp_path / "nodes")
    accident.join()
    back[0].terminate()
    assert trained.steps == STEPS
    out = capfd.readouterr().out
    assert re.search(
        r"psi: rank [01, ]+ of the cluster was lost \(\w+\); all start again from \S+/checkpoint-\d+ once",
        out,
    ), out[-2000:]
    assert list((tmp_path / "nodes" / "ray_train").rglob("*")), "Ray Train keeps its state in the run folder"

    deepspeed_sft.train(_config(nodes=1, processes=2), rows, start=NANO, work_dir=tmp_path / "whole")
    again, whole = _losses(tmp_path / "nodes"), _losses(tmp_path / "whole")
    assert sorted(again) == sorted(whole) == list(range(1, STEPS + 1))
    assert again == pytest.approx(whole, rel=1e-4)


def test_several_nodes_need_an_address(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster.nodes=2 needs ray.address="):
        deepspeed_sft.train(_config(nodes=2), rows, start=NANO, work_dir=tmp_path)


def test_grpo_over_two_nodes_resumes_when_a_lost_one_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, table = verl_world.write_checkpoint(tmp_path / "start", sft_steps=60), tmp_path / "rows.parquet"
    verl_world.write_rows(table, 16)
    for name, value in verl_variables(Config(recipe="cre")).items():
        if name.startswith("RAY_"):  # no idle processes: of the nodes' daemons too
            monkeypatch.setenv(name, value)
    phase = Phase(StageName.CRE, start, table, tmp_path / "cre", GRPO_STEPS)
    back: list[subprocess.Popen[bytes]] = []
    places: dict[str, set[str]] = {}
    with started(**LOGICAL) as cluster:
        lost = cluster.add_node(**LOGICAL)
        where = (cluster, lost, phase.work_dir / "verl", "global_step_1/complete.json")
        options = ["--num-cpus=16", "--num-gpus=1"]
        accident = threading.Thread(target=_lose_a_node, args=(*where, back, options, places), daemon=True)
        accident.start()
        (trained,) = launch(_grpo(cluster.address, tmp_path), [phase])
        accident.join()
        back[0].terminate()
    assert trained.steps == GRPO_STEPS
    assert len(places["WorkerDict"]) == 2, "a rank of FSDP on each node"
    assert len(places["vLLMHttpServer"]) == 2, "and a replica of vLLM"
    out = capsys.readouterr().out
    assert re.search(
        r"cre: node \S+ of the Ray cluster was lost at step \d\nstarting again from the newest checkpoint",
        out,
    ), out
    assert "nodes have 1 free GPUs each; waiting for the others" in out and "cre: resuming after step" in out
    sampler = CurriculumSampler(16, prompts_per_step=4, steps=GRPO_STEPS, seed=0)
    drawn = [json.loads(line) for line in (phase.work_dir / "batches.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in drawn] == [sampler.next_batch(step) for step in range(1, GRPO_STEPS + 1)]
    steps = [json.loads(line) for line in (phase.work_dir / METRICS).read_text().splitlines()]
    assert [line["step"] for line in steps] == list(range(1, GRPO_STEPS + 1))
    assert all(abs(line["cre/actor/ppo_kl"]) < 1e-5 for line in steps), (
        "both replicas have the actor's weights"
    )


TRAVELS = """
import ray
from pgenrm_train.backends.ray import cluster as ray_cluster

def where():
    import os, recipes.psi
    from pgenrm_train.config import CONFIG_DIR
    return recipes.psi.__file__, os.environ["ONE_OF_OURS"], (CONFIG_DIR / "config.yaml").exists()

ray_cluster.join("ADDRESS", {"ONE_OF_OURS": "set"})
print("FOUND", *ray.get(ray.remote(num_cpus=1)(where).remote(), timeout=120))
"""


def test_the_checkout_travels_to_the_workers_of_a_driver_and_of_a_submitted_job() -> None:
    """The second by the command of docs/cluster.md, with another entrypoint."""
    with (
        socket.socket() as free,
        socket.socket() as also_free,
    ):  # another Ray on this machine may hold the usual ports
        free.bind(("127.0.0.1", 0))
        also_free.bind(("127.0.0.1", 0))
        dashboard, agent = free.getsockname()[1], also_free.getsockname()[1]
    page = (ROOT / "docs/cluster.md").read_text()
    (command,) = re.findall(r"^(RAY_OVERRIDE\S+ ray job submit .*?-- )python", page, re.DOTALL | re.MULTILINE)
    command = command.replace("HEAD:8265", f"127.0.0.1:{dashboard}").replace("\\\n", " ")
    ports = {"dashboard_port": dashboard, "dashboard_agent_listen_port": agent}
    with started(num_cpus=2, include_dashboard=True, **ports) as cluster:
        driver = [sys.executable, "-c", TRAVELS.replace("ADDRESS", cluster.address)]
        submitted = [
            "bash",
            "-c",
            command + shlex.join([sys.executable, "-c", TRAVELS.replace("ADDRESS", "auto")]),
        ]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for one in (driver, submitted):
            done = subprocess.run(
                one, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=240
            )
            (found,) = re.findall(r"FOUND (\S+) set True", done.stdout) or [done.stdout + done.stderr]
            assert found.endswith("recipes/psi.py") and not Path(found).is_relative_to(ROOT), found


def test_a_cluster_that_is_too_small_is_an_error_after_a_while(
    cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    asking = _config(f"ray.address={cluster.address}", nodes=2)
    assert list(check_ray(asking, "psi")) == []
    assert "the Ray cluster has room for 0 nodes of 1 GPUs" in " ".join(check_ray(asking, "cre"))
    ray.init(address=cluster.address)
    try:
        with pytest.raises(
            BackendError, match="0 of 2 nodes of the Ray cluster had 1 free GPUs each after 1 s"
        ):
            ray_cluster.await_gpus(_config(nodes=2).cluster, lambda: None, seconds=1.0)
    finally:
        ray.shutdown()
    assert capsys.readouterr().out.count("waiting for the others") == 1


def _lose_a_node(
    cluster: Any, node: Any, saved: Path, complete: str, back: list[Any], options: list[str],
    places: dict[str, set[str]] | None = None,
) -> None:  # fmt: skip
    """Remove the node once a checkpoint is complete, and start another a little later."""
    while not list(saved.glob(complete)):
        time.sleep(0.05)
    if places is not None:
        places |= _places(cluster.address)
    cluster.remove_node(node, allow_graceful=False)
    if places is None:
        time.sleep(3)
    else:  # the engine's next start waits for it
        while "waiting for the others" not in (saved.parent / "engine.log").read_text():
            time.sleep(0.2)
    # as a user would, and `add_node` sets signal handlers, which a thread may not
    ray = Path(sys.executable).parent / "ray"
    back.append(subprocess.Popen([ray, "start", f"--address={cluster.address}", *options, "--block"]))


def _places(address: str) -> dict[str, set[str]]:
    """Class of living actors → the nodes that hold them."""
    import ray

    nodes: dict[str, set[str]] = defaultdict(set)
    ray.init(address=address, log_to_driver=False)
    for actor in ray._private.state.actors().values():
        if actor["State"] == "ALIVE":
            nodes[actor["ActorClassName"].rpartition(".")[2]].add(actor["Address"]["NodeID"])
    ray.shutdown()
    return nodes


def _grpo(address: str, folder: Path) -> Config:
    config = Config(recipe="cre", run_dir=str(folder))
    config.ray.address, config.cluster.nodes = address, 2
    config.model.max_prompt_tokens, config.model.max_response_tokens = 64, 64
    cre = config.cre
    cre.prompts_per_step, cre.mini_batch_prompts, cre.group_size, cre.micro_batch_size = 4, 4, 4, 8
    cre.learning_rate, cre.save_every, cre.kl_coefficient = 1e-3, 1, 0.0
    return config


def _config(*overrides: str, nodes: int, processes: int = 1) -> Config:
    config = load("recipe=psi", "model=llama31_8b", "cluster=multi_node", *overrides)
    changes = {
        "cluster.nodes": nodes,
        "cluster.processes_per_node": processes,
        "cluster.zero_stage": 3,
        "psi.max_steps": STEPS,
        "psi.save_every": 5,
    }
    for key, value in (CHANGED | changes).items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    return config


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return {line["step"]: line["psi/loss"] for line in lines}
