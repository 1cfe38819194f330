"""From a sampled chain to the reward that GRPO compares: scoring one chain, settling a group.  No veRL in here.

Failures are data.  A chain cut by the length limit has no end-of-sequence token and earns the format error.  A reward function
that raises leaves its sample unscored: it is recorded by kind and takes the mean of its group, so its advantage is zero.
A judge without a verdict is null, never 0: no sample of that group gets a process reward (GRPO compares within the group).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pgenrm_train.backends.protocols import Judge
from pgenrm_train.chains.chain import Chain, ParseFailure, parse_chain
from pgenrm_train.errors import ConfigError
from pgenrm_train.rewards.chain_reward import RewardWeights, chain_reward

SHAPE = ("margin", "verified_margin", "spread", "criteria")
NOTHING_SAID = "{}"  # `extra_info.explicit` of a user who stated nothing


@dataclass(frozen=True)
class RewardSpec:
    """How a phase scores chains.  `judge` names an importable factory, "module:factory"; None switches the process reward off."""

    weights: Mapping[str, float] = field(default_factory=dict)  # fields of rewards.RewardWeights
    judge: str | None = None
    judge_kwargs: Mapping[str, Any] = field(default_factory=dict)
    judge_in_flight: int = 64
    null_policy: str = "drop_process_for_group"


def share_of(spec: RewardSpec, samplers: int) -> RewardSpec:
    """One sampler's part of the limits of a judge: they are the run's.  A budget is not shared out where all read it from one disk."""
    settings = spec.judge_kwargs.get("settings")
    if settings is None or samplers == 1:
        return spec
    names = ["requests_per_minute", "tokens_per_minute"]
    names += [] if spec.judge_kwargs.get("cache") else ["max_dollars", "max_total_tokens"]
    each = {name: settings[name] / samplers for name in names if settings.get(name) is not None}
    each["max_in_flight"] = max(1, spec.judge_in_flight // samplers)
    kwargs = {**spec.judge_kwargs, "settings": {**settings, **each}}
    return replace(spec, judge_kwargs=kwargs, judge_in_flight=each["max_in_flight"])


@dataclass
class Sample:
    """One chain.  `info` holds the reward's parts, null where there is none; `score` is what GRPO sees."""

    prompt_ids: list[int]
    token_ids: list[int]
    log_probs: list[float]
    text: str
    finished: bool
    weights_version: int
    info: dict[str, Any] = field(default_factory=dict)
    score: float = 0.0


def load_judge(name: str | None, kwargs: Mapping[str, Any]) -> Judge | None:
    """`"data_builders.sources.personaworld:oracle_judge"` → the judge that its factory returns; None → None."""
    if name is None:
        return None
    module, _, factory = name.partition(":")
    try:
        return getattr(importlib.import_module(module), factory)(**kwargs)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"judge {name!r} cannot be imported as module:factory ({error})") from None


def score(
    sample: Sample, row: Mapping[str, Any], weights: RewardWeights, judge: Judge | None
) -> dict[str, Any]:
    """The reward of one chain as a flat dict: its parts, what `_shape` says, failure, null_verdict.

    Raises what the reward code raises; `scored` turns that into data.
    """
    extra = row["extra_info"]
    chosen, responses = int(row["reward_model"]["ground_truth"]), int(extra["n_responses"])
    text = (
        sample.text if sample.finished else ""
    )  # an unended chain is a format error whatever its text holds
    chain = parse_chain(text, responses)
    if extra.get("explicit") == NOTHING_SAID:
        judge = None  # no verdict is missing where there is nothing to judge by
    process = None if judge is None else (lambda _chain: judge(text, extra))
    reward = chain_reward(text, chosen, process=process, weights=weights, n_responses=responses)
    failure = chain.kind if isinstance(chain, ParseFailure) else None
    judged = failure is None and judge is not None
    return {
        "total": reward.total,
        "outcome": _or_null(reward.parts["outcome"]),
        "process": _or_null(reward.parts["process"]) if judged else None,
        "format": _or_null(reward.parts["format"]),
        "verified": reward.parts.get("verified"),
        **_shape(chain, chosen),
        "failure": failure if sample.finished else "length",
        "null_verdict": judged and math.isnan(reward.parts["process"]),
        "error": None,
    }


def _shape(chain: Chain | ParseFailure, chosen: int) -> dict[str, Any]:
    """What hardness and the signs of reward hacking are read from; null where there is no chain."""
    if isinstance(chain, ParseFailure):
        return dict.fromkeys(SHAPE)
    verified = chain.verified_scores
    return {
        "margin": _margin(chain.scores, chosen),
        "verified_margin": None if verified is None else _margin(verified, chosen),
        "spread": max(chain.scores) - min(chain.scores),
        "criteria": [name for name, _ in chain.criteria],
    }


def _margin(scores: Sequence[float], chosen: int) -> float:
    return scores[chosen] - max(score for i, score in enumerate(scores) if i != chosen)


def scored(
    sample: Sample, row: Mapping[str, Any], weights: RewardWeights, judge: Judge | None
) -> dict[str, Any]:
    """`score`, with an exception recorded instead of raised: reward code is a user's and must not end training."""
    try:
        return score(sample, row, weights, judge)
    except Exception as error:
        nothing = dict.fromkeys(("total", "outcome", "process", "format", "verified", *SHAPE, "failure"))
        return nothing | {"null_verdict": False, "error": f"{type(error).__name__}: {error}"[:300]}


def settle(
    samples: Sequence[Sample], row: Mapping[str, Any], weights: RewardWeights, null_policy: str
) -> None:
    """Turn the parts of a group into the scores that GRPO compares.

    A chain without a verdict is neither good nor bad: by default no sample of its group gets a process reward, with `group_mean` it
    gets the mean of those that have one, with `stop` the trainer ends the run after this step.
    """
    if any(sample.info["null_verdict"] for sample in samples):
        for sample, process in zip(samples, _stand_ins(samples, null_policy), strict=True):
            if sample.info["error"] is None:
                sample.info["total"] = scored(sample, row, weights, None)["total"] + weights.process * process
    totals = [sample.info["total"] for sample in samples if sample.info["total"] is not None]
    mean = sum(totals) / len(totals) if totals else 0.0
    for sample in samples:
        sample.score = mean if sample.info["total"] is None else sample.info["total"]


def _stand_ins(samples: Sequence[Sample], null_policy: str) -> list[float]:
    """The process score that counts for each sample of a group in which a verdict is missing."""
    known = [sample.info["process"] for sample in samples if sample.info["process"] is not None]
    if null_policy != "group_mean" or not known:
        return [0.0] * len(samples)
    mean = sum(known) / len(known)
    return [
        sample.info["process"] if sample.info["process"] is not None else mean * sample.info["null_verdict"]
        for sample in samples
    ]


def _or_null(value: float) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
