"""The hard-negative curriculum: schedules and the sampler that every rank can repeat (METHOD §5; hardness itself: `hardness`).

The paper says that the share of hard negatives grows and gives no schedule.  Ours, with progress p = (t − 1)/(T − 1) at step t of T:

    target     h(t) = h0 + (h1 − h0)·f(p),  f = p (linear), (1 − cos πp)/2 (cosine), 1{p ≥ ½} (step), 1 − p (anti, a control)
    self_paced h(t) = h1, and hard is what lies in the band of pass rates *now*: each group of chains that was trained on updates
               its pair, r ← Σ γᵃ·passes / Σ γᵃ·chains with γ = ½ and a the number of later groups
    uniform    hardness ignored (the control)
    others     of the remaining draws suspect pairs get w·n_suspect / (n_rest + w·n_suspect)

Deviations from a plain draw: inside a bucket the pairs come in shuffled rounds, so each is seen once before any is seen twice;
user-balanced, the users of a bucket come in rounds and each user's pairs in rounds of their own.  The fractional part of a batch's
target is carried to the next, so small batches hold the shares on average.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pgenrm_train.curriculum.decks import Decks
from pgenrm_train.errors import ConfigError

SCHEDULES = ("linear", "cosine", "step", "self_paced", "uniform", "anti")
HARD, REST, SUSPECT = "hard", "rest", "suspect"
MEMORY = 0.5  # γ: what an older group counts against the newest


def hard_share(schedule: str, progress: float, start: float, end: float) -> float:
    """Target share of hard pairs at `progress` in [0, 1] of the stage.  Raises ConfigError for an unknown schedule."""
    progress = min(max(progress, 0.0), 1.0)
    shapes = {
        "linear": progress,
        "cosine": (1.0 - math.cos(math.pi * progress)) / 2.0,
        "step": float(progress >= 0.5),
        "self_paced": 1.0,
        "uniform": 0.0,
        "anti": 1.0 - progress,
    }
    if schedule not in shapes:
        raise ConfigError(f"curriculum.schedule={schedule} is not one of {', '.join(SCHEDULES)}")
    return start + (end - start) * shapes[schedule]


def too_common(schedule: str, hard: Sequence[bool] | np.ndarray, start: float, end: float) -> str | None:
    """A sentence when more pairs are hard than the schedule asks for on average, so that it draws fewer of them than none would."""
    natural, asked = (
        float(np.mean(hard)),
        float(np.mean([hard_share(schedule, p, start, end) for p in np.linspace(0, 1, 101)])),
    )
    if schedule == "uniform" or natural <= asked + 1e-9:
        return None
    return (
        f"{natural:.0%} of the pairs are hard and curriculum.schedule={schedule} draws {asked:.0%} on average, fewer than without a schedule: "
        "narrow the band curriculum.hard_low … curriculum.hard_high, or raise curriculum.hard_share_start and curriculum.hard_share_end"
    )


class Bucket:
    """Pairs that are drawn alike: users in rounds, and each user's pairs in rounds.  One user for all makes it plain rounds."""

    def __init__(self, user_of: np.ndarray, members: np.ndarray) -> None:
        self.user_of, self.count = user_of, int(members.sum())
        self.pairs = Decks(user_of, members)
        users = np.zeros(int(user_of.max()) + 1, dtype=bool)
        users[user_of[members]] = True
        self.users = Decks(np.zeros(len(users), dtype=np.int32), users)

    def draw(self, rng: random.Random) -> int:
        return self.pairs.deal(self.users.deal(0, rng.random()), rng.random())

    def add(self, pair: int) -> None:
        user = int(self.user_of[pair])
        if not self.pairs.size(user):
            self.users.add(user)
        self.pairs.add(pair)
        self.count += 1

    def remove(self, pair: int) -> None:
        user = int(self.user_of[pair])
        self.pairs.remove(pair)
        self.count -= 1
        if not self.pairs.size(user):
            self.users.remove(user)

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": self.pairs.state_dict(), "users": self.users.state_dict(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs.load_state_dict(state["pairs"])
        self.users.load_state_dict(state["users"])
        self.count = int(state["count"])


