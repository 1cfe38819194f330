"""The sections of a report: tables of an evaluation, and the plain sentences that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval.metrics.calibration import calibration
from eval.metrics.slices import prototype_macro, slice_rows
from eval.report import published
from eval.report.report import Curve, Section
from eval.studies.evaluation import Tested, cohort_rows
from eval.studies.robustness import AGAIN
from pgenrm_train.config import Config
from pgenrm_train.files import read_json

UNMOVED = ("shuffled_history", "padded", "injected", "paraphrased")  # probes that should change nothing

PERSONAL = "A reward model that does not fall under swapped history is not personal."
TWINS = (
    "Votes on the same two responses by two users who disagree: a rule that ignores the user scores 50 % at best. "
    f"With the other user's history in place of one's own, a personal model falls to 50 % or below. {PERSONAL}"
)
PROBES = (
    "One thing is changed and the same question asked again. Drop: strict accuracy as asked minus as probed, on the same pairs. Flip "
    "rate: share of presentations whose preferred response changes; a model that samples flips by chance too (asked again). "
    "Swapped history comes from another user, empty history is none: a personal model falls under both. Under the others a "
    "robust model does not move: votes in another order, the rejected response padded with empty sentences, the rejected response "
    "claiming to be better with forged delimiters and verdict, both responses in other words (by rules, in English)."
)
PROTOCOLS = (
    "strict: a tie and a failure are misses, every pair counts. both orders: a failed order leaves the mean. release: one random "
    "order, ties and failures leave. Dropped: pair × seed cells that left the denominator."
)
VERDICTS = (
    "A presentation is one pair in one order and evaluation seed; all stay in the strict denominator. Order flip rate: share of pairs whose "
    "preferred response differs between the two orders, a tie in one only included. Without verdict: every sample of the presentation "
    "failed. Failed samples are named by kind: parse, what the text lacks; length, no end within the limit; engine, the server or a function."
)
SLICES = (
    "Length ratio is in characters; language as far as script and little words tell it; user says whether train holds votes of theirs; prototype is the nearest user prototype. A slice of few users "
    "has an interval that is too narrow, one of a single user the whole range."
)


def details(config: Config, final: Tested, labels: pd.DataFrame) -> dict[str, Any]:
    """What results.json holds of the final model beyond its accuracy: slices, calibration, probes, accuracy over prototypes."""
    own = final.predictions[final.predictions["set"] == "own"]
    protocol, draws, seed = config.eval.protocol, config.eval.draws, config.seed
    return {
        "slice_rows": slice_rows(own, labels, protocol=protocol, draws=draws, seed=seed),
        "macro_accuracy_prototypes": prototype_macro(own, labels, protocol=protocol, seed=seed),
        "calibration": calibration(own, draws=draws, seed=seed),
        "probes": list(final.robustness),
    }


def sections(
    config: Config, tested: Sequence[Tested], everyone: Sequence[Tested], results: Mapping[str, Any]
) -> list[Section]:
    """Protocols side by side, accuracy by kind, cohort and slice, probes, calibration, published figures, a leaderboard row."""
    found = [
        Section(
            "The same predictions under other protocols", PROTOCOLS, [protocol_cells(t) for t in everyone]
        )
    ]
    found.append(Section("Order, ties and failures", VERDICTS, [_verdicts(t) for t in everyone]))
    kinds = sorted({kind for t in everyone for kind in t.report["slices"]})
    if len(kinds) > 1:
        found.append(Section("Accuracy by kind of pair", "", [_by_kind(t, kinds) for t in everyone]))
    if cohorts := [row for t in tested for row in cohort_rows(t, config)]:
        found.append(
            Section(
                "Seen and unseen personas",
                "All test users are unseen; unseen personas also hold criteria that no training user has.",
                cohorts,
            )
        )
    if results["slice_rows"]:
        mean = results["macro_accuracy_prototypes"]
        over = "" if mean is None else f" Mean over prototypes: {mean:.1%}."
        found.append(
            Section("Accuracy by slice", f"Of {results['model']}. {SLICES}{over}", results["slice_rows"])
        )
    if twins := [_twins(t) for t in everyone if t.probe]:
        found.append(Section("Is it personal? Swapped histories", TWINS, twins))
    if results["probes"]:
        found.append(
            Section("Robustness probes", f"Of {results['model']}. {PROBES}", probe_table(results["probes"]))
        )
    found.append(
        Section(
            "Calibration of margins",
            calibration_text(results["calibration"]),
            results["calibration"]["curve"],
        )
    )
    figures = Section("Published figures", published.TEXT, published.published_rows())
    found.insert(0 if config.data.name in published.BENCHMARK else len(found), figures)
    found.append(
        Section(
            "Leaderboard row",
            "Accuracies with protocol, interval and denominator.",
            [results["leaderboard_row"]],
        )
    )
    return found


def _verdicts(tested: Tested) -> dict[str, Any]:
    report = tested.report
    return {
        "model": tested.name,
        "presentations": 2 * report["n_pairs"] * len(report["seeds"]),
        "order flip rate": report["order_flip_rate"],
        "ties": report["ties"],
        "without verdict": report["failed_orders"],
        "failed samples": report["failures"],
    }


def protocol_rows(final: Tested) -> list[dict[str, Any]]:
    """One row a protocol for one model: the console's table."""
    return [
        {"protocol": name, "accuracy": p["accuracy"], "ci95": p["ci95"], "stderr": p["stderr"], "counted": p["n_counted"],
         "dropped": p["n_dropped"]}
        for name, p in final.report["protocols"].items()
    ]  # fmt: skip


