"""A real vLLM, served here, as teacher and as judge.  The models are tiny: their quality is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from data_builders.sources.personaworld import build
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.roles import LlmJudge
from pgenrm_train.backends.sft.nano import make_nano
from pgenrm_train.backends.vllm.server import served
from pgenrm_train.config import ROOT, Config, DataConfig, EndpointConfig, NanoConfig
from pgenrm_train.records.pairs import ExplicitSignals
from pgenrm_train.records.rows import pair_to_row
from pgenrm_train.rewards.judging import INSTRUCTIONS


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster.address
    cluster.shutdown()


@pytest.mark.parametrize("place", ["here", "cluster"])
def test_a_served_judge_gives_verdicts_of_the_required_form(
    tmp_path: Path, place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights behind guided decoding: every answer is a verdict, and stopping leaves no process.

    The proxy of the environment is dead, because a server on this machine is asked without one.
    """
    if place == "here":
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
    config = Config(recipe="cre")
    config.ray.address = request.getfixturevalue("cluster") if place == "cluster" else None
    make_nano(tmp_path / "model", [INSTRUCTIONS] * 4, [], NanoConfig(positions=4096), 0)
    settings = EndpointConfig(
        kind="vllm", name=str(tmp_path / "model"), max_tokens=600, temperature=1.0, max_in_flight=4
    )
    with served(config, settings, tmp_path / "server.log", with_training=True) as endpoint:
        family = [
            p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])
        ]
        judge = LlmJudge(Endpoint(endpoint))
        scores = [judge(f"chain {n}", {"explicit": '{"criteria": "short"}'}) for n in range(4)]
        assert judge.endpoint.usage.calls == 4, (tmp_path / "server.log").read_text()[-2000:]
        assert sum(score is not None for score in scores) >= 2, (
            judge.metrics()
        )  # a random text may run into max_tokens
        assert all(score is None or 0 <= score <= 1 for score in scores)
    assert family and not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_served_model_is_the_teacher_of_a_run(tmp_path: Path) -> None:
    """The shipped nano has learnt to write chains: build_sec takes them from it as from any teacher."""
    votes = tmp_path / "votes.jsonl"
    # without stated criteria: the shipped model was trained without
    pairs = [
        replace(p, explicit=ExplicitSignals())
        for p in build(DataConfig(users=40, heldout_users=4), 0)
        if p.trains
    ]
    votes.write_text("".join(json.dumps(pair_to_row(pair)) + "\n" for pair in pairs))
    command = [
        sys.executable,
        *("-m", "pgenrm_train", "recipe=build_sec", "pipeline.budget=smoke", f"run_dir={tmp_path / 'run'}"),
        *(
            "data=pairs",
            f"data.path={votes}",
            "data.history_policy=same_scenario",
            "data.history_kind=medium",
        ),
        *("teacher=vllm", f"teacher.name={ROOT / 'tests/data/psi_nano'}", "teacher.instructions=false"),
        *("teacher.max_tokens=192", "teacher.temperature=0.3", "sec.max_chains=60", "sec.samples_per_pair=2"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "run/build_sec/yield.json").read_text())
    unreadable = sum(
        count for reason, count in facts["rejected"].items() if reason.startswith(("parse:", "teacher:"))
    )
    assert facts["asked"] - unreadable >= 30, facts  # the prompts are longer than in its training
    assert facts["teacher"]["calls"] == facts["asked"] and facts["teacher"]["completion tokens"] > 0
