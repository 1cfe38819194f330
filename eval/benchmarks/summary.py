"""Write the results of a benchmark of choices, next to the published figure.

Files as in `eval.report.summary`: results.json, predictions.parquet, table.txt, report.html and report.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from eval.benchmarks.choices import Measure
from eval.metrics.accuracy import AccuracyReport
from eval.report.console import text_table
from eval.report.report import Report, Row, Section, write_markdown, write_report
from eval.report.sections import protocol_rows
from eval.studies.evaluation import Tested
from pgenrm_train.config.evaluation import Task
from pgenrm_train.files import write_json, write_table, write_text

NAMES = ("best_of_n", "consistency", "pointwise")
TEXT = (
    "Published figures for orientation: other models were tested, and a row states its protocol where that "
    "differs from ours. docs/evaluation.md defines the measures."
)


@dataclass(frozen=True)
class Chosen:
    """One model on a benchmark of choices: its votes as a predictions table, and the measures of it."""

    name: str
    table: pd.DataFrame
    report: AccuracyReport
    measures: Mapping[str, Measure | None]  # by NAMES

    def row(self) -> Row:
        """The row of the model in a table."""
        row: dict[str, object] = {
            "model": self.name,
            "pair accuracy": self.report["accuracy"],
            "pair accuracy ci95": self.report["ci95"],
        }
        for name in NAMES:
            if measure := self.measures.get(name):
                label = f"{name.replace('_', ' ')} accuracy"
                row |= {label: measure.overall["accuracy"], f"{label} ci95": measure.overall["ci95"]}
        return row | {
            "votes": self.report["n_pairs"],
            "ties": self.report["ties"],
            "failures": sum(self.report["failures"].values()),
        }


def published_row(task: Task) -> Row:
    """The published figure of a task, with protocol and source."""
    return {
        "task": str(task),
        "published": task.system or "none",
        "measure": task.measure,
        "published accuracy": task.published,
        "protocol": task.protocol or None,
        "source": task.source or None,
    }


def write_results(
    task: Task, tested: Sequence[Chosen], facts: Mapping[str, object], notes: Sequence[str], folder: Path
) -> Mapping[str, object]:
    """Write every file; the last of `tested` is the headline.  Returns the content of results.json."""
    final = tested[-1]
    rows = [chosen.row() for chosen in tested]
    subsets = [
        {
            "model": chosen.name,
            "subset": subset,
            "pair accuracy": slice_["accuracy"],
            "pair accuracy ci95": slice_["ci95"],
        }
        | {
            f"{name.replace('_', ' ')} accuracy": measure.by_subset.get(subset)
            for name in NAMES
            if (measure := chosen.measures.get(name))
        }
        for chosen in tested
        for subset, slice_ in chosen.report["slices"].items()
    ]
    leaderboard = {
        "model": final.name,
        "name": facts["model_name"],
        "data": facts["data"],
        "protocol": final.report["protocol"],
        "accuracy": final.report["accuracy"],
        "ci95": final.report["ci95"],
        "stderr": final.report["stderr"],
        "users": final.report["n_users"],
        "pairs": final.report["n_pairs"],
        "ties": final.report["ties"],
        "failures": sum(final.report["failures"].values()),
    }
    results = {
        **final.report,
        "model": final.name,
        "pro": 0,
        **facts,
        "task": task.name,
        "task_version": task.version,
        "measures": {
            name: {**measure.overall, "macro": measure.macro, "by_subset": dict(measure.by_subset)}
            for name, measure in final.measures.items()
            if measure
        },
        "models": {chosen.name: chosen.report for chosen in tested},
        "published": published_row(task),
        "leaderboard_row": leaderboard,
        "notes": list(notes),
    }
    as_tested = Tested(final.name, final.table, final.report, None, None)
    report = Report(
        title=f"{final.name} on {task}",
        run=dict(facts),
        stages=rows,
        notes=notes,
        sections=[
            Section(
                "By subset", "Pair accuracy and the other measures; equal weight for every question.", subsets
            ),
            Section(
                "The same votes under each protocol",
                "Each two responses are one vote.",
                protocol_rows(as_tested),
            ),
            Section("Published figure", TEXT, [published_row(task)]),
            Section("Leaderboard row", "Accuracy with protocol, interval and denominator.", [leaderboard]),
        ],
    )
    predictions = pd.concat([c.table.assign(model=c.name) for c in tested], ignore_index=True)
    title = f"{task}: accuracy in % [95 % interval over instances], {final.report['protocol']} protocol"
    write_json(folder / "results.json", results)
    write_table(folder / "predictions.parquet", predictions)
    write_text(folder / "table.txt", text_table(rows, title, 150) + "".join(f"- {note}\n" for note in notes))
    write_report(folder / "report.html", report)
    write_markdown(folder / "report.md", report)
    return results


def tasks_table(results: Mapping[str, Mapping[str, object]], tasks: Sequence[Task]) -> list[Row]:
    """One row per task: the headline and the measures of the model."""
    rows: list[Row] = []
    for task in tasks:
        of_task = results[task.name]
        row = {"task": str(task)} | {
            name: of_task[name] for name in ("model", "protocol", "accuracy", "ci95")
        }
        measures = of_task.get("measures")
        for name, measure in measures.items() if isinstance(measures, Mapping) else ():
            label = f"{name.replace('_', ' ')} accuracy"
            row |= {label: measure["accuracy"], f"{label} ci95": measure["ci95"]}
        rows.append(row | {"votes": of_task["n_pairs"], "users": of_task["n_users"]})
    return rows
