"""PersonaWorld: users with known preferences, texts in which they must be read, and an oracle that knows the truth.

Why it exists: a reward model can only be shown to be *personal* where the truth about each person is known.  The world is small
enough for a 400k-parameter model on two CPU cores and keeps what makes the real problem hard:

- a user comes from a latent **prototype** and varies individually; what they care for **changes with the scenario**;
- a **response** is a few short sentences; its attributes (formal, cautious, …) are never named, they must be read;
- **explicit criteria** exist ("For work I want formal above all, …") and can be masked;
- votes carry **label noise**; pairs come in **kinds**: `easy` (the chosen one is also of better quality), `medium` (several
  attributes differ at equal quality), `hard` (exactly one cared-for attribute differs at equal quality), `rival` (the population
  prefers the rejected one, which may even be of better quality);
- a share of **personas** (scenario × criteria combinations) is never given to a training user: `cohort` tells test users of
  seen personas from those of unseen ones;
- a test pair at equal quality is also put to a user who prefers the *other* response, so that half of such votes are unlearnable
  from the texts alone.

Utility of a response for a user (our choice): +w for each cared-for attribute it has, −w for each whose opposite it has, weights
.45/.30/.15 by rank, ±.10 for quality; the vote is the sign of the difference plus Gaussian noise.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgenrm_train.config import DataConfig
from pgenrm_train.records.pairs import ExplicitSignals, Message, PreferencePair

SCENARIOS = {
    "work": ("budget", "report", "meeting", "contract", "deadline", "slides"),
    "leisure": ("trip", "garden", "party", "guitar", "movie", "picnic"),
    "health": ("knee", "sleep", "diet", "headache", "allergy", "workout"),
}
QUERIES = ("Fix my {topic}?", "Plan my {topic}?", "Explain my {topic}?")
AXES = (
    ("formal", "casual"),
    ("cautious", "direct"),
    ("factual", "anecdotal"),
    ("listed", "flowing"),
    ("warm", "brisk"),
)
PHRASES = {
    "formal": ("Dear reader.", "Kindly note.", "Respectfully yours."),
    "casual": ("Hey there.", "Yo friend.", "No worries."),
    "cautious": ("Check first.", "Move slowly.", "Mind risks."),
    "direct": ("Just start.", "Act now.", "Go ahead."),
    "factual": ("Studies agree.", "Figures show.", "Tests confirm."),
    "anecdotal": ("Grandma did.", "Neighbours tried.", "Uncle knew."),
    "listed": ("Step one.", "Point A.", "Item two."),
    "flowing": ("It flows.", "It unfolds.", "Onward then."),
    "warm": ("Poor you.", "Take heart.", "Stay strong."),
    "brisk": ("Noted.", "Next.", "Done."),
    "good": ("Well researched.", "Fully correct.", "Quite right."),
    "bad": ("Partly wrong.", "Off topic.", "Rather muddled."),
}
ATTRIBUTE_OF = {phrase: attribute for attribute, phrases in PHRASES.items() for phrase in phrases}
POLES = tuple(pole for axis in AXES for pole in axis)
OPPOSITE = {a: b for x, y in AXES for a, b in ((x, y), (y, x))}
AXIS = {pole: i for i, axis in enumerate(AXES) for pole in axis}
PROTOTYPES = ("analyst", "mentor", "planner", "buddy")
WEIGHTS = (0.45, 0.30, 0.15)  # of the cared-for attributes, by rank
QUALITY_WEIGHT = 0.10
NOISE = 0.05  # standard deviation of the label noise, in units of utility
MARGIN = 0.15  # least difference of utilities put to a vote
KINDS = ("easy", "medium", "hard", "rival")
HISTORY_PER_SCENARIO = 2
HELD_OUT_SHARE = 0.3  # of the individual variants of a cell
# Chosen so that prototypes differ much within each scenario, every attribute is cared for, and every cell has held-out variants.
WORLD_SEED, HELD_OUT_SALT = 91, 9

Criteria = tuple[str, ...]  # three poles, most important first


@dataclass(frozen=True, slots=True)
class Response:
    """Attributes in reading order (one pole an axis) and quality `good` | `bad`."""

    poles: tuple[str, ...]
    quality: str

    def render(self, rng: random.Random) -> str:
        return " ".join(rng.choice(PHRASES[a]) for a in (*self.poles, self.quality))


def read_response(text: str) -> Response | None:
    """The attributes of a rendered response, read back from its sentences; None for a text that is not of this world."""
    found: list[str] = []
    rest = text.strip()
    while rest:
        phrase = next((p for p in ATTRIBUTE_OF if rest.startswith(p)), None)
        if phrase is None:
            return None
        found.append(ATTRIBUTE_OF[phrase])
        rest = rest[len(phrase) :].lstrip()
    if not found or found[-1] not in ("good", "bad"):
        return None
    return Response(tuple(found[:-1]), found[-1])


@dataclass(frozen=True, slots=True)
class User:
    user_id: str
    prototype: str
    criteria: dict[str, Criteria]  # by scenario
    cohort: str

    def explicit(self, scenario: str) -> ExplicitSignals:
        first, second, third = self.criteria[scenario]
        return ExplicitSignals(
            criteria=f"For {scenario} I want {first} above all, then {second}, then {third}.",
            self_description=f"People call me a {self.prototype}.",
        )


def utility(
    criteria: Criteria,
    response: Response,
    weights: Sequence[float] = WEIGHTS,
    quality_weight: float = QUALITY_WEIGHT,
) -> float:
    """Utility of a response for a user; other weights give what a chain with those weights would total."""
    total = quality_weight if response.quality == "good" else -quality_weight
    for pole, weight in zip(criteria, weights):
        total += weight * ((pole in response.poles) - (OPPOSITE[pole] in response.poles))
    return total


class PersonaWorld:
    """The latent cells (prototype × scenario → criteria) and everything drawn from them; deterministic in `seed`."""

    def __init__(self, seed: int = WORLD_SEED) -> None:
        rng = random.Random(seed)
        self._population: dict[tuple[str, Response], float] = {}  # responses are few, draws are many
        self.cells: dict[tuple[str, str], Criteria] = {}
        for prototype in PROTOTYPES:
            base = [rng.choice(axis) for axis in AXES]
            for scenario in SCENARIOS:
                adapted = [pole if rng.random() > 0.3 else OPPOSITE[pole] for pole in base]
                self.cells[prototype, scenario] = tuple(rng.sample(adapted, 3))

    def variants(self, prototype: str, scenario: str, *, held_out: bool) -> list[Criteria]:
        """The cell itself (never held out) and its individual variants: the second or third criterion is another."""
        cell = self.cells[prototype, scenario]
        found = [] if held_out else [cell]
        for position in (1, 2):
            for pole in POLES:
                if (
                    AXIS[pole] in {AXIS[p] for i, p in enumerate(cell) if i != position}
                    or pole == cell[position]
                ):
                    continue
                variant = (*cell[:position], pole, *cell[position + 1 :])
                if self._is_held_out(scenario, variant) == held_out:
                    found.append(variant)
        return found

    def _is_held_out(self, scenario: str, criteria: Criteria) -> bool:
        if criteria in (self.cells[p, scenario] for p in PROTOTYPES):
            return False
        digest = hashlib.sha256(" ".join((str(HELD_OUT_SALT), scenario, *criteria)).encode()).digest()
        return digest[0] < 256 * HELD_OUT_SHARE

    def user(self, rng: random.Random, user_id: str, cohort: str) -> User:
        """A user of the cohort: half of the scenarios of a seen persona follow the prototype, all of an unseen one vary."""
        prototype = rng.choice(PROTOTYPES)
        criteria = {}
        for scenario in SCENARIOS:
            choices = self.variants(prototype, scenario, held_out=cohort == "unseen_persona")
            follows = cohort == "seen_persona" and rng.random() < 0.5
            criteria[scenario] = self.cells[prototype, scenario] if follows else rng.choice(choices)
        return User(user_id, prototype, criteria, cohort)

    def population_utility(self, scenario: str, response: Response) -> float:
        if (key := (scenario, response)) not in self._population:
            self._population[key] = sum(utility(self.cells[p, scenario], response) for p in PROTOTYPES) / len(
                PROTOTYPES
            )
        return self._population[key]

    def kind_of(self, scenario: str, chosen: Response, rejected: Response) -> str:
        popular_loses = (
            self.population_utility(scenario, chosen) < self.population_utility(scenario, rejected) - 0.05
        )
        if chosen.quality == rejected.quality:
            if sum(a != b for a, b in zip(chosen.poles, rejected.poles)) == 1:
                return "hard"
            return "rival" if popular_loses else "medium"
        return "rival" if popular_loses and rejected.quality == "good" else "easy"

    def draw_pair(
        self, rng: random.Random, user: User, scenario: str, kind: str
    ) -> tuple[Response, Response]:
        """A (chosen, rejected) pair of the wanted kind, by rejection; the vote carries label noise."""
        criteria = user.criteria[scenario]
        while True:
            first, second = self._draw_responses(rng, criteria, kind)
            gap = utility(criteria, first) - utility(criteria, second)
            if abs(gap) < MARGIN:
                continue
            chosen, rejected = (first, second) if gap + rng.gauss(0, NOISE) > 0 else (second, first)
            if self.kind_of(scenario, chosen, rejected) == kind and not (
                kind == "easy" and chosen.quality == "bad"
            ):
                return chosen, rejected

    def _draw_responses(self, rng: random.Random, criteria: Criteria, kind: str) -> tuple[Response, Response]:
        axes = sorted(AXIS[p] for p in criteria)
        if rng.random() < 0.5:  # else exactly the cared-for attributes are talked of
            axes = sorted([*rng.sample(axes, 2), rng.choice([i for i in range(len(AXES)) if i not in axes])])
        first = [rng.choice(AXES[i]) for i in axes]
        second = [rng.choice(AXES[i]) for i in axes]
        if kind == "hard":
            second = list(first)
            flip = rng.randrange(len(axes))
            second[flip] = OPPOSITE[first[flip]]
        quality = rng.choice(("good", "good", "bad"))
        other = (
            {"good": "bad", "bad": "good"}[quality]
            if kind == "easy" or (kind == "rival" and rng.random() < 0.6)
            else quality
        )
        return Response(tuple(first), quality), Response(tuple(second), other)


def build(data: DataConfig, seed: int, left_out: object = None) -> Iterator[PreferencePair]:
    """Stream the votes of all users: training users, then validation users, then held-out test users with their twins.

    Nothing is ever left out.
    """
    world = PersonaWorld()
    rng = random.Random(seed)
    queries = max(1, data.pairs_per_user - HISTORY_PER_SCENARIO * len(SCENARIOS))
    for i in range(data.users):
        yield from _votes(world, rng, world.user(rng, f"train-{i:05d}", "seen_persona"), "train", queries)
    for i in range(max(2, data.heldout_users // 4)):
        cohort = ("seen_persona", "unseen_persona")[i % 2]
        yield from _votes(world, rng, world.user(rng, f"val-{i:04d}", cohort), "val", queries)
    test_users = [
        world.user(rng, f"test-{i:04d}", ("seen_persona", "unseen_persona")[i % 2])
        for i in range(max(2, data.heldout_users))
    ]
    for user in test_users:
        for pair in _votes(world, rng, user, "test", queries):
            yield pair
            if pair.split == "test" and (twin := _twin(world, rng, pair, user, test_users)):
                yield twin


def _votes(
    world: PersonaWorld, rng: random.Random, user: User, split: str, queries: int
) -> Iterator[PreferencePair]:
    """A user's history part (always `train` within the user, medium pairs) and query part (`split`, all kinds in turn)."""
    scenarios = list(SCENARIOS)
    for n in range(HISTORY_PER_SCENARIO * len(scenarios)):
        yield _vote(world, rng, user, scenarios[n % len(scenarios)], "medium", "train", split, f"h{n}")
    start = rng.randrange(len(KINDS))
    for n in range(queries):
        scenario = scenarios[(n + start) % len(scenarios)]
        yield _vote(world, rng, user, scenario, KINDS[(n + start) % len(KINDS)], split, split, f"q{n}")


