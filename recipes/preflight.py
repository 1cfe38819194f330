"""preflight.only=true: a table of the recipe's checks, and its warnings; exit code 2 on failure."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pgenrm_train.cluster.preflight.checks import CHECKS, findings, stages_of, warn
from pgenrm_train.config import Config


def run(config: Config) -> int:
    problems: dict[str, list[str]] = {name: [] for name in CHECKS if name not in config.preflight.skip}
    stages = stages_of(config.recipe)
    for finding in findings(config, stages):
        problems[finding.check] += finding.problems
    table = Table("check", "", "what to do")
    for name, sentences in problems.items():
        table.add_row(name, "FAILED" if sentences else "ok", escape("\n".join(sentences)))
    for name in config.preflight.skip:
        table.add_row(name, "skipped", "by preflight.skip")
    Console(highlight=False).print(table)
    warn(config, stages)
    return 2 if any(problems.values()) else 0
