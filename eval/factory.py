"""Tables of the report on what the training data are made of and what paid models cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.report import Section
from pgenrm_train.artifacts import read_json


def yield_section(run_dir: Path) -> Section | None:
    """How many of the teacher's chains were kept, and why the others were not; None for a run without `build_sec`."""
    path = run_dir / "build_sec" / "yield.json"
    if not path.exists():
        return None
    facts = read_json(path)
    counts = {"kept": facts["chains"], **facts["rejected"]}
    rows = [{"reason": reason, "chains": count, "share": count / max(1, facts["asked"])} for reason, count in counts.items()]
    paid = facts["teacher"]
    cost = (
        f" The teacher read {paid['prompt tokens']:,} tokens and wrote {paid['completion tokens']:,}: {paid['dollars']:.2f} dollars at "
        "the stated rates."
        if paid
        else ""
    )
    return Section("Teacher chains and rejection sampling", f"Chains of {facts['users']} users.{cost}", rows)


def cost_section(cost: Mapping[str, Mapping[str, Any]]) -> Section | None:
    """What each model under test was paid; None where none is paid for."""
    rows = [{"model": name, **{k: v for k, v in facts.items() if k != "failures"}} for name, facts in cost.items() if facts]
    return Section("What the answers cost", "Tokens and dollars of all starts, at the stated rates.", rows) if rows else None
