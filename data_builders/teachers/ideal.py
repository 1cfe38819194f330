"""Ideal readers of PersonaWorld: what could be learnt from the masked prompt, exactly.

A reader knows the generator and not the user.  With the history H, the asked scenario s and the two responses
{a, b}, the posterior of the user's criteria c for s is

    p(c | H, {a, b}) ∝ prior(c) · L(c, H_s) · Σ_kind [p(a ≻ b | c, s, kind) + p(b ≻ a | c, s, kind)]
    prior(c) = Σ_{cohort, prototype} p(c | cohort, prototype, s) · Π_{t ≠ s} E_t
    E_t = Σ_d p(d | cohort, prototype, t) · L(d, H_t)
    L(c, H_s) = Π_{v ∈ H_s} p(v | c, s, medium)

where p(v | c, s, kind) is the generator's own probability of a vote, normalised per criteria, scenario and
kind.  It includes which attributes the responses talk of: half of them talk exactly of those that the user
cares for.

Readers, each the ceiling of something:

    ideal        P(a ≻ b | H, {a, b}): no reader of the prompt does better
    ideal_chain  the likeliest criteria with the true weights: the best single chain
    imitator     criteria drawn from the posterior, weights as the teacher draws them: the ceiling of PSI

The prior holds the personas of training users, which is all that training can teach, or all of the world.
"""

import functools
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from data_builders.sources.personaworld import (
    AXES,
    AXIS,
    KINDS,
    MARGIN,
    NOISE,
    PROTOTYPES,
    SCENARIOS,
    Criteria,
    PersonaWorld,
    Response,
    read_response,
    utility,
)
from data_builders.teachers.oracle import PATTERN_SHARES, PATTERNS
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import Example

SEEN, UNSEEN = "seen_persona", "unseen_persona"
FLOOR = 1e-9  # of a vote's probability, so that label noise beyond the tables rules nothing out
TIE = 1e-9  # utilities closer than this are equal
_AXES = tuple(itertools.combinations(range(len(AXES)), 3))
_RESPONSES = tuple(
    Response(poles, quality)
    for axes in _AXES
    for poles in itertools.product(*(AXES[i] for i in axes))
    for quality in ("good", "bad")
)
_PER_AXES = 16  # responses that talk of the same three axes: 2³ poles × 2 qualities
_BLOCKS = [_RESPONSES[i : i + _PER_AXES] for i in range(0, len(_RESPONSES), _PER_AXES)]
_PLACES = {response: place for place, response in enumerate(_RESPONSES)}
_SCENARIO_OF = {topic: scenario for scenario, topics in SCENARIOS.items() for topic in topics}


@dataclass(frozen=True)
class Posterior:
    """Criteria of the asked scenario with their probabilities.

    `first_wins` is P(the first response is chosen).
    """

    criteria: Sequence[Criteria]
    probabilities: np.ndarray
    first_wins: float

    @property
    def likeliest(self) -> Criteria:
        return self.criteria[int(self.probabilities.argmax())]


class IdealReader:
    """The exact posterior under a prior over `cohorts` (equally likely) and prototypes.

    Raises DataError for an example that is not of PersonaWorld or has other than two responses.
    """

    def __init__(self, cohorts: Sequence[str] = (SEEN,)) -> None:
        self.cohorts = tuple(cohorts)

    def read(self, example: Example) -> Posterior:
        scenario, (first, second) = _scenario(example.query, example), _responses(example.responses, example)
        weights = self._after_votes(scenario, _votes(example))
        tables = _tables(scenario)
        forwards = tables.votes[:, :, _PLACES[first], _within(second)].sum(axis=1)
        backwards = tables.votes[:, :, _PLACES[second], _within(first)].sum(axis=1)
        asked = weights * (forwards + backwards + 2 * len(KINDS) * FLOOR)
        first_wins = float(weights @ (forwards + len(KINDS) * FLOOR) / asked.sum())
        return Posterior(tables.criteria, asked / asked.sum(), first_wins)

    def after_votes(self, example: Example) -> dict[Criteria, float]:
        """Posterior of the criteria given the votes alone, without the responses that are asked about."""
        scenario = _scenario(example.query, example)
        weights = self._after_votes(scenario, _votes(example))
        return dict(zip(_tables(scenario).criteria, (weights / weights.sum()).tolist(), strict=True))

    def _after_votes(self, scenario: str, votes: dict[str, list[tuple[Response, Response]]]) -> np.ndarray:
        """Weight of each criteria of the scenario after the votes, up to a factor."""
        likelihoods = {name: _likelihoods(name, own) for name, own in votes.items()}
        total = np.zeros(len(_tables(scenario).criteria))
        for cohort, prototype in itertools.product(self.cohorts, PROTOTYPES):
            elsewhere = math.prod(
                float(_prior(cohort, prototype, name) @ likelihood)
                for name, likelihood in likelihoods.items()
                if name != scenario
            )
            total += elsewhere * _prior(cohort, prototype, scenario)
        return total * likelihoods.get(scenario, 1.0)


