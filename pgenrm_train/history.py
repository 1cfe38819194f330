"""Which earlier votes of a user an example may show (METHOD §1: h randomly drawn pairs).

Rules that hold for every policy: only pairs of the same user's `train` part, never the asked pair itself, never a vote on the
same texts, and the draw depends on (seed, pair) alone, so that every stage shows the same history for the same pair.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

from pgenrm_train.records import HistoryItem, PreferencePair

POLICIES = ("random", "recent", "same_scenario")


class HistorySampler:
    """Draws `size` history items a pair from the `train` rows among `pairs`; O(rows) to build, O(rows of the user) a draw."""

    def __init__(
        self, pairs: Iterable[PreferencePair], *, size: int, policy: str, kind: str | None = None, seed: int = 0
    ) -> None:
        self.size, self.policy, self.seed = size, policy, seed
        self._by_user: dict[str, list[PreferencePair]] = defaultdict(list)
        for pair in pairs:
            if pair.split == "train" and kind in (None, pair.kind):
                self._by_user[pair.user_id].append(pair)

    def __call__(self, pair: PreferencePair, size: int | None = None) -> tuple[HistoryItem, ...]:
        """Up to `size` items, oldest first; fewer when the user has fewer."""
        size = self.size if size is None else size
        texts = {pair.chosen, pair.rejected}
        pool = [p for p in self._by_user.get(pair.user_id, ()) if p.pair_id != pair.pair_id and {p.chosen, p.rejected} != texts]
        chosen = self._choose(pair, list(range(len(pool))), pool, size)
        return tuple(pool[i].as_history() for i in sorted(chosen))

    def _choose(self, pair: PreferencePair, indices: list[int], pool: list[PreferencePair], size: int) -> list[int]:
        if self.policy == "recent":
            return indices[-size:] if size else []
        rng = random.Random(f"{self.seed}/{pair.pair_id}")
        rng.shuffle(indices)
        if self.policy == "same_scenario":
            indices.sort(key=lambda i: pool[i].scenario != pair.scenario)  # stable: random within each group
        return indices[:size]
