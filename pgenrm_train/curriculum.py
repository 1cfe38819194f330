"""The hard-negative curriculum: hardness, schedules and the sampler that every rank can repeat (METHOD §5).

The paper says that the share of hard negatives grows and gives neither a definition nor a schedule.  Ours:

    pass rate  r_i = share of K sampled chains of the current model that rank chosen above rejected
    hard       low ≤ r_i ≤ high: the model wavers;   suspect  r_i < low: it contradicts the vote, chain after chain
    target     h(t) = h0 + (h1 − h0)·f(t/T),  f = t (linear), (1 − cos πt)/2 (cosine), 1{t ≥ ½} (step);
               uniform ignores hardness

Why a band and not "the lowest pass rates": those are chosen by the *label*.  A batch full of pairs that the model gets wrong is a
batch in which its evidence points the wrong way, and to learn from that mix is to learn to distrust one's own reading; measured,
it cost 2.5 points (docs/curriculum.md).  To waver does not depend on which response was chosen.  Suspect pairs, noisy votes among
them, keep their natural share among the rest.

Deviations from a plain draw: inside a bucket the pairs come in shuffled rounds, so each is seen once before any is seen twice,
and the fractional part of a batch's target is carried to the next, so small batches hold the share on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pgenrm_train.errors import ConfigError

SCHEDULES = ("linear", "cosine", "step", "uniform")


def checked_rates(pass_rates: Sequence[float | None]) -> np.ndarray:
    """Pass rates, shape (N,), in [0, 1]; NaN where a pair was not measured.  Raises ConfigError outside [0, 1]."""
    rates = np.array([np.nan if rate is None else rate for rate in pass_rates], dtype=float)
    if np.any((rates < 0) | (rates > 1)):
        raise ConfigError(f"pass rates must lie in [0, 1], got {np.nanmin(rates):g} … {np.nanmax(rates):g}")
    return rates


def hard_share(schedule: str, progress: float, start: float, end: float) -> float:
    """Target share of hard pairs at `progress` in [0, 1] of the stage."""
    progress = min(max(progress, 0.0), 1.0)
    shapes = {
        "linear": progress,
        "cosine": (1.0 - math.cos(math.pi * progress)) / 2.0,
        "step": float(progress >= 0.5),
        "uniform": 0.0,
    }
    if schedule not in shapes:
        raise ConfigError(f"curriculum.schedule={schedule} is not one of {', '.join(SCHEDULES)}")
    return start + (end - start) * shapes[schedule]


class Rounds:
    """An endless draw from `items`: round k is a permutation seeded by (seed, name, k).  O(1) a draw, amortised.

    The state is two integers: nothing else is needed to go on exactly.
    """

    def __init__(self, items: np.ndarray, seed: int, name: int) -> None:
        self.items, self.seed, self.name = items, seed, name
        self.round, self.position = 0, 0
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng((self.seed, self.name, self.round)).permutation(len(self.items))

    def draw(self, count: int) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < count:
            if self.position == len(self.items):
                self.round, self.position = self.round + 1, 0
                self._order = self._shuffled()
            take = self._order[self.position : self.position + count - len(drawn)]
            drawn += [int(i) for i in self.items[take]]
            self.position += len(take)
        return drawn

    def state_dict(self) -> dict[str, int]:
        return {"round": self.round, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.round, self.position = int(state["round"]), int(state["position"])
        self._order = self._shuffled()


class CurriculumSampler:
    """Batches of pair indices with a scheduled share of hard ones.

    pass_rates: one a pair in [0, 1], None where unknown (counts as not hard); unused under `uniform`, where all pairs are one
    bucket.  The sampler is a function of its arguments and of the number of batches drawn, so ranks that build it alike agree.
    `target` and `realised` hold the shares of the latest batch, `drawn` the totals.  Raises ConfigError when a bucket is empty.
    """

    def __init__(
        self,
        pairs: int,
        *,
        prompts_per_step: int,
        steps: int,
        seed: int,
        schedule: str = "uniform",
        pass_rates: Sequence[float | None] | None = None,
        hard_low: float = 0.25,
        hard_high: float = 0.75,
        start: float = 0.3,
        end: float = 0.8,
    ) -> None:
        if pairs < 1 or prompts_per_step < 1:
            raise ConfigError(f"a sampler needs pairs and prompts_per_step, got {pairs} and {prompts_per_step}")
        self.prompts_per_step, self.steps = prompts_per_step, steps
        self.schedule, self.start, self.end = schedule, start, end
        hard_share(schedule, 0.0, start, end)  # an unknown schedule fails here, before training
        hard = self._hard_mask(pairs, pass_rates, hard_low, hard_high)
        self.is_hard = hard
        everything = np.arange(pairs)
        self.hard = Rounds(everything[hard], seed, 1)
        self.other = Rounds(everything[~hard], seed, 0)
        self.carry = 0.0
        self.target, self.realised = 0.0, 0.0
        self.drawn = {"hard": 0, "other": 0}

    def _hard_mask(self, pairs: int, pass_rates: Sequence[float | None] | None, low: float, high: float) -> np.ndarray:
        if self.schedule == "uniform":
            return np.zeros(pairs, dtype=bool)
        for key, share in (("hard_share_start", self.start), ("hard_share_end", self.end)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"curriculum.{key}={share} must lie in [0, 1]")
        if pass_rates is None or len(pass_rates) != pairs:
            got = "none" if pass_rates is None else str(len(pass_rates))
            raise ConfigError(f"curriculum.schedule={self.schedule} needs a pass rate for each of {pairs} pairs, got {got}")
        rates = checked_rates(pass_rates)
        hard = (rates >= low) & (rates <= high)
        counted = f"{int(hard.sum())} of {len(hard)} pairs are hard between curriculum.hard_low={low:g} and hard_high={high:g}"
        if max(self.start, self.end) > 0 and not hard.any():
            raise ConfigError(
                f"{counted}, and curriculum.schedule={self.schedule} asks for some: widen the band, or use schedule=uniform"
            )
        if min(self.start, self.end) < 1 and hard.all():
            raise ConfigError(
                f"{counted}, and curriculum.schedule={self.schedule} asks for others too: narrow the band, or use schedule=uniform"
            )
        return hard

    def next_batch(self, step: int) -> list[int]:
        """Indices of the `prompts_per_step` pairs of `step` (counted from 1), in a seeded order."""
        if self.schedule == "uniform":
            self.drawn["other"] += self.prompts_per_step
            return self.other.draw(self.prompts_per_step)
        progress = (step - 1) / max(self.steps - 1, 1)
        self.target = hard_share(self.schedule, progress, self.start, self.end)
        wanted = self.target * self.prompts_per_step + self.carry
        count = min(max(round(wanted), 0), self.prompts_per_step)
        self.carry = wanted - count
        self.realised = count / self.prompts_per_step
        self.drawn["hard"] += count
        self.drawn["other"] += self.prompts_per_step - count
        return self.hard.draw(count) + self.other.draw(self.prompts_per_step - count)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` needs to draw the next batch as if nothing had happened."""
        return {
            "hard": self.hard.state_dict(),
            "other": self.other.state_dict(),
            "carry": self.carry,
            "target": self.target,
            "realised": self.realised,
            "drawn": dict(self.drawn),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.hard.load_state_dict(state["hard"])
        self.other.load_state_dict(state["other"])
        self.carry, self.target, self.realised = state["carry"], state["target"], state["realised"]
        self.drawn = dict(state["drawn"])
