"""PersonaWorld: users with known preferences, and texts in which these must be read.

Why it exists: a reward model can only be proved *personal* if the truth about each person is known.  The
world is small enough for a 400k-parameter model on two CPU cores and keeps the difficulties of the real
problem:

- a user comes from a latent **prototype** and varies individually; their criteria **change with the
  scenario**;
- a **response** is a few short sentences; its attributes (formal, cautious, …) are never named, they must be
  read;
- **explicit criteria** exist ("For work I want formal above all, …") and can be masked;
- votes carry **label noise**; pairs come in **kinds**: `easy` (the chosen one is also of better quality),
  `medium` (several attributes differ at equal quality), `hard` (exactly one cared-for attribute differs at
  equal quality), `rival` (the population prefers the rejected one, which may even be of better quality);
- a share of **personas** (scenario × criteria combinations) is never given to a training user: `cohort`
  separates test users of seen personas from those of unseen ones;
- a test pair at equal quality is also voted on by a user who prefers the *other* response: half of such votes
  cannot be learnt from the texts alone.

Half of the responses talk exactly of the axes that the voting user cares for
(`PersonaWorld._draw_responses`).  So the texts hint at WHICH axes matter, never at which pole is preferred.

Utility of a response for a user (our choice): +w for each cared-for attribute it has, −w for each whose
opposite it has, weights .45/.30/.15 by rank, ±.10 for quality.  The vote is the sign of the difference plus
Gaussian noise.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
MARGIN = 0.15  # least difference of utilities in a vote
KINDS = ("easy", "medium", "hard", "rival")
HISTORY_PER_SCENARIO = 2
HELD_OUT_SHARE = 0.3  # of the individual variants of a cell
# Chosen so that prototypes differ much within each scenario, every attribute is in some cell, and every
# cell has held-out variants.
WORLD_SEED, HELD_OUT_SALT = 91, 9

Criteria = tuple[str, ...]  # three poles, most important first


@dataclass(frozen=True, slots=True)
class Response:
    """Attributes in reading order (one pole per axis) and quality `good` | `bad`."""

    poles: tuple[str, ...]
    quality: str

    def render(self, rng: random.Random) -> str:
        return " ".join(rng.choice(PHRASES[a]) for a in (*self.poles, self.quality))


def read_response(text: str) -> Response | None:
    """Attributes of a rendered response, read back from its sentences; None for a foreign text."""
    attributes: list[str] = []
    rest = text.strip()
    while phrase := next((p for p in ATTRIBUTE_OF if rest.startswith(p)), None):
        attributes.append(ATTRIBUTE_OF[phrase])
        rest = rest[len(phrase) :].lstrip()
    complete = not rest and attributes and attributes[-1] in ("good", "bad")
    return Response(tuple(attributes[:-1]), attributes[-1]) if complete else None


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
    """Utility of a response for a user; with the weights of a chain, that chain's total."""
    total = quality_weight if response.quality == "good" else -quality_weight
    for pole, weight in zip(criteria, weights):
        total += weight * ((pole in response.poles) - (OPPOSITE[pole] in response.poles))
    return total


class PersonaWorld:
    """Latent cells (prototype × scenario → criteria) and all draws from them; deterministic in `seed`."""

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
        """The cell itself (never held out) and its variants: another second or third criterion."""
        cell = self.cells[prototype, scenario]
        variants = [(*cell[:position], pole, *cell[position + 1 :]) for position in (1, 2) for pole in POLES]
        return ([] if held_out else [cell]) + [
            variant
            for variant in variants
            if variant != cell
            and len({AXIS[pole] for pole in variant}) == len(cell)
            and self._is_held_out(scenario, variant) == held_out
        ]

    def _is_held_out(self, scenario: str, criteria: Criteria) -> bool:
        digest = hashlib.sha256(" ".join((str(HELD_OUT_SALT), scenario, *criteria)).encode()).digest()
        cells = (self.cells[prototype, scenario] for prototype in PROTOTYPES)
        return criteria not in cells and digest[0] < 256 * HELD_OUT_SHARE

    def user(self, rng: random.Random, user_id: str, cohort: str) -> User:
        """A user of the cohort.

        Half of the scenarios of a seen persona follow the prototype; all of an unseen one vary.
        """
        prototype = rng.choice(PROTOTYPES)
        criteria = {}
        for scenario in SCENARIOS:
            choices = self.variants(prototype, scenario, held_out=cohort == "unseen_persona")
            follows = cohort == "seen_persona" and rng.random() < 0.5
            criteria[scenario] = self.cells[prototype, scenario] if follows else rng.choice(choices)
        return User(user_id, prototype, criteria, cohort)

    def population_utility(self, scenario: str, response: Response) -> float:
        """Mean utility over the prototypes."""
        if (key := (scenario, response)) not in self._population:
            total = sum(utility(self.cells[prototype, scenario], response) for prototype in PROTOTYPES)
            self._population[key] = total / len(PROTOTYPES)
        return self._population[key]

    def kind_of(self, scenario: str, chosen: Response, rejected: Response) -> str:
        equal = chosen.quality == rejected.quality
        if equal and sum(a != b for a, b in zip(chosen.poles, rejected.poles)) == 1:
            return "hard"
        popular = self.population_utility(scenario, rejected) - 0.05
        if self.population_utility(scenario, chosen) < popular and (equal or rejected.quality == "good"):
            return "rival"
        return "medium" if equal else "easy"

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
            if self.allows(kind, scenario, chosen, rejected):
                return chosen, rejected

    def allows(self, kind: str, scenario: str, chosen: Response, rejected: Response) -> bool:
        """True if a pair is of the kind; the chosen response of an easy pair is also good."""
        good = kind != "easy" or chosen.quality == "good"
        return good and self.kind_of(scenario, chosen, rejected) == kind

    def _draw_responses(self, rng: random.Random, criteria: Criteria, kind: str) -> tuple[Response, Response]:
        """Draw two responses about the same three axes; half of the time, exactly those of the criteria."""
        axes = sorted(AXIS[p] for p in criteria)
        if rng.random() < 0.5:
            axes = sorted([*rng.sample(axes, 2), rng.choice([i for i in range(len(AXES)) if i not in axes])])
        first = [rng.choice(AXES[i]) for i in axes]
        second = [rng.choice(AXES[i]) for i in axes]
        if kind == "hard":
            flip = rng.randrange(len(axes))
            second = [OPPOSITE[pole] if i == flip else pole for i, pole in enumerate(first)]
        quality = other = rng.choice(("good", "good", "bad"))
        if kind == "easy" or (kind == "rival" and rng.random() < 0.6):
            other = {"good": "bad", "bad": "good"}[quality]
        return Response(tuple(first), quality), Response(tuple(second), other)


