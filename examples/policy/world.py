"""PersonaWorld for a policy: users, their votes, the policy's prompts, the true utility of its answers."""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from data_builders.sources.personaworld import (
    AXES,
    QUERIES,
    SCENARIOS,
    Criteria,
    PersonaWorld,
    Response,
    read_response,
    utility,
)
from pgenrm_train.records.pairs import PreferencePair

COHORTS = ("seen_persona", "unseen_persona")  # in turn, as PersonaWorld's test users
Vote = dict[str, str]


@dataclass(frozen=True)
class Asker:
    """A user in a scenario: the true criteria, and the votes that the reward model may read."""

    user: str
    scenario: str
    criteria: Criteria
    votes: tuple[Vote, ...]

    @property
    def key(self) -> str:
        """Id of the votes in the service's store."""
        return f"{self.user}.{self.scenario}"

    def utility(self, answer: str) -> float | None:
        """True utility of an answer; None for a text outside PersonaWorld's language."""
        response = read_response(answer)
        return None if response is None else utility(self.criteria, response)

    @cached_property
    def popular(self) -> float:
        """Utility of the answer that the population likes best."""
        world, good = PersonaWorld(), [Response(poles, "good") for poles in _poles()]
        return utility(self.criteria, max(good, key=lambda r: world.population_utility(self.scenario, r)))


def _poles() -> Iterable[tuple[str, ...]]:
    return (poles for axes in itertools.combinations(AXES, 3) for poles in itertools.product(*axes))


def draw_askers(users: int, votes: int, seed: int) -> list[Asker]:
    """New users of PersonaWorld with `votes` votes in each scenario, all of the kind medium."""
    world, rng = PersonaWorld(), random.Random(f"{seed}/askers")
    askers = []
    for number in range(users):
        name = f"u{number:02d}"
        user = world.user(rng, name, COHORTS[number % 2])
        for scenario, criteria in user.criteria.items():
            drawn = []
            for _ in range(votes):
                chosen, rejected = world.draw_pair(rng, user, scenario, "medium")
                query = rng.choice(QUERIES).format(topic=rng.choice(SCENARIOS[scenario]))
                drawn.append({"query": query, "chosen": chosen.render(rng), "rejected": rejected.render(rng)})
            askers.append(Asker(name, scenario, criteria, tuple(drawn)))
    return askers


def histories(askers: Sequence[Asker], *, of_others: bool) -> dict[str, tuple[Vote, ...]]:
    """Votes by key; `of_others`: those of the next user in the same scenario, so no user has their own."""
    users = list(dict.fromkeys(asker.user for asker in askers))
    votes = {(asker.user, asker.scenario): asker.votes for asker in askers}
    following = dict(zip(users, users[1:] + users[:1], strict=True)) if of_others else {}
    return {asker.key: votes[following.get(asker.user, asker.user), asker.scenario] for asker in askers}


def split_queries(seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Queries by scenario for training and evaluation; one of three per topic is never trained on."""
    rng = random.Random(f"{seed}/queries")
    training: dict[str, list[str]] = {scenario: [] for scenario in SCENARIOS}
    evaluation: dict[str, list[str]] = {scenario: [] for scenario in SCENARIOS}
    for scenario, topics in SCENARIOS.items():
        for topic in topics:
            held_out, *others = rng.sample(QUERIES, len(QUERIES))
            evaluation[scenario].append(held_out.format(topic=topic))
            training[scenario] += [query.format(topic=topic) for query in others]
    return training, evaluation


def prompt_of(user: str, query: str) -> str:
    """The policy's prompt: who asks, and the question; never a vote or a criterion."""
    return f"For {user}: {query}"


def rows_of(askers: Sequence[Asker], queries: Mapping[str, Sequence[str]]) -> list[dict[str, object]]:
    """Rows of veRL's data: one per asker and query, with the fields that our client sends."""
    return [
        {
            "data_source": "personaworld",
            "prompt": [{"role": "user", "content": prompt_of(asker.user, query)}],
            # No reward reads it: veRL copies it into its dumps.
            "reward_model": {"style": "rule", "ground_truth": asker.key},
            "extra_info": {"index": index, "user_id": asker.key, "query": query},
        }
        for index, (asker, query) in enumerate(
            (asker, query) for asker in askers for query in queries[asker.scenario]
        )
    ]


def chats_of(
    votes: Iterable[PreferencePair], users: Sequence[str], seed: int
) -> list[dict[str, list[dict[str, str]]]]:
    """Chats that teach the language and no taste: both responses of each vote, for a random user."""
    rng = random.Random(f"{seed}/chats")
    return [
        {
            "messages": [
                {"role": "user", "content": prompt_of(rng.choice(users), vote.query)},
                {"role": "assistant", "content": text},
            ]
        }
        for vote in votes
        for text in (vote.chosen, vote.rejected)
    ]
