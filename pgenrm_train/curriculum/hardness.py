"""How hard a pair is, why, and whether its label can be trusted (METHOD §5; the paper defines none of this).

Measured, from K chains of the model per pair, half of them in each presentation order:

    pass rate  r = share of the chains that rank chosen above rejected; a failed chain ranks nothing
    hard       low ≤ r ≤ high: the model wavers
    suspect    r < low, mean declared margin ≤ −1 point, both orders agree (order gap < ½), half of the chains
               parsed: the model contradicts the vote confidently and consistently, as it would a mistaken one

Why a band and not "the lowest pass rates": those are chosen by the *label*.  In a batch of pairs that the
model gets wrong, its evidence points the wrong way.  The model learns from it to distrust its own reading
(measured in docs/results.md).  Wavering does not depend on which response was chosen.

Before any model, from the texts and votes (a cold start): each signal that the data hold is turned into the
pair's rank among those that have it, in [0, 1].  The hardness is the mean of these ranks.  The harder half is
hard, and none is suspect.

    similarity    Dice coefficient of the responses' sets of character trigrams, or the cosine of their
                  embeddings if an embedder is given; similar responses are hard
    length_ratio  characters of the shorter by those of the longer; equal lengths are hard
    rating_gap    chosen_score − rejected_score; small gaps are hard
    disagreement  share of the other users who voted on the same two responses to the same context and chose
                  the other one; near ½ is hard, by the distance to ½, which no label turns

`curriculum.hard_by` orders by something else instead.  `history` makes the pairs of shorter-than-median
histories hard (users with few votes), `scenario` those of rarer-than-median scenarios.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pgenrm_train.errors import ConfigError
from pgenrm_train.records.pairs import ContentKey, PreferencePair, content_key

Embed = Callable[[Sequence[str]], np.ndarray]
SIGNALS = ("similarity", "length_ratio", "rating_gap", "disagreement")
CONFIDENT = 1.0  # points of the 1–10 scale
ORDERS_DIFFER = 0.5  # order gap from which the verdict follows the order rather than the content
PREFIX = 20_000  # characters that the trigrams read
STRIKING = 0.75  # rank from which a signal is given as a reason
# Orders by a value that makes a pair hard if it is small, and the reason to give.
ORDERS = {
    "history": "short history ({:g} items)",
    "scenario": "rare scenario ({:.1%} of the pairs)",
}
REASONS = {
    "similarity": "similar responses ({:.2f})",
    "length_ratio": "similar lengths ({:.2f})",
    "rating_gap": "close ratings ({:g} apart)",
    "disagreement": "other users are split ({:.0%} disagree)",
}


@dataclass(frozen=True, slots=True)
class MinedPair:
    """Measurement of one pair; None where no chain provides the value.

    `pass_rate`: share of the chains that rank chosen first.  `margin` and `verified_margin`: means of chosen
    score minus the best other.  `order_gap`: difference of the pass rates in the two orders, None if one
    order was sampled.
    """

    index: int
    pair_id: str
    pass_rate: float
    margin: float | None
    verified_margin: float | None
    order_gap: float | None
    samples: int
    failures: int


class Votes:
    """Votes per content and text.  Counts each user once, by their latest vote."""

    def __init__(self, pairs: Iterable[PreferencePair]) -> None:
        self._latest = {(key_of(pair), pair.user_id): pair.chosen for pair in pairs}
        self._counts: dict[ContentKey, Counter[str]] = defaultdict(Counter)
        for (key, _), chosen in self._latest.items():
            self._counts[key][chosen] += 1

    def others(self, pair: PreferencePair) -> tuple[int, int]:
        """Votes of users other than the pair's own (for its chosen response, for its rejected one)."""
        key = key_of(pair)
        counts, vote = self._counts.get(key, Counter()), self._latest.get((key, pair.user_id))
        return counts[pair.chosen] - (vote == pair.chosen), counts[pair.rejected] - (vote == pair.rejected)

    def disagreement(self, pair: PreferencePair) -> float:
        """Share of the other voters who chose the rejected response; NaN without any."""
        agree, disagree = self.others(pair)
        return disagree / (agree + disagree) if agree + disagree else np.nan


def key_of(pair: PreferencePair) -> ContentKey:
    """The judged content, independent of the judge and the winner."""
    return content_key(pair.context, (pair.chosen, pair.rejected))


