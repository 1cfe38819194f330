"""docs/plan.md, cluster.md, reproduction.md: their commands compose, and their estimates are what recipe=plan says."""

from __future__ import annotations

import re
import shlex

import pytest

from pgenrm_train.config import ROOT, load
from pgenrm_train.planning import plan_of
from pgenrm_train.planning.advice import apply

PAGES = ("plan", "cluster", "reproduction", "troubleshooting")


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Arguments of every `python -m pgenrm_train` in a bash block; shell variables of the page are put in."""
    found = []
    for name in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page(name), re.DOTALL):
            variables = dict(re.findall(r'^(\w+)="(.*?)"$', block, re.DOTALL | re.MULTILINE))
            for line in block.replace("\\\n", " ").splitlines():
                _, marker, rest = line.partition("python -m pgenrm_train ")
                if marker:
                    text = re.sub(r"\$(\w+)", lambda m: variables[m[1]].replace("\n", " "), rest)  # noqa: B023
                    found.append(shlex.split(text.split(" #")[0].split(" > ")[0]))
    return found


@pytest.mark.parametrize("arguments", commands(), ids=lambda a: " ".join(a)[:60])
def test_commands_of_the_pages_compose(arguments: list[str]) -> None:
    config = load(*arguments)
    assert config.recipe in arguments[0]


def test_there_are_commands_on_the_pages() -> None:
    assert len(commands()) >= 12


def test_the_estimates_are_the_planner_s() -> None:
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \| ([\d.,]+) \| ([\d,]+) \| ([\d,]+) \|$", page("reproduction"), re.MULTILINE)
    assert len(rows) == 9
    configs = {}
    for model, cluster, card, hours, dollars, disk in rows:
        if (model, cluster) not in configs:
            configs[model, cluster] = load("recipe=plan", f"model={model}", f"cluster={cluster}", "data=chatbot_arena")
        plan = plan_of(apply(configs[model, cluster], ((("plan.card", card),),)))
        assert plan.fits
        assert (f"{plan.hours:.1f}", f"{plan.dollars:,.0f}", f"{plan.disk_gib:,.0f}") == (hours, dollars, disk)
