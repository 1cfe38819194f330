"""Metrics, progress lines and complete checkpoints of a running GRPO phase.  No veRL in here."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgenrm_train.backends.grpo.phase import Draw
from pgenrm_train.backends.grpo.scoring import CUT, ScoredChain, ScoredGroup
from pgenrm_train.backends.protocols import TRUTH, ChainReader
from pgenrm_train.bootstrap import mean, user_bootstrap
from pgenrm_train.chains.totals import UNVERIFIED
from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.files import read_json
from pgenrm_train.rewards.hacking_signs import OWN, signs, stability
from pgenrm_train.rewards.training_rows import RowExtra
from pgenrm_train.run.checkpoints import COMPLETE, newest_complete

CHECKPOINTS = "global_step_*"
ACCURACY = "eval/accuracy"  # the key of accuracy in every stage
MAX_ERROR_SHARE = 0.2  # of a step's samples whose reward code raised
INTERVAL = ("eval/accuracy_low", "eval/accuracy_high")
DRAWS = 1000  # of the bootstrap
LENGTH = "validation/response_length"
# veRL's metrics that are logged, and a prefix that it puts before some of them
ENGINE = ("actor/", "perf/", "training/rollout_", "rollout_corr/")
MISNAMED = re.compile(r"^actor/(?=perf/|training/|rollout_corr/)")
DIFFERENCE = "training/rollout_probs_diff_mean"
MAX_FORMAT_ERRORS = 0.9  # of a step's chains, without a warning; our choice
MAX_DIFFERENCE = 0.02  # mean |p_vLLM − p_actor|; our choice, rounding in bf16 stays well below
Metrics = dict[str, float | None]


class Checkpoint(NamedTuple):
    """A complete checkpoint of veRL; its marker holds `step` and `sampler`."""

    folder: Path
    step: int
    sampler: dict[str, Any]


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None.

    Half-written ones are reported and removed, because verl would write into them again.
    """
    newest = newest_complete(folder, CHECKPOINTS)
    return Checkpoint(newest, **read_json(newest / COMPLETE)) if newest else None


def chain_metrics(groups: Sequence[ScoredGroup]) -> Metrics:
    """Every reward part of a step; a part that no chain has is null."""
    chains = [chain for group in groups for chain in group.chains]
    judged = [chain.null_verdict for chain in chains if chain.process is not None or chain.null_verdict]
    metrics: Metrics = {}
    for part in ("total", "outcome", "process", "format", "margin", "verified"):
        values = _values(chains, part)
        if part == "verified" and not values:  # a part only if it has a weight
            continue
        metrics[f"reward/{part}"] = mean(values)
        metrics[f"reward/{part}_std"] = float(np.std(values)) if values else None
    spreads = [np.ptp([chain.total or 0.0 for chain in group.chains]) for group in groups]
    return metrics | {
        "reward/process_null_share": sum(judged) / len(judged) if judged else None,
        "reward/error_share": sum(chain.error is not None for chain in chains) / len(chains),
        "pass_rate": sum(chain.passed for chain in chains) / len(chains),
        "format_error_share": sum(chain.failure is not None for chain in chains) / len(chains),
        "length_cut_share": sum(chain.failure == CUT for chain in chains) / len(chains),
        "response_length": float(np.mean([chain.length for chain in chains])),
        "response_length_max": max(chain.length for chain in chains),
        "rollout/cached_prompt_share": float(np.mean([chain.cached_share for chain in chains])),
        "groups/zero_advantage_share": float(np.mean([spread < 1e-9 for spread in spreads])),
        "groups/discarded_chains": sum(group.discarded_chains for group in groups),
        "order_first_share": float(np.mean([group.order == 0 for group in groups])),
        **_signs(chains),
    }


def _values(chains: Sequence[ScoredChain], part: str) -> list[float]:
    """A part of the reward, or the margin, of the chains that have it."""
    owners = [chain.ranking if part == "margin" else chain for chain in chains]
    return [value for owner in owners if (value := getattr(owner, part, None)) is not None]


def _signs(chains: Sequence[ScoredChain]) -> Metrics:
    unverified = sum(chain.failure == UNVERIFIED for chain in chains)
    values = signs((chain.ranking for chain in chains), unverified)
    return {f"signs/{name}": value for name, value in values.items()}


def rewards_problem(groups: Sequence[ScoredGroup], metrics: Metrics, max_null_share: float) -> str | None:
    """Reason to stop because a step's rewards are unusable, or None; `metrics` are its `chain_metrics`."""
    errors = metrics["reward/error_share"] or 0.0
    if errors > MAX_ERROR_SHARE:
        reason = next(chain.error for group in groups for chain in group.chains if chain.error)
        return f"reward code failed for {errors:.0%} of its chains, first with {reason}"
    nulls = metrics["reward/process_null_share"] or 0.0
    if nulls > max_null_share:
        return f"the judge gave no verdict for {nulls:.0%} of the chains that it saw"
    return None