def signals(
    pairs: Sequence[PreferencePair], votes: Votes, embed: Embed | None = None
) -> dict[str, np.ndarray]:
    """The model-free signals, one array of shape (N,) each, NaN where the data lack the value.

    `embed`: texts → (N, d), rows of length 1; None compares trigrams.
    """
    lengths = np.array([(len(p.chosen), len(p.rejected)) for p in pairs], dtype=float).reshape(-1, 2)
    ratings = np.array([(p.chosen_score, p.rejected_score) for p in pairs], dtype=float).reshape(-1, 2)
    shorter, longer = lengths.min(axis=1), lengths.max(axis=1)
    return {
        "similarity": np.array(
            cosines(pairs, embed) if embed else [similarity(p.chosen, p.rejected) for p in pairs], dtype=float
        ),
        "length_ratio": np.divide(shorter, longer, out=np.ones(len(pairs)), where=longer > 0),
        "rating_gap": ratings[:, 0] - ratings[:, 1],
        "disagreement": np.array([votes.disagreement(pair) for pair in pairs], dtype=float),
    }


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


def ranks(signals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each signal as a rank in [0, 1], 1 the hardest; equal values have equal ranks.

    NaN where a value is unknown, and everywhere if all values are equal.
    """
    harder = {
        "similarity": signals["similarity"],
        "length_ratio": signals["length_ratio"],
        "rating_gap": -signals["rating_gap"],
        "disagreement": -np.abs(signals["disagreement"] - 0.5),
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


def model_free(signals: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hardness in [0, 1], shape (N,): the mean rank over the signals that a pair has.

    Raises ConfigError if no signal differs between pairs.
    """
    table = np.array(list(ranks(signals).values()))
    known = np.isfinite(table)
    if not known.any():
        raise ConfigError(
            "curriculum.mine=false needs a signal that differs between pairs, and these data hold none; "
            "use mine=true"
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
    """True for values whose mid-rank is below the median's.  Raises ConfigError if all values are equal."""
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
    """True where the model contradicts the vote confidently and consistently.

    `parsed`: share of the chains that could be read.  An unknown order gap (NaN) counts as consistent.
    """
    contradicts = (pass_rates < low) & (margins <= -CONFIDENT) & (parsed >= 0.5)
    return np.asarray(contradicts & ~(order_gaps >= ORDERS_DIFFER))


def records(
    ids: Sequence[str],
    mined: Sequence[MinedPair] | None,
    signals: Mapping[str, np.ndarray] | None,
    low: float,
    high: float,
    by: str = "hardness",
) -> dict[str, list[Any]]:
    """The hardness record of N pairs by column: measurements, signals, `hard`, `suspect` and `why`.

    `mined`: None for a cold start.  `signals`: see `signals`, or None.  If `by` is not `hardness`, `signals`
    must have a column of that name.  Raises ConfigError without both.
    """
    if mined is None and signals is None:
        raise ConfigError("hardness needs measured pass rates (curriculum.mine=true) or model-free signals")
    size = len(ids)
    out: dict[str, list[Any]] = {"index": list(range(size)), "pair_id": list(ids)}
    suspect, reasons = np.zeros(size, dtype=bool), [""] * size
    if mined is not None:
        names = [field.name for field in fields(MinedPair)[2:]]  # those after index and pair_id
        measured = {name: [getattr(pair, name) for pair in mined] for name in names}
        rates, margins, gaps, failures, samples = (
            np.array(measured[name], dtype=float)
            for name in ("pass_rate", "margin", "order_gap", "failures", "samples")
        )
        hard = wavers(rates, low, high)
        suspect = is_suspect(rates, margins, gaps, 1 - failures / samples, low)
        out |= measured
    if signals is not None:
        out |= {name: [None if np.isnan(v) else float(v) for v in signals[name]] for name in SIGNALS}
        reasons = _striking(signals)
        if by in ORDERS:
            hard, suspect = by_order(signals[by], by), np.zeros(size, dtype=bool)
            out[by] = signals[by].tolist()
            reasons = [ORDERS[by].format(value) for value in signals[by]]
        elif mined is None:
            score = model_free(signals)
            hard = harder_half(score)
            out["model_free_hardness"] = score.tolist()
    out["hard"], out["suspect"] = hard.tolist(), suspect.tolist()
    out["why"] = [
        _why(mined[i] if mined is not None else None, reasons[i], bool(suspect[i]))
        if hard[i] or suspect[i]
        else ""
        for i in range(size)
    ]
    return out


def _striking(signals: Mapping[str, np.ndarray]) -> list[str]:
    """The signals of each pair whose rank is high, in words."""
    rank = ranks(signals)
    return [
        "; ".join(
            text.format(signals[name][i]) for name, text in REASONS.items() if rank[name][i] >= STRIKING
        )
        for i in range(len(signals["similarity"]))
    ]


def _why(pair: MinedPair | None, reason: str, suspect: bool) -> str:
    if pair is None:
        return reason or "harder than most by all signals together"
    passed = f"{pair.pass_rate:.0%} of {pair.samples} chains rank the chosen response first"
    parts = [f"wavers: {passed}"]
    if suspect:
        parts = [f"contradicted: {passed}, by {pair.margin:+.1f} points on average"]
    if pair.order_gap is not None and pair.order_gap >= ORDERS_DIFFER:
        parts.append("the verdict follows the order")
    return "; ".join([*parts, reason] if reason else parts)
