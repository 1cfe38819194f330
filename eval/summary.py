"""What an evaluation leaves behind: results.json, predictions.parquet, table.txt, report.html and report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval.evaluation import Evaluation, Grid, Tested, cohort_rows, gain_rows, stage_row
from eval.metrics import accuracy_report
from eval.report import ChainView, Curve, Report, Section, write_markdown, write_report
from pgenrm_train.artifacts import write_json, write_table, write_text
from pgenrm_train.chains import Chain, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.masking import present
from pgenrm_train.scaling import grid

GAINS = "What each stage adds, on the same pairs"


def publish(
    config: Config,
    folder: Path,
    evaluation: Evaluation,
    tested: Sequence[Tested],
    baselines: Sequence[Tested],
    grids: Sequence[Grid],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Write everything; returns what results.json holds.

    The last of `tested` is the final model and gives the top-level fields: Ind-1 as asked in both orders, or the cell that
    `eval.ind` and `eval.pro` name when both are numbers.
    """
    rows, compared = [stage_row(t) for t in tested], [stage_row(t) for t in baselines]
    final = (tested or baselines)[-1]
    everyone = [*tested, *baselines]
    gains = gain_rows(tested, config)
    results = headline(config, final, grids) | {
        "data": config.data.name,
        "judge": config.judge.kind,
        "grids": {g.study.name: g.rows for g in grids},
        "stages": {t.name: t.report for t in tested},
        "gains": gains,
        "baselines": {t.name: t.report for t in baselines},
        "probe_swapped_history": {t.name: t.probe for t in everyone if t.probe},
        "notes": list(notes),
    }
    write_json(folder / "results.json", results)
    pools = [g.pool.assign(model=final.name) for g in grids]
    write_table(
        folder / "predictions.parquet",
        pd.concat([*(t.predictions.assign(model=t.name) for t in everyone), *pools], ignore_index=True),
    )
    notes = [*personal_sentences(final), *notes]
    grid_texts = [text_table(g.rows, grid_title(g), 110) for g in grids]
    text = (
        text_table([*rows, *compared], headline_title(evaluation, config), 150)
        + (text_table(narrow(gains), GAINS, 150) if gains else "")
        + "".join(grid_texts)
        + "".join(f"- {n}\n" for n in notes)
    )
    write_text(folder / "table.txt", text)
    report = Report(
        title=f"P-GenRM on {config.data.name}",
        run=run_facts(config, evaluation),
        stages=rows,
        comparisons=compared,
        sections=[
            *([Section(GAINS, "Difference in strict accuracy; intervals resample users.", gains)] if gains else []),
            *(Section(grid_title(g), "Ties are counted by pair, order and evaluation seed.", g.rows) for g in grids),
            *sections(config, tested, everyone),
        ],
        curves=[*(grid_curve(g) for g in grids), *training_curves(folder.parent)],
        notes=notes,
        chains=chain_views(config, evaluation, final) if tested else [],
    )
    write_report(folder / "report.html", report)
    write_markdown(folder / "report.md", report)
    return results


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
    table = grid(scaling.pool, [config.eval.ind], [config.eval.pro])
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
        f"{config.data.name}: {len(evaluation.pairs)} pairs of {users} users in both orders, {config.eval.protocol} protocol, "
        f"judge={config.judge.kind}; accuracy in % [95 % interval over users]"
    )


def grid_title(grid: Grid) -> str:
    whose = "one history pair known" if grid.study.name == "one_pair" else "full history"
    return f"Test-time user-based scaling, {whose}: m own samples, n similar users"


def grid_curve(grid: Grid) -> Curve:
    """Accuracy over m, a line for each n."""
    by_n = {n: {row["ind"]: row["accuracy"] for row in grid.rows if row["pro"] == n} for n in grid.study.pro}
    lines = {f"Pro-{n}": [cells.get(m) for m in grid.study.ind] for n, cells in by_n.items()}
    return Curve(grid_title(grid), list(grid.study.ind), lines, "m own samples", "accuracy")


def run_facts(config: Config, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "model": config.model.name,
        "data": config.data.name,
        "pairs": len(evaluation.pairs),
        "users": len({p.user_id for p in evaluation.pairs}),
        "protocol": f"{config.eval.protocol} (both orders; a tie or a failure is not a hit)",
        "interval": f"95 %, {config.eval.draws} bootstrap draws over users",
        "training seed": config.seed,
        "sampling": f"temperature {config.eval.temperature}, {config.eval.seeds} evaluation seed(s)",
        "masking": config.eval.masking,
        "teacher": config.teacher.kind,
        "judge": config.judge.kind,
    }


