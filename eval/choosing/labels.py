"""Labels for DPO: of each user's candidates to a prompt a chosen and a rejected one, by a model's scores.

    margin       s_chosen − s_rejected > 0, scores of `scaling.groups`
    confidence   σ(margin / T); T is fitted on the labels whose true preference is known, of `LEAST` at least

Equal scores, margins below a bound and responses without a score make no label, and are counted by kind.
The agreement compares labels with ratings, else with votes, that no prompt showed; intervals resample users.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit

from eval.choosing.schemes import Match, Slot
from eval.metrics.calibration import fit_temperature
from eval.metrics.intervals import accuracy, interval
from pgenrm_train.records.pairs import ContentKey, PreferencePair, content_key
from pgenrm_train.records.slates import RULES, Slate
from pgenrm_train.scaling.groups import circle

LEAST = 20  # known preferences that a temperature is fitted on
TIE, CLOSE, NO_SCORE = "tie", "margin below label.min_margin", "response without a score"
BINS = 4
Votes = Mapping[tuple[str, ContentKey], str | None]  # (user, comparison) → text chosen; None if it changed


@dataclass(frozen=True, slots=True)
class Label:
    """Two responses of a slate by number, with their scores; `right` None if the preference is unknown."""

    slate: int
    chosen: int
    rejected: int
    score_chosen: float
    score_rejected: float
    right: bool | None

    @property
    def margin(self) -> float:
        return self.score_chosen - self.score_rejected


@dataclass(frozen=True)
class Labelled:
    """All labels, and what was left out, by kind."""

    labels: Sequence[Label]
    left_out: Mapping[str, int]
    temperature: float
    fitted: bool  # whether the temperature is; else 1

    def confidence(self, label: Label) -> float:
        return float(expit(label.margin / self.temperature))


def label(
    slates: Sequence[Slate],
    scores: Mapping[Slot, np.ndarray],
    chains: pd.DataFrame,
    votes: Votes,
    rule: str,
    min_margin: float = 0.0,
) -> Labelled:
    """Labels of all slates by `RULES[rule]`; `chains` are those behind the scores."""
    failures = _first_failures(chains)
    labels: list[Label] = []
    left_out: Counter[str] = Counter()
    for slot, values in sorted(scores.items()):
        slate = slates[slot.slate]
        known = [int(i) for i in np.argsort(-values, kind="stable") if np.isfinite(values[i])]
        for i in np.flatnonzero(~np.isfinite(values)):
            left_out[f"{NO_SCORE} ({_kind(slate, int(i), slot.n, failures)})"] += 1
        for better, worse in RULES[rule](known) if len(known) > 1 else []:
            margin = float(values[better] - values[worse])
            if margin <= 0 or margin < min_margin:
                left_out[CLOSE if margin > 0 else TIE] += 1
                continue
            right = _right(slate, better, worse, votes)
            labels.append(
                Label(slot.slate, better, worse, float(values[better]), float(values[worse]), right)
            )
    margins = np.array([la.margin if la.right else -la.margin for la in labels if la.right is not None])
    fitted = len(margins) >= LEAST
    return Labelled(labels, dict(left_out), fit_temperature(margins) if fitted else 1.0, fitted)


def votes_on(pairs: Sequence[PreferencePair]) -> Votes:
    """The votes by user and comparison."""
    votes: dict[tuple[str, ContentKey], str | None] = {}
    for pair in pairs:
        key = pair.user_id, content_key(pair.context, (pair.chosen, pair.rejected))
        votes[key] = pair.chosen if votes.get(key, pair.chosen) == pair.chosen else None
    return votes


def _right(slate: Slate, better: int, worse: int, votes: Votes) -> bool | None:
    if (rated := slate.prefers(better, worse)) is not None:
        return rated
    texts = slate.responses[better], slate.responses[worse]
    chosen = votes.get((slate.prompt.user_id, content_key(slate.prompt.context, texts)))
    return None if chosen is None else chosen == texts[0]


def _first_failures(chains: pd.DataFrame) -> dict[str, str]:
    """pair_id → its most frequent kind of failure."""
    failed = chains[chains["failure"].notna()]
    return {str(name): str(kinds.mode().iat[0]) for name, kinds in failed.groupby("pair_id")["failure"]}


def _kind(slate: Slate, response: int, n: int, failures: Mapping[str, str]) -> str:
    pairs = [slate.pair(min(order), max(order)).pair_id for order in circle(n) if response in order]
    return next((failures[pair] for pair in pairs if pair in failures), "no chain")


def agreement(slates: Sequence[Slate], labels: Sequence[Label], draws: int, seed: int) -> dict[str, object]:
    """Share of labels that agree with the user, among those that can be compared; `ci95` over users."""
    known = [la for la in labels if la.right is not None]
    users = np.unique([slates[la.slate].prompt.user_id for la in known], return_inverse=True)
    hits = np.array([[float(bool(la.right))] for la in known]).reshape(-1, 1)
    return {
        "compared labels": len(known),
        "their users": len(users[0]),
        "agreement accuracy": accuracy(hits) if known else None,
        "agreement accuracy ci95": interval(hits, users[1], draws, seed) if known else None,
    }


def agreement_by_confidence(
    slates: Sequence[Slate], labelled: Labelled, draws: int, seed: int
) -> list[dict[str, object]]:
    """One row per quarter of the compared labels, the least confident first."""
    known = sorted((la for la in labelled.labels if la.right is not None), key=lambda la: la.margin)
    parts = [known[i * len(known) // BINS : (i + 1) * len(known) // BINS] for i in range(BINS)]
    return [
        {"mean confidence": float(np.mean([labelled.confidence(la) for la in part]))}
        | agreement(slates, part, draws, seed)
        for part in parts
        if part
    ]


def shown_match(slot: Slot, label: Label) -> Match:
    """A match of the circle with the chosen response: against the rejected one, else against another."""
    orders = [order for order in circle(slot.n) if label.chosen in order]
    order = next((order for order in orders if label.rejected in order), orders[0])
    return Match(slot.slate, min(order), max(order))
