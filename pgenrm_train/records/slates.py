"""Slates: several candidate responses to one prompt of one user, and the labels that scores give them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pgenrm_train.records.pairs import HistoryItem, PreferencePair

# Rule → the pairs (better, worse) of responses that are ordered best first.
RULES: Mapping[str, Callable[[Sequence[int]], list[tuple[int, int]]]] = {
    "best": lambda order: [(order[0], other) for other in order[1:]],
    "all": lambda order: list(combinations(order, 2)),
    "ends": lambda order: [(order[0], order[-1])],
}


@dataclass(frozen=True, slots=True)
class Slate:
    """Candidate responses to one prompt.

    `prompt` has user, context, statements and ids; its own two responses are empty.  `history` None: to be
    drawn from the user's votes.  `values`: the user's rating per response, None if unknown.
    """

    prompt: PreferencePair
    responses: tuple[str, ...]
    history: tuple[HistoryItem, ...] | None = None
    values: tuple[float | None, ...] = ()

    @property
    def key(self) -> str:
        """Name of the slate, unique in a data set."""
        return f"{self.prompt.user_id}/{self.prompt.pair_id}"

    def pair(self, first: int, second: int) -> PreferencePair:
        """Two of the responses as a pair for the harness; which one is `chosen` says nothing."""
        return replace(
            self.prompt,
            pair_id=f"{self.key}/{first}-{second}",
            chosen=self.responses[first],
            rejected=self.responses[second],
        )

    def prefers(self, first: int, second: int) -> bool | None:
        """Whether the user rated the first response higher; None for equal or unknown ratings."""
        if not self.values:
            return None
        one, other = self.values[first], self.values[second]
        return None if one is None or other is None or one == other else one > other


def slates_of(pairs: Iterable[PreferencePair]) -> list[Slate]:
    """The distinct responses that each user saw for a context, with their ratings where the pairs have them.

    A response keeps the first of its ratings.
    """
    groups: dict[tuple[object, ...], list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.user_id, pair.conversation_id, pair.turn, pair.context].append(pair)
    slates = []
    for votes in groups.values():
        ratings: dict[str, float | None] = {}
        for vote in votes:
            for text, score in ((vote.chosen, vote.chosen_score), (vote.rejected, vote.rejected_score)):
                if ratings.get(text) is None:
                    ratings[text] = score
        if len(ratings) > 1:
            prompt = replace(
                votes[0], chosen="", rejected="", chosen_score=None, rejected_score=None, position=None
            )
            slates.append(Slate(prompt, tuple(ratings), None, tuple(ratings.values())))
    return slates


def user_by_user(slates: Sequence[Slate], limit: int | None) -> list[Slate]:
    """At most `limit` slates: the first of every user, then the second of every user, and so on."""
    turns: dict[str, int] = defaultdict(int)
    numbered = []
    for place, slate in enumerate(slates):
        numbered.append((turns[slate.prompt.user_id], place, slate))
        turns[slate.prompt.user_id] += 1
    return [slate for *_, slate in sorted(numbered, key=lambda item: item[:2])][:limit]
