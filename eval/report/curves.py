"""Curves and heat maps of a report: training, test-time scaling and calibration."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from markupsafe import Markup

from eval.metrics.calibration import Calibration
from eval.report.plots import heat_map
from eval.report.report import Curve
from eval.studies.evaluation import Grid
from pgenrm_train.config.stage_names import StageName

REWARD_PARTS = {"outcome": "reward/outcome", "process": "reward/process", "format": "reward/format"}
VALIDATION = {
    "their own history": "validation/accuracy",
    "another user's": "validation/probe/swapped_history_accuracy",
    "none": "validation/probe/empty_history_accuracy",
}
PASS_RATES = {name: f"curriculum/{name}_pass_rate" for name in ("hard", "rest", "suspect")}
MIX = {"target": "curriculum/target_hard_share", "realised": "curriculum/realised_hard_share"}
TRAINING_CURVES = (  # stage, title, axis, lines by the stage's metric
    (StageName.PSI, "loss", "loss", {"loss": "loss"}),
    (StageName.CRE, "reward parts", "mean reward", REWARD_PARTS),
    (StageName.CURRICULUM, "reward parts", "mean reward", REWARD_PARTS),
    (StageName.CRE, "validation and probes", "accuracy", VALIDATION),
    (StageName.CURRICULUM, "validation and probes", "accuracy", VALIDATION),
    (StageName.CURRICULUM, "curriculum mix", "share of hard pairs", MIX),
    (StageName.CURRICULUM, "pass rate by hardness", "pass rate", PASS_RATES),
)


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


def calibration_curve(calibration: Calibration, name: str) -> Curve:
    """Reliability curve: measured accuracy over confidence, with the diagonal."""
    confidence = [100 * point["confidence"] for point in calibration["curve"]]
    measured = [100 * point["accuracy"] for point in calibration["curve"]]
    return Curve(
        f"{name}: accuracy over confidence of the margin",
        confidence,
        {"measured": measured, "perfectly calibrated": confidence},
        "confidence σ(margin), %",
        "accuracy, %",
    )


def grid_title(grid: Grid) -> str:
    history = "one known vote per user" if grid.study.name == "one_pair" else "full history"
    weights = (
        "" if grid.study.weights == (1.0, 1.0) else " with weights {:g} and {:g}".format(*grid.study.weights)
    )
    return f"Test-time user-based scaling, {history}: m own samples, n similar users{weights}"


def grid_curve(grid: Grid) -> Curve:
    """Accuracy over m, one line per n."""
    study, cells = grid.study, _accuracies(grid)
    lines = {
        f"Pro-{n}": [None if (a := cells.get((m, n))) is None else 100 * a for m in study.ind]
        for n in study.pro
    }
    return Curve(grid_title(grid), list(study.ind), lines, "m own samples", "accuracy, %")


def grid_heat_map(grid: Grid) -> list[tuple[str, Markup]]:
    """Accuracy by m and n, if both vary."""
    study, cells = grid.study, _accuracies(grid)
    if len(study.ind) < 2 or len(study.pro) < 2:
        return []
    values = [[cells.get((m, n)) for m in study.ind] for n in study.pro]
    columns, rows = [f"Ind-{m}" for m in study.ind], [f"Pro-{n}" for n in study.pro]
    return [(grid_title(grid), heat_map(values, rows, columns, prefix=f"heat-{study.name}"))]


def _accuracies(grid: Grid) -> dict[tuple[int, int], float | None]:
    return {(row["ind"], row["pro"]): row["accuracy"] for row in grid.rows}
