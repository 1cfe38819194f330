"""Held-out texts that nearly are training texts: MinHash signatures and locality-sensitive banding (Broder 1997; Leskovec et al. §3.4).

datasketch makes the signatures and chooses the bands.  The join over bands is our own and vectorised: each
held-out text meets one training text a band, so that a thousand copies of one refusal cost no million
comparisons, as a query for all candidates would.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from datasketch import MinHashLSH

from pgenrm_train.chains.near_duplicates import PLACES, signature
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.vote_index import text_hash

THRESHOLD = 0.8  # Jaccard similarity of word 3-grams from which two texts are near duplicates
EXAMPLES = 5
TRAIN, HELD_OUT = 1, 2


class NearDuplicates:
    """Collects the distinct queries and responses of a data set, and on which side of the split each stands."""

    def __init__(self) -> None:
        self.texts = {"queries": _Texts(), "responses": _Texts()}

    def add(self, pair: PreferencePair) -> None:
        if pair.split == "train" and not pair.trains:
            return  # a held-out user's history: neither learnt from nor asked about
        side = TRAIN if pair.trains else HELD_OUT
        self.texts["queries"].add(pair.query, side, pair.pair_id)
        self.texts["responses"].add(pair.chosen, side, pair.pair_id)
        self.texts["responses"].add(pair.rejected, side, pair.pair_id)

    def report(self) -> dict[str, Any]:
        """For queries and responses: distinct held-out texts, how many of them are in train exactly or nearly, and examples."""
        return {"threshold": THRESHOLD} | {what: texts.report() for what, texts in self.texts.items()}


class _Texts:
    """Distinct texts: signature, sides and the first pair that showed each."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}
        self.sides = bytearray()
        self.first_pair: list[str] = []
        self.signatures = array("I")

    def add(self, text: str, side: int, pair_id: str) -> None:
        key = text_hash(text)
        if (place := self.places.get(key)) is not None:
            self.sides[place] |= side
            return
        self.places[key] = len(self.places)
        self.sides.append(side)
        self.first_pair.append(pair_id)
        self.signatures.frombytes(signature(text).tobytes())

    def report(self) -> dict[str, Any]:
        sides = np.frombuffer(self.sides, np.uint8)
        signatures = np.frombuffer(self.signatures, np.uint32).reshape(-1, PLACES)
        train, alone = np.flatnonzero(sides & TRAIN), np.flatnonzero(sides == HELD_OUT)
        match, similarity = nearest_by_band(signatures[alone], signatures[train])
        near = np.flatnonzero(similarity >= THRESHOLD)
        examples = [
            {
                "held_out": self.first_pair[alone[i]],
                "train": self.first_pair[train[match[i]]],
                "similarity": round(float(similarity[i]), 3),
            }
            for i in near[:EXAMPLES]
        ]
        exact = int((sides == TRAIN | HELD_OUT).sum())
        return {"held_out": exact + len(alone), "exact": exact, "near": len(near), "examples": examples}


def nearest_by_band(asked: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each signature of `asked` the row of `known` most like it among one candidate a band, and their estimated Jaccard.

    Both (N, PLACES) uint32; returns rows (N,) and similarities (N,), 0 where no band is shared.  Linear but
    for a sort.
    """
    best, similarity = np.zeros(len(asked), np.int64), np.zeros(len(asked))
    if not len(asked) or not len(known):
        return best, similarity
    bands = MinHashLSH(threshold=THRESHOLD, num_perm=PLACES)
    for band in range(bands.b):
        columns = slice(band * bands.r, (band + 1) * bands.r)
        keys, first = np.unique(_as_keys(known[:, columns]), return_index=True)
        wanted = _as_keys(asked[:, columns])
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        rows = np.flatnonzero(keys[place] == wanted)
        candidates = first[place[rows]]
        found = (asked[rows] == known[candidates]).mean(axis=1)
        better = found > similarity[rows]
        best[rows[better]], similarity[rows[better]] = candidates[better], found[better]
    return best, similarity


def _as_keys(columns: np.ndarray) -> np.ndarray:
    """A 64-bit key a row: equal rows have equal keys, and others may only be compared in vain."""
    multipliers = np.random.default_rng(0).integers(1, 2**63, columns.shape[1], np.uint64) | np.uint64(1)
    return (columns.astype(np.uint64) * multipliers).sum(axis=1, dtype=np.uint64)
