"""The Dockerfile: a pinned base, the pin file, the checkout, an ordinary user, and no secret."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from pgenrm_train.cluster.launch.files import CHECKOUT, RUNS
from pgenrm_train.config import ROOT

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


def test_no_secret_goes_in():
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"(?i)\b(ARG|ENV)\b.*(key|token|secret|password)", text)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "wandb", ".env*"} <= set(ignored)
    assert "://" not in text, "no index and no download beside the distribution's own"