def sections(config: Config, tested: Sequence[Tested], everyone: Sequence[Tested]) -> list[Section]:
    """Accuracy by kind, by cohort, the history probe, and the protocols side by side."""
    found = []
    kinds = sorted({kind for t in everyone for kind in t.report["slices"]})
    if len(kinds) > 1:
        by_kind = [
            {"model": t.name, **{f"{k} accuracy": t.report["slices"][k]["accuracy"] for k in kinds if k in t.report["slices"]}}
            for t in everyone
        ]
        found.append(Section("Accuracy by kind of pair", "", by_kind))
    if cohorts := [row for t in tested for row in cohort_rows(t, config)]:
        found.append(
            Section(
                "Seen and unseen personas",
                "All test users are unseen; unseen personas also hold criteria that no training user has.",
                cohorts,
            )
        )
    probes = [
        {
            "model": t.name,
            "own history accuracy": t.probe["own"]["accuracy"],
            "own history accuracy ci95": t.probe["own"]["ci95"],
            "swapped accuracy": t.probe["swapped"]["accuracy"],
            "swapped accuracy ci95": t.probe["swapped"]["ci95"],
            "pairs": t.probe["n_pairs"],
        }
        for t in everyone
        if t.probe
    ]
    if probes:
        text = (
            "Votes on the same two responses by two users who disagree: a rule that ignores the user scores 50 % at best. "
            "With the other user's history in place of one's own, a personal model falls to 50 % or below."
        )
        found.append(Section("Is it personal? Swapped histories", text, probes))
    protocols = [
        {"model": t.name, **{f"{name} accuracy": p["accuracy"] for name, p in t.report["protocols"].items()}} for t in everyone
    ]
    found.append(Section("The same predictions under other protocols", "", protocols))
    return found


def personal_sentences(final: Tested) -> list[str]:
    """Say plainly whether the final model depends on whose history it reads."""
    if not final.probe:
        return []
    own, swapped = final.probe["own"], final.probe["swapped"]
    low, high = final.probe["difference"]["ci95"]
    verdict = (
        "it uses whose history it reads"
        if low > 0
        else "no dependence on whose history it reads is proven: this model is not shown to be personal"
    )
    return [
        f"{final.name}, {final.probe['n_pairs']} votes on which two users disagree: own history {own['accuracy']:.1%}, swapped history "
        f"{swapped['accuracy']:.1%} (difference [{low:+.1%}, {high:+.1%}]); {verdict}."
    ]


def training_curves(run_dir: Path) -> list[Curve]:
    """Loss and reward curves of the stages that logged them."""
    curves = []
    for stage, name, label in (
        ("psi", "psi/loss", "loss"),
        ("cre", "cre/reward/outcome", "outcome reward"),
        ("curriculum", "curriculum/reward/outcome", "outcome reward"),
    ):
        path = run_dir / stage / "metrics.jsonl"
        if not path.exists():
            continue
        frame = pd.read_json(path, lines=True)
        if name in frame:
            part = frame[["step", name]].dropna().drop_duplicates("step", keep="last")
            curves.append(
                Curve(f"{stage}: {label}", part["step"].tolist(), {label: part[name].tolist()}, "optimiser step", label)
            )
    return curves


def chain_views(config: Config, evaluation: Evaluation, final: Tested) -> list[ChainView]:
    """A few readable chains of the final model: kinds in turn, hits and misses."""
    own = final.predictions[
        (final.predictions["set"] == "own") & (final.predictions["sample"] == 0) & (final.predictions["seed"] == 0)
    ]
    pairs = {p.pair_id: p for p in evaluation.pairs}
    step = max(1, len(own) // max(1, config.eval.chains_in_report))
    views = []
    for row in own.iloc[::step].head(config.eval.chains_in_report).itertuples():
        pair = pairs[row.pair_id]
        example = present(pair, evaluation.histories[pair.pair_id], row.order)
        text = row.text if isinstance(row.text, str) else ""  # NaN where the engine gave none
        chain = parse_chain(text)
        known: dict[str, Any] = {}
        if isinstance(chain, Chain):
            known = {
                "analysis": chain.analysis,
                "criteria": chain.criteria,
                "declared": chain.scores,
                "verified": chain.verified_scores,
                "issues": chain.issues,
                "criterion_scores": tuple(zip(*chain.criterion_scores)) if chain.criterion_scores else (),
            }
        failure = row.failure if isinstance(row.failure, str) else None
        views.append(
            ChainView(
                pair_id=pair.pair_id,
                user_id=pair.user_id,
                query=pair.query,
                responses=example.responses,
                label=example.chosen_index,
                text=text,
                kind=pair.kind,
                stage=final.name,
                history=example.history,
                failure=failure,
                **known,
            )
        )
    return views


def text_table(rows: Sequence[Mapping[str, Any]], title: str, width: int) -> str:
    """A table for the console."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row if not key.endswith("ci95")))
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in rows:
        table.add_row(
            *(_cell(column, row.get(column), row.get("ci95" if column == "accuracy" else f"{column} ci95")) for column in columns)
        )
    out = StringIO()
    Console(file=out, width=width, force_terminal=False).print(table)
    return out.getvalue()


def _cell(column: str, value: Any, interval: Sequence[float] | None) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if interval:
        return f"{value * 100:.1f} [{interval[0] * 100:.1f}, {interval[1] * 100:.1f}]"
    if column.endswith(("accuracy", "stderr")):
        return f"{value * 100:.1f}"
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
