"""Table and plot of the curriculum's trial, from kept cells alone.

See `curriculum_proof` and `kept_cells`.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from kept_cells import Facts, Kept
from matplotlib.figure import Figure
from training_seeds import accuracy, difference, part

from eval.metrics.accuracy import accuracy_report
from eval.report.report import Report, Section, write_markdown
from pgenrm_train.files import atomic

COMPARISONS = (
    ("cre", "psi"),
    ("linear", "uniform"),
    ("self_paced", "uniform"),
    ("anti", "uniform"),
    ("linear", "anti"),
    ("uniform", "cre"),
    ("linear", "cre"),
    ("linear_process", "uniform_process"),
    ("linear", "linear_process"),
    ("unmeasured", "uniform"),
)
SLICES = (None, "unseen", "unseen easy", "unseen hard", "unseen rival")
COLOURS = ("#222222", "#3b82c4", "#3a9d6b", "#d9772b", "#a866c4")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pgenrm",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def publish(kept: Kept, methods: Sequence[str], folder: Path) -> Path:
    """Write `curriculum_proof.md` and `.svg` from the kept cells, and return the page.

    `methods` are the rows of the table, in order.
    """
    page, plot = folder / "curriculum_proof.md", folder / "curriculum_proof.svg"
    write_markdown(page, proof(kept, methods))
    write_plot(plot, differences({cell: table for cell, (table, _) in kept.items()}), SLICES)
    with page.open("a", encoding="utf-8") as text:
        text.write(f"\n![Differences with 95 % intervals]({plot.name})\n")
    return page


def proof(kept: Kept, methods: Sequence[str]) -> Report:
    """Build the report of the kept cells."""
    answers = {cell: predictions for cell, (predictions, _) in kept.items()}
    facts = {cell: cell_facts for cell, (_, cell_facts) in kept.items()}
    pairs = {
        (user, pair)
        for table in answers.values()
        for user, pair in zip(table["user_id"], table["pair_id"], strict=True)
    }
    seeds, shown = (
        sorted({seed for _, seed in answers}),
        [method for method in methods if any(m == method for m, _ in answers)],
    )
    return Report(
        title="Trial of the curriculum",
        run={
            "pairs": len(pairs),
            "seeds": seeds,
            "protocol": "strict (both orders)",
            "interval": "95 %, over users",
            "arms": "see Five training seeds in results.md",
            "unseen": "pairs of personas that no training user has",
        },
        stages=[_arm(answers, facts, method) for method in shown],
        sections=[
            Section(
                "Differences on the same pairs",
                "Means over training seeds, with intervals over users. Seeds up (with a gain) and seed "
                "stderr (standard error over training seeds) are of all pairs.",
                differences(answers),
            ),
            Section(
                "Facts of the training",
                "Means over training seeds: shares of hard and suspect pairs, pass rates of the drawn pairs "
                "(first → last third of training), and groups without advantage, which teach nothing.",
                [
                    _training_row(method, [f for (m, _), f in facts.items() if m == method])
                    for method in shown
                    if method != "psi"
                ],
            ),
        ],
    )


def _arm(
    answers: Mapping[tuple[str, int], pd.DataFrame], facts: Mapping[tuple[str, int], Facts], method: str
) -> dict[str, Any]:
    tables = {seed: table for (m, seed), table in answers.items() if m == method}
    overall = accuracy_report(pd.concat([table.assign(seed=s) for s, table in tables.items()]))
    cells = [facts[method, seed] for seed in tables]
    row = {"arm": method, "seeds": len(tables), "steps": cells[0]["steps"], "chains": cells[0]["chains"]}
    row |= {"accuracy": overall["accuracy"], "ci95": overall["ci95"]}
    for kind in SLICES[1:]:
        values = [accuracy(t, kind) / 100 for t in tables.values() if len(part(t, kind))]
        row[f"{kind} accuracy"] = statistics.fmean(values) if values else None
    return row


def differences(answers: Mapping[tuple[str, int], pd.DataFrame]) -> list[dict[str, Any]]:
    """One row per comparison whose two cells exist for a seed, in fractions."""
    rows = []
    if ("psi", 0) in answers:  # the start of every seed
        answers = {**answers, **{("psi", seed): answers["psi", 0] for _, seed in answers}}
    for one, other in COMPARISONS:
        both = sorted(s for m, s in answers if m == one and (other, s) in answers)
        if not both:
            continue
        row: dict[str, Any] = {"comparison": f"{one} − {other}", "seeds": len(both)}
        for kind in (k for k in SLICES if len(part(answers[one, both[0]], k))):
            single, bounds = difference(answers, one, other, both, kind)
            name = f"{kind or 'all'} difference"
            row |= {name: statistics.fmean(single) / 100, f"{name} ci95": [bound / 100 for bound in bounds]}
            if kind is None:
                row["seeds up"] = sum(value > 0 for value in single)
                row["seed stderr"] = (
                    statistics.stdev(single) / len(single) ** 0.5 / 100 if len(single) > 1 else None
                )
        rows.append(row)
    return rows


def _training_row(method: str, cells: Sequence[Facts]) -> dict[str, Any]:
    """Facts of an arm's trainings, averaged over its seeds."""
    hard = [f["hardness"] for f in cells if f["hardness"]]
    row: dict[str, Any] = {"arm": method}
    for name in ("hard", "suspect"):
        row[f"{name} share"] = statistics.fmean(h[name] / h["pairs"] for h in hard) if hard else None
    for name in ("hard", "rest", "suspect"):
        row[f"{name} pass rate"] = " → ".join(
            _percent([f["curves"].get(f"{name}_pass_rate") for f in cells], end) for end in (0, -1)
        )
    row["no advantage share"] = statistics.fmean(np.mean(f["curves"]["zero_advantage_share"]) for f in cells)
    return row


def _percent(series: Sequence[Sequence[float | None] | None], end: int) -> str:
    """Mean of the first (0) or last (−1) third of each series; a dash without any."""
    thirds = [np.array_split(np.array(values, dtype=float), 3)[end] for values in series if values]
    known = [float(v) for third in thirds for v in third if np.isfinite(v)]
    return f"{100 * statistics.fmean(known):.0f} %" if known else "–"


def write_plot(path: Path, rows: Sequence[Mapping[str, Any]], slices: Sequence[str | None]) -> None:
    """Plot the differences; the same rows give the same bytes.

    A row has `comparison` and, per slice, `<slice> difference` with its `ci95`, as fractions.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 1.0 + 0.75 * len(rows)), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for number, kind in enumerate(slices):
            name = f"{kind or 'all'} difference"
            places = [(y, row) for y, row in enumerate(rows) if row.get(name) is not None]
            shift = 0.15 * (number - (len(slices) - 1) / 2)
            points = 100 * np.array([row[name] for _, row in places])
            bounds = 100 * np.array([row[f"{name} ci95"] for _, row in places]).reshape(-1, 2)
            y = np.array([place for place, _ in places]) + shift
            axes.hlines(y, bounds[:, 0], bounds[:, 1], color=COLOURS[number], linewidth=1.4)
            axes.plot(points, y, "o", color=COLOURS[number], markersize=4, label=kind or "all")
        axes.axvline(0, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [f"{row['comparison']} ({row['seeds']})" for row in rows])
        axes.set(
            ylim=(len(rows) - 0.4, -0.6),
            xlabel="difference of accuracy, points (95 % interval over users; seeds in brackets)",
        )
        figure.legend(loc="outside upper center", ncols=len(slices), frameon=False)
        with atomic(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})
