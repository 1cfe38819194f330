"""Sections, curves and maps of a run's user prototypes; empty for a run without prototypes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from markupsafe import Markup

from eval.report.plots import point_map
from eval.report.report import Curve, Row, Section
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.files import read_json
from pgenrm_train.prototypes.cards import Card
from pgenrm_train.run.folder import StageFolder

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


def prototype_sections(run_dir: Path) -> list[Section]:
    """Cards, held-out accuracy of the refinement, and the cold start as tables."""
    if (folder := _folder(run_dir)) is None:
        return []
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
    sections = [
        Section("User prototypes", REFINED, [refinement]),
        Section(
            "Prototype cards",
            CARDS,
            [_brief(card) for card in read_json(folder.path / "cards.json")],
        ),
    ]
    if facts.get("cold_start"):
        sections.append(Section("New users", COLD_START, facts["cold_start"]))
    return sections


def prototype_curves(run_dir: Path) -> list[Curve]:
    """Singular-value mass over k, loss of the refinement, and cold start."""
    if (folder := _folder(run_dir)) is None:
        return []
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


def prototype_maps(run_dir: Path) -> list[tuple[str, Markup]]:
    if (folder := _folder(run_dir)) is None:
        return []
    table = pd.read_parquet(folder.path / "analyses.parquet")
    names = [str(j) for j in range(folder.manifest.facts["k"])]
    x, y, label = (table[name].to_numpy() for name in ("x", "y", "prototype"))
    return [
        ("Prototypes: analyses on two principal axes", point_map(x, y, label, names, prefix="prototype-map"))
    ]


def _folder(run_dir: Path) -> StageFolder | None:
    folder = StageFolder.read(run_dir, StageName.PROTOTYPES)
    return (
        folder
        if folder.complete and (folder.path / "cards.json").exists() and "x" in _columns(folder.path)
        else None
    )


def _columns(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_schema(path / "analyses.parquet").names)


def _brief(card: Card) -> Row:
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
