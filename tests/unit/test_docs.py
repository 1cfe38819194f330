"""Pages of the repository: commands compose and run, links and names exist, estimates are the planner's."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import pgenrm_train
from pgenrm_train.cluster.planning.advice import apply
from pgenrm_train.cluster.planning.plan import plan_of
from pgenrm_train.config import ROOT, load

DOCS = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS, *EXAMPLES]
RUN = "python -m pgenrm_train "
STARTS_NOTHING = ("recipe=plan", "preflight.only=true", "score.dry_run=true")
FOLDERS = "benchmarks|recipes|configs|pgenrm_train|requirements|eval|data_builders|tests|examples"


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `python -m pgenrm_train` of the pages' code blocks, with the variables that its block sets."""
    found = []
    for path in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            variables = "\n".join(re.findall(r'^\w+=".*?"$', block, re.DOTALL | re.MULTILINE))
            lines = (line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
            found += [f"{variables}\n{line}".strip() for line in lines if RUN in line]
    return found


def arguments(command: str) -> list[str]:
    """Arguments of the recipe; `…` is left to the reader."""
    variables = dict(re.findall(r'^(\w+)="(.*?)"$', command, re.DOTALL | re.MULTILINE))
    line = command.partition(RUN)[2]
    text = re.sub(r"\$(\w+)", lambda match: variables[match[1]].replace("\n", " "), line)
    return [word for word in shlex.split(text.split(" > ")[0]) if word != "…"]


def jobs(words: list[str]) -> list[list[str]]:
    """One job for each choice of values of a multirun."""
    choices = (
        [f"{key}={value}" for value in values.split(",")]
        for key, _, values in (word.partition("=") for word in words)
    )
    return [list(job) for job in itertools.product(*choices)]


def starts_nothing(command: str) -> bool:
    return any(word in command for word in STARTS_NOTHING) and "…" not in command


def short(command: str) -> str:
    return command.partition(RUN)[2][:70]


@pytest.mark.parametrize("command", commands(), ids=short)
def test_commands_of_the_pages_compose(command: str) -> None:
    words = arguments(command)
    for job in jobs(words[1:]) if words[0] == "-m" else [words]:
        config = load(*job)
        assert f"recipe={config.recipe}" in job


def test_the_pages_have_commands() -> None:
    assert len(commands()) >= 20 and sum(map(starts_nothing, commands())) >= 8


@pytest.mark.parametrize("command", [c for c in dict.fromkeys(commands()) if starts_nothing(c)], ids=short)
def test_commands_that_start_nothing_run(command: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    codes = (
        (0, 2) if "preflight" in command else (0, 1)
    )  # 2: this machine lacks something; 1: it does not fit
    assert done.returncode in codes and "Traceback" not in done.stderr, done.stderr
    redirected = [file.read_text() for file in tmp_path.iterdir() if file.is_file()]
    assert len(redirected) == command.count(" > ")
    (output,) = redirected or [done.stdout]
    assert output.startswith(expected(command)), output[:200] + done.stderr


def expected(command: str) -> tuple[str, ...]:
    """First characters of a command's output."""
    for word, starts in (
        ("preflight", ("┏", "+")),
        ("dry_run", ("[",)),
        ("plan.json=true", ("{",)),
        ("emit=slurm", ("#!/bin/bash",)),
        ("emit=rayjob", ("apiVersion",)),
    ):
        if word in command:
            return starts
    return ("nano:", "llama31_8b:")


def test_files_and_make_targets_of_the_pages_exist() -> None:
    everything = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    files = set(re.findall(rf"(?<![\w./])(?:{FOLDERS})/[\w/]+\.\w+", everything))
    missing = [name for name in sorted(files) if "NAME" not in name and not (ROOT / name).exists()]
    assert missing == [] and len(files) > 20
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"[`\n]make (?:[A-Z]+=\S+ )?([a-z-]+)", everything))
    assert named <= targets and {"demo", "test", "gpu-check"} <= named


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_resolve(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{path.name}: {target}"


def test_the_reading_order_names_every_page_once() -> None:
    linked = re.findall(r"^\d+\. \[[^]]+\]\((\w+\.md)\)", page("README"), re.MULTILINE)
    assert sorted(linked) == [path.name for path in DOCS if path.name != "README.md"]


def test_the_architecture_page_has_the_layers_of_the_import_contract() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(
        c for c in tables["tool"]["importlinter"]["contracts"] if c["containers"] == ["pgenrm_train"]
    )
    drawing = page("architecture").partition("## Layers")[2].partition("```text\n")[2].partition("```")[0]
    rows = [re.match(r"[\w, |]+?(?= {2}|$)", line.strip()) for line in drawing.splitlines()[3:]]
    drawn = [set(re.findall(r"\w+", row[0])) for row in rows if row]
    layers = [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    assert set().union(*drawn) == set().union(*layers)
    order = {name: place for place, names in enumerate(drawn) for name in names}
    places = [min(order[name] for name in layer) for layer in layers]
    assert places == sorted(places)


def test_make_gpu_check_composes() -> None:
    dry_run = subprocess.run(
        ["make", "-n", "gpu-check"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    line = next(line for line in dry_run.stdout.splitlines() if "-m pgenrm_train" in line)
    config = load(*arguments(line.replace("python3 ", "python ")))
    assert (config.recipe, config.model.label, config.cluster.name) == ("gpu_check", "nano_1b", "gpu1")
    assert all(stage.fits for stage in plan_of(config).stages), "on the smallest card of the table"


def test_the_question_of_the_readme_is_the_example(tmp_path: Path) -> None:
    question = json.loads((ROOT / "examples" / "question.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = question["history"][0]
    for text in (question["query"], *question["responses"], first["chosen"], first["rejected"]):
        assert text in readme
    words = ["recipe=score", "score.dry_run=true", f"score.input={ROOT / 'examples' / 'question.json'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pgenrm_train", *words, f"model.path={ROOT / 'tests/data/psi_nano'}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert question["query"] in json.loads(done.stdout)[-1]["content"]


def test_the_python_example_of_the_evaluation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", page("evaluation"), re.DOTALL)
    rows = [
        {"user_id": f"u{n % 2}", "context": f"Question {n}?", "chosen": "Short.", "rejected": f"Long {n}."}
        | {"split": "test" if n > 5 else "train"}
        for n in range(8)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "votes.parquet")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(block, variables)
    assert variables["accuracy_report"](variables["table"])["accuracy"] == 1.0


def test_versions_agree() -> None:
    version = pgenrm_train.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert re.search(rf"^## \[{re.escape(version)}\]", changelog, re.MULTILINE)
    assert citation["version"] == version and citation["cff-version"] == "1.2.0"


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
        estimate = (f"{plan.hours:.1f}", f"{plan.dollars:,.0f}", f"{plan.disk_gib:,.0f}")
        assert estimate == (hours, dollars, disk)