class CurriculumSampler:
    """Batches of pair indices with a scheduled share of hard ones; O(1) a draw after a set-up of O(N log N).

    hard, suspect: shape (N,), needed by every schedule but `uniform`.  users: shape (N,), the user of each pair, for user-balanced
    draws.  pass_rates with `chains` behind each (NaN where unknown) start the online estimates.  band: pass rates, both ends
    included, that make a pair hard under `self_paced`.

    The sampler is a function of its arguments, the steps asked and the observations made, so ranks that build it alike agree.
    `target` and `realised` hold the shares of hard pairs in the latest batch (None under `uniform`), `drawn` the totals.
    Raises ConfigError, before anything is drawn, for a bucket too small for the schedule.
    """

    def __init__(
        self,
        pairs: int,
        *,
        prompts_per_step: int,
        steps: int,
        seed: int,
        schedule: str = "uniform",
        hard: Sequence[bool] | np.ndarray | None = None,
        suspect: Sequence[bool] | np.ndarray | None = None,
        suspect_weight: float = 1.0,
        users: Sequence[Any] | np.ndarray | None = None,
        pass_rates: Sequence[float | None] | np.ndarray | None = None,
        chains: int = 0,
        band: tuple[float, float] = (0.25, 0.75),
        start: float = 0.3,
        end: float = 0.8,
    ) -> None:
        if pairs < 1 or prompts_per_step < 1:
            raise ConfigError(
                f"a sampler needs pairs and prompts_per_step, got {pairs} and {prompts_per_step}"
            )
        hard_share(schedule, 0.0, start, end)  # an unknown schedule fails here, before training
        self.pairs, self.prompts_per_step, self.steps, self.seed = pairs, prompts_per_step, steps, seed
        self.schedule, self.start, self.end, self.band = schedule, start, end, band
        self.suspect_weight = suspect_weight
        self.buckets = self._buckets(hard, suspect, users)
        self._check()
        self.chains, self.passes = self._evidence(pass_rates, chains)
        self.before: dict[int, tuple[float, float]] = {}  # observed pair → its evidence at the start
        self.carry = {HARD: 0.0, SUSPECT: 0.0}
        self.target: float | None = None
        self.realised: float | None = None
        self.drawn = dict.fromkeys(self.buckets, 0)

    def _buckets(self, hard: Any, suspect: Any, users: Any) -> dict[str, Bucket]:
        user_of = np.zeros(self.pairs, dtype=np.int32)
        if users is not None:
            user_of = np.unique(np.asarray(users), return_inverse=True)[1].astype(np.int32)
        if self.schedule == "uniform":
            return {REST: Bucket(user_of, np.ones(self.pairs, dtype=bool))}
        if hard is None or len(hard) != self.pairs:
            got = "none" if hard is None else str(len(hard))
            raise ConfigError(
                f"curriculum.schedule={self.schedule} needs the hardness of each of {self.pairs} pairs, got {got}"
            )
        is_hard = np.asarray(hard, dtype=bool)
        is_suspect = (
            np.zeros(self.pairs, dtype=bool) if suspect is None else np.asarray(suspect, dtype=bool)
        ) & ~is_hard
        found = {HARD: Bucket(user_of, is_hard), REST: Bucket(user_of, ~is_hard & ~is_suspect)}
        return found | ({SUSPECT: Bucket(user_of, is_suspect)} if is_suspect.any() else {})

    def _check(self) -> None:
        if self.schedule == "uniform":
            return
        ends = {"hard_share_start": self.start, "hard_share_end": self.end}
        for key, share in (ends | {"suspect_weight": self.suspect_weight}).items():
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"curriculum.{key}={share} must lie in [0, 1]")
        if self.schedule == "self_paced":
            del ends["hard_share_start"]
        others = self.buckets[REST].count + (self._count(SUSPECT) if self.suspect_weight else 0)
        most, least = max(ends, key=ends.__getitem__), min(ends, key=ends.__getitem__)
        self._check_bucket(HARD, self.buckets[HARD].count, ends[most], "widen", f"lower curriculum.{most}")
        self._check_bucket("other", others, 1 - ends[least], "narrow", f"raise curriculum.{least}")

    def _check_bucket(self, name: str, have: int, share: float, widen: str, change: str) -> None:
        """A batch must not need a pair twice."""
        needed = math.ceil(share * self.prompts_per_step - 1e-9)
        if have < needed:
            raise ConfigError(
                f"{have} of {self.pairs} pairs are {name} and a batch of curriculum.schedule={self.schedule} needs {needed}: {widen} the "
                f"band curriculum.hard_low={self.band[0]:g} … curriculum.hard_high={self.band[1]:g}, raise curriculum.rows, {change}, "
                "or use curriculum.schedule=uniform"
            )

    def _evidence(self, pass_rates: Any, chains: int) -> tuple[np.ndarray, np.ndarray]:
        """(chains, passes) behind each estimate, decayed counts of shape (N,)."""
        counts, passes = np.zeros(self.pairs, dtype=np.float32), np.zeros(self.pairs, dtype=np.float32)
        if pass_rates is not None:
            rates = np.array([np.nan if rate is None else rate for rate in pass_rates], dtype=float)
            if np.any((rates < 0) | (rates > 1)):
                raise ConfigError(
                    f"pass rates must lie in [0, 1], got {np.nanmin(rates):g} … {np.nanmax(rates):g}"
                )
            known = np.isfinite(rates)
            counts[known], passes[known] = chains, chains * rates[known]
        return counts, passes

    def _count(self, name: str) -> int:
        return self.buckets[name].count if name in self.buckets else 0

    def pass_rate(self, pair: int) -> float | None:
        """The current estimate; None for a pair without evidence."""
        return float(self.passes[pair] / self.chains[pair]) if self.chains[pair] else None

    def bucket_of(self, pair: int) -> str:
        return next(name for name, bucket in self.buckets.items() if pair in bucket.pairs)

    def next_batch(self, step: int) -> list[int]:
        """Indices of the `prompts_per_step` pairs of `step` (counted from 1), in a seeded order."""
        rng = random.Random(f"{self.seed}/curriculum/{step}")
        batch = []
        for name, count in self._mix(step).items():
            batch += [self.buckets[name].draw(rng) for _ in range(count)]
            self.drawn[name] += count
        rng.shuffle(batch)  # mini-batches hold the mix too
        return batch

    def _mix(self, step: int) -> dict[str, int]:
        """How many pairs of each bucket the batch of `step` takes."""
        size = self.prompts_per_step
        if self.schedule == "uniform":
            return {REST: size}
        progress = (step - 1) / max(self.steps - 1, 1)
        self.target = hard_share(self.schedule, progress, self.start, self.end)
        weighted = self.suspect_weight * self._count(SUSPECT)
        others = self._count(REST) + weighted
        available = self.buckets[HARD].count
        if not others:
            hard = size if available else 0
        else:  # a moving band may hold fewer pairs than the target asks for
            hard = self._whole(
                HARD, self.target * size, min(size, available) if self.schedule == "self_paced" else size
            )
        self.realised = hard / size
        doubtful = self._whole(SUSPECT, (size - hard) * weighted / others, size - hard) if weighted else 0
        if not self._count(REST):
            doubtful = size - hard
        return {HARD: hard, REST: size - hard - doubtful} | ({SUSPECT: doubtful} if doubtful else {})

    def _whole(self, name: str, wanted: float, limit: int) -> int:
        """`wanted` as a whole number of at most `limit`; the fraction is carried to the next batch."""
        wanted += self.carry[name]
        count = min(max(round(wanted), 0), limit)
        self.carry[name] = wanted - count if abs(wanted - count) < 1 else 0.0
        return count

    def observe(self, groups: Iterable[tuple[int, float, int]]) -> None:
        """Learn from the groups just rolled out, (pair, passes, chains) in the batch's order; `self_paced` re-sorts their pairs."""
        for pair, passes, chains in groups:
            self.before.setdefault(pair, (float(self.passes[pair]), float(self.chains[pair])))
            self.passes[pair] = MEMORY * self.passes[pair] + passes
            self.chains[pair] = MEMORY * self.chains[pair] + chains
            if self.schedule == "self_paced":
                self._resort(pair)

    def _resort(self, pair: int) -> None:
        before, rate = self.bucket_of(pair), self.passes[pair] / self.chains[pair]
        low, high = self.band
        after = HARD if low <= rate <= high else SUSPECT if before == SUSPECT and rate < low else REST
        if after != before:
            self.buckets[before].remove(pair)
            self.buckets[after].add(pair)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` needs to draw the next batch as if nothing had happened."""
        return {
            "buckets": {name: bucket.state_dict() for name, bucket in self.buckets.items()},
            "evidence": [
                [pair, float(self.passes[pair]), float(self.chains[pair])] for pair in sorted(self.before)
            ],
            "carry": dict(self.carry),
            "target": self.target,
            "realised": self.realised,
            "drawn": dict(self.drawn),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which a sampler of the same arguments gave.  Raises ConfigError when its buckets are others."""
        if set(state["buckets"]) != set(self.buckets):
            raise ConfigError(
                f"the sampler's state has buckets {sorted(state['buckets'])}, and this one {sorted(self.buckets)}"
            )
        for name, bucket in self.buckets.items():
            bucket.load_state_dict(state["buckets"][name])
        for pair, (passes, chains) in self.before.items():
            self.passes[pair], self.chains[pair] = passes, chains
        self.before = {
            pair: (float(self.passes[pair]), float(self.chains[pair])) for pair, _, _ in state["evidence"]
        }
        for pair, passes, chains in state["evidence"]:
            self.passes[pair], self.chains[pair] = passes, chains
        self.carry, self.drawn = dict(state["carry"]), dict(state["drawn"])
        self.target, self.realised = state["target"], state["realised"]
