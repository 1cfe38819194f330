"""Held-out texts that nearly equal training texts: MinHash signatures and locality-sensitive banding.

Sources: Broder 1997; Leskovec et al. §3.4.  datasketch computes the signatures and chooses the bands.  The
join over bands is our own and vectorised: a held-out text meets one training text per band.  So a thousand
copies of one refusal do not cost a million comparisons, as a query for all candidates would.
"""

from array import array
from typing import TypedDict

import numpy as np
from datasketch import MinHashLSH

from pgenrm_train.chains.near_duplicates import PLACES, signature
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.vote_index import text_hash

THRESHOLD = 0.8  # least Jaccard similarity of the word 3-grams of near duplicates
EXAMPLES = 5
TRAIN, HELD_OUT = 1, 2


class NearPair(TypedDict):
    """Pair ids of two near duplicates."""

    held_out: str
    train: str
    similarity: float


class NearTexts(TypedDict):
    """Distinct held-out texts, those among them that are in train exactly or nearly, and examples."""

    held_out: int
    exact: int
    near: int
    examples: list[NearPair]


class NearReport(TypedDict):
    """Near duplicates of a data set."""

    threshold: float
    queries: NearTexts
    responses: NearTexts


class SharedTexts:
    """Collects the distinct queries and responses of a data set, each with its sides of the split."""

    def __init__(self) -> None:
        self.queries, self.responses = _Texts(), _Texts()

    def add(self, pair: PreferencePair) -> None:
        if pair.split == "train" and not pair.trains:
            return  # history of a held-out user: neither training nor test text
        side = TRAIN if pair.trains else HELD_OUT
        self.queries.add(pair.query, side, pair.pair_id)
        self.responses.add(pair.chosen, side, pair.pair_id)
        self.responses.add(pair.rejected, side, pair.pair_id)

    def report(self) -> NearReport:
        return {
            "threshold": THRESHOLD,
            "queries": self.queries.report(),
            "responses": self.responses.report(),
        }


class _Texts:
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

    def report(self) -> NearTexts:
        sides = np.frombuffer(self.sides, np.uint8)
        signatures = np.frombuffer(self.signatures, np.uint32).reshape(-1, PLACES)
        train, alone = np.flatnonzero(sides & TRAIN), np.flatnonzero(sides == HELD_OUT)
        match, similarity = nearest_by_band(signatures[alone], signatures[train])
        near = np.flatnonzero(similarity >= THRESHOLD)
        exact = int((sides == TRAIN | HELD_OUT).sum())
        return {
            "held_out": exact + len(alone),
            "exact": exact,
            "near": len(near),
            "examples": [
                {
                    "held_out": self.first_pair[alone[i]],
                    "train": self.first_pair[train[match[i]]],
                    "similarity": round(float(similarity[i]), 3),
                }
                for i in near[:EXAMPLES]
            ],
        }


def nearest_by_band(queries: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most similar row of `known` for each query, among one candidate per band, and the Jaccard estimate.

    Both (N, PLACES) uint32; returns rows (N,) and similarities (N,), 0 without a shared band.
    Linear except for a sort.
    """
    best, similarity = np.zeros(len(queries), np.int64), np.zeros(len(queries))
    if not (len(queries) and len(known)):
        return best, similarity
    bands = MinHashLSH(threshold=THRESHOLD, num_perm=PLACES)
    for band in range(bands.b):
        columns = slice(band * bands.r, (band + 1) * bands.r)
        keys, first = np.unique(_as_keys(known[:, columns]), return_index=True)
        wanted = _as_keys(queries[:, columns])
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        rows = np.flatnonzero(keys[place] == wanted)
        candidates = first[place[rows]]
        estimates = (queries[rows] == known[candidates]).mean(axis=1)
        better = estimates > similarity[rows]
        best[rows[better]], similarity[rows[better]] = candidates[better], estimates[better]
    return best, similarity


def _as_keys(columns: np.ndarray) -> np.ndarray:
    """A 64-bit key per row: equal rows have equal keys; a collision only costs a comparison."""
    multipliers = np.random.default_rng(0).integers(1, 2**63, columns.shape[1], np.uint64) | np.uint64(1)
    return (columns.astype(np.uint64) * multipliers).sum(axis=1, dtype=np.uint64)
