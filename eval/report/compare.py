"""Two finished evaluations side by side: what do the same pairs say of the one and of the other?

Read are the runs' `results.json` and `predictions.parquet`; no model is started.  What is compared is each run's headline: its final
model, with the samples and similar users (Ind-m, Pro-n) of the headline.  Two accuracies with overlapping intervals may well
differ, so the difference itself gets an interval (users resampled) and two exact tests, over all pairs and by slice:

    p users   exact sign test over users whose mean differs; users are independent, so this is the one to trust
    p pairs   exact McNemar test over pairs that differ (a sign test where a pair's accuracy is neither 0 nor 1)

Slices are many tests on the same votes, so theirs are adjusted together for the false discovery rate (Benjamini and Yekutieli, valid
for dependent tests).  Runs of different data, protocol or evaluation seeds are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import false_discovery_control

from eval.metrics.accuracy import difference, paired_hits
from eval.metrics.slices import DIMENSIONS, KEYS, several
from eval.report.console import text_table
from eval.report.report import Report, Section, write_markdown, write_report
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import read_json, write_json, write_text
from pgenrm_train.scaling.combine import grid

LABELS = ("kind", "cohort", *DIMENSIONS)
READING = (
    "Difference: the first run's accuracy minus the second's on the same pairs; intervals resample users. p users: exact sign test "
    "over users, the one to trust; p pairs: exact McNemar (sign) test over pairs, too sure where users hold many pairs."
)


@dataclass(frozen=True)
class Run:
    """A finished evaluation: its results and the predictions of its headline."""

    name: str
    results: Mapping[str, Any]
    predictions: pd.DataFrame
    samples: bool  # False for a scorer that writes no chains: it gives the same scores in every seed, so one stands for all

    @property
    def scores(self) -> str:
        """What the headline is made of, for a reader."""
        return f"{self.results['model']} (Ind-{self.results.get('ind', 1)}, Pro-{self.results.get('pro', 0)})"


def compare(runs: tuple[str, str], *, draws: int, seed: int) -> dict[str, Any]:
    """The comparison of two run folders, JSON-ready: `runs`, `protocol`, `overall` (see `metrics.difference`), `slices`, `notes`.

    Raises ArtifactError for a folder without a finished evaluation, DataError when the runs cannot be compared.
    """
    a, b = (read_run(Path(path)) for path in runs)
    _refuse_unlike(a, b)
    protocol = a.results["protocol"]
    try:
        hits = paired_hits(a.predictions, b.predictions, protocol=protocol, seed=seed)
    except DataError as error:
        raise DataError(f"{a.name} and {b.name} cannot be compared: {error}") from None
    alone = hits[hits["_merge"] != "both"]
    if len(alone):
        row = alone.iloc[0]
        raise DataError(
            f"{a.name} and {b.name} hold different data: pair_id {row['pair_id']!r} of user {row['user_id']!r} is in "
            f"{a.name if row['_merge'] == 'left_only' else b.name} only ({len(alone)} such pairs); evaluate both on the same pairs"
        )
    overall = difference(hits, draws=draws, seed=seed)
    return {
        "runs": [{"run": r.name, "model": r.scores, "data": r.results["data"], "accuracy": r.results["accuracy"],
                  "ci95": r.results["ci95"], "stderr": r.results["stderr"]} for r in (a, b)],
        "protocol": protocol,
        "seeds": a.results["seeds"],
        "overall": overall,
        "slices": _by_slice(hits, a.predictions, draws, seed),
        "notes": _notes(a, b, overall),
    }  # fmt: skip


def publish_comparison(found: Mapping[str, Any], folder: Path) -> str:
    """Write comparison.json, report.html, report.md and table.txt; returns the console's text."""
    rows = difference_rows(found)
    short = _short_names([run["run"] for run in found["runs"]])
    names = " − ".join(short)
    title = f"{names}: difference in accuracy, {found['protocol']} protocol, in % [95 % interval over users]"
    text = (
        text_table(found["runs"], "Compared runs", 150)
        + text_table(rows, title, 150)
        + "".join(f"- {n}\n" for n in found["notes"])
    )
    report = Report(
        title=f"Comparison: {names}",
        run={"protocol": found["protocol"], "evaluation seeds": found["seeds"], "pairs": found["overall"]["n_pairs"],
             "users": found["overall"]["n_users"]},
        stages=[{**run, "run": name} for run, name in zip(found["runs"], short, strict=True)],
        sections=[Section("Difference on the same pairs", READING, rows)],
        notes=found["notes"],
    )  # fmt: skip
    write_json(folder / "comparison.json", found)
    write_text(folder / "table.txt", text)
    write_report(folder / "report.html", report)
    write_markdown(folder / "report.md", report)
    return text


