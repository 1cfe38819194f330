"""Schemes that choose one of n candidates with a model that was trained on groups of two.

    circle      the circle of `scaling.groups`; the best mean score is chosen
    knockout    rounds of matches (0 against 1, 2 against 3, …); the winner plays on, an odd one waits.
                The final has twice the chains

Both cost 2n·(m + n_s) chains, with m own and n_s similar users' chains per position: a circle of n ≥ 3 has n
pairs, a knockout n − 1 matches of which one counts twice, and two candidates are one pair.  Every pair is
shown in both positions.  A match is won by the higher mean over both; without scores in both, or with equal
ones, the earlier candidate wins, which is a matter of chance if the candidates are in random order.

A slot is one slate with its first n candidates.  Smaller slots are the beginnings of larger ones, so that
they share chains.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd

from eval.ask.harness import CHOICE, Histories
from eval.studies.scaling_study import Ask, FindSimilar, Study, sample_pool
from pgenrm_train.records.slates import Slate
from pgenrm_train.scaling.combine import grid
from pgenrm_train.scaling.groups import Presentation, circle, merge


class Match(NamedTuple):
    """Two candidates of a slate, all by number; first < second."""

    slate: int
    first: int
    second: int


class Slot(NamedTuple):
    """The first `n` candidates of a slate."""

    slate: int
    n: int


class Choice(NamedTuple):
    """Number of the chosen candidate; `decided` is False if scores were equal or missing."""

    candidate: int
    decided: bool


# float (2, 2): positions × (first, second) of the match; position 0 shows the first of them first.
Scores = np.ndarray


class Play(Protocol):
    """Judges matches, with `times` as many chains as usual."""

    def __call__(self, matches: Collection[Match], times: int = 1) -> Mapping[Match, Scores]: ...


@dataclass
class Player:
    """Plays matches with the questions, answers and averages of an evaluation.

    `histories`: key of the slate → the history in its prompts.  `pools` keeps the chains of all calls.
    """

    slates: Sequence[Slate]
    histories: Histories
    ask: Ask
    find: FindSimilar | None
    ind: int = 1
    pro: int = 0
    weights: tuple[float, float] = (1.0, 1.0)
    pools: list[pd.DataFrame] = field(default_factory=list)

    def __call__(self, matches: Collection[Match], times: int = 1) -> Mapping[Match, Scores]:
        if not matches:
            return {}
        pairs = {match: self.slates[match.slate].pair(match.first, match.second) for match in sorted(matches)}
        histories = {
            pair.pair_id: self.histories[self.slates[match.slate].key] for match, pair in pairs.items()
        }
        study = Study(CHOICE, (self.ind * times,), (self.pro * times,), self.weights)
        pool = sample_pool(study, list(pairs.values()), histories, self.ask, self.find)
        self.pools.append(pool)
        table = grid(pool, study.ind, study.pro, study.weights).sort_values("order")
        by_pair = {
            pair_id: part[["score_chosen", "score_rejected"]].to_numpy(float)
            for pair_id, part in table.groupby("pair_id")
        }
        return {match: by_pair[pair.pair_id] for match, pair in pairs.items()}

    def chains(self) -> pd.DataFrame:
        """All distinct chains so far, with the columns of a pool."""
        every = pd.concat(self.pools, ignore_index=True)
        return every.drop_duplicates(["pair_id", "order", "source", "sample"], ignore_index=True)


def circles(slots: Iterable[Slot], play: Play) -> dict[Slot, np.ndarray]:
    """Mean scores (n,) of every slot, NaN for a candidate without a pair that has both positions."""
    shown = {slot: circle(slot.n) for slot in slots}
    scores = play({_match(slot, order) for slot, orders in shown.items() for order in orders})
    return {
        slot: merge(orders, np.array([_as_shown(scores[_match(slot, order)], order) for order in orders]))
        for slot, orders in shown.items()
    }


def _match(slot: Slot, order: Presentation) -> Match:
    return Match(slot.slate, min(order), max(order))


def _as_shown(scores: Scores, order: Presentation) -> np.ndarray:
    return scores[0] if order[0] < order[1] else scores[1][::-1]


def best(scores: np.ndarray) -> Choice:
    """The candidate with the highest score, the first of equal ones; the first of all without scores."""
    known = np.where(np.isfinite(scores), scores, -np.inf)
    top = int(known.argmax())
    return Choice(top, bool(np.isfinite(known[top]) and (known == known[top]).sum() == 1))


def knockouts(slots: Iterable[Slot], play: Play) -> dict[Slot, Choice]:
    """The winner of every slot's rounds; `decided` is that of its final."""
    left = {slot: list(range(slot.n)) for slot in slots}
    while rounds := {slot: entrants for slot, entrants in left.items() if len(entrants) > 2}:
        scores = play({match for slot, entrants in rounds.items() for match in _draw(slot, entrants)})
        for slot, entrants in rounds.items():
            winners = [_winner(match, scores[match]).candidate for match in _draw(slot, entrants)]
            left[slot] = winners + entrants[len(entrants) // 2 * 2 :]
    finals = {slot: Match(slot.slate, *entrants) for slot, entrants in left.items()}
    once = play({match for slot, match in finals.items() if slot.n == 2})
    twice = play({match for slot, match in finals.items() if slot.n > 2}, 2)
    return {slot: _winner(match, (once if slot.n == 2 else twice)[match]) for slot, match in finals.items()}


def _draw(slot: Slot, entrants: Sequence[int]) -> list[Match]:
    return [Match(slot.slate, *pair) for pair in zip(entrants[::2], entrants[1::2])]


def _winner(match: Match, scores: Scores) -> Choice:
    margin = float((scores[:, 0] - scores[:, 1]).mean())
    return Choice(match.second if margin < 0 else match.first, bool(margin < 0 or margin > 0))


def chains_of(n: int, ind: int, pro: int) -> int:
    """Chains of one choice among n candidates, under either scheme."""
    return len(circle(n)) * (ind + pro)
