"""From a sampled chain to the reward that GRPO compares: score one chain, settle a group.  No veRL in here.

Failures are data.  A chain cut by the length limit has no end-of-sequence token and earns the format error.
A reward function that raises leaves its chain unscored: it is recorded by kind and takes the mean of its
group, so its advantage is zero.  A judge without a verdict is null, never 0: no chain of that group gets a
process reward, because GRPO compares within the group.
"""

import bisect
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pgenrm_train.backends.protocols import Judge
from pgenrm_train.chains.chain import ParseFailure
from pgenrm_train.chains.totals import first_total, read_chain
from pgenrm_train.config import EndpointConfig, Totals
from pgenrm_train.errors import ConfigError
from pgenrm_train.rewards.hacking_signs import Ranking, ranking_of
from pgenrm_train.rewards.reward import DEFAULT_WEIGHTS, RewardWeights, reward_of
from pgenrm_train.rewards.training_rows import GrpoRow, with_dropout, withheld_signals


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """A judge that every sampler builds for itself.

    `factory`: "module:function" of a `protocols.Judge`, called with `settings` and `cache` if there are
    settings, else without arguments.  `cache`: folder of its answers.  `in_flight`: chains judged at a time.
    """

    factory: str
    settings: EndpointConfig | None = None
    cache: Path | None = None
    in_flight: int = 64

    def share(self, samplers: int) -> "JudgeSpec":
        """Divide the rate limits by the samplers; divide budgets only without a shared cache."""
        if self.settings is None or samplers == 1:
            return self
        names = ["requests_per_minute", "tokens_per_minute"]
        names += [] if self.cache else ["max_dollars", "max_total_tokens"]
        shares = {
            name: limit / samplers for name in names if (limit := getattr(self.settings, name)) is not None
        }
        in_flight = max(1, self.in_flight // samplers)
        settings = replace(self.settings, **shares, max_in_flight=in_flight)
        return replace(self, settings=settings, in_flight=in_flight)

    def build(self) -> Judge:
        """The judge.  Raises ConfigError if `factory` cannot be imported."""
        module, _, name = self.factory.partition(":")
        arguments = () if self.settings is None else (self.settings, self.cache)
        try:
            return getattr(importlib.import_module(module), name)(*arguments)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"judge {self.factory!r} cannot be imported as module:factory ({error})"
            ) from None


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """How a phase scores chains; without a judge there is no process reward.

    `rubric_dropout`: share of the criteria that the judge does not see in a training step.
    """

    weights: RewardWeights = DEFAULT_WEIGHTS
    judge: JudgeSpec | None = None
    null_policy: str = "drop_process_for_group"
    totals: Totals = Totals.DECLARED
    rubric_dropout: float = 0.0

    def judged_row(self, row: GrpoRow, step: int) -> GrpoRow:
        """The row that the judge sees; mining and validation have step 0 and hide nothing."""
        return with_dropout(row, self.rubric_dropout, step) if self.rubric_dropout and step else row


@dataclass(frozen=True, slots=True)
class Sample:
    """One chain as the engine returned it.

    `finished` is false if the length limit cut it.  `cached_tokens`: tokens of the prompt that the engine had
    in its prefix cache.  `trained`: the number of tokens that bear loss, from the first; None for all.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    log_probs: list[float]
    text: str
    finished: bool
    weights_version: int
    trained: int | None = None
    cached_tokens: int = 0

    @property
    def loss_mask(self) -> list[int]:
        """1 per token that bears loss, else 0."""
        return [int(self.trained is None or place < self.trained) for place in range(len(self.token_ids))]

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / len(self.prompt_ids)


CUT = "length"  # failure of a chain that reached the limit of tokens


@dataclass(frozen=True, slots=True)
class ScoredChain:
    """The reward of one chain and its parts, None where there is no value.

    `unjudged` is the reward without the process part.  `failure` is the kind of format error, "length" for a
    chain that was cut.  `error` is what the reward code raised.  `cached_share`: share of the prompt that the
    engine had in its prefix cache.  `score` is what GRPO compares; `settle` sets it.  `text` is
    kept in a measurement, for the table of sample chains.
    """

    length: int
    total: float | None = None
    unjudged: float | None = None
    outcome: float | None = None
    process: float | None = None
    format: float | None = None
    verified: float | None = None
    ranking: Ranking | None = None
    failure: str | None = None
    null_verdict: bool = False
    error: str | None = None
    cached_share: float = 0.0
    score: float = 0.0
    text: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the chain ranks the chosen response first."""
        return bool(self.outcome)


