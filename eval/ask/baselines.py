"""Baselines without a language model, run through the same harness: a reward model must beat them.

    random       a uniform number per (seed, pair, response)
    longer       characters of the response, unchanged
    shorter      the same, negated
    user_length  longer or shorter, learnt per user from the training pairs and shrunk to the population
    majority     votes of the *other* users on the same two responses to the same context

A recipe passes two more to `fit_baseline`, because they need other packages: `features`, and Bradley–Terry on
sentence embeddings (`bradley_terry`).

`majority` reads labels of the evaluated split (other people's).  It is a reference for how much of a vote is
shared taste, not a competitor.  If the source counts the other voters itself (`PreferencePair.others`), those
counts are used, because they include votes that are not in the data.  Otherwise it counts the given votes.

A baseline is fitted once and yields a function of an example (`scored.score_pairs`).  The user's history and
everything else that a model may see is in the `Example`; the label is not.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from eval.ask.scored import Score
from pgenrm_train.errors import ConfigError
from pgenrm_train.records.pairs import ContentKey, Example, PreferencePair, content_key

Votes = Sequence[PreferencePair]
# (training pairs, every pair of the data set with the evaluated ones, seed) → a fitted baseline
Fit = Callable[[Votes, Votes, int], Score]
PRIOR = 5.0  # average votes that a user's direction starts with, for `user_length`


def uniform(example: Example, seed: int) -> Sequence[float]:
    """Uniform in [0, 1) from a hash of seed, user, pair and text: independent of order and other pairs."""
    keys = (repr((seed, example.user_id, example.pair_id, text)).encode() for text in example.responses)
    return [int.from_bytes(hashlib.sha256(key).digest()[:6]) / 2**48 for key in keys]


def length(example: Example, direction: float = 1.0) -> Sequence[float]:
    """`direction` × characters per response."""
    return [direction * len(text) for text in example.responses]


def fit_user_length(train_pairs: Votes, _all: Votes, _seed: int) -> Score:
    """Longer or shorter, by user.

    Each training pair of a user votes +1 (the longer response was chosen) or −1.  The mean is shrunk to the
    population's mean, as if the user had cast `PRIOR` more average votes: (Σ votes + PRIOR·μ) / (n + PRIOR).
    Its sign is the user's direction.  An exact zero, or a user without training pairs, takes the
    population's.  Without any training vote every score is a tie.
    """
    votes: dict[str, list[int]] = defaultdict(list)
    for pair in train_pairs:
        if gap := len(pair.chosen) - len(pair.rejected):
            votes[pair.user_id].append(_sign(gap))
    flat = [vote for of_user in votes.values() for vote in of_user]
    mean = sum(flat) / len(flat) if flat else 0.0
    shrunk = {user: (sum(v) + PRIOR * mean) / (len(v) + PRIOR) for user, v in votes.items()}
    return lambda example: length(example, _sign(shrunk.get(example.user_id, 0.0)) or _sign(mean))


def fit_majority(_train: Votes, all_pairs: Votes, _seed: int) -> Score:
    """Score a response by the number of other users' votes for it on the same content."""
    votes: dict[ContentKey, Counter[tuple[str, str]]] = defaultdict(Counter)
    for pair in all_pairs:
        votes[content_key(pair.context, (pair.chosen, pair.rejected))][pair.user_id, pair.chosen] += 1
    by_source = {
        (p.user_id, p.pair_id): {p.chosen: p.others[0], p.rejected: p.others[1]}
        for p in all_pairs
        if p.others
    }

    def score(example: Example) -> Sequence[float]:
        others: Mapping[str, int] = by_source.get((example.user_id, example.pair_id), {})
        if not others.keys() >= set(example.responses):
            others = Counter()
            for (user, text), n in votes.get(content_key(example.context, example.responses), {}).items():
                others[text] += n * (user != example.user_id)
        return [float(others[text]) for text in example.responses]

    return score


BASELINES: dict[str, Fit] = {
    "random": lambda _train, _all, seed: partial(uniform, seed=seed),
    "longer": lambda _train, _all, _seed: length,
    "shorter": lambda _train, _all, _seed: partial(length, direction=-1.0),
    "user_length": fit_user_length,
    "majority": fit_majority,
}


def fit_baseline(
    name: str, train_pairs: Votes, all_pairs: Votes, *, seed: int = 0, more: Mapping[str, Fit] | None = None
) -> Score:
    """Fit the baseline called `name`; `more` adds a recipe's baselines.

    Raises ConfigError for a name in neither.  Only `random` depends on `seed`.
    """
    registry = {**BASELINES, **(more or {})}
    if name not in registry:
        raise ConfigError(
            f"model.name={name!r} is no baseline; expected one of {', '.join(sorted(registry))}"
        )
    return registry[name](train_pairs, all_pairs, seed)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
