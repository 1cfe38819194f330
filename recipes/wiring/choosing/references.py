"""Candidates of best_of_n with their utility, and references that choose among them.

PersonaWorld draws candidates and knows the truth (`data_builders.teachers.choosers`).  Elsewhere the
candidates are the responses that a user rated for one prompt, in a random order, and the utility is the
rating.
"""

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from data_builders.sources.personaworld import PersonaWorld
from data_builders.teachers.choosers import READERS, draw_slate, references
from data_builders.teachers.ideal import IdealReader
from eval.ask.bradley_terry import BradleyTerry
from pgenrm_train.config import Config
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.writer import pairs_of_split
from pgenrm_train.records.pairs import Example, HistoryItem, Message, PreferencePair
from pgenrm_train.records.slates import Slate, slates_of, user_by_user
from recipes.wiring.models import make_embedder


@dataclass(frozen=True)
class Values:
    """Per slate `utility`, `population` and, where known, `ideal` of every response; and their meaning."""

    by_slate: Sequence[Mapping[str, np.ndarray]]
    utility: str
    population: str
    ideal: str


def candidates_of(config: Config, pairs: Sequence[PreferencePair]) -> list[Slate]:
    """The slates of `eval.split`.  Raises DataError if no prompt has enough rated responses."""
    settings, split = config.best_of_n, pairs_of_split(pairs, config.eval.split)
    limit = settings.prompts or None
    if config.data.name == "personaworld":
        queries = [Slate(pair, ()) for pair in split if pair.conversation_id == pair.pair_id]
        drawn = user_by_user(queries, limit)
        return [draw_slate(query.prompt, max(settings.sizes), config.seed) for query in drawn]
    rated = [slate for slate in slates_of(split) if all(value is not None for value in slate.values)]
    slates = [shuffled(slate, config.seed) for slate in rated if len(slate.responses) >= min(settings.sizes)]
    if not slates:
        raise DataError(
            f"eval.split={config.eval.split} of data={config.data.name} holds no prompt with "
            f"{min(settings.sizes)} rated responses; recipe=best_of_n needs chosen_score and rejected_score, "
            "rows of responses with ratings, or data=personaworld"
        )
    return user_by_user(slates, limit)


def shuffled(slate: Slate, seed: int) -> Slate:
    """The responses in a random order: as read, the best may come first."""
    order = list(range(len(slate.responses)))
    random.Random(f"{seed}/{slate.key}").shuffle(order)
    texts, values = slate.responses, slate.values
    return replace(slate, responses=tuple(texts[i] for i in order), values=tuple(values[i] for i in order))


def values_of(
    config: Config,
    slates: Sequence[Slate],
    histories: Mapping[str, tuple[HistoryItem, ...]],
    pairs: Sequence[PreferencePair],
) -> Values:
    """Utility and references of all slates."""
    if config.data.name == "personaworld":
        readers, world = {name: IdealReader(cohorts) for name, cohorts in READERS.items()}, PersonaWorld()
        known = [references(slate, histories[slate.key], readers, world) for slate in slates]
        return Values(
            known,
            "true utility of PersonaWorld",
            "mean utility over the prototypes",
            "greatest expected utility given the votes in the prompt, under training users' personas",
        )
    favourites, meaning = population_of(config, slates, pairs)
    ratings = [np.array([float(value or 0.0) for value in slate.values]) for slate in slates]
    by_slate = [{"utility": own, "population": all_} for own, all_ in zip(ratings, favourites, strict=True)]
    return Values(by_slate, "the user's rating", meaning, "unknown on these data; best is the bound")


def population_of(
    config: Config, slates: Sequence[Slate], pairs: Sequence[PreferencePair]
) -> tuple[list[np.ndarray], str]:
    """Other users' mean ratings if complete, else a Bradley–Terry model of all users."""
    ratings = ratings_of(pairs)
    others = [others_mean(slate, ratings) for slate in slates]
    if all(np.isfinite(means).all() for means in others):
        return others, "mean rating by the other users"
    scorer = BradleyTerry(make_embedder(config)).fit([pair for pair in pairs if pair.trains], pairs)
    examples = [
        Example(slate.key, slate.prompt.user_id, slate.prompt.context, slate.responses, -1)
        for slate in slates
    ]
    meaning = "Bradley–Terry on sentence embeddings, fitted on all training votes"
    return [np.array(scorer.score(example)) for example in examples], meaning


@dataclass
class Ratings:
    """Ratings of one response by user, and their exact sum."""

    by_user: dict[str, float] = field(default_factory=dict)
    total: Fraction = Fraction(0)

    def add(self, user: str, rating: float) -> None:
        """The last rating of a user counts."""
        self.total += Fraction(rating) - Fraction(self.by_user.get(user, 0.0))
        self.by_user[user] = rating

    def mean_without(self, user: str) -> float:
        """Mean rating by the other users, NaN without any."""
        count = len(self.by_user) - (user in self.by_user)
        total = self.total - Fraction(self.by_user.get(user, 0.0))
        return float(total / count) if count else math.nan


Rated = Mapping[tuple[tuple[Message, ...], str], Ratings]


def ratings_of(pairs: Sequence[PreferencePair]) -> Rated:
    """(context, response) → its ratings."""
    ratings: dict[tuple[tuple[Message, ...], str], Ratings] = defaultdict(Ratings)
    for pair in pairs:
        for text, score in ((pair.chosen, pair.chosen_score), (pair.rejected, pair.rejected_score)):
            if score is not None:
                ratings[pair.context, text].add(pair.user_id, score)
    return ratings


def others_mean(slate: Slate, ratings: Rated) -> np.ndarray:
    """Mean rating per response by other users, NaN without any."""
    own, unrated = slate.prompt.user_id, Ratings()
    of = [ratings.get((slate.prompt.context, text), unrated) for text in slate.responses]
    return np.array([response.mean_without(own) for response in of])