@dataclass(frozen=True)
class Ideal:
    """Scores a response with the probability that the user chose it."""

    reader: IdealReader

    def score(self, example: Example) -> tuple[float, ...]:
        first = self.reader.read(example).first_wins
        return first, 1 - first


@dataclass(frozen=True)
class IdealChain:
    """Scores by the likeliest criteria with the true weights."""

    reader: IdealReader

    def score(self, example: Example) -> tuple[float, ...]:
        likeliest = self.reader.read(example).likeliest
        return tuple(round(utility(likeliest, r), 9) for r in _responses(example.responses, example))


@dataclass(frozen=True)
class Imitator:
    """Draws criteria from the posterior and weights as the teacher does.

    Deterministic in (seed, pair, order).
    """

    reader: IdealReader
    seed: int = 0

    def score(self, example: Example) -> tuple[float, ...]:
        posterior = self.reader.read(example)
        rng = random.Random(f"{self.seed}/{example.pair_id}/{example.responses[0]}")
        criteria = rng.choices(posterior.criteria, posterior.probabilities.tolist())[0]
        pattern = rng.choices(PATTERNS, PATTERN_SHARES)[0]
        return tuple(round(utility(criteria, r, *pattern), 9) for r in _responses(example.responses, example))

    def hit_probability(self, example: Example, chosen: int) -> float:
        """P(the chosen response scores strictly higher), exactly: over all criteria and weight patterns."""
        posterior = self.reader.read(example)
        responses = _responses(example.responses, example)
        totals = _tables(_scenario(example.query, example)).totals
        gaps = totals[:, :, _PLACES[responses[chosen]]] - totals[:, :, _PLACES[responses[1 - chosen]]]
        return float(np.array(PATTERN_SHARES) @ (gaps > TIE) @ posterior.probabilities)


@dataclass(frozen=True)
class _Tables:
    """Everything that a scenario fixes.

    votes[c, k, i, j]: probability that under criteria c and kind k response i is chosen over response j of
    those about the same axes.
    totals[p, c, i]: weighted sum of response i under criteria c and the teacher's weight pattern p.
    """

    criteria: tuple[Criteria, ...]
    votes: np.ndarray
    totals: np.ndarray


_world = functools.cache(PersonaWorld)


@functools.cache
def _tables(scenario: str) -> _Tables:
    world = _world()
    variants = (
        world.variants(prototype, scenario, held_out=held_out)
        for prototype in PROTOTYPES
        for held_out in (False, True)
    )
    criteria = tuple(dict.fromkeys(itertools.chain.from_iterable(variants)))
    utilities = np.array([[utility(c, r) for r in _RESPONSES] for c in criteria])
    by_axes = utilities.reshape(len(criteria), len(_AXES), _PER_AXES)
    gaps = by_axes[:, :, :, None] - by_axes[:, :, None, :]  # criteria × axes × chosen × rejected
    wins = ndtr(gaps / NOISE) * (abs(gaps) >= MARGIN)
    talk = np.array([[_talks_of(c, axes) for axes in _AXES] for c in criteria])
    votes = np.empty((len(criteria), len(KINDS), len(_AXES), _PER_AXES, _PER_AXES))
    for number, kind in enumerate(KINDS):
        draws = _draws(kind)  # chosen × rejected, the same for all axes
        allowed = np.array(
            [[[world.allows(kind, scenario, a, b) for b in block] for a in block] for block in _BLOCKS]
        )
        weights = talk[:, :, None, None] * (draws + draws.T) * wins * allowed
        sums = weights.sum(axis=(1, 2, 3), keepdims=True)
        votes[:, number] = np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)
    totals = [[[utility(c, r, *pattern) for r in _RESPONSES] for c in criteria] for pattern in PATTERNS]
    places = (len(criteria), len(KINDS), len(_RESPONSES), _PER_AXES)
    return _Tables(criteria, votes.reshape(places), np.array(totals))