def difference_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for all pairs and one a slice, for the tables."""
    return [_row("all", "", found["overall"]), *(_row(s["slice"], s["value"], s) for s in found["slices"])]


def read_run(path: Path) -> Run:
    """The evaluation in a run folder, or in its folder `evaluate`.  Raises ArtifactError when there is none."""
    folder = next((f for f in (path / "evaluate", path) if (f / "results.json").exists()), None)
    if folder is None or not (folder / "predictions.parquet").exists():
        raise ArtifactError(
            f"eval.compare: {path} holds no finished evaluation (results.json and predictions.parquet)"
        )
    results = read_json(folder / "results.json")
    if missing := [
        name
        for name in ("model", "data", "protocol", "seeds", "accuracy", "ci95", "stderr")
        if name not in results
    ]:
        raise ArtifactError(
            f"eval.compare: {folder / 'results.json'} lacks {missing[0]!r}; evaluate this run again"
        )
    try:
        table = pd.read_parquet(folder / "predictions.parquet")
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"eval.compare: {folder / 'predictions.parquet'} cannot be read ({error})"
        ) from None
    own = _own(table, results)
    samples = "text" in own and bool(own["text"].notna().any())
    return Run(str(path), results, headline_predictions(table, results), samples)


def headline_predictions(table: pd.DataFrame, results: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of a predictions table that gave the run's headline accuracy."""
    cell = (results.get("ind", 1), results.get("pro", 0))
    if cell == (1, 0) or "study" not in table:
        return _own(table, results)
    pool = table[(table["model"] == results["model"]) & (table["study"] == "scaling")]
    labels = pool[[*KEYS, *(name for name in LABELS if name in pool and name != "kind")]].drop_duplicates(
        KEYS
    )
    return grid(pool, [cell[0]], [cell[1]]).merge(labels, on=KEYS, how="left")


def _own(table: pd.DataFrame, results: Mapping[str, Any]) -> pd.DataFrame:
    """The final model's answers with the user's own history; all rows of a table that tells neither models nor sets apart."""
    for column, wanted in (("model", results["model"]), ("set", "own")):
        if column in table:
            table = table[table[column] == wanted]
    return table


def _refuse_unlike(a: Run, b: Run) -> None:
    digests = [r.results.get("data_sha256") for r in (a, b)]
    facts: list[tuple[str, Any, Any]] = [
        ("data", a.results["data"], b.results["data"]),
        ("protocol", a.results["protocol"], b.results["protocol"]),
    ]
    if None not in digests:
        facts.append(("data, by content", digests[0], digests[1]))
    if a.samples and b.samples:
        facts.append(("evaluation seeds", a.results["seeds"], b.results["seeds"]))
    for name, first, second in facts:
        if first != second:
            raise DataError(
                f"{a.name} and {b.name} cannot be compared: {name} {first} in the one and {second} in the other; "
                "evaluate both with the same data, protocol and seeds"
            )


def _by_slice(hits: pd.DataFrame, predictions: pd.DataFrame, draws: int, seed: int) -> list[dict[str, Any]]:
    names = [name for name in LABELS if name in predictions]
    labels = predictions[[*KEYS, *names]].astype(dict.fromkeys(KEYS, str)).drop_duplicates(KEYS)
    labelled = hits.merge(labels, on=KEYS, how="left")
    rows = [
        {"slice": name, "value": label, **difference(labelled[column == label], draws=draws, seed=seed)}
        for name, column in several(labelled, names)
        for label in sorted(column.unique())
    ]
    if not rows:
        return rows
    adjusted = false_discovery_control([row["p_value_users"] for row in rows], method="by")
    return [row | {"p_value_users_adjusted": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def _row(name: str, value: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "slice": name,
        "value": value,
        "first accuracy": found["accuracy_a"],
        "second accuracy": found["accuracy_b"],
        "difference": found["difference"],
        "difference ci95": found["ci95"],
        "p users": found["p_value_users"],
        "adjusted": found.get("p_value_users_adjusted"),
        "p pairs": found["p_value"],
        "users": found["n_users"],
        "pairs": found["n_pairs"],
    }


def _short_names(runs: Sequence[str]) -> list[str]:
    """Folder names where they tell the runs apart, else the paths as given."""
    names = [Path(run).name for run in runs]
    return names if len(set(names)) == len(names) else list(runs)


def _notes(a: Run, b: Run, overall: Mapping[str, Any]) -> list[str]:
    low, high = overall["ci95"]
    verdict = "they differ" if low > 0 or high < 0 else "no difference is proven"
    notes = [
        f"{a.scores} of {a.name} against {b.scores} of {b.name}, {overall['n_pairs']} pairs of {overall['n_users']} users: "
        f"{overall['difference']:+.1%} [{low:+.1%}, {high:+.1%}]; {verdict}."
        if overall["difference"] is not None
        else "The protocol drops every pair in one of the runs: nothing can be compared."
    ]
    if overall["ci95_note"]:
        notes.append(f"{overall['ci95_note']}.")
    if overall["n_dropped"]:
        notes.append(
            f"{overall['n_dropped']} pairs that the protocol drops in one of the runs are in no difference."
        )
    if "data_sha256" not in a.results or "data_sha256" not in b.results:
        notes.append("One run was evaluated by an older version: its pairs are known by id, not by content.")
    if a.samples != b.samples:
        notes.append(
            "A scorer that samples nothing has one seed, which stands for all seeds of the other run."
        )
    return notes
