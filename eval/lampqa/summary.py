"""Write the results of an evaluation on LaMP-QA: results.json, predictions.parquet, table.txt and report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pandas as pd

from eval.lampqa.ranking import COUNTS, MEASURES, Grades, RankingReport, Statistics
from eval.report.console import text_table
from eval.report.published import LAMPQA_TEXT, published_rankings
from eval.report.report import Report, Row, Section, write_markdown, write_report
from pgenrm_train.files import write_json, write_table, write_text

TITLE = "LaMP-QA: Spearman × 100 [95 % interval over questions]; of models, and within questions"
ALL = "all subsets"


@dataclass(frozen=True)
class Reference:
    """The reference ranking: grades, their source for the report, and answers without a grade by reason."""

    grades: Grades
    source: str
    failures: Mapping[str, int]


@dataclass(frozen=True)
class Ranked:
    """Answers and rank correlations of every model; the last one is the headline."""

    tables: Mapping[str, pd.DataFrame]
    reports: Mapping[str, RankingReport]
    reference: Reference
    ind: int
    history_size: int
    skipped: Sequence[str] = ()  # baselines that learn from votes

    @property
    def final(self) -> str:
        return list(self.tables)[-1]


def write_results(ranked: Ranked, folder: Path) -> None:
    name, reference = ranked.final, ranked.reference
    facts = {
        "model": name,
        "data": "lampqa",
        "reference": reference.source,
        "ungraded_answers": dict(reference.failures),
        "ind": ranked.ind,
        "history_size": ranked.history_size,
        "seeds": [0],
    }
    rows = {model: _row(model, ALL, _totals(report)) for model, report in ranked.reports.items()}
    parts = [
        _row(model, subset, statistics)
        for model, report in ranked.reports.items()
        for subset, statistics in report["subsets"].items()
    ]
    leaderboard = {
        "model": f"{name} (Ind-{ranked.ind})",
        "data": "lampqa",
        "reference": reference.source,
        "history texts": ranked.history_size,
        **{column: value for column, value in rows[name].items() if column != "stage"},
        "answer models": len(ranked.reports[name]["answer_models"]),
    }
    notes = [f"Reference ranking: {reference.source}."]
    if reference.failures:
        reasons = ", ".join(f"{n} × {kind}" for kind, n in reference.failures.items())
        notes.append(f"{sum(reference.failures.values())} answers have no grade ({reasons}).")
    if ranked.skipped:
        notes.append(f"Skipped baselines, which learn from votes: {', '.join(ranked.skipped)}.")
    report = Report(
        title=f"{name} on LaMP-QA",
        run=facts,
        stages=list(rows.values()),
        notes=notes,
        sections=[
            Section("By subset", "A question without a ranking by the model counts as 0.", parts),
            Section("Published figures", LAMPQA_TEXT, published_rankings()),
            Section("Leaderboard row", "Mean of the subsets, with interval and denominator.", [leaderboard]),
        ],
    )
    results = {
        **ranked.reports[name],
        **facts,
        "models": dict(ranked.reports),
        "leaderboard_row": leaderboard,
    }
    predictions = pd.concat([t.assign(model=n) for n, t in ranked.tables.items()], ignore_index=True)
    console = text_table([*rows.values(), *parts], TITLE, 150) + "".join(f"- {note}\n" for note in notes)
    write_json(folder / "results.json", results)
    write_table(folder / "predictions.parquet", predictions)
    write_text(folder / "table.txt", console)
    write_report(folder / "report.html", report)
    write_markdown(folder / "report.md", report)


def _row(model: str, subset: str, statistics: Statistics) -> Row:
    row: dict[str, object] = {"stage": model, "subset": subset}
    for measure in MEASURES:
        label = measure.replace("_", " ")
        row |= {label: statistics.get(measure), f"{label} ci95": statistics.get(f"{measure}_ci95")}
    labels = ("questions", "unranked", "tied", "no reference")
    counts = {label: statistics[key] for label, key in zip(labels, COUNTS, strict=True)}
    return row | counts | {"failed samples": statistics.get("failed")}


def _totals(report: RankingReport) -> Statistics:
    """Means over the subsets, and sums of their counts."""
    totals = {key: sum(cast(int, s[key]) for s in report["subsets"].values()) for key in COUNTS}
    return {**totals, "failed": sum(report["failures"].values()), **report["average"]}
