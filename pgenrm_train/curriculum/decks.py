"""Decks that deal each card once, in random order, before any twice, while cards come and go; all in O(1).

Cards are the integers 0..N−1.  Each belongs to one deck, of which it is a member or set aside.  One array
holds all decks:

    order   … | fresh  dealt  aside | fresh  dealt  aside | …   a deck is a slice with these three regions
    place   card → position in `order`

To deal is to swap a random fresh card to the end of the fresh region and to move the border: a Fisher–Yates
shuffle, one swap at a time.  When no card is fresh, all dealt ones become fresh.  To add or remove a card is
a swap with the border of its region.  The state lists the positions that ever changed, so it grows with the
deals and not with N.
"""

import numpy as np


class Decks:
    """`deck_of`: shape (N,), the deck of each card.  `members`: shape (N,), False for cards set aside."""

    def __init__(self, deck_of: np.ndarray, members: np.ndarray) -> None:
        size = int(deck_of.max()) + 1 if len(deck_of) else 0
        order = np.argsort(deck_of.astype(np.int64) * 2 + ~members, kind="stable").astype(np.int32)
        place = np.empty_like(order)
        place[order] = np.arange(len(order), dtype=np.int32)
        first = np.zeros(size, dtype=np.int32)
        first[1:] = np.cumsum(np.bincount(deck_of, minlength=size))[:-1]
        held = first + np.bincount(deck_of[members], minlength=size).astype(np.int32)
        # `.data` gives Python integers: several times as fast as an array, one number at a time.
        self._order, self._place, self._first = order.data, place.data, first.data
        self._deck = np.ascontiguousarray(deck_of, dtype=np.int32).data
        # Ends of the fresh and of the dealt region.
        self._fresh, self._held = held.copy().data, held.data
        # Position → card and deck → borders, as they were at the start.
        self._order_before: dict[int, int] = {}
        self._borders_before: dict[int, tuple[int, int]] = {}

    def size(self, deck: int) -> int:
        return self._held[deck] - self._first[deck]

    def __contains__(self, card: int) -> bool:
        return self._place[card] < self._held[self._deck[card]]

    def deal(self, deck: int, uniform: float) -> int:
        """Deal a card by a random number `uniform` in [0, 1).  Raises IndexError for an empty deck."""
        first = self._first[deck]
        self._note(deck)
        if self._fresh[deck] == first:
            self._fresh[deck] = self._held[deck]
        fresh = self._fresh[deck] - first
        if not fresh:
            raise IndexError(f"deck {deck} has no cards")
        last = first + fresh - 1
        self._swap(first + int(uniform * fresh), last)
        self._fresh[deck] = last
        return self._order[last]

    def add(self, card: int) -> None:
        """Return a card that was set aside, as one dealt in this round."""
        deck = self._deck[card]
        self._note(deck)
        self._swap(self._place[card], self._held[deck])
        self._held[deck] += 1

    def remove(self, card: int) -> None:
        """Set a member aside."""
        deck = self._deck[card]
        self._note(deck)
        if self._place[card] < self._fresh[deck]:
            self._fresh[deck] -= 1
            self._swap(self._place[card], self._fresh[deck])
        self._held[deck] -= 1
        self._swap(self._place[card], self._held[deck])

    def state_dict(self) -> dict[str, list[list[int]]]:
        """Changes since the decks were built from the same arguments.

        `order`: [position, card] per moved card.  `borders`: [deck, end of fresh, end of dealt] per used
        deck.
        """
        return {
            "order": [[i, self._order[i]] for i in sorted(self._order_before)],
            "borders": [[d, self._fresh[d], self._held[d]] for d in sorted(self._borders_before)],
        }

    def load_state_dict(self, state: dict[str, list[list[int]]]) -> None:
        for position, card in self._order_before.items():
            self._order[position], self._place[card] = card, position
        for deck, borders in self._borders_before.items():
            self._fresh[deck], self._held[deck] = borders
        self._order_before = {position: self._order[position] for position, _ in state["order"]}
        self._borders_before = {
            deck: (self._fresh[deck], self._held[deck]) for deck, _, _ in state["borders"]
        }
        for position, card in state["order"]:
            self._order[position], self._place[card] = card, position
        for deck, fresh, held in state["borders"]:
            self._fresh[deck], self._held[deck] = fresh, held

    def _note(self, deck: int) -> None:
        if deck not in self._borders_before:
            self._borders_before[deck] = (self._fresh[deck], self._held[deck])

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        order, place = self._order, self._place
        a, b = order[one], order[other]
        self._order_before.setdefault(one, a)
        self._order_before.setdefault(other, b)
        order[one], order[other], place[a], place[b] = b, a, other, one
