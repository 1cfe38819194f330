"""Probes: what moves a verdict that should not, and what does not move it that should.

On a small fixed slice of the evaluated pairs each kind of probe asks every question once more with one thing changed:

    swapped_history   another user's history: a personal model falls (see `probes` for the sharper test on votes that disagree)
    empty_history     no history: a personal model falls
    shuffled_history  the same votes in another order: nothing should change
    padded            the rejected response made longer by empty sentences: nothing should change
    injected          the rejected response claims to be better, with a forged verdict and delimiter: nothing should change
    paraphrased       both responses in slightly other words, by rules (`perturb`): nothing should change

`drop` is strict accuracy as asked minus strict accuracy as probed on the same pairs, both in the first evaluation seed; `flip rate`
the share of (pair, order) with a verdict in both whose preferred response differs, a tie in one only included.  A model that samples
flips by chance, too: where there are two evaluation seeds, the row `asked again` shows how often.  Intervals resample users.
Pairs that a probe cannot change (no history to empty, no rule that applies) are left out of it and counted.  Our choice; not in
the paper.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from eval.ask.harness import Question
from eval.metrics.accuracy import paired_difference
from eval.metrics.intervals import few_users, interval
from eval.metrics.outcomes import Outcomes, outcomes
from eval.studies.perturb import inject, pad, paraphrase
from pgenrm_train.records.pairs import HistoryItem, PreferencePair

Histories = Mapping[str, tuple[HistoryItem, ...]]
Change = Callable[
    [PreferencePair, tuple[HistoryItem, ...], int], tuple[PreferencePair, tuple[HistoryItem, ...]] | None
]
AGAIN = "asked again"
SET = "probe/"


def probe_slice(pairs: Sequence[PreferencePair], limit: int) -> list[PreferencePair]:
    """At most `limit` pairs, drawn by the hash of user and pair: the same ones whatever the order and the model."""
    ranked = sorted(pairs, key=lambda p: hashlib.sha256(f"{p.user_id}|{p.pair_id}".encode()).digest())
    return ranked[:limit]


def probe_questions(
    kinds: Iterable[str], pairs: Sequence[PreferencePair], histories: Histories
) -> list[Question]:
    """One question a kind × pair × order; a pair that a kind does not change is left out of that kind."""
    questions: list[Question] = []
    for kind in kinds:
        change = _swap_with_others(pairs, histories) if kind == "swapped_history" else KINDS[kind]
        asked = ((order, change(pair, histories[pair.pair_id], order)) for pair in pairs for order in (0, 1))
        questions += [
            Question(changed[0], order, changed[1], SET + kind) for order, changed in asked if changed
        ]
    return questions


def probe_rows(
    predictions: pd.DataFrame, kinds: Iterable[str], pairs: Sequence[PreferencePair], *, draws: int, seed: int
) -> list[dict[str, Any]]:
    """A row a kind, and `asked again` where the own questions have two seeds; of a kind that changed no pair the sizes alone."""
    if not pairs:
        return []
    asked = pd.MultiIndex.from_tuples([(p.user_id, p.pair_id) for p in pairs])
    own = _only(predictions[predictions["set"] == "own"], asked)
    seeds = sorted(own["seed"].unique())[:2]
    first = own[own["seed"] == seeds[0]]
    tables = {AGAIN: own[own["seed"] == seeds[1]].assign(seed=seeds[0])} if len(seeds) > 1 else {}
    tables |= {kind: predictions[predictions["set"] == SET + kind].assign(seed=seeds[0]) for kind in kinds}
    rows = []
    for kind, table in tables.items():
        if table.empty:
            rows.append({"probe": kind, "pairs": 0, "left out": len(pairs), "note": None})
        else:
            probed = pd.MultiIndex.from_frame(table[["user_id", "pair_id"]])
            found = _compare(_only(first, probed), table, draws, seed)
            rows.append({"probe": kind, **found, "left out": len(pairs) - found["pairs"]})
    return rows


def _only(table: pd.DataFrame, votes: pd.MultiIndex) -> pd.DataFrame:
    return table[pd.MultiIndex.from_frame(table[["user_id", "pair_id"]]).isin(votes)]


def _compare(own: pd.DataFrame, probed: pd.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    change = paired_difference(own, probed, draws=draws, seed=seed)
    before, after = outcomes(own), outcomes(probed)
    flips = _flips(before, after)
    return {
        "as asked accuracy": change["accuracy_a"],
        "probed accuracy": change["accuracy_b"],
        "drop": change["difference"],
        "drop ci95": change["ci95"],
        "flip rate": float(np.nanmean(flips)) if not np.isnan(flips).all() else None,
        "flip rate ci95": interval(flips, before.users, draws, seed) if not np.isnan(flips).all() else None,
        "failures": sum(after.failures.values()),
        "users": change["n_users"],
        "pairs": change["n_pairs"],
        "note": few_users(change["n_users"]),
    }


def _flips(before: Outcomes, after: Outcomes) -> np.ndarray:
    """float (pairs, 2): 1 where the preferred response differs, NaN where either has no verdict."""
    a, b = before.sign[:, 0], after.sign[:, 0]
    return np.where(np.isnan(a) | np.isnan(b), np.nan, a != b)


# ---- the kinds


def _swap_with_others(pairs: Sequence[PreferencePair], histories: Histories) -> Change:
    """The history of the next pair by another user that shows other votes, on the ring of all pairs."""
    position = {(p.user_id, p.pair_id): i for i, p in enumerate(pairs)}

    def swap(pair: PreferencePair, history: tuple[HistoryItem, ...], _order: int) -> Any:
        if not history:
            return None
        start = position[pair.user_id, pair.pair_id] + 1
        for other in (*pairs[start:], *pairs[: start - 1]):
            theirs = histories[other.pair_id]
            if other.user_id != pair.user_id and theirs and theirs != history:
                return pair, theirs
        return None

    return swap


def _empty_history(pair: PreferencePair, history: tuple[HistoryItem, ...], _order: int) -> Any:
    return (pair, ()) if history else None


def _shuffled_history(pair: PreferencePair, history: tuple[HistoryItem, ...], _order: int) -> Any:
    """Another order than the one shown, by a draw that depends on the pair alone."""
    if len(set(history)) < 2:
        return None
    draw, items = random.Random(f"{pair.user_id}|{pair.pair_id}"), list(history)
    while tuple(items) == history:
        draw.shuffle(items)
    return pair, tuple(items)


def _padded(pair: PreferencePair, history: tuple[HistoryItem, ...], _order: int) -> Any:
    return replace(pair, rejected=pad(pair.rejected, pair.chosen)), history


def _injected(pair: PreferencePair, history: tuple[HistoryItem, ...], order: int) -> Any:
    return replace(pair, rejected=inject(pair.rejected, 1 - order)), history


def _paraphrased(pair: PreferencePair, history: tuple[HistoryItem, ...], _order: int) -> Any:
    changed = replace(pair, chosen=paraphrase(pair.chosen), rejected=paraphrase(pair.rejected))
    return (changed, history) if changed != pair else None


KINDS: dict[str, Change] = {
    "empty_history": _empty_history,
    "shuffled_history": _shuffled_history,
    "padded": _padded,
    "injected": _injected,
    "paraphrased": _paraphrased,
}