def _talks_of(criteria: Criteria, axes: tuple[int, ...]) -> float:
    """Probability that the responses talk of `axes`: half of the time exactly those cared for."""
    return {3: 0.5, 2: 0.5 / 6}.get(len({AXIS[pole] for pole in criteria} & set(axes)), 0.0)


def _draws(kind: str) -> np.ndarray:
    """P(first response, second response | axes, kind), before the vote, over 16 × 16 responses."""
    block = _BLOCKS[0]
    table = np.zeros((_PER_AXES, _PER_AXES))
    for (i, first), (j, second) in itertools.product(enumerate(block), enumerate(block)):
        differ = sum(x != y for x, y in zip(first.poles, second.poles, strict=True))
        poles = (differ == 1) / 3 if kind == "hard" else 1 / 8
        flipped = {"easy": 1.0, "rival": 0.6}.get(kind, 0.0)
        quality = flipped if first.quality != second.quality else 1.0 - flipped
        table[i, j] = (2 / 3 if first.quality == "good" else 1 / 3) / 8 * poles * quality
    return table


@functools.cache
def _prior(cohort: str, prototype: str, scenario: str) -> np.ndarray:
    """p(criteria | cohort, prototype, scenario): half of the seen personas follow the prototype."""
    criteria, prior = _tables(scenario).criteria, defaultdict[Criteria, float](float)
    variants = _world().variants(prototype, scenario, held_out=cohort == UNSEEN)
    follows = 0.5 if cohort == SEEN else 0.0
    for variant in variants:
        prior[variant] += (1 - follows) / len(variants)
    prior[_world().cells[prototype, scenario]] += follows
    return np.array([prior[c] for c in criteria])


def _likelihoods(scenario: str, votes: Sequence[tuple[Response, Response]]) -> np.ndarray:
    """L(c, votes) for each criteria of the scenario; every vote of a history is of kind medium."""
    medium = _tables(scenario).votes[:, KINDS.index("medium")]
    return np.prod([medium[:, _PLACES[c], _within(r)] + FLOOR for c, r in votes], axis=0)


def _within(response: Response) -> int:
    return _PLACES[response] % _PER_AXES


def _votes(example: Example) -> dict[str, list[tuple[Response, Response]]]:
    votes = defaultdict[str, list[tuple[Response, Response]]](list)
    for item in example.history:
        vote = _responses((item.chosen, item.rejected), example)
        votes[_scenario(item.query, example)].append(vote)
    return votes


def _responses(texts: Sequence[str], example: Example) -> tuple[Response, Response]:
    responses = [response for text in texts if (response := _read(text)) in _PLACES]
    same_axes = len({_PLACES[response] // _PER_AXES for response in responses}) == 1
    if len(responses) != 2 or len(texts) != 2 or not same_axes:
        raise _foreign(example)
    return responses[0], responses[1]


_read = functools.lru_cache(maxsize=100_000)(read_response)


def _scenario(query: str, example: Example) -> str:
    topic = query.rstrip("?").rpartition(" ")[2]
    if topic not in _SCENARIO_OF:
        raise _foreign(example)
    return _SCENARIO_OF[topic]


def _foreign(example: Example) -> DataError:
    return DataError(
        f"pair {example.pair_id}: the baselines ideal, ideal_chain and imitator read "
        "PersonaWorld's pairs only; leave them out of eval.baselines"
    )