def build(data: DataConfig, seed: int, left_out: object = None) -> Iterator[PreferencePair]:
    """Stream the votes of training users, validation users, and held-out test users with their twins.

    No row is ever left out.
    """
    world = PersonaWorld()
    rng = random.Random(seed)
    queries = max(1, data.pairs_per_user - HISTORY_PER_SCENARIO * len(SCENARIOS))
    for i in range(data.users):
        yield from _votes(world, rng, world.user(rng, f"train-{i:05d}", "seen_persona"), "train", queries)
    cohorts = ("seen_persona", "unseen_persona")
    for i in range(max(2, data.heldout_users // 4)):
        yield from _votes(world, rng, world.user(rng, f"val-{i:04d}", cohorts[i % 2]), "val", queries)
    test_users = [world.user(rng, f"test-{i:04d}", cohorts[i % 2]) for i in range(max(2, data.heldout_users))]
    for user in test_users:
        for pair in _votes(world, rng, user, "test", queries):
            yield pair
            if pair.split == "test" and (twin := _twin(world, rng, pair, user, test_users)):
                yield twin


def _votes(
    world: PersonaWorld, rng: random.Random, user: User, split: str, queries: int
) -> Iterator[PreferencePair]:
    """A user's history (medium pairs, always `train`) and queries (`split`, all kinds in turn)."""
    scenarios = list(SCENARIOS)
    for n in range(HISTORY_PER_SCENARIO * len(scenarios)):
        vote = _vote(world, rng, user, scenarios[n % len(scenarios)], "medium", f"h{n}")
        yield replace(vote, split="train", user_split=split)
    start = rng.randrange(len(KINDS))
    for n in range(start, start + queries):
        vote = _vote(world, rng, user, scenarios[n % len(scenarios)], KINDS[n % len(KINDS)], f"q{n - start}")
        yield replace(vote, split=split, user_split=split)


def _vote(
    world: PersonaWorld, rng: random.Random, user: User, scenario: str, kind: str, tag: str
) -> PreferencePair:
    chosen, rejected = world.draw_pair(rng, user, scenario, kind)
    query = rng.choice(QUERIES).format(topic=rng.choice(SCENARIOS[scenario]))
    pair_id = f"{user.user_id}-{tag}"
    return PreferencePair(
        pair_id=pair_id,
        user_id=user.user_id,
        context=(Message("user", query),),
        chosen=chosen.render(rng),
        rejected=rejected.render(rng),
        conversation_id=pair_id,
        kind=kind,
        scenario=scenario,
        cohort=user.cohort,
        explicit=user.explicit(scenario),
    )


def _twin(
    world: PersonaWorld, rng: random.Random, pair: PreferencePair, user: User, users: list[User]
) -> PreferencePair | None:
    """The same question with the vote of a user who prefers the other response.

    None if the qualities differ or no such user exists.
    """
    chosen, rejected, scenario = read_response(pair.chosen), read_response(pair.rejected), pair.scenario
    assert chosen is not None and rejected is not None and scenario is not None
    if chosen.quality != rejected.quality:
        return None
    for other in rng.sample(users, min(50, len(users))):
        criteria = other.criteria[scenario]
        gap = utility(criteria, rejected) - utility(criteria, chosen)
        if other.user_id != user.user_id and other.cohort == user.cohort and gap >= MARGIN:
            return replace(
                pair,
                pair_id=f"{pair.pair_id}-twin",
                user_id=other.user_id,
                chosen=pair.rejected,
                rejected=pair.chosen,
                conversation_id=pair.pair_id,
                kind=world.kind_of(scenario, rejected, chosen),
                explicit=other.explicit(scenario),
            )
    return None