def _vote(
    world: PersonaWorld,
    rng: random.Random,
    user: User,
    scenario: str,
    kind: str,
    split: str,
    user_split: str,
    tag: str,
) -> PreferencePair:
    chosen, rejected = world.draw_pair(rng, user, scenario, kind)
    query = rng.choice(QUERIES).format(topic=rng.choice(SCENARIOS[scenario]))
    return _pair(
        user,
        scenario,
        query,
        chosen.render(rng),
        rejected.render(rng),
        kind,
        split,
        user_split,
        f"{user.user_id}-{tag}",
    )


def _twin(
    world: PersonaWorld, rng: random.Random, pair: PreferencePair, user: User, users: list[User]
) -> PreferencePair | None:
    """The same question put to a user who prefers the other response; None when quality differs or nobody does."""
    chosen, rejected = read_response(pair.chosen), read_response(pair.rejected)
    assert chosen is not None and rejected is not None and pair.scenario is not None
    if chosen.quality != rejected.quality:
        return None
    for other in rng.sample(users, min(50, len(users))):
        gap = utility(other.criteria[pair.scenario], rejected) - utility(
            other.criteria[pair.scenario], chosen
        )
        if other.user_id != user.user_id and other.cohort == user.cohort and gap >= MARGIN:
            kind = world.kind_of(pair.scenario, rejected, chosen)
            name = f"{pair.pair_id}-twin"
            return _pair(
                other,
                pair.scenario,
                pair.query,
                pair.rejected,
                pair.chosen,
                kind,
                "test",
                "test",
                name,
                pair.pair_id,
            )
    return None


def _pair(
    user: User, scenario: str, query: str, chosen: str, rejected: str, kind: str, split: str, user_split: str, pair_id: str,
    conversation_id: str | None = None,
) -> PreferencePair:  # fmt: skip
    return PreferencePair(
        pair_id=pair_id,
        user_id=user.user_id,
        context=(Message("user", query),),
        chosen=chosen,
        rejected=rejected,
        conversation_id=conversation_id or pair_id,
        kind=kind,
        scenario=scenario,
        split=split,
        user_split=user_split,
        cohort=user.cohort,
        explicit=user.explicit(scenario),
    )
