"""Files of best_of_n: results.json, choices.parquet, table and report with curves and a reader of chains."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.choosing.chain_views import Shown, match_views
from eval.choosing.curves import BEST, MODEL, POPULATION, RANDOM, Curves, choices
from eval.choosing.schemes import Choice, Match, Player, Slot
from eval.metrics.intervals import few_users
from eval.report.console import text_table
from eval.report.report import Curve, Report, Row, Section, write_markdown, write_report
from pgenrm_train.files import write_json, write_table, write_text

HEADLINE = 8  # candidates
UTILITY = (
    "The choosers see the same candidates. model: the best mean score in a circle of pairs; model, knockout: "
    "the winner of rounds, at as many chains; random: the mean of the candidates; best: the greatest true "
    "utility. "
    "Gains are paired by prompt. The gain share is the gain over random as a share of the named chooser's. "
    "Intervals resample users."
)
SCHEMES = (
    "Both schemes judge the same candidates, with the same number of chains. Undecided: equal or no scores."
)
OPTIMISATION = (
    "The model's choice among more and more candidates. If its score rises while the utility falls, the "
    "choice is over-optimised. KL bound: of best of n against the candidates' distribution. Gains are over "
    "the size before."
)


@dataclass(frozen=True)
class ChoiceFacts:
    """Facts of the run that results and report state."""

    model: str
    data: str
    split: str
    utility: str
    population: str
    ideal: str
    totals: str
    ind: int
    pro: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class ChoiceRun:
    """Everything that a run of best_of_n knows; `values` by slate, see `curves.choices`."""

    facts: ChoiceFacts
    scores: Mapping[Slot, np.ndarray]
    winners: Mapping[Slot, Choice]
    values: Sequence[Mapping[str, np.ndarray]]
    player: Player
    notes: Sequence[str]
    draws: int
    shown: int  # chains of the report


def write_best_of_n(run: ChoiceRun, folder: Path) -> Mapping[str, object]:
    """Write every file; returns the content of results.json."""
    facts, chains = run.facts, run.player.chains()
    users = [slate.prompt.user_id for slate in run.player.slates]
    table = choices(users, run.scores, run.winners, run.values)
    curves = Curves(table, draws=run.draws, seed=facts.seed)
    rows, schemes = curves.rows(), curves.scheme_rows(facts.ind, facts.pro)
    optimisation = curves.optimisation_rows()
    n = max((n for n in curves.by_n if n <= HEADLINE), default=min(curves.by_n))
    notes = [headline(rows, n), *run.notes]
    if warning := few_users(len(set(users))):
        notes.append(f"{warning}.")
    results = {
        **asdict(facts),
        "prompts": len(users),
        "users": len(set(users)),
        "chosen": rows,
        "schemes": schemes,
        "over_optimisation": optimisation,
        "headline": next(row for row in rows if row["n"] == n and row["chooser"] == MODEL),
        "chains": len(chains),
        "tokens": int(chains["tokens"].sum()),
        "failures": chains["failure"].dropna().value_counts().to_dict(),
        "notes": notes,
    }
    write_table(folder / "choices.parquet", table)
    write_json(folder / "results.json", results)
    report = Report(
        title=f"Best of n by {facts.model}",
        run=asdict(facts),
        stages=[row for row in rows if row["n"] == n],
        sections=[
            Section("Utility by chooser", UTILITY, rows),
            Section("Circle and knockout at equal chains", SCHEMES, schemes),
            Section("Over-optimisation", OPTIMISATION, optimisation),
        ],
        curves=_curves(rows, optimisation),
        notes=notes,
        chains=match_views(run.player, _shown(run), facts.model),
    )
    write_report(folder / "report.html", report)
    write_markdown(folder / "report.md", report)
    write_text(folder / "table.txt", _console(rows, schemes, optimisation, notes))
    return results


def headline(rows: Sequence[Mapping[str, object]], n: int) -> str:
    """One sentence on the model's choice among n."""
    row = next(row for row in rows if row["n"] == n and row["chooser"] == MODEL)
    share = next(name for name in row if name.endswith("gain share"))
    gains = [
        f"{_value(row, f'gain over {other}')} over {words}"
        for other, words in ((RANDOM, "random"), (POPULATION, "the population's favourite"))
    ]
    part = row[share]
    of_gain = (
        f"; {100 * float(str(part)):.0f} % of {share.partition(' ')[0]}'s gain" if part is not None else ""
    )
    return f"Best of {n} by the model: utility {_value(row, 'utility')}, {', '.join(gains)}{of_gain}."


def _value(row: Mapping[str, Any], name: str) -> str:
    bounds = row[f"{name} ci95"]
    interval = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
    return f"{row[name]:+.3f}{interval}" if name.startswith("gain") else f"{row[name]:.3f}{interval}"


def _curves(rows: Sequence[Mapping[str, Any]], optimisation: Sequence[Mapping[str, Any]]) -> list[Curve]:
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    names = list(dict.fromkeys(row["chooser"] for row in rows))
    of = {(row["chooser"], row["n"]): row for row in rows}
    lines = {name: [of[name, n]["utility"] for n in sizes] for name in names}
    bands = {name: [of[name, n]["utility ci95"] for n in sizes] for name in names if name != BEST}
    curves = [Curve("Utility of the choice, 95 % intervals", sizes, lines, "n candidates", "utility", bands)]
    for column, title in (
        ("model score", "The model's score of its choice"),
        ("utility", "Its true utility"),
    ):
        values = {"model": [row[column] for row in optimisation]}
        band = {"model": [row[f"{column} ci95"] for row in optimisation]}
        curves.append(Curve(f"Over-optimisation: {title}", sizes, values, "n candidates", column, band))
    return curves


def _shown(run: ChoiceRun) -> list[Shown]:
    """For a spread of prompts, the winner of the knockout against one that it met on its way."""
    largest = max(slot.n for slot in run.scores)
    slots = [slot for slot in sorted(run.winners) if slot.n == largest]
    step = max(1, 2 * len(slots) // max(1, run.shown))
    shown = []
    for slot in slots[::step][: run.shown // 2]:
        winner = run.winners[slot].candidate
        other = winner - 1 if winner % 2 else winner + 1  # its first match; an odd last one had none here
        if other >= slot.n:
            continue
        truth = run.values[slot.slate]["utility"]
        match = Match(slot.slate, min(winner, other), max(winner, other))
        one, two = float(truth[match.first]), float(truth[match.second])
        title = f"best of {slot.n}: utility {truth[winner]:.2f} against {truth[other]:.2f}"
        shown.append(Shown(match, None if one == two else one > two, title))
    return shown


def _console(
    rows: Sequence[Row], schemes: Sequence[Row], optimisation: Sequence[Row], notes: Sequence[str]
) -> str:
    brief = [{name: value for name, value in row.items() if name != "prompts"} for row in rows]
    return (
        text_table(brief, "Utility of the choice among n candidates [95 % interval over users]", 150)
        + text_table(schemes, "Circle and knockout at equal chains", 150)
        + text_table(optimisation, "Over-optimisation", 150)
        + "".join(f"- {note}\n" for note in notes)
    )
