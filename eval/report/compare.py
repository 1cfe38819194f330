"""Compare two finished evaluations on the same pairs.

Reads the runs' `results.json` and `predictions.parquet`; starts no model.  It compares the headline of each
run: its final model, with the samples and similar users (Ind-m, Pro-n) of the headline.  Two accuracies with
overlapping intervals may still differ.  So the difference itself gets an interval (users resampled) and two
exact tests, over all pairs and by slice:

    p users   exact sign test over users whose mean differs; users are independent, so trust this one
    p pairs   exact McNemar test over pairs that differ (a sign test if a pair's accuracy is neither 0 nor 1)

Slices are many tests on the same votes, so their p values are adjusted together for the false discovery rate
(Benjamini and Yekutieli, valid for dependent tests).  Runs of different data, protocol or evaluation seeds
raise DataError.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import pandas as pd
from scipy.stats import false_discovery_control

from eval.metrics.accuracy import Accuracy, Difference, difference, paired_hits, refuse_unpaired
from eval.metrics.slices import DIMENSIONS, KEYS, several
from eval.report.console import text_table
from eval.report.report import Report, Row, Section, write_markdown, write_report
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import read_json, write_json, write_text
from pgenrm_train.scaling.combine import grid

LABELS = ("kind", "cohort", *DIMENSIONS)
READING = (
    "Difference: the first run's accuracy minus the second's on the same pairs. Intervals resample users. "
    "p users: exact sign test over users; trust this one. p pairs: exact McNemar (sign) test over pairs; "
    "too sure if users have many pairs."
)


@dataclass(frozen=True)
class Headline:
    """Fields of results.json that a comparison reads."""

    model: str
    data: str
    protocol: str
    seeds: list[int]
    accuracy: float | None
    ci95: list[float]
    stderr: float | None
    ind: int = 1
    pro: int = 0
    data_sha256: str | None = None  # None in results of older versions


@dataclass(frozen=True)
class Run:
    """A finished evaluation: its results and the predictions of its headline."""

    name: str
    results: Headline
    predictions: pd.DataFrame
    samples: bool  # False for a scorer without chains: its scores are equal in every seed

    @property
    def scores(self) -> str:
        """The model with its samples and similar users, for a reader."""
        return f"{self.results.model} (Ind-{self.results.ind}, Pro-{self.results.pro})"


class RunRow(Accuracy):
    run: str
    model: str
    data: str
    stderr: float | None


class SliceDifference(Difference):
    slice: str
    value: str
    p_value_users_adjusted: float


class Comparison(TypedDict):
    """The content of comparison.json."""

    runs: list[RunRow]
    protocol: str
    seeds: list[int]
    overall: Difference
    slices: list[SliceDifference]
    notes: list[str]


def compare(runs: tuple[str, str], *, draws: int, seed: int) -> Comparison:
    """Compare two run folders.

    Raises ArtifactError for a folder without a finished evaluation, DataError if the runs are not comparable.
    """
    a, b = (read_run(Path(path)) for path in runs)
    hits = hits_of(a, b, seed)
    overall = difference(hits, draws=draws, seed=seed)
    return {
        "runs": [
            {
                "run": r.name,
                "model": r.scores,
                "data": r.results.data,
                "accuracy": r.results.accuracy,
                "ci95": r.results.ci95,
                "stderr": r.results.stderr,
            }
            for r in (a, b)
        ],
        "protocol": a.results.protocol,
        "seeds": a.results.seeds,
        "overall": overall,
        "slices": _by_slice(hits, a.predictions, draws, seed),
        "notes": _notes(a, b, overall),
    }


def hits_of(a: Run, b: Run, seed: int) -> pd.DataFrame:
    """Both runs' hits on the same pairs (`paired_hits`).  DataError if the runs are not comparable."""
    _refuse_different(a, b)
    try:
        hits = paired_hits(a.predictions, b.predictions, protocol=a.results.protocol, seed=seed)
    except DataError as error:
        raise DataError(f"{a.name} and {b.name} cannot be compared: {error}") from None
    refuse_unpaired(hits, f"{a.name} and {b.name}", a.name, b.name)
    return hits


def write_comparison(comparison: Comparison, folder: Path) -> str:
    """Write comparison.json, report.html, report.md and table.txt; returns the console's text."""
    overall, notes = comparison["overall"], comparison["notes"]
    rows = [_row("all", "", overall), *(_row(s["slice"], s["value"], s) for s in comparison["slices"])]
    paths = [run["run"] for run in comparison["runs"]]
    folders = [Path(path).name for path in paths]
    short = folders if len(set(folders)) == len(folders) else paths
    names = " − ".join(short)
    protocol = comparison["protocol"]
    title = f"{names}: difference in accuracy, {protocol} protocol, in % [95 % interval over users]"
    text = (
        text_table(comparison["runs"], "Compared runs", 150)
        + text_table(rows, title, 150)
        + "".join(f"- {note}\n" for note in notes)
    )
    report = Report(
        title=f"Comparison: {names}",
        run={
            "protocol": protocol,
            "evaluation seeds": comparison["seeds"],
            "pairs": overall["n_pairs"],
            "users": overall["n_users"],
        },
        stages=[{**run, "run": name} for run, name in zip(comparison["runs"], short, strict=True)],
        sections=[Section("Difference on the same pairs", READING, rows)],
        notes=notes,
    )
    write_json(folder / "comparison.json", comparison)
    write_text(folder / "table.txt", text)
    write_report(folder / "report.html", report)
    write_markdown(folder / "report.md", report)
    return text