def engine_metrics(metrics: Mapping[str, float]) -> Metrics:
    """veRL's own numbers of a step: losses, memory, MFU, and the difference between sampler and trainer."""
    plain = {MISNAMED.sub("", name): value for name, value in metrics.items()}
    return {name: float(value) for name, value in plain.items() if name.startswith(ENGINE)}


def staleness_metrics(step: int, tags: Sequence[Mapping[str, Any]]) -> Metrics:
    """Updates between the weights that sampled a chain and those that `step` trains; `tags`: veRL's."""
    ages = [step - 1 - tag["min_global_steps"] for tag in tags if not tag.get("is_padding", False)]
    return {"staleness/mean": float(np.mean(ages)), "staleness/max": max(ages)}


def difference_warning(metrics: Metrics) -> str | None:
    """A sentence if vLLM and the actor give the sampled tokens other probabilities, else None."""
    difference = metrics.get(DIFFERENCE)
    if difference is None or difference <= MAX_DIFFERENCE:
        return None
    return (
        f"warning: probabilities of sampled tokens differ by {difference:.3f} on average between vLLM and "
        f"the actor, more than {MAX_DIFFERENCE:g}; the update is then off-policy: check the "
        "versions of the libraries, model.dtype and model.attention"
    )


def format_warning(groups: Sequence[ScoredGroup]) -> str | None:
    """A sentence if nearly all chains of a step are format errors, which teach little, else None."""
    chains = [chain for group in groups for chain in group.chains]
    failures = Counter(chain.failure for chain in chains if chain.failure)
    if failures.total() < MAX_FORMAT_ERRORS * len(chains):
        return None
    kind, count = failures.most_common(1)[0]
    remedies = {
        CUT: "raise model.max_response_tokens",
        UNVERIFIED: "train PSI longer, or with model.totals=declared",
    }
    return (
        f"warning: {failures.total()} of {len(chains)} chains are format errors, {count} of them {kind}; "
        f"they have the same reward, so there is little to learn: {remedies.get(kind, 'train PSI longer')}"
    )


def mix_metrics(drawn: Mapping[int, ScoredGroup], sampler: CurriculumSampler, draw: Draw) -> Metrics:
    """Target and realised share of hard pairs, and pass rates of the hard, the suspect and the rest.

    `drawn`: pair → its group.  Call it before `sampler.observe`, which may move the pairs.
    """
    metrics: Metrics = {
        "curriculum/target_hard_share": draw.target,
        "curriculum/realised_hard_share": draw.realised,
    }
    if len(sampler.buckets) == 1:
        return metrics
    rates: dict[str, list[float]] = {name: [] for name in sampler.buckets}
    for pair, group in drawn.items():
        passes, chains = group.evidence()
        rates[sampler.bucket_of(pair)].append(passes / chains)
    for name, bucket in sampler.buckets.items():
        metrics[f"curriculum/{name}_pairs"] = bucket.count
        metrics[f"curriculum/{name}_pass_rate"] = mean(rates[name])
    return metrics


def validation_metrics(
    groups: Sequence[Sequence[ScoredChain]],
    extras: Sequence[RowExtra],
    first_length: float | None = None,
) -> Metrics:
    """Accuracy in both orders, reward parts and signs of reward hacking on the fixed slice.

    `groups`: the chains of each row; `extras`: its `extra_info`, whose `probe` marks rows that do not show
    the user's own history.  `first_length`: mean length at the first validation, the reference of the drift.
    """
    by_probe: dict[str, list[tuple[Sequence[ScoredChain], RowExtra]]] = {}
    for group, extra in zip(groups, extras, strict=True):
        by_probe.setdefault(extra.get("probe") or OWN, []).append((group, extra))
    own = by_probe.pop(OWN)
    chains = [chain for group, _ in own for chain in group]
    length = float(np.mean([chain.length for chain in chains]))
    low, high = _interval(own)
    return {
        **_accuracies(own),
        "validation/accuracy_low": low,
        "validation/accuracy_high": high,
        "validation/format_error_share": float(np.mean([chain.failure is not None for chain in chains])),
        "validation/null_verdict_share": float(np.mean([chain.null_verdict for chain in chains])),
        LENGTH: length,
        "validation/length_drift": length / (first_length or length),
        **{
            f"validation/reward/{part}": mean(_values(chains, part))
            for part in ("total", "outcome", "process")
        },
        **{f"validation/{name}": value for name, value in _signs(chains).items()},
        "validation/signs/criteria_stability": _stability_of_orders(own),
        **{
            f"validation/chains/accuracy_{kind}": float(
                np.mean([(getattr(chain.ranking, f"{kind}_margin", None) or 0) > 0 for chain in chains])
            )
            for kind in ("declared", "verified")
        },
        **{
            f"validation/probe/{name}_accuracy": _accuracies(rows)["validation/accuracy"]
            for name, rows in by_probe.items()
        },
    }


