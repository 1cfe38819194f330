"""One page for many finished evaluations: every accuracy under every protocol, and paired comparisons.

Reads the runs' `results.json` and `predictions.parquet`, starts no model and needs no server.  Two runs are
compared if they have the same data by content, protocol, totals and evaluation seeds: the difference with its
interval (users resampled), and an exact sign test over users.  The p values of all comparisons are adjusted
together for the false discovery rate (Benjamini and Yekutieli).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from scipy.stats import false_discovery_control

from eval.metrics.accuracy import Difference, difference
from eval.report.compare import Run, hits_of, read_run
from eval.report.report import Row, Table, table_of, write_page
from pgenrm_train.config import StageName
from pgenrm_train.config.evaluation import TASKS
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import read_json, write_json

RESULTS = f"{StageName.EVALUATE}/results.json"
SHOWN = ("n_pairs", "n_users", "ties", "failures", "order_flip_rate")  # next to those that `read_run` needs
LEVEL = 0.05  # of the adjusted p value below which a difference counts as significant
FILTERS = ("task", "protocol", "totals")
ABOUT = (
    "Accuracy of finished evaluations. Choose a task, a protocol and the kind of totals; the head of a "
    "column sorts. Rows of different tasks, protocols or totals are not comparable."
)
READING = (
    "Difference: the first run's accuracy minus the second's on the same pairs, under the protocol of the "
    "runs' headline. Intervals resample users. p users: exact sign test over users, adjusted for all "
    f"comparisons of this page (Benjamini–Yekutieli); below {LEVEL:g} a difference is called significant."
)


@dataclass(frozen=True)
class Entry:
    """A finished evaluation: its folder below the searched ones, its results and its predictions."""

    name: str
    results: Mapping[str, Any]
    run: Run

    @property
    def key(self) -> dict[str, str]:
        """The values of FILTERS; those of the headline."""
        data = self.results["data"]
        # Results without a version are older than the second one of any task.
        version = self.results.get("task_version", 1 if data in TASKS else None)
        name = f"{data}@{version}" if version else str(data)
        totals = self.results.get("totals") or "declared"
        return {"task": name, "protocol": str(self.results["protocol"]), "totals": str(totals)}


class Content(TypedDict):
    """The content of leaderboard.json."""

    results: list[Row]
    comparisons: list[Row]
    notes: list[str]


Keyed = tuple[dict[str, Any], dict[str, str]]  # a row of a table, and the values of FILTERS


class Board(NamedTuple):
    """A table of the page: its cells, and per row the values of FILTERS and of all columns.

    `sorted`: the column that orders the rows, and its direction.
    """

    table: Table
    keys: list[Mapping[str, object]]
    sorted: tuple[str, str]


def find_runs(places: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """All evaluations in or below the folders, and a note per one that cannot be shown.

    Raises ArtifactError for a folder without any.
    """
    entries, notes, seen = [], [], set[Path]()
    for place in map(Path, places):
        files = sorted(place.rglob(RESULTS)) if place.is_dir() else []
        if not files:
            raise ArtifactError(
                f"leaderboard.runs: {place} holds no finished evaluation ({RESULTS}); give run folders, or a "
                "folder of them"
            )
        for file in files:
            folder = file.parent.parent
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            name = str(folder.relative_to(place)) if folder != place else place.name
            try:
                results = read_json(file)
                if not isinstance(results, dict) or "protocols" not in results:
                    notes.append(f"{name} is left out: its results are no accuracies of votes.")
                    continue
                run = read_run(folder)
                if missing := [field for field in SHOWN if field not in results]:
                    raise ArtifactError(f"{file} lacks {missing[0]!r}; evaluate this run again")
                entries.append(Entry(name, results, run))
            except ArtifactError as error:
                notes.append(f"{name} is left out: {error}.")
    return entries, notes


def write_leaderboard(places: Sequence[str], folder: Path, *, draws: int, seed: int) -> Content:
    """Write leaderboard.html and leaderboard.json; returns the content of the latter."""
    entries, notes = find_runs(places)
    results = list(_results(entries))
    comparisons = _compared(entries, draws, seed)
    content: Content = {
        "results": [row | key for row, key in results],
        "comparisons": [row | key for row, key in comparisons],
        "notes": notes,
    }
    keys = [key for _, key in results]
    write_json(folder / "leaderboard.json", content)
    write_page(
        folder / "leaderboard.html",
        "leaderboard.html.j2",
        title=f"Leaderboard of {len(entries)} evaluations",
        about=ABOUT,
        reading=READING,
        notes=notes,
        filters=[(name, sorted({str(key[name]) for key in keys})) for name in FILTERS],
        results=_board(results, ("accuracy", "descending")),
        comparisons=_board(comparisons, ("p users, adjusted", "ascending")),
    )
    return content


def _results(entries: Sequence[Entry]) -> Iterator[Keyed]:
    """One row per evaluation and protocol, best first."""
    rows = [
        (
            {"run": entry.name, "model": entry.run.scores} | _accuracy(entry, protocol),
            entry.key | {"protocol": protocol},
        )
        for entry in entries
        for protocol in dict.fromkeys((entry.key["protocol"], *entry.results["protocols"]))
    ]
    yield from sorted(rows, key=lambda row: -(row[0]["accuracy"] or 0.0))


def _accuracy(entry: Entry, protocol: str) -> dict[str, Any]:
    results, headline = entry.results, protocol == entry.results["protocol"]
    own = results if headline else results["protocols"][protocol]
    return {
        "task": entry.key["task"],
        "protocol": f"{protocol} (headline)" if headline else protocol,
        "totals": entry.key["totals"],
        "accuracy": own["accuracy"],
        "ci95": own["ci95"],
        "stderr": own["stderr"],
        "pairs": results["n_pairs"],
        "users": results["n_users"],
        "dropped": own["n_dropped"],
        "ties": results["ties"],
        "failures": sum(results["failures"].values()),
        "order flip rate": results["order_flip_rate"],
    }


def _compared(entries: Sequence[Entry], draws: int, seed: int) -> list[Keyed]:
    """One row per two comparable runs, smallest adjusted p value first."""
    pairs: list[tuple[Entry, Entry, Difference]] = []
    for a, b in combinations(entries, 2):
        if a.key == b.key:
            try:
                pairs.append((a, b, difference(hits_of(a.run, b.run, seed), draws=draws, seed=seed)))
            except DataError:  # other data, seeds or pairs: not comparable
                continue
    if not pairs:
        return []
    adjusted = false_discovery_control([part["p_value_users"] for *_, part in pairs], method="by")
    rows: list[Keyed] = [
        (
            {
                "first": f"{a.name}: {a.run.scores}",
                "second": f"{b.name}: {b.run.scores}",
                "task": a.key["task"],
                "first accuracy": part["accuracy_a"],
                "second accuracy": part["accuracy_b"],
                "difference": part["difference"],
                "difference ci95": part["ci95"],
                "p users, adjusted": float(p),
                "verdict": _verdict(part, float(p)),
                "pairs": part["n_pairs"],
                "users": part["n_users"],
            },
            a.key,
        )
        for (a, b, part), p in zip(pairs, adjusted, strict=True)
    ]
    return sorted(rows, key=lambda row: float(row[0]["p users, adjusted"]))


def _verdict(part: Difference, p: float) -> str:
    if p >= LEVEL or not part["difference"]:
        return "not significant"
    return f"{'first' if part['difference'] > 0 else 'second'} is better"


def _board(rows: Sequence[Keyed], order: tuple[str, str]) -> Board:
    names = list(dict.fromkeys(name for row, _ in rows for name in row if not name.endswith("ci95")))
    keys: list[Mapping[str, object]] = [
        {**key, "values": [row.get(name) for name in names]} for row, key in rows
    ]
    return Board(table_of([row for row, _ in rows]), keys, order)
