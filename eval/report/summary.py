"""What an evaluation leaves behind: results.json, predictions.parquet, table.txt, report.html and report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from markupsafe import Markup

from eval.metrics.accuracy import accuracy_report
from eval.metrics.slices import KEYS, data_digest, odd_inputs, slice_labels
from eval.report.console import text_table
from eval.report.plots import heat_map
from eval.report.prototype_section import prototype_curves, prototype_maps, prototype_sections
from eval.report.reader import chain_views
from eval.report.report import Curve, Report, Section, write_markdown, write_report
from eval.report.sections import (  # fmt: skip
    calibration_curve,
    cost_section,
    details,
    input_notes,
    leaderboard_row,
    probe_table,
    protocol_rows,
    reader_notes,
    sections,
    yield_section,
)
from eval.studies.evaluation import Evaluation, Grid, Tested, gain_rows, stage_row
from eval.studies.scaling_study import SETTLED
from pgenrm_train.config import Config
from pgenrm_train.files import write_json, write_table, write_text
from pgenrm_train.scaling.combine import grid

ADAPTIVE = (
    "Own samples that eval.adaptive would not have drawn, and the largest cell's accuracy then: the same pool, cut where each pair's "
    "verdict was settled. The difference is paired, to the cell with all samples."
)
RULES = {
    "strict": "both orders; a tie or a failure is not a hit",
    "both_orders": "both orders; a tie is not a hit, a failed order leaves",
    "release": "one random order; ties and failures leave",
    "user_disjoint": "held-out users; both orders; a tie or a failure is not a hit",
}
REWARD_PARTS = {"outcome": "reward/outcome", "process": "reward/process", "format": "reward/format"}
VALIDATION = {
    "their own history": "validation/accuracy",
    "another user's": "validation/probe/swapped_history_accuracy",
    "none": "validation/probe/empty_history_accuracy",
}
PASS_RATES = {name: f"curriculum/{name}_pass_rate" for name in ("hard", "rest", "suspect")}
MIX = {"target": "curriculum/target_hard_share", "realised": "curriculum/realised_hard_share"}
TRAINING_CURVES = (  # stage, title, axis, lines by what the stage logs
    ("psi", "loss", "loss", {"loss": "loss"}),
    ("cre", "reward parts", "mean reward", REWARD_PARTS),
    ("curriculum", "reward parts", "mean reward", REWARD_PARTS),
    ("cre", "validation and probes", "accuracy", VALIDATION),
    ("curriculum", "validation and probes", "accuracy", VALIDATION),
    ("curriculum", "curriculum mix", "share of hard pairs", MIX),
    ("curriculum", "pass rate by hardness", "pass rate", PASS_RATES),
)
GAINS = "What each stage adds, on the same pairs"


def publish(
    config: Config,
    folder: Path,
    evaluation: Evaluation,
    tested: Sequence[Tested],
    baselines: Sequence[Tested],
    grids: Sequence[Grid],
    notes: Sequence[str],
    prototypes: Mapping[str, int] | None = None,
    cost: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write everything; returns what results.json holds.  `cost`: what each model under test was paid, empty for our own.

    The last of `tested` is the final model and gives the top-level fields: Ind-1 as asked in both orders, or the cell that
    `eval.ind` and `eval.pro` name when both are numbers.  `prototypes`: pair_id → nearest prototype, where the run has some.
    """
    rows, compared = [stage_row(t) for t in tested], [stage_row(t) for t in baselines]
    final = (tested or baselines)[-1]
    everyone = [*tested, *baselines]
    gains = gain_rows(tested, config)
    labels = slice_labels(evaluation.pairs, evaluation.histories, prototypes, evaluation.known_users)
    results = headline(config, final, grids) | {
        "model_name": config.model.path
        or config.model.name,  # which endpoint, function or folder the label stands for
        "data": config.data.name,
        "data_sha256": data_digest(evaluation.pairs),
        "odd_inputs": odd_inputs(evaluation.pairs, evaluation.histories),
        "judge": config.judge.kind,
        "scores": config.eval.scores,
        "weights": list(config.eval.weights),
        "grids": {g.study.name: g.rows for g in grids},
        "adaptive_stopping": {g.study.name: g.adaptive for g in grids if g.adaptive},
        "stages": {t.name: t.report for t in tested},
        "gains": gains,
        "baselines": {t.name: t.report for t in baselines},
        "probe_swapped_history": {t.name: t.probe for t in everyone if t.probe},
        **details(config, final, labels),
        "notes": list(notes),
        "cost": {name: dict(facts) for name, facts in cost.items() if facts},
    }
    results["leaderboard_row"] = leaderboard_row(results)
    write_json(folder / "results.json", results)
    pools = [g.pool[g.pool["failure"] != SETTLED].assign(model=final.name, study=g.study.name) for g in grids]
    predictions = pd.concat(
        [*(t.predictions.assign(model=t.name) for t in everyone), *pools], ignore_index=True
    )
    write_table(folder / "predictions.parquet", predictions.merge(labels, on=KEYS, how="left"))
    notes = [*reader_notes(final), *input_notes(results["odd_inputs"]), *notes]
    write_text(
        folder / "table.txt",
        console_text([*rows, *compared], headline_title(evaluation, config), final, results, grids, notes),
    )
    stopped = [{"study": g.study.name, **g.adaptive} for g in grids if g.adaptive]
    report = Report(
        title=f"{final.name} on {config.data.name}",
        run=run_facts(config, evaluation),
        stages=rows,
        comparisons=compared,
        sections=[
            *(
                [Section(GAINS, "Difference in strict accuracy; intervals resample users.", gains)]
                if gains
                else []
            ),
            *(
                Section(
                    grid_title(g),
                    "Ties are a share of all draws of a cell: of each pair, in both orders, as often as its samples are in the pool.",
                    g.rows,
                )
                for g in grids
            ),
            *([Section("Adaptive stopping, replayed", ADAPTIVE, stopped)] if stopped else []),
            *prototype_sections(folder.parent),
            *sections(config, tested, everyone, results),
            *(section for section in (yield_section(folder.parent), cost_section(cost)) if section),
        ],
        curves=[
            *(grid_curve(g) for g in grids),
            *(
                [calibration_curve(results["calibration"], final.name)]
                if results["calibration"]["curve"]
                else []
            ),
            *training_curves(folder.parent),
            *prototype_curves(folder.parent),
        ],
        drawings=[*(d for g in grids for d in grid_heat_map(g)), *prototype_maps(folder.parent)],
        notes=notes,
        chains=chain_views(config, evaluation, final) if tested else [],
    )
    write_report(folder / "report.html", report)
    write_markdown(folder / "report.md", report)
    return results


