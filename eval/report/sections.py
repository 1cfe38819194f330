"""The sections of a report: tables of an evaluation with an introduction."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.metrics.accuracy import Accuracy, accuracy_report, paired_difference
from eval.metrics.calibration import Calibration
from eval.metrics.slices import SliceRow
from eval.report import published
from eval.report.report import Row, Section
from eval.studies.evaluation import Tested
from eval.studies.robustness import ProbeRow
from pgenrm_train.config import Config, StageName
from pgenrm_train.files import read_json
from pgenrm_train.run import timeline

TWINS = (
    "Votes by two users who disagree about the same two responses. A rule that ignores the user scores at "
    "most 50 %. With the other user's history, a personal model falls to 50 % or below. A model that does "
    "not fall is not personal."
)
PROBES = (
    "Each probe changes one thing and repeats the question. Drop: strict accuracy as asked minus as "
    "probed, on the same pairs. Flip rate: share of presentations whose preferred response changes. A "
    "model that samples also flips by chance (asked again). A personal model falls with another user's "
    "history (swapped) and without history (empty). A robust model does not move under the other probes: "
    "votes in another order (shuffled); the rejected response with empty sentences added (padded); the "
    "rejected response with a claim to be better, forged delimiters and a forged verdict (injected); both "
    "responses in other words, by rules for English (paraphrased)."
)
PROTOCOLS = (
    "strict: ties and failures are misses, and every pair counts. both orders: a failed order leaves the "
    "mean. release: one random order; ties and failures are dropped. Dropped: pair × seed cells that "
    "left the denominator."
)
VERDICTS = (
    "A presentation is one pair in one order and evaluation seed. All presentations stay in the strict "
    "denominator. Order flip rate: share of pairs whose preferred response differs between the two orders; "
    "a tie in one order counts as a flip. Without verdict: every sample of the presentation failed. Kinds "
    "of failed samples: parse, the text lacks a required part; length, the text did not end within the "
    "limit; engine, an error of the server or function."
)
COHORTS = "All test users are unseen. Unseen personas also hold criteria that no training user has."
SLICES = (
    "Length ratio is in characters. Language is estimated from script and function words. User: whether "
    "the user has votes in train. Prototype: the nearest user prototype. The interval of a slice with few "
    "users is too narrow; a single user gets the full range."
)


TIMELINE = (
    "Seconds of each stage, over all of its starts, by what its processes did. The evaluation's row ends "
    "where this report was written. The seconds of a process that was killed count up to its last change of "
    "part. `timeline.jsonl` has every change."
)


def timeline_section(run_dir: Path) -> Section | None:
    """Where the time of the run went; None without a time line."""
    rows = timeline.rows(timeline.seconds_by_part(run_dir))
    return Section("Where the time went", TIMELINE, rows) if rows else None


def sections(
    config: Config,
    tested: Sequence[Tested],
    everyone: Sequence[Tested],
    slices: Sequence[SliceRow],
    prototype_mean: float | None,
    calibration: Calibration,
) -> list[Section]:
    """Protocols, verdicts, accuracy by kind, cohort and slice, probes, calibration and published figures."""
    final = (tested or everyone)[-1]
    mean = "" if prototype_mean is None else f" Mean over prototypes: {prototype_mean:.1%}."
    several_kinds = len({kind for t in everyone for kind in t.report["slices"]}) > 1
    by_kind = [{"model": t.name, **_accuracy_cells(t.report["slices"])} for t in everyone if several_kinds]
    cohorts = [row for t in tested for row in cohort_rows(t, config)]
    twins = [
        {
            "model": t.name,
            **_accuracy_cells({"own history": t.probe["own"], "swapped": t.probe["swapped"]}),
            "pairs": t.probe["n_pairs"],
        }
        for t in everyone
        if t.probe
    ]
    optional = [
        Section(
            "The same predictions under other protocols", PROTOCOLS, [protocol_cells(t) for t in everyone]
        ),
        Section("Order, ties and failures", VERDICTS, [_verdicts(t) for t in everyone]),
        Section("Accuracy by kind of pair", "Kinds as named by the data.", by_kind),
        Section("Seen and unseen personas", COHORTS, cohorts),
        Section("Accuracy by slice", f"Of {final.name}. {SLICES}{mean}", slices),
        Section("Is it personal? Swapped histories", TWINS, twins),
        Section("Robustness probes", f"Of {final.name}. {PROBES}", probe_table(final.robustness)),
    ]
    margins = Section("Calibration of margins", calibration_text(calibration), calibration["curve"])
    tables = [*(section for section in optional if len(section.table)), margins]
    figures = Section("Published figures", published.TEXT, published.published_rows())
    return [figures, *tables] if config.data.name in published.BENCHMARK else [*tables, figures]


def stage_row(tested: Tested) -> Row:
    """One row of the headline table."""
    report = tested.report
    probe: Mapping[str, Accuracy] = {"swapped history": tested.probe["swapped"]} if tested.probe else {}
    return {
        "stage": tested.name,
        "accuracy": report["accuracy"],
        "ci95": report["ci95"],
        "stderr": report["stderr"],
        **_accuracy_cells({"greedy": tested.greedy} if tested.greedy else {}),
        **_accuracy_cells({k: part for k, part in report["slices"].items() if k in ("hard", "rival")}),
        **_accuracy_cells(probe),
        "format failures": sum(report["failures"].values()),
        "ties": report["ties"],
        "seconds": tested.seconds,
    }


def cohort_rows(tested: Tested, config: Config) -> list[Row]:
    """Accuracy by cohort of users, if the data defines cohorts."""
    own, settings = tested.own, config.eval
    if "cohort" not in own or own["cohort"].isna().all():
        return []
    reports = {
        cohort: accuracy_report(part, protocol=settings.protocol, draws=settings.draws, seed=config.seed)
        for cohort, part in own.groupby("cohort")
    }
    return [
        {
            "model": tested.name,
            "users": cohort,
            "accuracy": report["accuracy"],
            "ci95": report["ci95"],
            "pairs": report["n_pairs"],
        }
        for cohort, report in reports.items()
    ]


def gain_rows(tested: Sequence[Tested], config: Config) -> list[Row]:
    """Paired gains in strict accuracy: each stage over the one before, and the last over the first.

    One column for all pairs and, with several kinds, one per kind.  Raises DataError if the stages answered
    different pairs.
    """
    overall = [(tested[0], tested[-1])] if len(tested) > 2 else []
    return [
        {"from": before.name, "to": after.name, **_gains(before, after, config)}
        for before, after in (*itertools.pairwise(tested), *overall)
    ]


def _gains(before: Tested, after: Tested, config: Config) -> Row:
    new, old = after.own, before.own
    kinds = sorted(new["kind"].dropna().unique())
    tables = {"all": (new, old)}
    if before.greedy and after.greedy:
        tables["greedy"] = after.likeliest, before.likeliest
    if len(kinds) > 1:
        tables |= {kind: (new[new["kind"] == kind], old[old["kind"] == kind]) for kind in kinds}
    row: dict[str, object] = {}
    for name, answers in tables.items():
        gain = paired_difference(*answers, draws=config.eval.draws, seed=config.seed)
        row |= {f"{name} difference": gain["difference"], f"{name} difference ci95": gain["ci95"]}
    return row


def _verdicts(tested: Tested) -> Row:
    report = tested.report
    return {
        "model": tested.name,
        "presentations": 2 * report["n_pairs"] * len(report["seeds"]),
        "order flip rate": report["order_flip_rate"],
        "ties": report["ties"],
        "without verdict": report["failed_orders"],
        "failed samples": report["failures"],
    }


def protocol_rows(final: Tested) -> list[Row]:
    """One row per protocol for one model: the console's table."""
    return [
        {
            "protocol": name,
            "accuracy": p["accuracy"],
            "ci95": p["ci95"],
            "stderr": p["stderr"],
            "counted": p["n_counted"],
            "dropped": p["n_dropped"],
        }
        for name, p in final.report["protocols"].items()
    ]