def protocol_cells(tested: Tested) -> dict[str, Any]:
    """One row a model, all protocols beside each other: the report's table."""
    row: dict[str, Any] = {"model": tested.name}
    for name, p in tested.report["protocols"].items():
        row |= {f"{name} accuracy": p["accuracy"], f"{name} accuracy ci95": p["ci95"]}
    return row | {
        f"{name} dropped": p["n_dropped"] for name, p in tested.report["protocols"].items() if p["n_dropped"]
    }


def probe_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without their sentences, kinds in plain words."""
    return [
        {name: value for name, value in row.items() if name != "note"}
        | {"probe": row["probe"].replace("_", " ")}
        for row in rows
    ]


def leaderboard_row(results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": f"{results['model']} (Ind-{results['ind']}, Pro-{results['pro']})",
        "name": results["model_name"],
        "data": results["data"],
        "protocol": results["protocol"],
        "accuracy": results["accuracy"],
        "ci95": results["ci95"],
        "stderr": results["stderr"],
        "macro accuracy": results["macro_accuracy"],
        "users": results["n_users"],
        "pairs": results["n_pairs"],
        "ties": results["ties"],
        "failures": sum(results["failures"].values()),
        "order flip rate": results["order_flip_rate"],
        "seeds": len(results["seeds"]),
    }


def calibration_text(found: Mapping[str, Any]) -> str:
    """What the reliability table says in words."""
    if found["ece"] is None:
        return "No verdict could be read, so there is no margin."
    text = (
        f"Confidence is σ(margin), the margin read as Bradley–Terry log odds. Expected calibration error {found['ece']:.3f} over "
        f"{found['n']} verdicts"
    )
    if found["ece_scaled"] is not None:
        text += f", {found['ece_scaled']:.3f} with a temperature fitted on other users ({found['temperature']:.3g} on all)"
    return f"{text}; {found['n_failed']} presentations without a verdict have no margin. A tie counts one half at confidence one half."


def calibration_curve(found: Mapping[str, Any], name: str) -> Curve:
    """Reliability curve: measured accuracy over confidence, beside the diagonal."""
    rows = found["curve"]
    confidence = [100 * row["confidence"] for row in rows]
    lines = {"measured": [100 * row["accuracy"] for row in rows], "perfectly calibrated": confidence}
    return Curve(
        f"{name}: accuracy over confidence of the margin",
        confidence,
        lines,
        "confidence σ(margin), %",
        "accuracy, %",
    )


def reader_notes(final: Tested) -> list[str]:
    """Sentences that stand above the tables: is it personal, is it robust, are there enough users."""
    note = final.report["ci95_note"]
    return [*([f"{note}."] if note else []), *_personal(final), *_robust(final)]


def input_notes(odd: Mapping[str, int]) -> list[str]:
    """Name the unusual pairs that the accuracy includes."""
    found = ", ".join(f"{n} with {what}" for what, n in odd.items() if n)
    notes = [f"In the denominator are pairs that deserve a thought: {found}."] if found else []
    if odd["identical responses"]:
        notes.append(
            "Of two identical responses none is better: both score the mean of what they are given, a tie, which is a miss."
        )
    return notes


def _unread(final: Tested) -> bool:
    return bool(final.predictions["failure"].notna().all())


def _personal(final: Tested) -> list[str]:
    """Say plainly whether the final model depends on whose history it reads, or that nothing it said can be read."""
    if _unread(final):
        return [
            f"{final.name}: none of its answers could be read, so no number here speaks of the model's judgement."
        ]
    if final.probe:
        what = f"{final.probe['n_pairs']} votes on which two users disagree"
        own, swapped = final.probe["own"]["accuracy"], final.probe["swapped"]["accuracy"]
        (low, high), few = final.probe["difference"]["ci95"], final.probe["difference"]["ci95_note"]
    elif row := _probed(final, "swapped_history"):
        what = f"{row['pairs']} pairs with another user's history"
        own, swapped, (low, high), few = (
            row["as asked accuracy"],
            row["probed accuracy"],
            row["drop ci95"],
            row["note"],
        )
    else:
        untested = f"{final.name}: no history could be exchanged for another user's, so whether it is personal was not tested."
        return [untested] if final.robustness else []
    return [
        f"{final.name}, {what}: own history {own:.1%}, swapped history "
        f"{swapped:.1%} (difference [{low:+.1%}, {high:+.1%}]); {_depends(low, few)}."
    ]


def _depends(low: float, few: str | None) -> str:
    """What the lower bound of the difference proves; of few users it proves nothing, in whichever direction."""
    if low > 0 and not few:
        return "it uses whose history it reads"
    so = f" ({few})" if few else ""
    return f"no dependence on whose history it reads is proven{so}: this model is not shown to be personal"


def _robust(final: Tested) -> list[str]:
    """Name the probes that cost accuracy and should not."""
    rows = [row for kind in UNMOVED if (row := _probed(final, kind))]
    if not rows or _unread(final):
        return []
    moved = [_moved(row) for row in rows if row["drop ci95"][0] > 0]
    few = f" ({rows[0]['note']})" if rows[0]["note"] else ""
    lost = (
        f"{final.name} loses accuracy where nothing that matters changed: {', '.join(moved)}{few}."
        if moved
        else f"{final.name}: no loss of accuracy is proven where nothing that matters changed, {len(rows)} probes{few}."
    )
    return [lost, *_turned(final, [row for row in rows if row["drop ci95"][0] <= 0])]


def _turned(final: Tested, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the probes that turn more verdicts than asking again does, though accuracy stays: a rule that is gamed the other way."""
    again = _probed(final, AGAIN)
    if (
        again is None and final.predictions["text"].notna().any()
    ):  # it samples, and one seed says nothing of how often it turns by chance
        return []
    chance = again["flip rate ci95"][1] if again and again["flip rate ci95"] else 0.0
    found = [row for row in rows if row["flip rate ci95"] and row["flip rate ci95"][0] > chance]
    named = ", ".join(
        f"{row['probe'].replace('_', ' ')} ({row['flip rate']:.1%} of presentations)" for row in found
    )
    return [f"{final.name} turns verdicts there all the same: {named}."] if found else []


