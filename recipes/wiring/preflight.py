"""preflight.only=true: every check of every stage of the recipe as a table; exit code 2 when one fails.  Starts nothing."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pgenrm_train.cluster.preflight import CHECKS, findings, stages_of
from pgenrm_train.config import Config


def run(config: Config) -> int:
    found: dict[str, list[str]] = {name: [] for name in CHECKS if name not in config.preflight.skip}
    for finding in findings(config, stages_of(config)):
        found[finding.check] += finding.problems
    table = Table("check", "", "what to do")
    for name, problems in found.items():
        table.add_row(name, "FAILED" if problems else "ok", "\n".join(problems))
    for name in config.preflight.skip:
        table.add_row(name, "skipped", "by preflight.skip")
    Console(highlight=False).print(table)
    return 2 if any(found.values()) else 0
