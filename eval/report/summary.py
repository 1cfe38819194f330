"""Summarise an evaluation: compute the results, then write tables, predictions and report.

Files: results.json, predictions.parquet, table.txt, report.html and report.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from eval.metrics.accuracy import AccuracyReport, accuracy_report
from eval.metrics.calibration import Calibration, calibration
from eval.metrics.slices import (
    KEYS,
    SliceRow,
    data_digest,
    odd_inputs,
    prototype_macro,
    slice_labels,
    slice_rows,
)
from eval.report.chain_section import Ceilings, chain_sections, chain_views, error_rows
from eval.report.console import text_table
from eval.report.figures import (
    calibration_curve,
    grid_curve,
    grid_heat_map,
    grid_title,
    prototype_curves,
    prototype_folder,
    prototype_map,
    prototype_sections,
    training_curves,
)
from eval.report.notes import input_notes, reader_notes
from eval.report.report import Report, Row, Section, write_markdown, write_report
from eval.report.sections import (
    cost_section,
    gain_rows,
    probe_table,
    protocol_rows,
    sections,
    stage_row,
    timeline_section,
    yield_section,
)
from eval.studies.evaluation import Evaluation, Grid, Tested
from eval.studies.robustness import ProbeRow
from eval.studies.scaling_study import SETTLED
from pgenrm_train.config import Config, Totals
from pgenrm_train.config.evaluation import TASKS
from pgenrm_train.files import write_json, write_table, write_text
from pgenrm_train.scaling.combine import grid

ADAPTIVE = (
    "Own samples that eval.adaptive would not have drawn, and the accuracy of the largest cell without "
    "them. The same pool is cut where each pair's verdict was settled. The difference is paired, to the "
    "cell with all samples."
)
GRIDS = (
    "Tie share: ties as a share of all draws of a cell. A pool of M samples gives M // m draws per pair and "
    "order."
)
CONTROL = "Similar users against random users"
CONTROL_TEXT = (
    "The same own chains, with chains from the histories of the most similar training users, or of as many "
    "random training users. Own chains: as many own chains as both kinds together. Differences are "
    "over the same pairs; intervals resample users."
)
RULES = {
    "strict": "both orders; ties and failures are misses",
    "both_orders": "both orders; ties are misses, failed orders are dropped",
    "release": "one random order; ties and failures are dropped",
    "user_disjoint": "held-out users; both orders; ties and failures are misses",
}
GAINS = "Gain of each stage on the same pairs"


@dataclass(frozen=True)
class Evaluated:
    """All answers of an evaluation.

    The last of `tested` is the final model and gives the top-level results.
    """

    config: Config
    evaluation: Evaluation
    tested: Sequence[Tested]
    baselines: Sequence[Tested]
    grids: Sequence[Grid] = ()
    notes: Sequence[str] = ()
    prototypes: Mapping[str, int] | None = None  # pair_id → nearest prototype
    cost: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # per paid model under test
    ceilings: Ceilings = field(default_factory=Ceilings)
    truth: Sequence[Row] = ()  # steps of the chains against the truth, where the data know it

    @property
    def everyone(self) -> list[Tested]:
        return [*self.tested, *self.baselines]

    @property
    def stage_rows(self) -> list[Row]:
        return [{**stage_row(t), **self.ceilings.cells(t.name, t.report["accuracy"])} for t in self.tested]

    @property
    def final(self) -> Tested:
        return (self.tested or self.baselines)[-1]


@dataclass(frozen=True)
class Details:
    """Measurements of the final model beyond its accuracy, as in results.json."""

    slice_rows: Sequence[SliceRow]
    macro_accuracy_prototypes: float | None
    calibration: Calibration
    probes: Sequence[ProbeRow]
    chain_errors: Sequence[Row]


def write_results(evaluated: Evaluated, folder: Path) -> Mapping[str, object]:
    """Compute all results and write every file; returns the content of results.json."""
    evaluation, final = evaluated.evaluation, evaluated.final
    labels = slice_labels(
        evaluation.pairs, evaluation.histories, evaluated.prototypes, evaluation.known_users
    )
    own, settings, seed = final.own, evaluated.config.eval, evaluated.config.seed
    details = Details(
        slice_rows(own, labels, protocol=settings.protocol, draws=settings.draws, seed=seed),
        prototype_macro(own, labels, protocol=settings.protocol, seed=seed),
        calibration(own, draws=settings.draws, seed=seed),
        list(final.robustness),
        error_rows(evaluated.tested, evaluated.config),
    )
    gains = gain_rows(evaluated.tested, evaluated.config)
    odd = odd_inputs(evaluation.pairs, evaluation.histories)
    top = headline(evaluated.config, final, evaluated.grids)
    leaderboard = leaderboard_row(evaluated.config, top)
    results = _results(evaluated, top, details) | {
        "odd_inputs": odd,
        "gains": gains,
        "leaderboard_row": leaderboard,
    }
    notes = [*reader_notes(final), *input_notes(odd), *evaluated.notes]
    report = _report(evaluated, folder.parent, details, gains, leaderboard, notes)
    write_json(folder / "results.json", results)
    write_table(folder / "predictions.parquet", _predictions(evaluated, labels))
    write_text(folder / "table.txt", console_text(evaluated, gains, notes))
    write_report(folder / "report.html", report)
    write_markdown(folder / "report.md", report)
    return results


def headline(config: Config, final: Tested, grids: Sequence[Grid]) -> AccuracyReport:
    """The top-level fields of results.json.

    Ind-1 in both orders, or the cell of `eval.ind` and `eval.pro` if both are numbers.
    """
    scaling = next((g for g in grids if g.study.name == "scaling"), None)
    if scaling is None or isinstance(config.eval.ind, list) or isinstance(config.eval.pro, list):
        return final.report | {"ind": 1, "pro": 0}
    table = grid(scaling.pool, [config.eval.ind], [config.eval.pro], scaling.study.weights)
    cell = accuracy_report(table, protocol=config.eval.protocol, draws=config.eval.draws, seed=config.seed)
    return cell | {"ind": config.eval.ind, "pro": config.eval.pro, "model": final.name}


def leaderboard_row(config: Config, top: AccuracyReport) -> Row:
    return {
        "model": f"{top['model']} (Ind-{top['ind']}, Pro-{top['pro']})",
        "name": _model_name(config),
        "data": config.data.name,
        "protocol": top["protocol"],
        "accuracy": top["accuracy"],
        "ci95": top["ci95"],
        "stderr": top["stderr"],
        "macro accuracy": top["macro_accuracy"],
        "users": top["n_users"],
        "pairs": top["n_pairs"],
        "ties": top["ties"],
        "failures": sum(top["failures"].values()),
        "order flip rate": top["order_flip_rate"],
        "seeds": len(top["seeds"]),
    }


def _model_name(config: Config) -> str:
    """The endpoint, function or folder behind the model's label."""
    return config.model.path or config.model.name


