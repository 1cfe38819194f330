"""Histories: the earlier votes of a user that an example may show (METHOD §1: h randomly drawn pairs).

Rules of all policies:
- only pairs of the same user's `train` part
- never the pair itself, nor a vote on the same two texts
- no vote on the same prompt that shares a response with it: that A beat C implies much about A against B
- nothing from its future: no later vote where votes have times, no later turn of the same conversation

The draw depends only on (seed, pair), so that all stages show the same history for a pair.

Policies: `random` (the paper), `recent`, `most_similar` (TF–IDF cosine of the queries within the user, ties
to the newer vote), `same_scenario` (random, votes of the pair's scenario first).
"""

import math
import random
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice

from pgenrm_train.records.pairs import HistoryItem, PreferencePair
from pgenrm_train.records.words import WORD

# Up to this many votes of a user a draw looks at all of them, and is that of earlier versions.
SCANNED = 256


class HistorySampler:
    """A sampler of `size` history items per pair from the `train` rows among `pairs`.

    It takes O(rows) to build.  Beyond SCANNED votes of a user, a draw looks at about `size` of them;
    `most_similar` compares with all that share a word.
    """

    def __init__(
        self,
        pairs: Iterable[PreferencePair],
        *,
        size: int,
        policy: str,
        kind: str | None = None,
        seed: int = 0,
    ) -> None:
        self.size, self.policy, self.seed = size, policy, seed
        self._by_user: dict[str, list[PreferencePair]] = defaultdict(list)
        for pair in pairs:
            if pair.split == "train" and kind in (None, pair.kind):
                self._by_user[pair.user_id].append(pair)
        for votes in self._by_user.values():
            # The sort is stable: rows without times keep their order.
            votes.sort(key=_time)
        self._queries: dict[str, _Queries] = {}
        self._places: dict[str, dict[str | None, list[int]]] = {}

    def __call__(
        self, pair: PreferencePair, size: int | None = None, shown: Collection[str] = ()
    ) -> tuple[HistoryItem, ...]:
        """Draw up to `size` items, oldest first; fewer if the user has fewer.

        `shown`: further responses of the question, under the same rules as those of the pair.
        """
        size = self.size if size is None else size
        votes = self._by_user.get(pair.user_id, [])
        if len(votes) > SCANNED and self.policy != "most_similar":
            usable = (i for i in self._in_turn(pair, votes) if _may_show(votes[i], pair, shown))
            chosen = list(islice(usable, size))
        else:
            indices = [i for i, vote in enumerate(votes) if _may_show(vote, pair, shown)]
            chosen = self._choose(pair, indices, votes, size)
        return tuple(votes[i].as_history() for i in sorted(chosen))

    def _in_turn(self, pair: PreferencePair, votes: list[PreferencePair]) -> Iterator[int]:
        """The user's votes from before the pair, the first to show first, found as they are read."""
        start, stop = 0, len(votes)
        if pair.time is not None:
            start = bisect_right(votes, -math.inf, key=_time)
            stop = bisect_left(votes, pair.time, start, key=_time)
        if self.policy == "recent":
            return iter(range(stop - 1, start - 1, -1))
        rng = random.Random(f"{self.seed}/{pair.pair_id}")
        everything = (start + i for i in shuffled(stop - start, rng))
        if self.policy == "random":
            return everything
        if pair.user_id not in self._places:
            places = self._places[pair.user_id] = defaultdict(list)
            for i, vote in enumerate(votes):
                places[vote.scenario].append(i)
        alike = self._places[pair.user_id].get(pair.scenario, [])
        first, last = bisect_left(alike, start), bisect_left(alike, stop)
        return chain(
            (alike[first + i] for i in shuffled(last - first, rng)),
            (i for i in everything if votes[i].scenario != pair.scenario),
        )

    def _choose(
        self, pair: PreferencePair, indices: list[int], votes: list[PreferencePair], size: int
    ) -> list[int]:
        if self.policy == "recent":
            return indices[-size:] if size else []
        if self.policy == "most_similar":
            if pair.user_id not in self._queries:
                self._queries[pair.user_id] = _Queries([vote.query for vote in votes])
            similar = self._queries[pair.user_id].similarity(pair.query)
            return sorted(indices, key=lambda i: (-similar[i], -i))[:size]
        rng = random.Random(f"{self.seed}/{pair.pair_id}")
        rng.shuffle(indices)
        if self.policy == "same_scenario":
            indices.sort(key=lambda i: votes[i].scenario != pair.scenario)  # stable: random within each group
        return indices[:size]


def shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """The numbers below `count` in random order: a Fisher–Yates shuffle, made as far as it is read."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        place = rng.randrange(last + 1)
        yield moved.get(place, place)
        moved[place] = moved.pop(last, last)


def _time(vote: PreferencePair) -> float:
    return -math.inf if vote.time is None else vote.time


def _may_show(vote: PreferencePair, pair: PreferencePair, shown: Collection[str]) -> bool:
    texts, of_pair = {vote.chosen, vote.rejected}, {pair.chosen, pair.rejected}
    shared = texts & {*of_pair, *shown}
    same = vote.pair_id == pair.pair_id or shared == of_pair or (bool(shown) and shared == texts)
    later = pair.time is not None and (vote.time is None or vote.time >= pair.time)
    same_conversation = bool(pair.conversation_id) and vote.conversation_id == pair.conversation_id
    return not (
        same
        or (shared and vote.query == pair.query)
        or later
        or (same_conversation and vote.turn > pair.turn)
    )


class _Queries:
    """An inverted index of one user's queries as normalised TF–IDF vectors.

    w = (1 + ln tf) · (1 + ln((1 + n) / (1 + df)))
    """

    def __init__(self, queries: Sequence[str]) -> None:
        counts = [_words(query) for query in queries]
        documents = Counter(word for words in counts for word in words)
        self._idf = {word: 1 + math.log((1 + len(counts)) / (1 + df)) for word, df in documents.items()}
        self._weights_of: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for i, words in enumerate(counts):
            weights = self._weights(words)
            length = math.sqrt(sum(w * w for w in weights.values())) or 1.0
            for word, weight in weights.items():
                self._weights_of[word].append((i, weight / length))

    def similarity(self, query: str) -> dict[int, float]:
        """Query number → cosine times the length of `query`, which keeps the order; absent is 0."""
        scores: dict[int, float] = defaultdict(float)
        for word, weight in self._weights(_words(query)).items():
            for i, other in self._weights_of[word]:
                scores[i] += weight * other
        return scores

    def _weights(self, words: Counter[str]) -> dict[str, float]:
        return {word: (1 + math.log(tf)) * self._idf[word] for word, tf in words.items() if word in self._idf}


def _words(text: str) -> Counter[str]:
    return Counter(WORD.findall(text.lower()))
