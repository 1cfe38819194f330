"""What a GRPO phase leaves on disk while it runs, and what it says: metrics, batches, complete checkpoints.  No veRL in here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.rewards.hacking_signs import OWN, signs
from pgenrm_train.run.checkpoints import COMPLETE, complete_checkpoints

CHECKPOINTS = "global_step_*"
ACCURACY = "eval/accuracy"  # the key of accuracy in every stage
MAX_ERROR_SHARE = 0.2  # of a step's samples whose reward code raised
LENGTH = "validation/response_length"


def newest_checkpoint(folder: Path) -> tuple[Path | None, int, dict[str, Any]]:
    """(folder, step, sampler state) of the newest complete checkpoint, (None, 0, {}) without one.
    Half-written ones are reported and removed, for verl would write into them again."""
    complete = complete_checkpoints(folder, CHECKPOINTS)
    for path in folder.glob(CHECKPOINTS):
        if path not in complete:
            print(
                f"{path} was left half-written by an interrupted run; it is ignored and removed", flush=True
            )
            shutil.rmtree(path)
    if not complete:
        return None, 0, {}
    marker = json.loads((complete[-1] / COMPLETE).read_text())
    return complete[-1], int(marker["step"]), marker["sampler"]


def chain_metrics(groups: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Every reward part of a step; a part that no chain has is null."""
    infos = [info for group in groups for info in group]
    judged = [info for info in infos if info["process"] is not None or info["null_verdict"]]
    found: dict[str, Any] = {}
    for part in ("total", "outcome", "process", "format", "margin", "verified"):
        values = [info[part] for info in infos if info.get(part) is not None]
        if part == "verified" and not values:  # a part only where it has a weight
            continue
        found[f"reward/{part}"] = float(np.mean(values)) if values else None
        found[f"reward/{part}_std"] = float(np.std(values)) if values else None
    kinds = [info["failure"] for info in infos]
    spreads = [
        np.ptp([info["total"] if info["total"] is not None else 0.0 for info in group]) for group in groups
    ]
    return found | {
        "reward/process_null_share": sum(info["null_verdict"] for info in judged) / len(judged)
        if judged
        else None,
        "reward/error_share": sum(info["error"] is not None for info in infos) / len(infos),
        "pass_rate": sum((info["outcome"] or 0.0) > 0 for info in infos) / len(infos),
        "format_error_share": sum(kind is not None for kind in kinds) / len(infos),
        "length_cut_share": kinds.count("length") / len(infos),
        "response_length": float(np.mean([info["length"] for info in infos])),
        "response_length_max": max(info["length"] for info in infos),
        "groups/zero_advantage_share": float(np.mean([spread < 1e-9 for spread in spreads])),
        "groups/discarded_chains": sum(group[0]["discarded_chains"] for group in groups),
        "order_first_share": float(np.mean([group[0]["order"] == 0 for group in groups])),
        **{f"signs/{name}": value for name, value in signs(infos).items()},
    }


def hopeless(
    found: Mapping[str, Any], groups: Sequence[Sequence[Mapping[str, Any]]], max_null_share: float
) -> str | None:
    """Why a step's rewards are no ground to go on, in words; None when they are.  found: its `chain_metrics`."""
    if found["reward/error_share"] > MAX_ERROR_SHARE:
        reason = next(info["error"] for group in groups for info in group if info["error"])
        return f"reward code failed for {found['reward/error_share']:.0%} of its chains, first with {reason}"
    nulls = found["reward/process_null_share"] or 0.0
    return (
        f"the judge gave no verdict for {nulls:.0%} of the chains that it saw"
        if nulls > max_null_share
        else None
    )


