"""Scorers without a language model, run through the same harness: what a reward model must beat.

    random       a uniform number per (seed, pair, response)
    longer       characters of the response as it stands
    shorter      the same, negated
    user_length  longer or shorter, learnt per user from the training pairs and shrunk to the population
    majority     votes of the *other* users on the same two responses to the same context

Two more are given to `fit_baseline` from outside, as they need other rooms: `features`, and Bradley–Terry on sentence embeddings
(`bradley_terry`).

`majority` reads labels of the evaluated split (other people's): it is a reference for how much of a vote is shared taste, not a
competitor.  Where the source counts the other voters itself (`PreferencePair.others`), those counts are used, for they hold also
votes that are not in the data; elsewhere it counts the votes that it is given.

A baseline is fitted once and yields a `Scorer`, which is asked as any other function of an example (`scored.score_pairs`): the user's
history and everything else that a model may see is in the `Example`, the label is not.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pgenrm_train.errors import ConfigError
from pgenrm_train.records.pairs import ContentKey, Example, PreferencePair, content_key


class Scorer(Protocol):
    """Scores the responses of an example, in presentation order; higher is better, equal is a tie."""

    def score(self, example: Example) -> tuple[float, ...]: ...


class Baseline(Protocol):
    """What a registry entry builds (called with `seed=`): fitted on pairs, it gives a scorer.

    train_pairs: what a model may learn from.  all_pairs: every vote of the data set, the evaluated ones included.
    """

    def fit(self, train_pairs: Sequence[PreferencePair], all_pairs: Sequence[PreferencePair]) -> Scorer: ...


@dataclass(frozen=True)
class _Rule:
    """A scorer that learns nothing."""

    seed: int = 0

    def fit(self, train_pairs: Sequence[PreferencePair], all_pairs: Sequence[PreferencePair]) -> Scorer:
        return self

    def score(self, example: Example) -> tuple[float, ...]:
        raise NotImplementedError


class Random(_Rule):
    """Uniform in [0, 1) from a hash of seed, user, pair and text: independent of presentation order and of the other pairs."""

    def score(self, example: Example) -> tuple[float, ...]:
        return tuple(self._uniform(example, text) for text in example.responses)

    def _uniform(self, example: Example, text: str) -> float:
        key = repr((self.seed, example.user_id, example.pair_id, text)).encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:6]) / 2**48


class Longer(_Rule):
    """Prefers the response with more characters."""

    def score(self, example: Example) -> tuple[float, ...]:
        return tuple(float(len(text)) for text in example.responses)


class Shorter(_Rule):
    """Prefers the response with fewer characters."""

    def score(self, example: Example) -> tuple[float, ...]:
        return tuple(-float(len(text)) for text in example.responses)


@dataclass(frozen=True)
class UserLength:
    """Longer or shorter, by user.

    Each training pair of a user votes +1 (the longer response was chosen) or −1; the mean is shrunk to the population's mean as
    if the user had cast `prior` more average votes: (Σ votes + prior·μ) / (n + prior).  Its sign is the user's direction; an
    exact zero and a user without training pairs take the population's.  Without any training vote every score is a tie.
    """

    seed: int = 0
    prior: float = 5.0

    def fit(self, train_pairs: Sequence[PreferencePair], all_pairs: Sequence[PreferencePair]) -> Scorer:
        votes: dict[str, list[int]] = defaultdict(list)
        for pair in train_pairs:
            if gap := len(pair.chosen) - len(pair.rejected):
                votes[pair.user_id].append(1 if gap > 0 else -1)
        flat = [vote for own in votes.values() for vote in own]
        population = sum(flat) / len(flat) if flat else 0.0
        shrunk = {u: (sum(v) + self.prior * population) / (len(v) + self.prior) for u, v in votes.items()}
        return UserLengthScorer(
            _sign(population), {u: _sign(m) or _sign(population) for u, m in shrunk.items()}
        )


@dataclass(frozen=True)
class UserLengthScorer:
    """`direction` × characters; the direction is +1 (longer), −1 (shorter) or 0 (nothing known)."""

    population: int
    directions: Mapping[str, int]

    def score(self, example: Example) -> tuple[float, ...]:
        direction = self.directions.get(example.user_id, self.population)
        return tuple(float(direction * len(text)) for text in example.responses)


@dataclass(frozen=True)
class Majority:
    """Strict majority of the other users' votes on the same content; no vote, or as many each way, is a tie."""

    seed: int = 0

    def fit(self, train_pairs: Sequence[PreferencePair], all_pairs: Sequence[PreferencePair]) -> Scorer:
        votes: dict[ContentKey, Counter[tuple[str, str]]] = defaultdict(Counter)
        for pair in all_pairs:
            votes[content_key(pair.context, (pair.chosen, pair.rejected))][pair.user_id, pair.chosen] += 1
        counted = {
            (p.user_id, p.pair_id): {p.chosen: p.others[0], p.rejected: p.others[1]}
            for p in all_pairs
            if p.others
        }
        return MajorityScorer(votes, counted)


@dataclass(frozen=True)
class MajorityScorer:
    """A response scores the number of votes for it by users other than the example's.

    votes: content → (user, text) → n.  counted: (user, pair_id) → text → n, as the source says; goes before `votes`.
    """

    votes: Mapping[ContentKey, Mapping[tuple[str, str], int]] = field(repr=False)
    counted: Mapping[tuple[str, str], Mapping[str, int]] = field(default_factory=dict, repr=False)

    def score(self, example: Example) -> tuple[float, ...]:
        known = self.counted.get((example.user_id, example.pair_id), {})
        if known.keys() >= set(example.responses):
            return tuple(float(known[text]) for text in example.responses)
        cast = self.votes.get(content_key(example.context, example.responses), {})
        others: Counter[str] = Counter()
        for (user, text), n in cast.items():
            if user != example.user_id:
                others[text] += n
        return tuple(float(others[text]) for text in example.responses)


BASELINES: dict[str, Callable[..., Baseline]] = {
    "random": Random,
    "longer": Longer,
    "shorter": Shorter,
    "user_length": UserLength,
    "majority": Majority,
}


def fit_baseline(
    name: str,
    train_pairs: Sequence[PreferencePair],
    all_pairs: Sequence[PreferencePair],
    *,
    seed: int = 0,
    more: Mapping[str, Callable[..., Baseline]] | None = None,
) -> Scorer:
    """Build and fit the baseline called `name`; `more` adds scorers that this room does not know (a recipe's).

    Raises ConfigError for a name in neither.  Only `random` depends on `seed`.
    """
    registry = {**BASELINES, **(more or {})}
    if name not in registry:
        raise ConfigError(
            f"model.name={name!r} is no baseline; expected one of {', '.join(sorted(registry))}"
        )
    return registry[name](seed=seed).fit(train_pairs, all_pairs)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
