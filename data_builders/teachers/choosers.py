"""PersonaWorld's candidates for best of n, and references that choose among them.

Candidates are drawn without regard to the user: three of the five axes, the pole of each at random, and good
quality twice as often as bad.  So they do not hint at the user's criteria, and the exact choice is that of
the greatest expected utility given the votes:

    ideal        Σ_c p(c | H) · utility(c, r), with the posterior of `ideal` under training users' personas,
                 which is all that training can teach
    ideal, all personas   the same under all personas of the world: no chooser does better on average
    population   mean utility over the prototypes: the favourite of the population
    utility      the true one
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from data_builders.sources.personaworld import AXES, PersonaWorld, Response, read_response, utility
from data_builders.teachers.ideal import SEEN, UNSEEN, IdealReader
from data_builders.teachers.oracle import read_criteria
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import Example, HistoryItem, PreferencePair
from pgenrm_train.records.slates import Slate

AXES_PER_RESPONSE = 3
READERS = {"ideal": (SEEN,), "ideal, all personas": (SEEN, UNSEEN)}  # name → cohorts of the prior


def draw_slate(vote: PreferencePair, n: int, seed: int) -> Slate:
    """`n` different texts for the query of a vote; deterministic in (seed, vote)."""
    rng = random.Random(f"{seed}/{vote.pair_id}/candidates")
    texts: dict[str, None] = {}
    while len(texts) < n:
        axes = sorted(rng.sample(range(len(AXES)), AXES_PER_RESPONSE))
        poles = tuple(rng.choice(AXES[axis]) for axis in axes)
        texts[Response(poles, rng.choice(("good", "good", "bad"))).render(rng)] = None
    return Slate(replace(vote, chosen="", rejected=""), tuple(texts))


def references(
    slate: Slate,
    history: Sequence[HistoryItem],
    readers: Mapping[str, IdealReader],
    world: PersonaWorld,
) -> dict[str, np.ndarray]:
    """`utility`, `population` and the expectation of each reader for every response, each float (n,)."""
    prompt = slate.prompt
    stated = read_criteria(prompt.explicit)
    responses = [response for text in slate.responses if (response := read_response(text)) is not None]
    if stated is None or len(responses) < len(slate.responses):
        raise DataError(f"pair {prompt.pair_id}: expected a vote of PersonaWorld, with stated criteria")
    scenario, criteria = stated
    example = Example(prompt.pair_id, prompt.user_id, prompt.context, slate.responses, -1, tuple(history))
    posteriors = {name: reader.after_votes(example) for name, reader in readers.items()}
    return {
        "utility": np.array([utility(criteria, r) for r in responses]),
        "population": np.array([world.population_utility(scenario, r) for r in responses]),
        **{
            name: np.array([sum(p * utility(c, r) for c, p in posterior.items()) for r in responses])
            for name, posterior in posteriors.items()
        },
    }