def console_text(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    final: Tested,
    results: Mapping[str, Any],
    grids: Sequence[Grid],
    notes: Sequence[str],
) -> str:
    """The tables that an evaluation ends with on a console, and what a reader must know beside them."""
    gains, probes = results["gains"], results["probes"]
    return (
        text_table(rows, title, 150)
        + (text_table(narrow(gains), GAINS, 150) if gains else "")
        + text_table(protocol_rows(final), f"{final.name}: the same predictions under each protocol", 110)
        + (text_table(probe_table(probes), f"{final.name}: what moves its verdicts", 150) if probes else "")
        + "".join(text_table(g.rows, grid_title(g), 110) for g in grids)
        + "".join(f"- {n}\n" for n in notes)
    )


def narrow(gains: Sequence[Mapping[str, Any]], columns: int = 12) -> list[Mapping[str, Any]]:
    """The rows as they are where a console has room for them, else without the kinds; the report has all."""
    kept = ("from", "to", "all difference", "all difference ci95")
    return [row if len(row) <= columns else {name: row[name] for name in kept} for row in gains]


def headline(config: Config, final: Tested, grids: Sequence[Grid]) -> dict[str, Any]:
    """The top-level fields of results.json."""
    plain = final.report | {"ind": 1, "pro": 0}
    scaling = next((g for g in grids if g.study.name == "scaling"), None)
    if scaling is None or isinstance(config.eval.ind, list) or isinstance(config.eval.pro, list):
        return plain
    table = grid(scaling.pool, [config.eval.ind], [config.eval.pro], scaling.study.weights)
    cell = accuracy_report(
        table,
        protocol=config.eval.protocol,
        draws=config.eval.draws,
        seed=config.seed,
        extra={"ind": config.eval.ind, "pro": config.eval.pro},
    )
    return cell | {"model": final.name}


