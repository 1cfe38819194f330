"""Hard negatives beyond a random draw of the given pairs; each is based on its own user's votes or ratings.

    cross_user_flip  a given pair whose user went against the others: the strict majority of the other users
                     who voted on the same two responses to the same context prefers the rejected one
    prototype_flip   as cross_user_flip, with the voters of one other prototype of users instead of all others
    near_tie         two answers to the same context that this user rated, unequally but too close for the
                     data builder to make a pair of them (N-way data such as PRISM); the higher rated one is
                     chosen

No label is invented.  Only training pairs count, as sources and as votes, so no held-out vote shows.  Near
ties join neighbours in a user's order of ratings: they are linear in number, and no rating lies between the
two.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from types import MappingProxyType

from pgenrm_train.curriculum.hardness import Votes, key_of
from pgenrm_train.records.pairs import ContentKey, Message, PreferencePair

Place = tuple[str, str, tuple[Message, ...]]  # user, conversation, context
FLIP, PROTOTYPE_FLIP, NEAR_TIE, GIVEN = "cross_user_flip", "prototype_flip", "near_tie", "given"


@dataclass(frozen=True, slots=True)
class HardNegative:
    """A pair to train on and where it comes from."""

    pair: PreferencePair
    origin: str


def hard_negatives(
    pairs: Sequence[PreferencePair], *, near: float, prototype_of: Mapping[str, int] = MappingProxyType({})
) -> list[HardNegative]:
    """All hard negatives of the training pairs among `pairs`, near ties first.

    `pairs`: every pair of the data; the others only exclude held-out questions.  `near`: rating gap below
    which two answers are a near tie.  `prototype_of`: user → prototype, of the users that have one.
    """
    train = [pair for pair in pairs if pair.trains]
    votes = Votes(train)
    camps = {
        prototype: Votes(pair for pair in train if prototype_of.get(pair.user_id) == prototype)
        for prototype in set(prototype_of.values())
    }
    negatives = [HardNegative(pair, NEAR_TIE) for pair in near_ties(pairs, near)]
    for pair in train:
        prototype = prototype_of.get(pair.user_id)
        if _against(pair, votes):
            negatives.append(HardNegative(pair, FLIP))
        elif prototype is not None and any(
            _against(pair, camp) for other, camp in camps.items() if other != prototype
        ):
            negatives.append(HardNegative(pair, PROTOTYPE_FLIP))
    return negatives


def _against(pair: PreferencePair, votes: Votes) -> bool:
    agree, disagree = votes.others(pair)
    return disagree > agree


def near_ties(pairs: Sequence[PreferencePair], near: float) -> list[PreferencePair]:
    """New pairs of neighbouring ratings of one user and context, less than `near` apart and not equal."""
    given: set[tuple[str, ContentKey]] = {(pair.user_id, key_of(pair)) for pair in pairs}
    ties = []
    for source, rated in _rated(pair for pair in pairs if pair.trains):
        for (low, worse), (high, better) in pairwise(sorted((score, text) for text, score in rated.items())):
            tie = replace(source, chosen=better, rejected=worse, chosen_score=high, rejected_score=low)
            if 0 < high - low < near and (tie.user_id, key_of(tie)) not in given:
                ties.append(replace(tie, pair_id=_name(tie)))
    return ties


def _rated(pairs: Iterable[PreferencePair]) -> list[tuple[PreferencePair, dict[str, float]]]:
    """Per user and context, one of its pairs and text → rating; a text with two ratings is left out."""
    sources: dict[Place, PreferencePair] = {}
    ratings: dict[Place, dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
    for pair in pairs:
        place = (pair.user_id, pair.conversation_id, pair.context)
        sources.setdefault(place, pair)
        for text, score in ((pair.chosen, pair.chosen_score), (pair.rejected, pair.rejected_score)):
            if score is not None:
                ratings[place][text].add(score)
    return [
        (sources[place], {text: min(scores) for text, scores in texts.items() if len(scores) == 1})
        for place, texts in ratings.items()
    ]


def _name(pair: PreferencePair) -> str:
    content = repr((pair.user_id, pair.conversation_id, pair.context, pair.chosen, pair.rejected))
    return f"near-tie-{sha256(content.encode()).hexdigest()[:16]}"
