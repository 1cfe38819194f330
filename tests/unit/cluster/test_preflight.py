"""Preflight reports all failures at once, each with its remedy and its row in the docs."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest

from pgenrm_train.cluster.preflight import gpus, machine, reach
from pgenrm_train.cluster.preflight.checks import CHECKS, check_machine, findings, still_to_do
from pgenrm_train.config import ROOT, STAGES, Config, attention_of, load, tokens_per_pass
from pgenrm_train.config.cluster import PREFLIGHT
from pgenrm_train.errors import PreflightError


def config(tmp_path: Path) -> Config:
    made = Config(recipe="psi", run_dir=str(tmp_path / "not" / "there" / "yet"))
    made.cluster.min_free_memory_gib = made.cluster.min_free_disk_gib = 0.0
    made.model.max_prompt_tokens, made.model.max_response_tokens = 640, 192  # nano's
    return made


@contextmanager
def server(status: int, body: bytes = b"") -> Iterator[tuple[str, list[str]]]:
    """A server that answers `status` and `body`; yields its base URL and received Authorization headers."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.path} {self.headers.get('authorization')}")
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    found = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_address[1]}/v1", seen
    finally:
        found.shutdown()
        found.server_close()


def dead_url() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}/v1"


# ---- machine ----


@pytest.mark.parametrize("stage", STAGES)
def test_enough_of_everything_passes(tmp_path: Path, stage: str) -> None:
    check_machine(config(tmp_path), stage)