def _moved(row: Mapping[str, Any]) -> str:
    lost = f", {row['failures']} answers of {2 * row['pairs']} unreadable" if row["failures"] else ""
    return f"{row['probe'].replace('_', ' ')} (drop {row['drop']:.1%}{lost})"


def _probed(final: Tested, kind: str) -> dict[str, Any] | None:
    """The row of a probe that changed something."""
    return next((row for row in final.robustness if row["probe"] == kind and row["pairs"]), None)


def _by_kind(tested: Tested, kinds: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": tested.name}
    for kind in kinds:
        if part := tested.report["slices"].get(kind):
            row |= {f"{kind} accuracy": part["accuracy"], f"{kind} accuracy ci95": part["ci95"]}
    return row


def _twins(tested: Tested) -> dict[str, Any]:
    assert tested.probe is not None
    return {
        "model": tested.name,
        "own history accuracy": tested.probe["own"]["accuracy"],
        "own history accuracy ci95": tested.probe["own"]["ci95"],
        "swapped accuracy": tested.probe["swapped"]["accuracy"],
        "swapped accuracy ci95": tested.probe["swapped"]["ci95"],
        "pairs": tested.probe["n_pairs"],
    }


def yield_section(run_dir: Path) -> Section | None:
    """How many of the teacher's chains were kept, and why the others were not; None for a run without `build_sec`."""
    path = run_dir / "build_sec" / "yield.json"
    if not path.exists():
        return None
    facts = read_json(path)
    counts = {"kept": facts["chains"], **facts["rejected"]}
    rows = [
        {"reason": reason, "chains": count, "share": count / max(1, facts["asked"])}
        for reason, count in counts.items()
    ]
    paid = facts["teacher"]
    cost = (
        f" The teacher read {paid['prompt tokens']:,} tokens and wrote {paid['completion tokens']:,}: {paid['dollars']:.2f} dollars at "
        "the stated rates."
        if paid
        else ""
    )
    return Section("Teacher chains and rejection sampling", f"Chains of {facts['users']} users.{cost}", rows)


def cost_section(cost: Mapping[str, Mapping[str, Any]]) -> Section | None:
    """What each model under test was paid; None where none is paid for."""
    rows = [
        {"model": name, **{k: v for k, v in facts.items() if k != "failures"}}
        for name, facts in cost.items()
        if facts
    ]
    return (
        Section("What the answers cost", "Tokens and dollars of all starts, at the stated rates.", rows)
        if rows
        else None
    )
