"""The hard-negative curriculum: schedules, and the sampler that every rank can repeat (METHOD §5).

Hardness itself is in `hardness`.  The paper lets the share of hard negatives grow and gives no schedule.
Ours, with progress p = (t − 1)/(T − 1) at step t of T:

    target     h(t) = h0 + (h1 − h0)·f(p),  f = p (linear), (1 − cos πp)/2 (cosine), 1{p ≥ ½} (step),
               1 − p (anti, a control)
    self_paced h(t) = h1, and the hard pairs are those in the band of pass rates *now*: each trained group of
               chains updates its pair, r ← Σ γᵃ·passes / Σ γᵃ·chains, with γ = ½ and a the number of later
               groups
    uniform    hardness ignored (the control)
    others     of the remaining draws suspect pairs get w·n_suspect / (n_rest + w·n_suspect)

Deviations from a plain draw: inside a bucket the pairs come in shuffled rounds, so each is drawn once before
any is drawn twice.  User-balanced, the users of a bucket come in rounds, and each user's pairs in rounds of
their own.  The fractional part of a batch's target is carried to the next, so small batches have the shares
on average.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgenrm_train.config.grpo import SCHEDULES
from pgenrm_train.curriculum.decks import Decks, pack, unpack
from pgenrm_train.errors import ConfigError

HARD, REST, SUSPECT = "hard", "rest", "suspect"
MEMORY = 0.5  # γ: weight of an older group against the newest


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule of hard pairs: h0 (`start`), h1 (`end`) and w (`suspect_weight`).

    `band`: pass rates, both ends included, that make a pair hard under `self_paced`.
    """

    name: str = "uniform"
    start: float = 0.3
    end: float = 0.8
    band: tuple[float, float] = (0.25, 0.75)
    suspect_weight: float = 1.0

    def hard_share(self, progress: float) -> float:
        """Target share of hard pairs at `progress` in [0, 1].  Raises ConfigError for an unknown schedule.

        >>> Schedule("linear", start=0.3, end=0.8).hard_share(1.0)
        0.8
        """
        progress = min(max(progress, 0.0), 1.0)
        shapes = {
            "linear": progress,
            "cosine": (1.0 - math.cos(math.pi * progress)) / 2.0,
            "step": float(progress >= 0.5),
            "self_paced": 1.0,
            "uniform": 0.0,
            "anti": 1.0 - progress,
        }
        if self.name not in shapes:
            raise ConfigError(f"curriculum.schedule={self.name} is not one of {', '.join(SCHEDULES)}")
        return self.start + (self.end - self.start) * shapes[self.name]

    def warning(self, hard: Sequence[bool] | np.ndarray) -> str | None:
        """Warning if the schedule would draw fewer hard pairs than a uniform draw, else None."""
        natural = float(np.mean(hard))
        scheduled = float(np.mean([self.hard_share(progress) for progress in np.linspace(0, 1, 101)]))
        if self.name == "uniform" or natural <= scheduled + 1e-9:
            return None
        return (
            f"{natural:.0%} of the pairs are hard and curriculum.schedule={self.name} draws {scheduled:.0%} "
            "on average, fewer than without a schedule: narrow the band curriculum.hard_low … "
            "curriculum.hard_high, or raise curriculum.hard_share_start and curriculum.hard_share_end"
        )


@dataclass(frozen=True, slots=True)
class PairFacts:
    """Facts about N pairs, arrays of shape (N,) or None.

    `hard` and `suspect`: `hard` is needed by every schedule but `uniform`.  `users`: the user of each pair,
    for user-balanced draws.  `pass_rates` from `chains` chains each (NaN or None where unknown) start the
    online estimates.
    """

    hard: Sequence[bool] | np.ndarray | None = None
    suspect: Sequence[bool] | np.ndarray | None = None
    users: Sequence[str] | np.ndarray | None = None
    pass_rates: Sequence[float | None] | np.ndarray | None = None
    chains: int = 0