_SCORED_CHAIN = TypeAdapter(ScoredChain)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """The chains of one prompt, its presentation order, and counts of the groups discarded before it."""

    chains: Sequence[ScoredChain]
    order: int = 0
    discarded_passes: int = 0
    discarded_chains: int = 0

    def evidence(self) -> tuple[int, int]:
        """(passes, chains) of all groups sampled; the kept group alone would be a selection."""
        passes = self.discarded_passes + sum(chain.passed for chain in self.chains)
        return passes, self.discarded_chains + len(self.chains)

    def to_extra_fields(self) -> list[dict[str, object]]:
        """veRL's `extra_fields` per chain."""
        shared: dict[str, object] = {
            "order": self.order,
            "discarded_passes": self.discarded_passes,
            "discarded_chains": self.discarded_chains,
        }
        return [shared | {"reward_extra_info": asdict(chain)} for chain in self.chains]

    @classmethod
    def from_extra_fields(cls, fields: Sequence[Mapping[str, Any]]) -> "ScoredGroup":
        """Inverse of `to_extra_fields`."""
        chains = [_SCORED_CHAIN.validate_python(chain["reward_extra_info"]) for chain in fields]
        return cls(
            chains, **{name: fields[0][name] for name in ("order", "discarded_passes", "discarded_chains")}
        )


def score(
    sample: Sample,
    row: GrpoRow,
    weights: RewardWeights,
    judge: Judge | None,
    totals: Totals = Totals.DECLARED,
) -> ScoredChain:
    """Score one chain; an exception is recorded, because a user's reward code must not end training."""
    try:
        return _score(sample, row, weights, judge, totals)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        return ScoredChain(len(sample.token_ids), error=reason, cached_share=sample.cached_share)


def _score(
    sample: Sample, row: GrpoRow, weights: RewardWeights, judge: Judge | None, totals: Totals
) -> ScoredChain:
    extra, chosen = row["extra_info"], int(row["reward_model"]["ground_truth"])
    # A chain without an end is a format error, whatever its text holds.
    text, chain = read_chain(sample.text if sample.finished else "", totals, extra["n_responses"])
    failure = chain.kind if isinstance(chain, ParseFailure) else None
    # Without withheld signals the judge is not called, so this is not a null verdict.
    if failure is not None or judge is None or not withheld_signals(extra):
        judge = None
    verdict = None if judge is None else judge(text, extra)
    reward = reward_of(chain, chosen, process=verdict, weights=weights)
    process = reward.parts["process"]
    return ScoredChain(
        length=len(sample.token_ids),
        total=reward.total,
        unjudged=reward_of(chain, chosen, weights=weights).total,
        outcome=reward.parts["outcome"],
        process=None if math.isnan(process) else process,
        format=reward.parts["format"],
        verified=reward.parts.get("verified"),
        ranking=ranking_of(chain, chosen),
        failure=failure if sample.finished else CUT,
        null_verdict=judge is not None and math.isnan(process),
        cached_share=sample.cached_share,
    )


def tokens_before_total(tokenizer: Any, tokens: Sequence[int], text: str) -> int:
    """Number of tokens before the first total that `text`, their decoding, states; all for an open chain."""
    place = first_total(text)
    if place is None:
        return len(tokens)
    # The first prefix of the tokens that reaches into the total, without its last token.
    longer = bisect.bisect_right(
        range(len(tokens) + 1),
        place,
        key=lambda n: len(tokenizer.decode(tokens[:n], skip_special_tokens=True)),
    )
    return max(0, longer - 1)


def settle(chains: Sequence[ScoredChain], spec: RewardSpec) -> list[ScoredChain]:
    """Give each chain of a group the score that GRPO compares.

    A chain without a verdict is neither good nor bad.  By default no chain of its group gets a process
    reward.  With `group_mean` it gets the mean of those that have one.  With `stop` the trainer ends the run
    after this step.
    """
    if any(chain.null_verdict for chain in chains):
        chains = [
            chain
            if chain.unjudged is None
            else replace(chain, total=chain.unjudged + spec.weights.process * process)
            for chain, process in zip(chains, _stand_ins(chains, spec.null_policy), strict=True)
        ]
    totals = [chain.total for chain in chains if chain.total is not None]
    mean = sum(totals) / len(totals) if totals else 0.0
    return [replace(chain, score=mean if chain.total is None else chain.total) for chain in chains]


def _stand_ins(chains: Sequence[ScoredChain], null_policy: str) -> list[float]:
    """The process score that counts for each chain of a group in which a verdict is missing."""
    verdicts = [chain.process for chain in chains if chain.process is not None]
    if null_policy != "group_mean" or not verdicts:
        return [0.0] * len(chains)
    mean = sum(verdicts) / len(verdicts)
    return [mean * chain.null_verdict if chain.process is None else chain.process for chain in chains]