def _stability_of_orders(rows: Sequence[tuple[Sequence[ScoredChain], RowExtra]]) -> float | None:
    """Similarity of the criteria of one pair's chains: one per order."""
    by_pair: dict[str, list[tuple[str, ...]]] = {}
    for group, extra in rows:
        criteria = [chain.ranking.criteria for chain in group if chain.ranking]
        by_pair.setdefault(extra["pair_id"], []).extend(criteria)
    return stability(by_pair.values())


def _accuracies(rows: Sequence[tuple[Sequence[ScoredChain], RowExtra]]) -> Metrics:
    """Accuracy over pairs and per order, and the share of pairs won in one order only.

    Accuracy is the mean over pairs of the mean over their orders.
    """
    hits: dict[str, dict[int, float]] = {}
    for group, extra in rows:
        won = float(np.mean([chain.passed for chain in group]))
        hits.setdefault(extra["pair_id"], {})[extra["order"]] = won
    first, second = ([won[order] for won in hits.values() if order in won] for order in (0, 1))
    return {
        "validation/accuracy": float(np.mean([np.mean(list(won.values())) for won in hits.values()])),
        "validation/order_flip_rate": mean([won[0] != won[1] for won in hits.values() if len(won) == 2]),
        "validation/accuracy_chosen_first": mean(first),
        "validation/accuracy_chosen_second": mean(second),
    }


def _interval(rows: Sequence[tuple[Sequence[ScoredChain], RowExtra]]) -> tuple[float, float]:
    """95 % interval of the accuracy, from users drawn with replacement; [0, 1] for a single user."""
    won: dict[str, list[float]] = {}
    for group, extra in rows:
        won.setdefault(extra["user_id"], []).append(float(np.mean([chain.passed for chain in group])))
    if len(won) == 1:
        return 0.0, 1.0
    sums, counts = (np.array([of(rates) for rates in won.values()], dtype=float) for of in (sum, len))
    return user_bootstrap(sums, counts, draws=DRAWS, seed=0)


def truth_metrics(
    groups: Sequence[Sequence[ScoredChain]], extras: Sequence[RowExtra], reader: ChainReader
) -> Metrics:
    """Where the chains of a validation err, step by step, for those with the user's own history."""
    own = [
        (extra["pair_id"], extra["order"], chain.text)
        for group, extra in zip(groups, extras, strict=True)
        for chain in group
        if (extra.get("probe") or OWN) == OWN
    ]
    return {f"{TRUTH}{name}": share for name, share in reader(own).items()}


def validation_line(metrics: Metrics) -> str:
    """The console's part on a validation: accuracy, and where truth is known what the criteria are worth."""
    words = f"validation accuracy {metrics[ACCURACY]:.3f}"
    for name in ("allowed", "recalled"):
        if (share := metrics.get(f"{TRUTH}{name}")) is not None:
            words += f" · criteria {name} {share:.0%}"
    return words


def sample_rows(
    groups: Sequence[Sequence[ScoredChain]], extras: Sequence[RowExtra], count: int
) -> list[dict[str, object]]:
    """The first `count` chains of a validation with the user's own history, for the table of a tracker."""
    own = [(g[0], e) for g, e in zip(groups, extras, strict=True) if (e.get("probe") or OWN) == OWN]
    return [
        {
            "pair_id": extra["pair_id"],
            "order": extra["order"],
            "passed": chain.passed,
            "reward": chain.total,
            "failure": chain.failure,
            "tokens": chain.length,
            "text": chain.text,
        }
        for chain, extra in own[:count]
    ]


def progress_line(stage: str, step: int, steps: int, metrics: Metrics, seconds: float) -> str:
    """One console line: step, rewards, and the time left at `seconds` per step."""

    def show(name: str) -> str:
        value = metrics[f"reward/{name}"]
        return "–" if value is None else f"{value:.3f}"

    return (
        f"{stage} {step}/{steps} · reward {show('total')} (outcome {show('outcome')}, "
        f"process {show('process')}, format errors {metrics['format_error_share']:.1%}) · "
        f"{metrics['time/step']:.1f} s · {seconds * (steps - step) / 60:.1f} min left"
    )


def under_stage(stage: str, metrics: Metrics) -> Metrics:
    """`name` → `stage/name`, with NaN as null, because JSON has no NaN."""
    return {
        f"{stage}/{name}": None if value is None or np.isnan(value) else value
        for name, value in metrics.items()
    }