class Bucket:
    """Pairs that are drawn in the same way: users in rounds, and each user's pairs in rounds.

    One user for all pairs makes it plain rounds.
    """

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
        self.count = state["count"]


class CurriculumSampler:
    """Batches of pair indices with a scheduled share of hard ones.

    Set-up takes O(N log N), a draw O(1).  The sampler is a function of its arguments, the steps requested and
    the observations, so ranks with equal arguments agree.  `target` and `realised` are the shares of hard
    pairs in the latest batch (None under `uniform`), `drawn` the totals per bucket.  Raises ConfigError,
    before anything is drawn, for a bucket too small for the schedule.

    >>> sampler = CurriculumSampler(4, prompts_per_step=2, steps=2, seed=0)
    >>> sorted(sampler.next_batch(1) + sampler.next_batch(2))
    [0, 1, 2, 3]
    """

    def __init__(
        self,
        pairs: int,
        *,
        prompts_per_step: int,
        steps: int,
        seed: int,
        schedule: Schedule = Schedule(),
        facts: PairFacts = PairFacts(),
    ) -> None:
        if pairs < 1 or prompts_per_step < 1:
            raise ConfigError(
                f"a sampler needs pairs and prompts_per_step, got {pairs} and {prompts_per_step}"
            )
        schedule.hard_share(0.0)  # an unknown schedule fails here, before training
        self.pairs, self.prompts_per_step, self.steps, self.seed = pairs, prompts_per_step, steps, seed
        self.schedule, self.uniform = schedule, schedule.name == "uniform"
        self.self_paced = schedule.name == "self_paced"
        self.buckets = self._buckets(facts)
        if not self.uniform:
            self._check()
        self.chains, self.passes = self._evidence(facts)
        self.before = self.passes.copy(), self.chains.copy()  # the evidence at the start
        self.carry = {HARD: 0.0, SUSPECT: 0.0}
        self.target: float | None = None
        self.realised: float | None = None
        self.drawn = dict.fromkeys(self.buckets, 0)

    def _buckets(self, facts: PairFacts) -> dict[str, Bucket]:
        user_of = np.zeros(self.pairs, dtype=np.int32)
        if facts.users is not None:
            from pandas import factorize  # hashes, where numpy sorts all users

            user_of = factorize(np.asarray(facts.users), sort=True)[0].astype(np.int32)
        if self.uniform:
            return {REST: Bucket(user_of, np.ones(self.pairs, dtype=bool))}
        if facts.hard is None or len(facts.hard) != self.pairs:
            raise ConfigError(
                f"curriculum.schedule={self.schedule.name} needs the hardness of each of {self.pairs} pairs, "
                f"got {'none' if facts.hard is None else len(facts.hard)}"
            )
        hard = np.asarray(facts.hard, dtype=bool)
        suspect = ~hard & (False if facts.suspect is None else np.asarray(facts.suspect, dtype=bool))
        buckets = {HARD: Bucket(user_of, hard), REST: Bucket(user_of, ~hard & ~suspect)}
        return buckets | ({SUSPECT: Bucket(user_of, suspect)} if suspect.any() else {})

    def _check(self) -> None:
        ends = {"hard_share_start": self.schedule.start, "hard_share_end": self.schedule.end}
        for key, share in (ends | {"suspect_weight": self.schedule.suspect_weight}).items():
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"curriculum.{key}={share} must lie in [0, 1]")
        if self.self_paced:
            del ends["hard_share_start"]
        others = self.buckets[REST].count + (self._count(SUSPECT) if self.schedule.suspect_weight else 0)
        most, least = max(ends, key=ends.__getitem__), min(ends, key=ends.__getitem__)
        self._check_bucket(HARD, self.buckets[HARD].count, ends[most], "widen", f"lower curriculum.{most}")
        self._check_bucket("not hard", others, 1 - ends[least], "narrow", f"raise curriculum.{least}")

    def _check_bucket(self, name: str, have: int, share: float, widen: str, change: str) -> None:
        """Refuse a bucket from which a batch would need a pair twice."""
        needed, (low, high) = math.ceil(share * self.prompts_per_step - 1e-9), self.schedule.band
        if have < needed:
            raise ConfigError(
                f"{have} of {self.pairs} pairs are {name} and a batch of "
                f"curriculum.schedule={self.schedule.name} needs {needed}: {widen} the band "
                f"curriculum.hard_low={low:g} … curriculum.hard_high={high:g}, raise curriculum.rows, "
                f"{change}, or use curriculum.schedule=uniform"
            )

    def _evidence(self, facts: PairFacts) -> tuple[np.ndarray, np.ndarray]:
        """(chains, passes) behind each estimate, decayed counts of shape (N,)."""
        given = np.full(self.pairs, np.nan) if facts.pass_rates is None else facts.pass_rates
        rates = np.array(given, dtype=float)  # None becomes NaN
        if np.any((rates < 0) | (rates > 1)):
            raise ConfigError(
                f"pass rates must lie in [0, 1], got {np.nanmin(rates):g} … {np.nanmax(rates):g}"
            )
        chains = np.where(np.isfinite(rates), facts.chains, 0).astype(np.float32)
        return chains, (facts.chains * np.nan_to_num(rates)).astype(np.float32)

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
        """Number of pairs per bucket in the batch of `step`."""
        size = self.prompts_per_step
        if self.uniform:
            return {REST: size}
        self.target = self.schedule.hard_share((step - 1) / max(self.steps - 1, 1))
        weighted = self.schedule.suspect_weight * self._count(SUSPECT)
        others = self._count(REST) + weighted
        available = self.buckets[HARD].count
        if not others:
            hard = size if available else 0
        else:
            # A moving band may hold fewer pairs than the target needs.
            hard = self._whole(HARD, self.target * size, min(size, available) if self.self_paced else size)
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
        """Update the estimates from new groups, (pair, passes, chains) in the batch's order.

        `self_paced` moves their pairs to other buckets.
        """
        for pair, passes, chains in groups:
            self.passes[pair] = MEMORY * self.passes[pair] + passes
            self.chains[pair] = MEMORY * self.chains[pair] + chains
            if self.self_paced:
                self._resort(pair)

    def _resort(self, pair: int) -> None:
        before, rate = self.bucket_of(pair), self.passes[pair] / self.chains[pair]
        low, high = self.schedule.band
        after = HARD if low <= rate <= high else SUSPECT if before == SUSPECT and rate < low else REST
        if after != before:
            self.buckets[before].remove(pair)
            self.buckets[after].add(pair)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state from which `load_state_dict` continues as if uninterrupted."""
        changed = np.flatnonzero((self.passes != self.before[0]) | (self.chains != self.before[1]))
        evidence = (changed, self.passes[changed], self.chains[changed])
        return {
            "buckets": {name: bucket.state_dict() for name, bucket in self.buckets.items()},
            "evidence": pack(*evidence, kind="<f8"),
            "carry": dict(self.carry),
            "target": self.target,
            "realised": self.realised,
            "drawn": dict(self.drawn),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a sampler with the same arguments.

        Raises ConfigError if its buckets differ.
        """
        if set(state["buckets"]) != set(self.buckets):
            raise ConfigError(
                f"the saved sampler has buckets {sorted(state['buckets'])} and this one "
                f"{sorted(self.buckets)}; the hardness of the pairs has changed, so use another run_dir"
            )
        for name, bucket in self.buckets.items():
            bucket.load_state_dict(state["buckets"][name])
        self.passes[:], self.chains[:] = self.before
        pairs, passes, chains = unpack(state["evidence"], 3, "<f8")
        self.passes[pairs.astype(int)], self.chains[pairs.astype(int)] = passes, chains
        self.carry, self.drawn = dict(state["carry"]), dict(state["drawn"])
        self.target, self.realised = state["target"], state["realised"]
