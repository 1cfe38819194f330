"""Commands of the README and of docs/: all compose, those that start nothing are run as they stand; estimates are recipe=plan's."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pgenrm_train.cluster.planning import plan_of
from pgenrm_train.cluster.planning.advice import apply
from pgenrm_train.config import ROOT, load

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = "python -m pgenrm_train "
STARTS_NOTHING = ("recipe=plan", "preflight.only=true", "score.dry_run=true")


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def lines() -> list[str]:
    """Every `python -m pgenrm_train` of the pages' code blocks, with the variables that its block sets before it."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(
            r"^ {4}(python .*)$", text, re.MULTILINE
        )
        for block in blocks:
            variables = "\n".join(re.findall(r'^\w+=".*?"$', block, re.DOTALL | re.MULTILINE))
            commands = (
                line.split("  #")[0].strip()
                for line in block.replace("\\\n", " ").splitlines()
                if RUN in line
            )
            found += [f"{variables}\n{command}".strip() for command in commands]
    return found


def arguments(line: str) -> list[str]:
    """Of the recipe; `…` stands for what the reader fills in."""
    variables = dict(re.findall(r'^(\w+)="(.*?)"$', line, re.DOTALL | re.MULTILINE))
    text = re.sub(r"\$(\w+)", lambda m: variables[m[1]].replace("\n", " "), line.partition(RUN)[2])
    return [word for word in shlex.split(text.split(" > ")[0]) if word != "…"]


def short(line: str) -> str:
    return line.partition(RUN)[2][:70]


@pytest.mark.parametrize("line", lines(), ids=short)
def test_commands_of_the_pages_compose(line: str) -> None:
    asked = arguments(line)
    for job in jobs(asked[1:]) if asked[0] == "-m" else [asked]:
        config = load(*job)
        assert f"recipe={config.recipe}" in job


def jobs(asked: list[str]) -> list[list[str]]:
    """Of a multirun: one for each choice of values."""
    choices = (
        [f"{key}={value}" for value in values.split(",")]
        for key, _, values in (word.partition("=") for word in asked)
    )
    return [list(job) for job in itertools.product(*choices)]


def test_there_are_commands_on_the_pages() -> None:
    assert len(lines()) >= 20 and len([line for line in lines() if runs_here(line)]) >= 8


def runs_here(line: str) -> bool:
    return any(word in line for word in STARTS_NOTHING) and "…" not in line


@pytest.mark.parametrize("line", [line for line in dict.fromkeys(lines()) if runs_here(line)], ids=short)
def test_commands_that_start_nothing_run_as_they_stand(line: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    codes = (0, 2) if "preflight" in line else (0, 1)  # 2: this machine lacks something; 1: it would not fit
    assert done.returncode in codes and "Traceback" not in done.stderr, done.stderr
    made = [file.read_text() for file in tmp_path.iterdir() if file.is_file()]  # by a redirection alone
    assert len(made) == line.count(" > ")
    (told,) = made or [done.stdout]
    assert told.startswith(expected(line)), told[:200] + done.stderr


def expected(line: str) -> tuple[str, ...]:
    if "preflight" in line:
        return ("┏", "+")
    if "plan.json=true" in line:
        return ("{",)
    return (
        ("#!/bin/bash",)
        if "emit=slurm" in line
        else ("apiVersion",)
        if "emit=rayjob" in line
        else ("nano:", "llama31_8b:")
    )


def test_benchmarks_and_make_targets_that_the_pages_name_exist() -> None:
    everything = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    files = set(
        re.findall(
            r"(?:benchmarks|recipes|configs|pgenrm_train|requirements|eval|data_builders)/[\w/]+\.\w+",
            everything,
        )
    )
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == [] and len(files) > 20
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"[`\n]make (?:[A-Z]+=\S+ )?([a-z-]+)", everything))
    assert named <= targets and {"demo", "test", "gpu-check"} <= named


def test_make_gpu_check_composes() -> None:
    said = subprocess.run(
        ["make", "-n", "gpu-check"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    config = load(
        *arguments(
            next(line for line in said.splitlines() if "-m pgenrm_train" in line).replace(
                "python3 ", "python "
            )
        )
    )
    assert (config.recipe, config.model.label, config.cluster.name) == ("gpu_check", "nano_1b", "gpu1")
    plan = plan_of(config)
    assert all(stage.fits for stage in plan.stages), "on the smallest card of the table it is meant for"


def test_the_question_of_the_readme_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "question.json").write_text(text)
    command = [sys.executable, "-m", "pgenrm_train", "recipe=score", "score.dry_run=true", "score.input=question.json",
               f"model.path={ROOT / 'tests/data/psi_nano'}"]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Explain my slides?" in json.loads(done.stdout)[-1]["content"]


def test_the_estimates_are_the_planner_s() -> None:
    rows = re.findall(
        r"^\| (\w+) \| (\w+) \| (\w+) \| ([\d.,]+) \| ([\d,]+) \| ([\d,]+) \|$",
        page("reproduction"),
        re.MULTILINE,
    )
    assert len(rows) == 9
    configs = {}
    for model, cluster, card, hours, dollars, disk in rows:
        if (model, cluster) not in configs:
            configs[model, cluster] = load(
                "recipe=plan", f"model={model}", f"cluster={cluster}", "data=chatbot_arena"
            )
        plan = plan_of(apply(configs[model, cluster], ((("plan.card", card),),)))
        assert plan.fits
        assert (f"{plan.hours:.1f}", f"{plan.dollars:,.0f}", f"{plan.disk_gib:,.0f}") == (
            hours,
            dollars,
            disk,
        )