def protocol_cells(tested: Tested) -> Row:
    """One row per model with all protocols: the report's table."""
    protocols = tested.report["protocols"]
    dropped = {f"{name} dropped": p["n_dropped"] for name, p in protocols.items() if p["n_dropped"]}
    return {"model": tested.name, **_accuracy_cells(protocols), **dropped}


def probe_table(rows: Sequence[ProbeRow]) -> list[Row]:
    """The rows without their notes, kinds in plain words."""
    return [
        {name: value for name, value in row.items() if name != "note"}
        | {"probe": row["probe"].replace("_", " ")}
        for row in rows
    ]


def calibration_text(calibration: Calibration) -> str:
    """Introduction of the reliability table."""
    if calibration["ece"] is None:
        return "No verdict is readable, so there is no margin."
    scaled = (
        f", and {calibration['ece_scaled']:.3f} with a temperature fitted on other users "
        f"({calibration['temperature']:.3g} on all)"
        if calibration["ece_scaled"] is not None
        else ""
    )
    return (
        "Confidence is σ(margin): the margin is read as Bradley–Terry log odds. The expected calibration "
        f"error is {calibration['ece']:.3f} over {calibration['n']} verdicts{scaled}. "
        f"{calibration['n_failed']} presentations without a verdict have no margin. A tie counts as one "
        "half at confidence one half."
    )


def _accuracy_cells(estimates: Mapping[str, Accuracy]) -> Row:
    """Two columns per estimate: `<name> accuracy` and its interval."""
    accuracies = {f"{name} accuracy": part["accuracy"] for name, part in estimates.items()}
    return accuracies | {f"{name} accuracy ci95": part["ci95"] for name, part in estimates.items()}


def yield_section(run_dir: Path) -> Section | None:
    """Kept and rejected chains of the teacher; None for a run without `build_sec`."""
    path = run_dir / StageName.BUILD_SEC / "yield.json"
    if not path.exists():
        return None
    facts = read_json(path)
    counts = {"kept": facts["chains"], **facts["rejected"]}
    rows = [
        {"reason": reason, "chains": count, "share": count / max(1, facts["asked"])}
        for reason, count in counts.items()
    ]
    text = f"Chains of {facts['users']} users."
    if paid := facts["teacher"]:
        text += (
            f" The teacher read {paid['prompt tokens']:,} tokens and wrote {paid['completion tokens']:,}. "
            f"Cost: ${paid['dollars']:.2f} at the configured prices."
        )
    return Section("Teacher chains and rejection sampling", text, rows)


def cost_section(cost: Mapping[str, Mapping[str, object]]) -> Section | None:
    """Cost of the answers per paid model; None without a paid model."""
    rows = [
        {"model": name, **{k: v for k, v in facts.items() if k != "failures"}}
        for name, facts in cost.items()
        if facts
    ]
    text = "Tokens and dollars of all starts, at the configured prices."
    return Section("What the answers cost", text, rows) if rows else None
