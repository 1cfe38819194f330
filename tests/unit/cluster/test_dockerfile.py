"""The Dockerfile: a pinned base, the pin file, the checkout, an ordinary user, and no secret."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pgenrm_train.cluster.launch.files import CHECKOUT, RUNS
from pgenrm_train.cluster.preflight import gpus, machine
from pgenrm_train.cluster.preflight.checks import findings
from pgenrm_train.config import ROOT, load
from recipes.wiring.gpu_check import STEPS

KNOWN = {"FROM", "RUN", "USER", "ENV", "COPY", "WORKDIR", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order; continued lines joined, comments left out."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_every_line_is_an_instruction_and_the_base_is_pinned():
    found = instructions()
    assert {name for name, _ in found} <= KNOWN
    assert found[0][0] == "FROM" and [name for name, _ in found].count("FROM") == 1
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu24\.04", found[0][1]), "no latest"


def test_hadolint_has_nothing_to_say():
    linter = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run(
        [linter, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_has_the_cuda_of_the_pins():
    toolkit = re.search(
        r"^cuda-toolkit==(\d+\.\d+)", (ROOT / "requirements/gpu.txt").read_text(), re.MULTILINE
    )
    assert toolkit is not None and f":{toolkit[1]}." in instructions()[0][1]


def test_the_pins_are_installed_before_the_checkout_is_copied():
    steps = [f"{name} {text}" for name, text in instructions()]
    pins = next(
        i for i, step in enumerate(steps) if step.startswith("RUN") and "requirements/gpu.txt" in step
    )
    code = next(i for i, step in enumerate(steps) if re.match(r"COPY .* \. \.$", step))
    assert pins < code < next(i for i, step in enumerate(steps) if "--editable ." in step)
    assert f"WORKDIR {CHECKOUT}" in steps and any(
        f"mkdir -p /opt/venv {CHECKOUT} {RUNS}" in step for step in steps
    )


def test_it_runs_as_an_ordinary_user():
    users = [text for name, text in instructions() if name == "USER"]
    # By number: Kubernetes' runAsNonRoot cannot resolve a name.
    assert users == ["10001"] and any(
        "useradd" in text and "10001" in text for name, text in instructions() if name == "RUN"
    )


def test_nccl_verl_and_triton_find_their_libraries():
    """RDMA for NCCL between nodes, libnuma.so (its development package) for veRL, a compiler for Triton."""
    (packages,) = (text for _, text in instructions() if "apt-get install" in text)
    wanted = {"ibverbs-providers", "libibverbs1", "librdmacm1t64", "libnuma-dev", "build-essential"}
    assert wanted <= set(packages.split())


# Packages of Ubuntu 24.04 (noble) for amd64 and their component, from logs of apt on that release; the image
# has main and universe.  There librdmacm1 is librdmacm1t64.
NOBLE = {
    "build-essential": "main",
    "git": "main",
    "ibverbs-providers": "main",
    "libibverbs1": "main",
    "libnuma-dev": "main",
    "librdmacm1t64": "main",
    "openssh-client": "main",
    "python3.12": "main",
    "python3.12-dev": "main",
    "python3.12-venv": "universe",
    "wget": "main",
}


def test_every_package_is_one_of_the_base_s_release():
    (command,) = (text for _, text in instructions() if "apt-get install" in text)
    names = shlex.split(command.split("apt-get install")[1].split("&&")[0])
    packages = [name for name in names if not name.startswith("-")]
    assert packages == sorted(packages) and set(packages) == set(NOBLE), "look a new name up and add it"
    assert instructions()[0][1].endswith("-ubuntu24.04"), "another release has other names"


def test_weights_outlive_the_container():
    assert any(f"HF_HOME={RUNS}/" in text for name, text in instructions() if name == "ENV")


def test_the_example_composes_and_passes_the_preflight_in_the_image(tmp_path, monkeypatch):
    import torch

    (line,) = re.findall(
        r"^#   docker run .* pgenrm-train:\S+ (.*)$", (ROOT / "Dockerfile").read_text(), re.M
    )
    config = load(*shlex.split(line))
    assert config.cluster.device == "cuda", "the image has the packages of GPUs"
    config.run_dir = str(tmp_path / Path(config.run_dir).name)
    # the image on a machine with one GPU
    monkeypatch.setattr(machine, "installed", machine.pins("gpu").get)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [gpus.Gpu("NVIDIA L40S", 45.0, 44.0, (8, 9))])
    monkeypatch.setattr(gpus, "driver_version", lambda: "580.65.06")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    left_out = ("memory", "shared_memory")  # of this machine
    problems = [p for f in findings(config, STEPS) for p in f.problems if f.check not in left_out]
    assert problems == []
    config.cluster.device = "cpu"
    assert "versions differ" in " ".join(p for f in findings(config, STEPS) for p in f.problems)


def test_no_secret_goes_in():
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"(?i)\b(ARG|ENV)\b.*(key|token|secret|password)", text)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "wandb", ".env*"} <= set(ignored)
    assert "://" not in text, "no index and no download beside the distribution's own"