def headline_title(evaluation: Evaluation, config: Config) -> str:
    users = len({p.user_id for p in evaluation.pairs})
    return (
        f"{config.data.name}: {len(evaluation.pairs)} pairs of {users} users asked in both orders, {config.eval.protocol} protocol, "
        f"judge={config.judge.kind}{', verified scores' if config.eval.scores == 'verified' else ''}; accuracy in % [95 % interval over users]"
    )


def grid_title(grid: Grid) -> str:
    whose = "one history pair known" if grid.study.name == "one_pair" else "full history"
    weights = (
        "" if grid.study.weights == (1.0, 1.0) else " with weights {:g} and {:g}".format(*grid.study.weights)
    )
    return f"Test-time user-based scaling, {whose}: m own samples, n similar users{weights}"


def grid_curve(grid: Grid) -> Curve:
    """Accuracy over m, a line for each n."""
    by_n = {n: {row["ind"]: row["accuracy"] for row in grid.rows if row["pro"] == n} for n in grid.study.pro}
    lines = {
        f"Pro-{n}": [100 * cells[m] if cells.get(m) is not None else None for m in grid.study.ind]
        for n, cells in by_n.items()
    }
    return Curve(grid_title(grid), list(grid.study.ind), lines, "m own samples", "accuracy, %")


def grid_heat_map(grid: Grid) -> list[tuple[str, Markup]]:
    """Accuracy by m and n, where both vary."""
    if len(grid.study.ind) < 2 or len(grid.study.pro) < 2:
        return []
    cells = {(row["ind"], row["pro"]): row["accuracy"] for row in grid.rows}
    values = [[cells.get((m, n)) for m in grid.study.ind] for n in grid.study.pro]
    columns, rows = [f"Ind-{m}" for m in grid.study.ind], [f"Pro-{n}" for n in grid.study.pro]
    return [(grid_title(grid), heat_map(values, rows, columns, prefix=f"heat-{grid.study.name}"))]


def run_facts(config: Config, evaluation: Evaluation) -> dict[str, Any]:
    users, known = {p.user_id for p in evaluation.pairs}, evaluation.known_users
    return {
        "model": config.model.path or config.model.name,
        "data": config.data.name,
        "pairs": len(evaluation.pairs),
        "users": len(users)
        if known is None
        else f"{len(users)}, {len(users - known)} without votes in train",
        "protocol": f"{config.eval.protocol} ({RULES[config.eval.protocol]})",
        "interval": f"95 %, {config.eval.draws} bootstrap draws over users",
        "training seed": config.seed,
        "sampling": f"temperature {config.eval.temperature}, {config.eval.seeds} evaluation seed(s)",
        "masking": config.eval.masking,
        "teacher": config.teacher.kind,
        "judge": config.judge.kind,
    }


def training_curves(run_dir: Path) -> list[Curve]:
    """Loss, reward parts and curriculum mix of the stages that logged them."""
    curves = []
    for stage, title, label, lines in TRAINING_CURVES:
        path = run_dir / stage / "metrics.jsonl"
        if not path.exists():
            continue
        frame = pd.read_json(path, lines=True)
        logged = {line: f"{stage}/{name}" for line, name in lines.items() if f"{stage}/{name}" in frame}
        part = frame.dropna(subset=list(logged.values()), how="all").drop_duplicates("step", keep="last")
        series = {line: part[name].tolist() for line, name in logged.items() if part[name].notna().any()}
        if series:
            curves.append(Curve(f"{stage}: {title}", part["step"].tolist(), series, "optimiser step", label))
    return curves
