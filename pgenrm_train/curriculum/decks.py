"""Decks that deal each card once, in random order, before any twice, while cards come and go; all in O(1).

Cards are the integers 0..N−1.  Each belongs to one deck, of which it is a member or set aside.  One array
holds all decks:

    order   … | fresh  dealt  aside | fresh  dealt  aside | …   a deck is a slice with these three regions
    place   card → position in `order`

To deal is to swap a random fresh card to the end of the fresh region and to move the border: a Fisher–Yates
shuffle, one swap at a time.  When no card is fresh, all dealt ones become fresh.  To add or remove a card is
a swap with the border of its region.  The state lists the positions that differ from the start, so it grows
with the deals and not with N.
"""

import base64
from collections.abc import Mapping, Sequence

import numpy as np

# Columns of numbers as text; rows of numbers in states of older versions.
Packed = str | Sequence[Sequence[float]]


def pack(*columns: np.ndarray, kind: str = "<i4") -> str:
    """Columns (N,) as text of 16/3 bytes per number of type `kind`, twice that of a longer one."""
    return base64.b64encode(np.stack(columns).astype(kind).tobytes()).decode()


def unpack(packed: Packed, columns: int, kind: str = "<i4") -> np.ndarray:
    """Shape (columns, N): inverse of `pack`."""
    if isinstance(packed, str):
        return np.frombuffer(base64.b64decode(packed), kind).reshape(columns, -1)
    return np.array(packed, kind).reshape(-1, columns).T


def _sorted(keys: np.ndarray) -> np.ndarray:
    """Stable order of `keys` (uint32), in linear time: numpy sorts 16 bits at a time by radix."""
    low = np.argsort(keys.astype(np.uint16), kind="stable").astype(np.int32)
    return low[np.argsort((keys[low] >> 16).astype(np.uint16), kind="stable")]


class Decks:
    """`deck_of`: shape (N,), the deck of each card.  `members`: shape (N,), False for cards set aside."""

    def __init__(self, deck_of: np.ndarray, members: np.ndarray) -> None:
        size = int(deck_of.max()) + 1 if len(deck_of) else 0
        order = _sorted(deck_of.astype(np.uint32) * np.uint32(2) + ~members)
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
        # As they were at the start, where all cards of a deck are fresh.
        self._order_before, self._held_before = order.copy(), held.copy()

    def size(self, deck: int) -> int:
        return self._held[deck] - self._first[deck]

    def __contains__(self, card: int) -> bool:
        return self._place[card] < self._held[self._deck[card]]

    def deal(self, deck: int, uniform: float) -> int:
        """Deal a card by a random number `uniform` in [0, 1).  Raises IndexError for an empty deck."""
        first = self._first[deck]
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
        self._swap(self._place[card], self._held[deck])
        self._held[deck] += 1

    def remove(self, card: int) -> None:
        """Set a member aside."""
        deck = self._deck[card]
        if self._place[card] < self._fresh[deck]:
            self._fresh[deck] -= 1
            self._swap(self._place[card], self._fresh[deck])
        self._held[deck] -= 1
        self._swap(self._place[card], self._held[deck])

    def state_dict(self) -> dict[str, str]:
        """Changes since the decks were built from the same arguments.

        `order`: [position, card] per moved card.  `borders`: [deck, end of fresh, end of dealt] per deck that
        differs; both as `pack` writes them.
        """
        order, fresh, held = (np.asarray(part) for part in (self._order, self._fresh, self._held))
        moved = np.flatnonzero(order != self._order_before)
        decks = np.flatnonzero((fresh != self._held_before) | (held != self._held_before))
        return {
            "order": pack(moved, order[moved]),
            "borders": pack(decks, fresh[decks], held[decks]),
        }

    def load_state_dict(self, state: Mapping[str, Packed]) -> None:
        order, place = np.asarray(self._order), np.asarray(self._place)
        order[:] = self._order_before
        place[order] = np.arange(len(order), dtype=np.int32)
        positions, cards = unpack(state["order"], 2)
        order[positions], place[cards] = cards, positions
        decks, *borders = unpack(state["borders"], 3)
        for ends, saved in zip((self._fresh, self._held), borders, strict=True):
            np.asarray(ends)[:] = self._held_before
            np.asarray(ends)[decks] = saved

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        order, place = self._order, self._place
        a, b = order[one], order[other]
        order[one], order[other], place[a], place[b] = b, a, other, one