def read_run(path: Path) -> Run:
    """The evaluation in a run folder, or in its folder `evaluate`.  Raises ArtifactError if there is none."""
    folder = next((f for f in (path / StageName.EVALUATE, path) if (f / "results.json").exists()), None)
    if folder is None or not (folder / "predictions.parquet").exists():
        raise ArtifactError(f"{path} holds no finished evaluation (results.json and predictions.parquet)")
    fields = read_json(folder / "results.json")
    required = ("model", "data", "protocol", "seeds", "accuracy", "ci95", "stderr")
    if missing := [name for name in required if name not in fields]:
        raise ArtifactError(f"{folder / 'results.json'} lacks {missing[0]!r}; evaluate this run again")
    results = Headline(**{name: fields[name] for name in Headline.__dataclass_fields__ if name in fields})
    try:
        table = pd.read_parquet(folder / "predictions.parquet")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / 'predictions.parquet'} cannot be read ({error})") from None
    samples = "text" in table and bool(_own(table, results)["text"].notna().any())
    return Run(str(path), results, headline_predictions(table, results), samples)


def headline_predictions(table: pd.DataFrame, results: Headline) -> pd.DataFrame:
    """The rows of a predictions table behind the run's headline accuracy."""
    if (results.ind, results.pro) == (1, 0) or "study" not in table:
        return _own(table, results)
    pool = table[(table["model"] == results.model) & (table["study"] == "scaling")]
    columns = [*KEYS, *(name for name in LABELS if name in pool and name != "kind")]
    labels = pool[columns].drop_duplicates(KEYS)
    return grid(pool, [results.ind], [results.pro]).merge(labels, on=KEYS, how="left")


def _own(table: pd.DataFrame, results: Headline) -> pd.DataFrame:
    """The final model's answers with the user's own history; all rows of a table without models and sets."""
    for column, value in (("model", results.model), ("set", "own")):
        if column in table:
            table = table[table[column] == value]
    return table


def _refuse_different(a: Run, b: Run) -> None:
    first, second = a.results, b.results
    hashed = first.data_sha256 and second.data_sha256
    facts: tuple[tuple[str, object, object, object], ...] = (  # name, values, whether both runs have it
        ("data", first.data, second.data, True),
        ("protocol", first.protocol, second.protocol, True),
        ("data, by content", first.data_sha256, second.data_sha256, hashed),
        ("evaluation seeds", first.seeds, second.seeds, a.samples and b.samples),
    )
    for name, one, other, comparable in facts:
        if comparable and one != other:
            raise DataError(
                f"{a.name} and {b.name} cannot be compared: {name} {one} in the first and {other} in the "
                "second; evaluate both with the same data, protocol and seeds"
            )


def _by_slice(hits: pd.DataFrame, predictions: pd.DataFrame, draws: int, seed: int) -> list[SliceDifference]:
    names = [name for name in LABELS if name in predictions]
    labels = predictions[[*KEYS, *names]].astype(dict.fromkeys(KEYS, str)).drop_duplicates(KEYS)
    labelled = hits.merge(labels, on=KEYS, how="left")
    parts = [
        (name, label, difference(labelled[column == label], draws=draws, seed=seed))
        for name, column in several(labelled, names)
        for label in sorted(column.unique())
    ]
    if not parts:
        return []
    adjusted = false_discovery_control([part["p_value_users"] for _, _, part in parts], method="by")
    return [
        {"slice": name, "value": label, **part, "p_value_users_adjusted": float(p)}
        for (name, label, part), p in zip(parts, adjusted, strict=True)
    ]


def _row(name: str, value: str, part: Difference | SliceDifference) -> Row:
    return {
        "slice": name,
        "value": value,
        "first accuracy": part["accuracy_a"],
        "second accuracy": part["accuracy_b"],
        "difference": part["difference"],
        "difference ci95": part["ci95"],
        "p users": part["p_value_users"],
        "adjusted": part.get("p_value_users_adjusted"),
        "p pairs": part["p_value"],
        "users": part["n_users"],
        "pairs": part["n_pairs"],
    }


def _notes(a: Run, b: Run, overall: Difference) -> list[str]:
    low, high = overall["ci95"]
    verdict = "they differ" if low > 0 or high < 0 else "no difference is proven"
    dropped = overall["n_dropped"]
    notes = (  # sentence, whether it applies
        (
            f"{a.scores} of {a.name} against {b.scores} of {b.name}, {overall['n_pairs']} pairs of "
            f"{overall['n_users']} users: {overall['difference']:+.1%} [{low:+.1%}, {high:+.1%}]; {verdict}."
            if overall["difference"] is not None
            else "The protocol drops every pair in one of the runs: nothing can be compared.",
            True,
        ),
        (f"{overall['ci95_note']}.", overall["ci95_note"]),
        (
            f"The differences leave out {dropped} pairs that the protocol drops in one of the runs.",
            dropped,
        ),
        (
            "An older version evaluated one run: its pairs are matched by id, not by content.",
            not (a.results.data_sha256 and b.results.data_sha256),
        ),
        (
            "A scorer without sampling has one seed; it is compared with all seeds of the other run.",
            a.samples != b.samples,
        ),
    )
    return [note for note, applies in notes if applies]