def _results(evaluated: Evaluated, top: AccuracyReport, details: Details) -> dict[str, object]:
    config, grids = evaluated.config, evaluated.grids
    return {
        **top,
        "model_name": _model_name(config),
        "data": config.data.name,
        "task": config.data.name,
        "task_version": TASKS[config.data.name].version if config.data.name in TASKS else None,
        "data_sha256": data_digest(evaluated.evaluation.pairs),
        "judge": config.judge.kind,
        "totals": config.model.counted,
        "weights": list(config.eval.weights),
        "grids": {g.study.name: g.rows for g in grids},
        "similar_against_random": {g.study.name: list(g.control) for g in grids if g.control},
        "adaptive_stopping": {g.study.name: g.adaptive for g in grids if g.adaptive},
        "stages": {
            t.name: {**t.report, "greedy": t.greedy, "ceiling": evaluated.ceilings.by_stage.get(t.name)}
            for t in evaluated.tested
        },
        "ceilings": list(evaluated.ceilings.rows),
        "chain_truth": list(evaluated.truth),
        "baselines": {t.name: t.report for t in evaluated.baselines},
        "probe_swapped_history": {t.name: t.probe for t in evaluated.everyone if t.probe},
        **asdict(details),
        "notes": list(evaluated.notes),
        "cost": {name: dict(facts) for name, facts in evaluated.cost.items() if facts},
    }


def _predictions(evaluated: Evaluated, labels: pd.DataFrame) -> pd.DataFrame:
    """All answers and the pools of the grids, with model and slice labels."""
    pools = [
        g.pool[g.pool["failure"] != SETTLED].assign(model=evaluated.final.name, study=g.study.name)
        for g in evaluated.grids
    ]
    answers = [t.predictions.assign(model=t.name) for t in evaluated.everyone]
    return pd.concat([*answers, *pools], ignore_index=True).merge(labels, on=KEYS, how="left")


