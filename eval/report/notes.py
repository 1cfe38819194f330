"""Plain sentences that qualify the figures of a report: is the model personal, is it robust?"""

from collections.abc import Mapping, Sequence

from eval.studies.evaluation import Tested
from eval.studies.robustness import AGAIN, ProbeRow

UNMOVED = ("shuffled_history", "padded", "injected", "paraphrased")  # probes that should change nothing


def reader_notes(final: Tested) -> list[str]:
    """Notes above the tables: number of users, personalisation, robustness."""
    few = [f"{note}."] if (note := final.report["ci95_note"]) else []
    few += _refused(final)
    if final.predictions["failure"].notna().all():
        unread = "no answer is readable, so no figure here describes the model's judgement"
        return [*few, f"{final.name}: {unread}."]
    return [*few, *_personal(final), *_robust(final)]


def _refused(final: Tested) -> list[str]:
    """Name the prompts that a server refused: their failures say nothing of the model."""
    failures = final.predictions["failure"]
    refused = int((failures == "prompt_refused").sum())
    note = (
        f"{final.name}: the server refused the prompts of {refused:,} of {len(failures):,} answers, e.g. for "
        "their length; these count as failures."
    )
    return [note] if refused else []


def input_notes(odd: Mapping[str, int]) -> list[str]:
    """Notes on unusual pairs that the accuracy includes."""
    listed = ", ".join(f"{n} with {name}" for name, n in odd.items() if n)
    notes = [f"The accuracy includes unusual pairs: {listed}."] if listed else []
    if odd["identical responses"]:
        notes.append("Two identical responses both score their mean. This is a tie, so a miss.")
    return notes


def _personal(final: Tested) -> list[str]:
    """State whether the final model is shown to depend on whose history it reads."""
    if final.probe:
        subject = f"{final.probe['n_pairs']} votes on which two users disagree"
        own, swapped = final.probe["own"]["accuracy"], final.probe["swapped"]["accuracy"]
        (low, high), few = final.probe["difference"]["ci95"], final.probe["difference"]["ci95_note"]
    elif row := _probed(final, "swapped_history"):
        subject = f"{row['pairs']} pairs with another user's history"
        own, swapped = row["as asked accuracy"], row["probed accuracy"]
        (low, high), few = row["drop ci95"], row["note"]
    else:
        untested = (
            f"{final.name}: no other user's history was available, so whether it is personal was not tested."
        )
        return [untested] if final.robustness else []
    return [
        f"{final.name}, {subject}: own history {own:.1%}, swapped history {swapped:.1%} "
        f"(difference [{low:+.1%}, {high:+.1%}]); {_depends(low, few)}."
    ]


def _depends(low: float, few: str | None) -> str:
    """The conclusion from the lower bound of the difference; few users prove nothing either way."""
    if low > 0 and not few:
        return "it uses whose history it reads"
    reason = f" ({few})" if few else ""
    return (
        f"no dependence on whose history it reads is proven{reason}: this model is not shown to be personal"
    )


def _robust(final: Tested) -> list[str]:
    """Name the probes that cost accuracy or turn verdicts but should not."""
    rows = [row for kind in UNMOVED if (row := _probed(final, kind))]
    if not rows:
        return []
    few = f" ({rows[0]['note']})" if rows[0]["note"] else ""
    moved = ", ".join(_moved(row) for row in rows if row["drop ci95"][0] > 0)
    note = (
        f"{final.name} loses accuracy under irrelevant changes: {moved}{few}."
        if moved
        else f"{final.name}: no loss of accuracy is proven under {len(rows)} irrelevant changes{few}."
    )
    return [note, *_turned(final, [row for row in rows if row["drop ci95"][0] <= 0])]


def _turned(final: Tested, rows: Sequence[ProbeRow]) -> list[str]:
    """Name the probes that turn more verdicts than chance at equal accuracy: a rule gamed the other way."""
    again = _probed(final, AGAIN)
    if again is None and final.predictions["text"].notna().any():
        return []  # the model samples, and one seed does not show its flips by chance
    chance = again["flip rate ci95"][1] if again and again["flip rate ci95"] else 0.0
    turned = ", ".join(
        f"{row['probe'].replace('_', ' ')} ({row['flip rate']:.1%} of presentations)"
        for row in rows
        if row["flip rate ci95"] and row["flip rate ci95"][0] > chance
    )
    return [f"{final.name} still turns verdicts under irrelevant changes: {turned}."] if turned else []


def _moved(row: ProbeRow) -> str:
    lost = f", {row['failures']} answers of {2 * row['pairs']} unreadable" if row["failures"] else ""
    return f"{row['probe'].replace('_', ' ')} (drop {row['drop']:.1%}{lost})"


def _probed(final: Tested, kind: str) -> ProbeRow | None:
    """The row of a probe that changed at least one pair."""
    return next((row for row in final.robustness if row["probe"] == kind and row["pairs"]), None)
