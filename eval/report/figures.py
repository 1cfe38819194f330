"""Curves, maps and tables of a report: training, scaling, calibration and prototypes."""

from pathlib import Path

import pandas as pd
from markupsafe import Markup

from eval.metrics.calibration import Calibration
from eval.report.plots import heat_map, point_map
from eval.report.report import Curve, Row, Section
from eval.studies.evaluation import Grid
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.files import read_json
from pgenrm_train.prototypes.cards import PrototypeCard
from pgenrm_train.run.folder import StageFolder

REWARD_PARTS = {"outcome": "reward/outcome", "process": "reward/process", "format": "reward/format"}
VALIDATION = {
    "their own history": "validation/accuracy",
    "another user's": "validation/probe/swapped_history_accuracy",
    "none": "validation/probe/empty_history_accuracy",
}
PASS_RATES = {name: f"curriculum/{name}_pass_rate" for name in ("hard", "rest", "suspect")}
MIX = {"target": "curriculum/target_hard_share", "realised": "curriculum/realised_hard_share"}
JUDGES = {
    "training judge": "validation/judge_gold/training_judge",
    "second judge": "validation/judge_gold/score",
    "gap": "validation/judge_gold/gap",
}
TRAINING_CURVES = (  # stage, title, axis, lines by the stage's metric
    (StageName.PSI, "loss", "loss", {"loss": "loss"}),
    (StageName.CRE, "reward parts", "mean reward", REWARD_PARTS),
    (StageName.CURRICULUM, "reward parts", "mean reward", REWARD_PARTS),
    (StageName.CRE, "validation and probes", "accuracy", VALIDATION),
    (StageName.CURRICULUM, "validation and probes", "accuracy", VALIDATION),
    (StageName.CRE, "both judges on validation chains", "mean score", JUDGES),
    (StageName.CURRICULUM, "both judges on validation chains", "mean score", JUDGES),
    (StageName.CURRICULUM, "curriculum mix", "share of hard pairs", MIX),
    (StageName.CURRICULUM, "pass rate by hardness", "pass rate", PASS_RATES),
)

CARDS = (
    "Typical: criteria that the members' chains weigh more than average. Nearest and farthest: members by "
    "distance from the prototype. The full cards are in prototypes/cards.md."
)
REFINED = (
    "Refined and centroids accuracy: pairwise accuracy of z on votes of users unseen by the refinement, "
    "with and without refinement. Recovery: adjusted Rand index against the users' stated criteria, by "
    "scenario, if the data has them. Recovery of users assigns each user the prototype of most of their "
    "analyses in a scenario."
)
COLD_START = (
    "New users with this many known votes. The analysis is written from these votes only and selects the "
    "nearest prototype; z picks a response without a chain. Without prototypes: the mean of all "
    "prototypes. Intervals resample users."
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


def prototype_sections(folder: StageFolder) -> list[Section]:
    """Cards, held-out accuracy of the refinement, and the cold start as tables."""
    facts = folder.manifest.facts
    refinement = {
        "prototypes": facts["k"],
        "suggested by singular values": facts["k_suggested_by_singular_values"],
        "analyses": facts["analyses"],
        "users": facts["users"],
        "held-out pairs": facts["refinement"]["holdout_pairs"],
        "refined accuracy": facts["refinement"]["holdout_accuracy"],
        "centroids accuracy": facts["refinement"]["holdout_accuracy_centroids"],
        "moved share": facts["refinement"]["moved_share"],
        "recovery": facts["recovery"],
        "recovery of users": facts.get("recovery_of_users"),
    }
    cards = [_brief(card) for card in read_json(folder.path / "cards.json")]
    cold_start = facts.get("cold_start")
    return [
        Section("User prototypes", REFINED, [refinement]),
        Section("Prototype cards", CARDS, cards),
        *([Section("New users", COLD_START, cold_start)] if cold_start else []),
    ]


def prototype_curves(folder: StageFolder) -> list[Curve]:
    """Singular-value mass over k, loss of the refinement, and cold start."""
    mass = read_json(folder.path / "singular_values.json")["retained_mass"]
    loss, start = folder.manifest.facts["refinement"]["loss"], folder.manifest.facts.get("cold_start") or []
    curves = [
        Curve(
            "Prototypes: retained singular-value mass",
            [*range(1, len(mass) + 1)],
            {"share": mass},
            "k",
            "share of the sum",
        ),
        Curve(
            "Prototypes: loss of the refinement", [*range(1, len(loss) + 1)], {"loss": loss}, "epoch", "loss"
        ),
    ]
    if start:
        keys = (("with prototypes", "accuracy"), ("without", "without prototypes accuracy"))
        lines = {name: [100 * p[key] for p in start] for name, key in keys}
        known = [p["history_pairs"] for p in start]
        curves.append(
            Curve("New users: accuracy of z by known votes", known, lines, "history pairs", "accuracy, %")
        )
    return curves


def prototype_map(folder: StageFolder) -> tuple[str, Markup]:
    table = pd.read_parquet(folder.path / "analyses.parquet")
    names = [str(j) for j in range(folder.manifest.facts["k"])]
    x, y, label = (table[name].to_numpy() for name in ("x", "y", "prototype"))
    return "Prototypes: analyses on two principal axes", point_map(x, y, label, names, prefix="prototype-map")


def prototype_folder(run_dir: Path) -> StageFolder | None:
    """The run's finished prototypes with cards and map, if it has any."""
    import pyarrow.parquet as pq

    folder = StageFolder.read(run_dir, StageName.PROTOTYPES)
    if not folder.complete or not (folder.path / "cards.json").exists():
        return None
    return folder if "x" in pq.read_schema(folder.path / "analyses.parquet").names else None


def _brief(card: PrototypeCard) -> Row:
    members = {"nearest": card.get("nearest"), "farthest": card.get("farthest")}
    texts = {
        name: f"{member['user_id']}: {member['analysis']}"[:160] for name, member in members.items() if member
    }
    return {
        "prototype": str(card["prototype"]),
        "typical": ", ".join(card["typical"]),
        "analyses": card["analyses"],
        "users": card["users"],
        **texts,
    }