def tried(group: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(passes, chains) of all that was sampled for a prompt, discarded groups included: what was kept alone would be a selection."""
    passes = sum((info["outcome"] or 0.0) > 0 for info in group)
    return passes + group[0]["discarded_passes"], len(group) + group[0]["discarded_chains"]


def mix_metrics(
    drawn: Mapping[int, Sequence[Mapping[str, Any]]], sampler: CurriculumSampler
) -> dict[str, Any]:
    """Target and realised share of hard pairs, and what the step's chains say of the hard, the suspect and the rest.

    drawn: pair → its group.  To be read before `sampler.observe`, which may move the pairs.
    """
    found: dict[str, Any] = {
        "curriculum/target_hard_share": sampler.target,
        "curriculum/realised_hard_share": sampler.realised,
    }
    if len(sampler.buckets) == 1:
        return found
    rates: dict[str, list[float]] = {name: [] for name in sampler.buckets}
    for pair, group in drawn.items():
        passes, chains = tried(group)
        rates[sampler.bucket_of(pair)].append(passes / chains)
    for name, bucket in sampler.buckets.items():
        found[f"curriculum/{name}_pairs"] = bucket.count
        found[f"curriculum/{name}_pass_rate"] = float(np.mean(rates[name])) if rates[name] else None
    return found


def validation_metrics(
    groups: Sequence[Sequence[Mapping[str, Any]]],
    extras: Sequence[Mapping[str, Any]],
    first_length: float | None = None,
) -> dict[str, Any]:
    """What the fixed slice says: accuracy in both orders, reward parts and signs of reward hacking.

    groups: the chains of each row, extras: its `extra_info`; `probe` tells rows with another history from those with the user's own.
    first_length: mean length at the first validation, which the drift is measured against.
    """
    asked: dict[str, list[tuple[Any, Any]]] = {}
    for group, extra in zip(groups, extras, strict=True):
        asked.setdefault(extra.get("probe") or OWN, []).append((group, extra))
    own = asked.pop(OWN)
    infos = [info for group, _ in own for info in group]
    length = float(np.mean([info["length"] for info in infos]))
    found: dict[str, Any] = {
        **_accuracies(own),
        "validation/format_error_share": float(np.mean([info["failure"] is not None for info in infos])),
        "validation/null_verdict_share": float(np.mean([info["null_verdict"] for info in infos])),
        LENGTH: length,
        "validation/length_drift": length / (first_length or length),
    }
    for part in ("total", "outcome", "process"):
        values = [info[part] for info in infos if info[part] is not None]
        found[f"validation/reward/{part}"] = float(np.mean(values)) if values else None
    found |= {f"validation/signs/{name}": value for name, value in signs(infos).items()}
    return found | {
        f"validation/probe/{name}_accuracy": _accuracies(rows)["validation/accuracy"]
        for name, rows in asked.items()
    }


def _accuracies(
    rows: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]],
) -> dict[str, float | None]:
    """Accuracy as the mean over pairs of the mean over their orders, in each order, and the share of pairs won in one order only."""
    hits: dict[str, dict[int, float]] = {}
    for group, extra in rows:
        won = float(np.mean([(info["outcome"] or 0.0) > 0 for info in group]))
        hits.setdefault(extra["pair_id"], {})[extra["order"]] = won
    both = [won for won in hits.values() if len(won) == 2]
    orders = {
        name: [won[order] for won in hits.values() if order in won]
        for order, name in enumerate(("first", "second"))
    }
    return {
        "validation/accuracy": float(np.mean([np.mean(list(won.values())) for won in hits.values()])),
        "validation/order_flip_rate": float(np.mean([won[0] != won[1] for won in both])) if both else None,
        **{
            f"validation/accuracy_chosen_{name}": float(np.mean(won)) if won else None
            for name, won in orders.items()
        },
    }


def progress_line(stage: str, step: int, steps: int, last: Mapping[str, Any], seconds: float) -> str:
    """One line for the console: where the phase stands and, at `seconds` a step, how long it will take."""

    def show(name: str) -> str:
        value = last[f"reward/{name}"]
        return "–" if value is None else f"{value:.3f}"

    left = seconds * (steps - step) / 60
    return (
        f"{stage} {step}/{steps} · reward {show('total')} (outcome {show('outcome')}, process {show('process')}, format errors "
        f"{last['format_error_share']:.1%}) · {last['time/step']:.1f} s · {left:.1f} min left"
    )


def under_stage(stage: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """`name` → `stage/name`, with NaN as null: JSON has no NaN."""
    return {f"{stage}/{k}": (None if isinstance(v, float) and np.isnan(v) else v) for k, v in found.items()}