def _report(
    evaluated: Evaluated,
    run_dir: Path,
    details: Details,
    gains: Sequence[Row],
    leaderboard: Row,
    notes: Sequence[str],
) -> Report:
    config, grids, final = evaluated.config, evaluated.grids, evaluated.final
    clustered = prototype_folder(run_dir)
    stopped = [{"study": g.study.name, **g.adaptive} for g in grids if g.adaptive]
    optional = [
        Section(GAINS, "Difference in strict accuracy; intervals resample users.", gains) if gains else None,
        *(Section(grid_title(g), GRIDS, g.rows) for g in grids),
        Section(CONTROL, CONTROL_TEXT, control) if (control := control_rows(grids)) else None,
        Section("Adaptive stopping, replayed", ADAPTIVE, stopped) if stopped else None,
        *chain_sections(evaluated.ceilings, details.chain_errors, evaluated.truth),
        *(prototype_sections(clustered) if clustered else []),
        *sections(
            config,
            evaluated.tested,
            evaluated.everyone,
            details.slice_rows,
            details.macro_accuracy_prototypes,
            details.calibration,
        ),
        Section("Leaderboard row", "Accuracies with protocol, interval and denominator.", [leaderboard]),
        timeline_section(run_dir),
        yield_section(run_dir),
        cost_section(evaluated.cost),
    ]
    return Report(
        title=f"{final.name} on {config.data.name}",
        run=run_facts(config, evaluated.evaluation),
        stages=evaluated.stage_rows,
        comparisons=[stage_row(t) for t in evaluated.baselines],
        sections=[section for section in optional if section],
        curves=[
            *(grid_curve(g) for g in grids),
            *([calibration_curve(details.calibration, final.name)] if details.calibration["curve"] else []),
            *training_curves(run_dir),
            *(prototype_curves(clustered) if clustered else []),
        ],
        drawings=[
            *(d for g in grids for d in grid_heat_map(g)),
            *([prototype_map(clustered)] if clustered else []),
        ],
        notes=notes,
        chains=chain_views(config, evaluated.evaluation, final) if evaluated.tested else [],
    )


def console_text(evaluated: Evaluated, gains: Sequence[Row], notes: Sequence[str]) -> str:
    """The console's tables at the end of an evaluation, with the notes below."""
    final = evaluated.final
    rows = [*evaluated.stage_rows, *(stage_row(t) for t in evaluated.baselines)]
    return (
        text_table(rows, headline_title(evaluated.evaluation, evaluated.config), 150)
        + (text_table(narrow(gains), GAINS, 150) if gains else "")
        + text_table(protocol_rows(final), f"{final.name}: the same predictions under each protocol", 110)
        + (
            text_table(probe_table(final.robustness), f"{final.name}: robustness probes", 150)
            if final.robustness
            else ""
        )
        + "".join(text_table(g.rows, grid_title(g), 110) for g in evaluated.grids)
        + (text_table(control, CONTROL, 150) if (control := control_rows(evaluated.grids)) else "")
        + "".join(f"- {note}\n" for note in notes)
    )


def control_rows(grids: Sequence[Grid]) -> list[Row]:
    """The cells of all studies whose similar users were compared with random ones."""
    return [{"study": g.study.name, **row} for g in grids for row in g.control]


def narrow(gains: Sequence[Row], columns: int = 14) -> Sequence[Row]:
    """Drop the columns by kind if the console is too narrow for them; the report has all."""
    kept = (
        "from",
        "to",
        "all difference",
        "all difference ci95",
        "greedy difference",
        "greedy difference ci95",
    )
    return [
        row if len(row) <= columns else {name: row[name] for name in kept if name in row} for row in gains
    ]


def headline_title(evaluation: Evaluation, config: Config) -> str:
    users = len({p.user_id for p in evaluation.pairs})
    kind = config.model.counted
    scores = "" if kind is Totals.DECLARED else f", totals={kind}"
    return (
        f"{config.data.name}: {len(evaluation.pairs)} pairs of {users} users in both orders, "
        f"{config.eval.protocol} protocol, judge={config.judge.kind}{scores}; accuracy in % [95 % interval "
        "over users]"
    )


def run_facts(config: Config, evaluation: Evaluation) -> Row:
    users, known = {p.user_id for p in evaluation.pairs}, evaluation.known_users
    return {
        "model": _model_name(config),
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
