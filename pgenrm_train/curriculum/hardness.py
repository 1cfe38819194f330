"""How hard a pair is, why, and whether its label is to be trusted (METHOD §5; the paper defines none of this, so it is ours).

Measured, from K chains of the model a pair, half of them in each presentation order:

    pass rate  r = share of the chains that rank chosen above rejected; a failed chain ranks nothing
    hard       low ≤ r ≤ high: the model wavers
    suspect    r < low, mean declared margin ≤ −1 point, both orders agree (order gap < ½), half of the chains parsed:
               it contradicts the vote confidently and consistently, as it would a mistaken vote

Why a band and not "the lowest pass rates": those are chosen by the *label*.  A batch full of pairs that the model gets wrong is a
batch in which its evidence points the wrong way, and to learn from that mix is to learn to distrust one's own reading
(docs/curriculum.md has the measurement).  To waver does not depend on which response was chosen.

Before any model, from the texts and votes (a cold start): each signal that the data hold is turned into the pair's rank among those
that have it, in [0, 1], and the hardness is the mean of these ranks.  The harder half is hard, nothing is suspect.

    similarity    Dice coefficient of the responses' sets of character trigrams, or the   alike is hard
                  cosine of their embeddings where an embedder is given
    length_ratio  characters of the shorter by those of the longer                        alike is hard
    rating_gap    chosen_score − rejected_score                                           small is hard
    disagreement  share of the other users who voted on the same two responses to the     near ½ is hard: by the distance to ½,
                  same context and chose the other one                                    which no label turns

`curriculum.hard_by` orders by something else instead: `history` calls the pairs of shorter-than-median histories hard (users of whom
little is known), `scenario` those of rarer-than-median scenarios.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pgenrm_train.errors import ConfigError
from pgenrm_train.records.pairs import ContentKey, PreferencePair, content_key

Embed = Callable[[Sequence[str]], np.ndarray]
SIGNALS = ("similarity", "length_ratio", "rating_gap", "disagreement")
MEASURED = ("pass_rate", "margin", "verified_margin", "order_gap", "samples", "failures")
CONFIDENT = 1.0  # points of the 1–10 scale
ORDERS_DIFFER = 0.5  # order gap from which the verdict follows the order rather than the content
PREFIX = 20_000  # characters that the trigrams read
ORDERS = {
    "history": "short history ({:g} items)",
    "scenario": "rare scenario ({:.1%} of the pairs)",
}  # hard when small
STRIKING = 0.75  # rank from which a signal is given as a reason


class Votes:
    """Who chose what: content → text → users.  Counts each user once, by their latest vote."""

    def __init__(self, pairs: Iterable[PreferencePair]) -> None:
        latest = {(key_of(pair), pair.user_id): pair.chosen for pair in pairs}
        self._counts: dict[ContentKey, Counter[str]] = defaultdict(Counter)
        self._own = latest
        for (key, _), chosen in latest.items():
            self._counts[key][chosen] += 1

    def others(self, pair: PreferencePair) -> tuple[int, int]:
        """(for the pair's chosen, for its rejected) among users other than its own."""
        key = key_of(pair)
        counts, own = self._counts.get(key, Counter()), self._own.get((key, pair.user_id))
        return counts[pair.chosen] - (own == pair.chosen), counts[pair.rejected] - (own == pair.rejected)

    def disagreement(self, pair: PreferencePair) -> float:
        """Share of the other voters who chose the other response; NaN without any."""
        agree, disagree = self.others(pair)
        return disagree / (agree + disagree) if agree + disagree else np.nan


def key_of(pair: PreferencePair) -> ContentKey:
    """What was judged, whoever judged it and whichever won."""
    return content_key(pair.context, (pair.chosen, pair.rejected))


def signals(
    pairs: Sequence[PreferencePair], votes: Votes, embed: Embed | None = None
) -> dict[str, np.ndarray]:
    """The model-free signals, one array of shape (N,) each, NaN where the data hold nothing.

    embed: texts → (N, d), rows of length 1; None compares trigrams.
    """
    alike = cosines(pairs, embed) if embed else [similarity(p.chosen, p.rejected) for p in pairs]
    rows = [
        (like, _length_ratio(p), _rating_gap(p), votes.disagreement(p))
        for like, p in zip(alike, pairs, strict=True)
    ]
    columns = np.array(rows, dtype=float).reshape(len(rows), len(SIGNALS))
    return dict(zip(SIGNALS, columns.T, strict=True))


def cosines(pairs: Sequence[PreferencePair], embed: Embed) -> np.ndarray:
    """Cosine of the embeddings of the two responses, shape (N,)."""
    vectors = embed([text for pair in pairs for text in (pair.chosen, pair.rejected)])
    return np.asarray((vectors[0::2] * vectors[1::2]).sum(axis=1), dtype=float)


def similarity(one: str, other: str) -> float:
    """Dice coefficient of the sets of character trigrams, in [0, 1]; O(length)."""
    a, b = (_trigrams(text[:PREFIX]) for text in (one, other))
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def _trigrams(text: str) -> set[str]:
    text = f" {' '.join(text.lower().split())} "
    return {text[i : i + 3] for i in range(len(text) - 2)}


def _length_ratio(pair: PreferencePair) -> float:
    shorter, longer = sorted((len(pair.chosen), len(pair.rejected)))
    return shorter / longer if longer else 1.0


def _rating_gap(pair: PreferencePair) -> float:
    if pair.chosen_score is None or pair.rejected_score is None:
        return np.nan
    return pair.chosen_score - pair.rejected_score


def ranks(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each signal as a rank in [0, 1], 1 the hardest, equal values equal; NaN where unknown and where all values are one."""
    harder = {
        "similarity": found["similarity"],
        "length_ratio": found["length_ratio"],
        "rating_gap": -found["rating_gap"],
        "disagreement": -np.abs(found["disagreement"] - 0.5),
    }
    return {name: _rank(values) for name, values in harder.items()}


def _rank(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    out = np.full(len(values), np.nan)
    distinct, place, counts = np.unique(values[known], return_inverse=True, return_counts=True)
    if len(distinct) > 1:
        below = np.cumsum(counts) - counts
        out[known] = ((below + (counts - 1) / 2) / (counts.sum() - 1))[place]
    return out


def model_free(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hardness in [0, 1], shape (N,): the mean rank over the signals that a pair has.  Raises ConfigError when none tells pairs apart."""
    table = np.array(list(ranks(found).values()))
    known = np.isfinite(table)
    if not known.any():
        raise ConfigError(
            "curriculum.mine=false needs a signal that tells pairs apart, and these data hold none; use mine=true"
        )
    counts = known.sum(axis=0)
    mean = np.where(known, table, 0.0).sum(axis=0) / np.maximum(counts, 1)
    return np.where(counts > 0, mean, 0.5)


def harder_half(score: np.ndarray) -> np.ndarray:
    """True for the ⌈N/2⌉ highest scores; equal ones in the order of the rows."""
    hard = np.zeros(len(score), dtype=bool)
    hard[np.argsort(-score, kind="stable")[: -(-len(score) // 2)]] = True
    return hard


def by_order(values: np.ndarray, name: str) -> np.ndarray:
    """True where a value is small: its mid-rank is below the median's.  Raises ConfigError when all values are one."""
    rank = _rank(-values)
    if not np.isfinite(rank).any():
        raise ConfigError(
            f"curriculum.hard_by={name} finds the same {name} in every pair; use curriculum.hard_by=hardness"
        )
    return np.asarray(rank > 0.5)


def wavers(pass_rates: np.ndarray, low: float, high: float) -> np.ndarray:
    """True where low ≤ pass rate ≤ high; unknown rates do not."""
    return np.asarray((pass_rates >= low) & (pass_rates <= high))


def is_suspect(
    pass_rates: np.ndarray, margins: np.ndarray, order_gaps: np.ndarray, parsed: np.ndarray, low: float
) -> np.ndarray:
    """True where the model contradicts the vote confidently and consistently; an unknown order gap (NaN) contradicts nothing.

    parsed: share of the chains that could be read.
    """
    contradicts = (pass_rates < low) & (margins <= -CONFIDENT) & (parsed >= 0.5)
    return np.asarray(contradicts & ~(order_gaps >= ORDERS_DIFFER))


def records(
    ids: Sequence[str],
    mined: Sequence[Mapping[str, Any]] | None,
    found: Mapping[str, np.ndarray] | None,
    low: float,
    high: float,
    by: str = "hardness",
) -> dict[str, list[Any]]:
    """The hardness record, a column a name: what was measured, `hard`, `suspect` and `why`, of N pairs.

    mined: a row a pair with pass_rate, margin, verified_margin, order_gap, samples, failures (null where unknown), or None for a
    cold start; found: `signals`, or None.  `by` another order, found holds its column too.  Raises ConfigError when there is neither.
    """
    if mined is None and found is None:
        raise ConfigError("hardness needs measured pass rates (curriculum.mine=true) or model-free signals")
    size = len(ids)
    out: dict[str, list[Any]] = {"index": list(range(size)), "pair_id": list(ids)}
    if mined is not None:
        rates, margins, gaps, samples = (
            column(mined, name) for name in ("pass_rate", "margin", "order_gap", "samples")
        )
        parsed = 1 - column(mined, "failures") / samples
        hard, suspect = wavers(rates, low, high), is_suspect(rates, margins, gaps, parsed, low)
        out |= {name: [row[name] for row in mined] for name in MEASURED}
    if found is not None:
        out |= {name: [None if np.isnan(v) else float(v) for v in found[name]] for name in SIGNALS}
    if found is not None and by in ORDERS:
        hard, suspect = by_order(found[by], by), np.zeros(size, dtype=bool)
        out[by] = found[by].tolist()
    elif mined is None and found is not None:
        score = model_free(found)
        hard, suspect = harder_half(score), np.zeros(size, dtype=bool)
        out["model_free_hardness"] = score.tolist()
    telling = (
        [""] * size
        if found is None
        else _striking(found)
        if by not in ORDERS
        else [*map(ORDERS[by].format, found[by])]
    )
    out["hard"], out["suspect"] = hard.tolist(), suspect.tolist()
    out["why"] = [
        _why(mined[i] if mined is not None else None, telling[i], bool(suspect[i]))
        if hard[i] or suspect[i]
        else ""
        for i in range(size)
    ]
    return out


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A column of numbers, NaN for null."""
    return np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=float)


def _striking(found: Mapping[str, np.ndarray]) -> list[str]:
    """The signals of each pair whose rank is high, in words."""
    words = {
        "similarity": "responses alike ({:.2f})", "length_ratio": "lengths alike ({:.2f})",
        "rating_gap": "ratings close ({:g} apart)", "disagreement": "other users are split ({:.0%} disagree)",
    }  # fmt: skip
    free = ranks(found)
    return [
        "; ".join(text.format(found[name][i]) for name, text in words.items() if free[name][i] >= STRIKING)
        for i in range(len(found["similarity"]))
    ]


def _why(row: Mapping[str, Any] | None, telling: str, suspect: bool) -> str:
    if row is None:
        return telling or "harder than most by all signals together"
    passed = f"{row['pass_rate']:.0%} of {row['samples']} chains rank the chosen response first"
    said = [
        f"contradicted: {passed}, by {row['margin']:+.1f} points on average"
        if suspect
        else f"wavers: {passed}"
    ]
    if row["order_gap"] is not None and row["order_gap"] >= ORDERS_DIFFER:
        said.append("the verdict follows the order")
    return "; ".join([*said, telling] if telling else said)