def test_too_little_memory_names_the_need_and_the_remedy(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    wanting.cluster.min_free_memory_gib = 1e6
    with pytest.raises(
        PreflightError,
        match=r"GiB of memory are free, and psi needs 1000000; .* cluster\.min_free_memory_gib=",
    ):
        check_machine(wanting, "psi")


def test_light_stages_do_not_ask_for_memory(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    wanting.cluster.min_free_memory_gib = 1e6
    check_machine(wanting, "build_data")


def test_too_little_disk_is_reported_for_every_stage(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    wanting.cluster.min_free_disk_gib = 1e6
    with pytest.raises(PreflightError, match=r"GiB of disk are free at run_dir="):
        check_machine(wanting, "build_data")


def test_all_failures_are_reported_at_once(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    wanting.cluster.min_free_memory_gib = wanting.cluster.min_free_disk_gib = 1e6
    wanting.model.path = "none"
    with pytest.raises(PreflightError) as error:
        check_machine(wanting, "psi")
    assert re.findall(r"\(\d\)", str(error.value)) == ["(1)", "(2)", "(3)"] and "\n" not in str(error.value)


def test_a_check_can_be_skipped_by_name(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    wanting.cluster.min_free_memory_gib = 1e6
    wanting.preflight.skip = ["memory"]
    check_machine(wanting, "psi")


def test_missing_gpus_are_named(tmp_path: Path) -> None:
    import torch

    wanting = config(tmp_path)
    wanting.cluster.device, wanting.cluster.name = "cuda", "gpu8"
    wanting.cluster.processes_per_node = torch.cuda.device_count() + 1
    with pytest.raises(PreflightError, match="cluster=gpu8 needs"):
        check_machine(wanting, "psi")
    wanting.ray.address = "head:6379"
    assert list(gpus.check_gpus(wanting, "psi")) == [], "the cluster's GPUs are not this machine's"


def test_unfit_gpus_are_named(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    good = gpus.Gpu("NVIDIA H100", 80.0, 79.0, (9, 0))
    assert list(gpus.gpu_problems(wanting, [good, good])) == []
    old, busy = gpus.Gpu("Tesla V100", 32.0, 31.0, (7, 0)), gpus.Gpu("NVIDIA H100", 80.0, 12.0, (9, 0))
    assert "computes no bfloat16" in " ".join(gpus.gpu_problems(wanting, [old]))
    assert "the GPUs differ (NVIDIA H100, Tesla V100)" in " ".join(gpus.gpu_problems(wanting, [good, old]))
    assert "GPU 1 (NVIDIA H100) has 12.0 of 80.0 GiB free" in " ".join(
        gpus.gpu_problems(wanting, [good, busy])
    )


def test_a_fixed_port_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        monkeypatch.setenv("MASTER_PORT", str(holder.getsockname()[1]))
        (problem,) = machine.check_ports(config(tmp_path), "psi")
    assert "MASTER_PORT=" in problem and "in use" in problem
    monkeypatch.setenv("MASTER_PORT", "0")
    assert list(machine.check_ports(config(tmp_path), "psi")) == []


def test_the_driver_must_know_the_cuda_of_the_pins() -> None:
    assert list(gpus.driver_problems("580.65.06")) == [] == list(gpus.driver_problems(None))
    (problem,) = gpus.driver_problems("570.124.06")
    assert "driver is 570.124.06" in problem and "580 or newer" in problem


def test_gpus_without_work_are_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    one = load("recipe=psi", "model=llama31_8b", "cluster=gpu1", f"run_dir={tmp_path}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert next(gpus.idle_gpus(one, "psi")) == (
        "psi uses 1 of 8 GPUs; the nearest better setting is cluster.processes_per_node=8"
    )
    assert next(gpus.idle_gpus(one, "evaluate")).startswith("evaluate uses 1 of 8 GPUs")
    assert list(gpus.idle_gpus(one, "build_data")) == []
    monkeypatch.setattr(gpus, "nodes_at", lambda _: [{"GPU": 8.0}] * 6)
    four = dataclasses.replace(one, cluster=dataclasses.replace(one.cluster, nodes=2, processes_per_node=8))
    four.ray.address = "head:6379"
    assert "psi uses 16 of 48 GPUs; the nearest better setting is cluster.nodes=6" in gpus.idle_gpus(
        four, "psi"
    )
    four.preflight.skip = list(CHECKS)
    check_machine(four, "psi")
    assert capsys.readouterr().err.startswith("warning: psi uses 16 of 48 GPUs")


def test_missing_compilers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = config(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(gpus, "TOOLKIT", "nowhere")
    assert list(gpus.check_compilers(asking, "cre")) == [], "on a CPU nothing is compiled"
    asking.cluster.device = "cuda"
    assert list(gpus.check_compilers(asking, "build_data")) == []
    told = " ".join(gpus.check_compilers(asking, "cre"))
    assert "no C compiler is on PATH" in told and "nvcc is neither on PATH nor under CUDA_HOME" in told
    (tmp_path / "bin").mkdir()
    for tool in (tmp_path / "bin" / "nvcc", tmp_path / "gcc"):
        tool.touch(0o755)
    assert list(gpus.check_compilers(asking, "cre")) == []


def test_nodes_that_talk_over_tcp_are_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    line = "ring: 16 processes (nccl via NET/Socket, P2P), 1.10 GB/s"
    machine._log_ring(f"some log\n{line}\n", nodes=2)
    told = capsys.readouterr()
    assert told.out == f"{line}\n" and "over TCP (NET/Socket)" in told.err and "libibverbs1" in told.err
    machine._log_ring(f"{line}\n", nodes=1)
    machine._log_ring(line.replace("Socket", "IB"), nodes=2)
    assert capsys.readouterr().err == ""


def test_a_stage_asks_for_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("model=llama31_8b", "cluster=gpu8", "data=chatbot_arena", f"run_dir={tmp_path}")
    usage = type("Usage", (), {"free": 300 * 2**30, "total": 2**40})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    alone = load("recipe=psi", *keys)
    (problem,) = machine.check_disk(alone, "psi")
    assert re.search(r"300\.0 GiB of disk are free .* and 329 are needed", problem), (
        "three checkpoints and weights"
    )
    whole = dataclasses.replace(alone, recipe="pipeline")
    assert {tuple(machine.check_disk(whole, stage)) for stage in STAGES} == {
        tuple(machine.check_disk(whole, "psi"))
    }
    assert " and 897 are needed" in next(machine.check_disk(whole, "psi"))
    (tmp_path / "psi").mkdir()
    with (tmp_path / "psi" / "states").open("wb") as file:
        file.truncate(100 * 2**30)  # a sparse file: what a resumed stage has written counts
    assert list(machine.check_disk(alone, "psi")) == []


def test_a_ring_of_two_processes_closes_over_gloo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(tmp_path)
    assert list(machine.check_ring(asked, "psi")) == []
    asked.preflight.ring = True
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert list(machine.check_ring(asked, "psi")) == []
    assert re.search(r"^ring: 2 processes \(gloo\), \d+\.\d\d GB/s$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    (problem,) = machine.check_ring(asked, "psi")
    assert "an all-reduce over 2 processes (gloo) failed" in problem and "GLOO_SOCKET_IFNAME" in problem


# ---- versions ----


def test_a_version_off_the_pins_is_named_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = dict(machine.pins("cpu")) | {"ray": "0.1", "numpy": "9.9"}
    monkeypatch.setattr(machine, "pins", lambda device: wanted)
    (problem,) = machine.check_versions(config(tmp_path), "psi")
    assert "instead of 0.1" in problem and "instead of 9.9" in problem and "requirements/cpu.txt" in problem


def test_a_kernel_that_a_training_asks_for_must_be_there(tmp_path: Path) -> None:
    asked = config(tmp_path)
    asked.cluster.device, asked.model.attention = "cuda", "flash_attention_2"
    output = [
        problem
        for stage in ("build_sec", "psi")
        for problem in machine.check_versions(asked, stage)
        if "flash-attn" in problem
    ]
    assert len(output) == 1 and "model.attention=sdpa" in output[0], "PSI trains, build_sec does not"


def test_flash_attention_is_taken_where_it_is_installed_and_must_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = load("recipe=plan", "model=llama31_8b", "cluster=gpu8", "data=chatbot_arena")
    if find_spec("flash_attn") is None:
        assert attention_of(shipped) == "sdpa" and tokens_per_pass(shipped, "cre") is None
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert attention_of(shipped) == "flash_attention_2" and tokens_per_pass(shipped, "cre")
    problems = " ".join(machine.check_versions(shipped, "cre"))
    assert "flash-attn cannot be imported (ImportError: undefined symbol)" in problems
    for key in ("model.dtype=float32", "cluster.device=cpu", "model.attention=sdpa"):
        other = load("recipe=plan", "model=llama31_8b", "cluster=gpu8", "data=chatbot_arena", key)
        assert attention_of(other) == "sdpa", key
        assert "flash-attn" not in " ".join(machine.check_versions(other, "cre"))


def test_outside_a_checkout_no_version_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    machine.pins.cache_clear()
    assert list(machine.check_versions(config(tmp_path), "psi")) == []
    machine.pins.cache_clear()


# ---- reach ----


@pytest.mark.parametrize(("section", "stage"), [("teacher", "build_sec"), ("judge", "cre")])
def test_an_api_is_asked_before_it_is_needed(
    section: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = config(tmp_path)
    settings = getattr(asking, section)
    settings.kind, settings.name, settings.api_key_env = "endpoint", "m", "SOME_KEY"
    check = CHECKS[section]
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert f"{section}.api_key_env=SOME_KEY is not set" in " ".join(check(asking, stage))
    monkeypatch.setenv("SOME_KEY", "k")
    for status, message in {
        200: "",
        404: "",
        401: "refuses the key in SOME_KEY",
        503: "answers HTTP 503",
    }.items():
        with server(status) as (url, seen):
            settings.base_url = url
            output = " ".join(check(asking, stage))
        assert (message in output) if message else not output
        assert seen == ["/v1/models Bearer k"]
    settings.base_url = dead_url()
    assert f"the {section} does not answer at" in " ".join(check(asking, stage))
    assert list(check(asking, "build_data")) == [], "only where it is used"


def test_a_judge_that_is_not_asked_is_not_looked_for(tmp_path: Path) -> None:
    asking = config(tmp_path)
    asking.judge.kind, asking.judge.base_url = "endpoint", dead_url()
    assert list(CHECKS["judge"](asking, "curriculum")) == [], "its process reward is off"


def test_a_model_under_test_is_asked(tmp_path: Path) -> None:
    asking = config(tmp_path)
    asking.model.kind, asking.model.base_url = "endpoint", "no url at all"
    assert "the model does not answer" in " ".join(CHECKS["model_endpoint"](asking, "evaluate"))


def test_missing_data_is_reported_and_a_hub_name_is_not(tmp_path: Path) -> None:
    asking = config(tmp_path)
    for path, wrong in {
        str(tmp_path): False,
        "none.parquet": True,
        "/none/x": True,
        "someone/votes": False,
    }.items():
        asking.data.path = path
        assert bool(list(reach.check_data(asking, "build_data"))) == wrong, path


def test_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    asking = config(tmp_path)
    asking.model.kind, asking.model.name = "hf", "nobody/nothing"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in " ".join(reach.check_model(asking, "psi"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for status, message in {
        200: "",
        403: "accept its licence",
        404: "the hub has no model nobody/nothing",
    }.items():
        with server(status) as (url, _):
            monkeypatch.setattr(constants, "ENDPOINT", url)
            output = " ".join(reach.check_model(asking, "psi"))
        assert (message in output) if message else not output
    monkeypatch.setattr(constants, "ENDPOINT", dead_url())
    assert "is not reached" in " ".join(reach.check_model(asking, "psi"))
    for variable, value in (("ALL_PROXY", "socks://proxy:1"), ("SSL_CERT_FILE", "/nowhere/ca.pem")):
        with monkeypatch.context() as environment:
            environment.setenv(variable, value)
            environment.setattr(constants, "ENDPOINT", "https://hub.example")
            [problem] = reach.check_model(asking, "psi")
            environment.setenv("WANDB_API_KEY", "key")
            environment.setenv("WANDB_BASE_URL", "https://wandb.example")
            asking.tracking.kind = "wandb"
            [other] = reach.check_wandb(asking, "psi")
        assert variable in problem and "hub cannot be called" in problem
        assert variable in other and "W&B at wandb.example cannot be called" in other
    asking.model.name = str(ROOT / "tests/data/psi_nano")
    assert list(reach.check_model(asking, "psi")) == []


def test_wandb_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = config(tmp_path)
    asking.tracking.kind = "wandb"
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "tracking=wandb has no key for api.wandb.ai" in " ".join(reach.check_wandb(asking, "psi"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # no server there: the run would start offline
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert list(reach.check_wandb(asking, "psi")) == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")
    assert "wandb.invalid" in " ".join(reach.check_wandb(asking, "psi"))
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert list(reach.check_wandb(asking, "psi")) == []


@pytest.mark.parametrize(
    ("answer", "refused"),
    [({"viewer": {"id": "v"}}, False), ({"viewer": None}, True), (401, True), (503, False)],
)
def test_a_key_that_wandb_refuses_is_reported(
    answer: object, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = config(tmp_path)
    asking.tracking.kind = "wandb"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    status = answer if isinstance(answer, int) else 200
    with server(status, json.dumps({"data": answer}).encode()) as (url, seen):
        monkeypatch.setenv("WANDB_BASE_URL", url.removesuffix("/v1"))
        output = " ".join(reach.check_wandb(asking, "psi"))
    assert seen == ["/graphql Basic YXBpOms="]
    assert ("W&B at 127.0.0.1 refuses the key" in output) == refused == bool(output)


def test_a_ray_cluster_must_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = config(tmp_path)
    asking.ray.address = dead_url().removeprefix("http://").removesuffix("/v1")
    assert "no Ray cluster answers at 127.0.0.1" in " ".join(reach.check_ray(asking, "cre"))
    asking.ray.address = "nonsense"
    assert "is not host:port or auto" in " ".join(reach.check_ray(asking, "cre"))
    asking.ray.address = "auto"
    monkeypatch.setenv("RAY_ADDRESS", dead_url().removeprefix("http://").removesuffix("/v1"))
    assert "no Ray cluster answers at 127.0.0.1" in " ".join(reach.check_ray(asking, "cre"))


def test_several_nodes_need_a_cluster_with_enough_gpus_of_one_kind(tmp_path: Path) -> None:
    asking = config(tmp_path)
    asking.cluster.nodes, asking.cluster.processes_per_node, asking.cluster.name = 2, 8, "multi_node"
    assert "cluster.nodes=2 needs ray.address=" in " ".join(reach.check_ray(asking, "cre"))
    assert list(reach.check_ray(asking, "build_sec")) == []
    full, half = {"GPU": 8.0, "accelerator_type:H100": 1.0}, {"GPU": 4.0, "accelerator_type:H100": 1.0}
    assert list(reach.cluster_problems(asking, "cre", [full, full])) == []
    assert "room for 1 nodes of 8 GPUs and cluster=multi_node needs 2" in " ".join(
        reach.cluster_problems(asking, "cre", [full, half, {"CPU": 4.0}])
    )
    assert "differ (A100, H100)" in " ".join(
        reach.cluster_problems(asking, "cre", [full, {"GPU": 8.0, "accelerator_type:A100": 1.0}])
    )
    judged = load("recipe=cre", "model=llama31_8b", "cluster=gpu8", "judge=vllm", "judge.name=some/model")
    (problem,) = reach.cluster_problems(judged, "cre", [full])
    assert problem.startswith("the Ray cluster has 8 GPUs, and cre needs 9 with those of served judges")
    assert list(reach.cluster_problems(judged, "cre", [full, half])) == []
    assert list(reach.cluster_problems(judged, "psi", [full])) == []
    assert list(reach.cluster_problems(asking, "psi", [{"CPU": 4.0}])) == [], (
        "on CPUs PSI takes no GPUs, logical ones neither"
    )


# ---- the whole ----


def test_a_failure_of_one_stage_is_not_repeated_by_the_next(tmp_path: Path) -> None:
    wanting = config(tmp_path)
    wanting.cluster.min_free_disk_gib = 1e6
    assert sum(len(f.problems) for f in findings(wanting, STAGES)) == 1


def test_complete_stages_need_nothing(tmp_path: Path) -> None:
    made = config(tmp_path)
    folder = Path(made.run_dir) / "build_sec"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"status": "complete"}')
    assert still_to_do(made, ["build_sec", "psi"]) == ["psi"]


SKIP = "[disk,memory,versions,gpus,compilers,shared_memory,data,model]"  # of this machine


def test_only_prints_a_table_and_an_exit_code_and_makes_nothing(tmp_path: Path) -> None:
    def ask(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pgenrm_train", "recipe=pipeline", "preflight.only=true", *more]
        return subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        )

    lacking = ask("cluster.min_free_disk_gib=1e6", "cluster.min_free_memory_gib=0")
    assert lacking.returncode == 2 and "FAILED" in lacking.stdout and lacking.stdout.count("FAILED") == 1
    assert "votes[copy].parquet" in ask("data=pairs", "data.path='votes[copy].parquet'").stdout
    eight = ("model=qwen3_8b", "cluster=gpu8", "data=chatbot_arena", f"preflight.skip={SKIP}")
    few = ask(*eight, "cre.steps=5")
    assert few.returncode == 0 and "cre makes 5 optimiser steps" in few.stderr, few.stdout + few.stderr
    fine = ask("cluster.min_free_disk_gib=0", "cluster.min_free_memory_gib=0", "preflight.skip=[versions]")
    assert fine.returncode == 0 and "FAILED" not in fine.stdout and "skipped" in fine.stdout
    assert list(tmp_path.iterdir()) == []


def test_names_of_checks_are_known_to_the_configuration_and_to_the_docs() -> None:
    assert tuple(CHECKS) == PREFLIGHT
    rows = re.findall(
        r"^\| (`.+?`) \| ", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(CHECKS) <= set(re.findall(r"`(\w+)`", " ".join(rows)))


def failures_in_the_code() -> list[str]:
    """Longest run of fixed words before the remedy, of every sentence that a check can yield."""
    import ast

    found = []
    for name in ("fit", "gpus", "machine", "reach"):
        tree = ast.parse((ROOT / f"pgenrm_train/cluster/preflight/{name}.py").read_text(encoding="utf-8"))
        checks = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name != "planned_warnings"]
        for node in (n.value for f in checks for n in ast.walk(f) if isinstance(n, ast.Yield)):
            assert isinstance(node, ast.JoinedStr)
            parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            text = "".join(parts)
            found.append(max(text.partition(";")[0].split("…"), key=len).strip(" (),"))
    return found


def test_every_failure_has_its_row_in_the_troubleshooting_table() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    failures = failures_in_the_code()
    assert len(failures) > 20 and all(failures)
    assert [failure for failure in failures if failure not in page] == []


def test_a_stage_alone_needs_the_one_before_it_and_its_data(tmp_path: Path) -> None:
    config = load(
        "recipe=cre", "data=pairs", "data.path=/nowhere/votes.parquet", f"run_dir={tmp_path / 'run'}"
    )
    output = " ".join(problem for finding in findings(config, ["cre"]) for problem in finding.problems)
    assert (
        "/nowhere/votes.parquet does not exist" in output
        and "there is no complete psi under run_dir=" in output
    )
    assert not (tmp_path / "run").exists()
