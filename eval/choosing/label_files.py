"""Files of labels: a data set in TRL's schema for DPO with its card, results.json, table and report.

    dataset/labels.parquet   prompt, chosen, rejected: lists of {role, content}, TRL's conversational schema
                             of preferences; then user, scores, margin and confidence
    dataset/README.md        the card; `datasets.load_dataset` reads the folder

veRL 0.9 has no trainer for DPO, and so no schema for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from eval.choosing.chain_views import Shown, match_views
from eval.choosing.labels import Label, Labelled, agreement, agreement_by_confidence, shown_match
from eval.choosing.schemes import Player, Slot
from eval.metrics.intervals import few_users
from eval.report.console import text_table
from eval.report.report import Curve, Report, Row, Section, markdown_table, write_report
from pgenrm_train.files import write_json, write_table, write_text
from pgenrm_train.records.slates import Slate

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        *((name, MESSAGES) for name in ("prompt", "chosen", "rejected")),
        *((name, pa.string()) for name in ("user_id", "prompt_id")),
        *((name, pa.float64()) for name in ("score_chosen", "score_rejected", "margin", "confidence")),
        ("responses", pa.int64()),
        ("chains", pa.int64()),
        ("totals", pa.string()),
    ]
)
COLUMNS = {
    "prompt": "the conversation, a list of {role, content}",
    "chosen, rejected": "one answer each, a list of one {role, content}",
    "user_id": "the user whose preference it is: keep one user's rows to train that user's policy",
    "prompt_id": "the prompt, unique per user",
    "score_chosen, score_rejected": "the model's mean scores over both positions",
    "margin": "their difference, above 0",
    "confidence": "σ(margin / T), read as the probability that the user agrees",
    "responses": "candidates of the prompt",
    "chains": "readable chains behind the scores of all candidates of the prompt",
    "totals": "which totals of a chain count: declared, verified or code",
}
AGREEMENT = (
    "Share of labels that agree with the user's ratings or votes, which no prompt showed. Left out: labels "
    "whose true preference is unknown. Intervals resample users."
)
UNCALIBRATED = "Too few votes to compare with: the temperature T of the confidence is 1, not fitted."


@dataclass(frozen=True)
class LabelFacts:
    """Facts of the run that card and results state."""

    model: str
    data: str
    totals: str
    rule: str
    min_margin: float
    ind: int
    pro: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class LabelRun:
    """Everything that a run of labels knows."""

    facts: LabelFacts
    slates: Sequence[Slate]
    scores: Mapping[Slot, np.ndarray]
    labelled: Labelled
    player: Player
    unused: Mapping[str, int]  # prompts without two responses, by kind
    draws: int
    shown: int  # chains of the report

    @property
    def left_out(self) -> dict[str, int]:
        return {kind: n for kind, n in {**self.unused, **self.labelled.left_out}.items() if n}


def write_labels(run: LabelRun, folder: Path) -> Mapping[str, object]:
    """Write every file; returns the content of results.json."""
    chains, labelled = run.player.chains(), run.labelled
    seed = run.facts.seed
    compared = agreement(run.slates, labelled.labels, run.draws, seed)
    quarters = agreement_by_confidence(run.slates, labelled, run.draws, seed)
    counts: dict[str, object] = {
        "labels": len(labelled.labels),
        "prompts": len(run.slates),
        "users": len({slate.prompt.user_id for slate in run.slates}),
        "left_out": run.left_out,
        "chains": len(chains),
        "failures": chains["failure"].dropna().value_counts().to_dict(),
        "tokens": int(chains["tokens"].sum()),
    }
    results = {
        **asdict(run.facts),
        **counts,
        "agreement": compared,
        "agreement_by_confidence": quarters,
        "confidence_temperature": labelled.temperature,
        "confidence_fitted": labelled.fitted,
    }
    notes = _notes(run, compared)
    count_rows = _count_rows(counts)
    write_table(folder / "dataset" / "labels.parquet", _table(run, chains))
    write_text(folder / "dataset" / "README.md", _card(run, count_rows, compared, quarters, notes))
    write_json(folder / "results.json", results)
    summary: Row = {"model": run.facts.model, **_brief(counts), **compared}
    table = text_table([summary], "Labels: agreement with the user in % [95 % interval]", 150)
    left = "".join(f"left out: {n} × {kind}\n" for kind, n in run.left_out.items())
    write_text(folder / "table.txt", table + left + "".join(f"- {note}\n" for note in notes))
    report = Report(
        title=f"Labels by {run.facts.model}",
        run=asdict(run.facts),
        stages=[summary],
        sections=[
            Section("Counts", "Prompts, labels and what was left out.", count_rows),
            Section("Agreement by confidence", AGREEMENT, quarters),
        ],
        curves=_curves(quarters),
        notes=notes,
        chains=match_views(run.player, _shown(run), run.facts.model),
    )
    write_report(folder / "report.html", report)
    return results


def _brief(counts: Mapping[str, object]) -> Row:
    return {name: counts[name] for name in ("prompts", "users", "chains", "labels")}


def _count_rows(counts: Mapping[str, object]) -> list[Row]:
    """One row per figure; failures and kinds left out have one each."""
    rows: list[Row] = []
    for name, value in counts.items():
        kinds = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [
            {"what": f"{name.replace('_', ' ')}{': ' if kind else ''}{kind}", "count": n} for kind, n in kinds
        ]
    return rows


def _notes(run: LabelRun, compared: Mapping[str, object]) -> list[str]:
    users = int(str(compared["their users"]))
    notes = [] if run.labelled.fitted else [UNCALIBRATED]
    if users and (warning := few_users(users)):
        notes.append(f"Agreement: {warning}.")
    return notes


def _table(run: LabelRun, chains: pd.DataFrame) -> pa.Table:
    readable = chains[chains["failure"].isna()].groupby("pair_id").size()
    of_slate: dict[int, int] = {}
    for slot in run.scores:
        slate = run.slates[slot.slate]
        pairs = {slate.pair(i, j).pair_id for i in range(slot.n) for j in range(i + 1, slot.n)}
        of_slate[slot.slate] = int(readable[readable.index.isin(pairs)].sum())
    rows = [_row(run, label, of_slate[label.slate]) for label in run.labelled.labels]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _row(run: LabelRun, label: Label, chains: int) -> dict[str, object]:
    slate = run.slates[label.slate]

    def answer(number: int) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": slate.responses[number]}]

    return {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in slate.prompt.context],
        "chosen": answer(label.chosen),
        "rejected": answer(label.rejected),
        "user_id": slate.prompt.user_id,
        "prompt_id": slate.prompt.pair_id,
        "score_chosen": label.score_chosen,
        "score_rejected": label.score_rejected,
        "margin": label.margin,
        "confidence": run.labelled.confidence(label),
        "responses": len(slate.responses),
        "chains": chains,
        "totals": run.facts.totals,
    }


def _card(
    run: LabelRun, counts: Sequence[Row], compared: Row, quarters: Sequence[Row], notes: Sequence[str]
) -> str:
    from huggingface_hub import DatasetCardData

    # Without `configs`: with them datasets 5.2 caches by the folder's name alone, and returns older labels.
    head = DatasetCardData(tags=["preference", "dpo", "trl", "personalization"])
    facts = [{"fact": name.replace("_", " "), "value": value} for name, value in asdict(run.facts).items()]
    columns = [{"column": name, "meaning": meaning} for name, meaning in COLUMNS.items()]
    fit = "fitted on the compared labels" if run.labelled.fitted else "not fitted"
    parts = [
        f"---\n{head.to_yaml()}\n---",
        "# Preferences by a personalised reward model",
        "One chosen and one rejected answer per label, by a model's scores for the prompt's user. The "
        "schema is TRL's for DPO: conversational preferences with an explicit prompt.",
        "## Columns",
        markdown_table(columns),
        f"T = {run.labelled.temperature:.3g}, {fit}.",
        "## How they were made",
        markdown_table(facts),
        "## Counts",
        markdown_table(counts),
        "## Agreement with the users",
        AGREEMENT,
        markdown_table([compared]),
        *([markdown_table(quarters)] if quarters else []),
        "## Limits",
        "The labels are a model's: they share its errors and its taste. The texts keep the licence of their "
        "source. " + " ".join(notes),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _curves(quarters: Sequence[Mapping[str, Any]]) -> list[Curve]:
    if len(quarters) < 2:
        return []
    shares = [100 * row["agreement accuracy"] for row in quarters]
    bands = [[100 * bound for bound in row["agreement accuracy ci95"]] for row in quarters]
    confidence = [100 * row["mean confidence"] for row in quarters]
    lines = {"agreement": shares, "perfectly calibrated": confidence}
    title, xlabel = "Agreement with the user by confidence", "confidence σ(margin / T), %"
    return [Curve(title, confidence, lines, xlabel, "agreement, %", {"agreement": bands})]


def _shown(run: LabelRun) -> list[Shown]:
    """Labels from the most confident to the least."""
    labels = sorted(run.labelled.labels, key=lambda label: (-label.margin, label.slate))
    step = max(1, 2 * len(labels) // max(1, run.shown))
    shown = []
    for label in labels[::step][: run.shown // 2]:
        match = shown_match(Slot(label.slate, len(run.slates[label.slate].responses)), label)
        preferred = None
        if label.right is not None and {label.chosen, label.rejected} == {match.first, match.second}:
            preferred = label.right == (label.chosen == match.first)
        title = f"margin {label.margin:.2f}, confidence {run.labelled.confidence(label):.2f}"
        shown.append(Shown(match, preferred, title))
    return shown
