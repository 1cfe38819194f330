"""Properties of the curriculum's sampler: mix, reach, determinism, exact resume."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgenrm_train.curriculum.decks import unpack
from pgenrm_train.curriculum.sampler import (
    HARD,
    REST,
    SCHEDULES,
    SUSPECT,
    CurriculumSampler,
    PairFacts,
    Schedule,
)
from pgenrm_train.errors import ConfigError

PAIRS, BATCH, STEPS = 60, 8, 40
HARD_ONES = np.arange(PAIRS) % 3 == 0
FEW = [True] * 6 + [False] * 54
SUSPECTS = np.arange(PAIRS) % 5 == 1
USERS = [f"u{min(i // 2, 9)}" for i in range(PAIRS)]  # nine users of two pairs, one of the other 42


def sampler(schedule: str = "linear", **changed: Any) -> CurriculumSampler:
    """A sampler of PAIRS pairs; `changed`: fields of Schedule and PairFacts, and arguments of the sampler."""

    def fields(kind: type, **defaults: Any) -> dict[str, Any]:
        return defaults | {name: changed.pop(name) for name in list(changed) if name in kind.__annotations__}

    shares = fields(Schedule, suspect_weight=0.5, start=0.2, end=0.8)
    facts = PairFacts(**fields(PairFacts, hard=HARD_ONES, suspect=SUSPECTS))
    shape = {"prompts_per_step": BATCH, "steps": STEPS, "seed": 3} | changed
    return CurriculumSampler(PAIRS, schedule=Schedule(schedule, **shares), facts=facts, **shape)


def passes(pair: int, step: int) -> int:
    """A model that learns: passes among 4 chains of a pair at a step."""
    return min(4, (pair * 7 + step // 4) % 6)


def run(drawn: CurriculumSampler, steps: range) -> list[list[int]]:
    """Draw and observe as the trainer does."""
    batches = []
    for step in steps:
        batches.append(drawn.next_batch(step))
        drawn.observe((pair, passes(pair, step), 4) for pair in batches[-1])
    return batches


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [("linear", (0.3, 0.8)), ("cosine", (0.3, 0.8)), ("step", (0.3, 0.8)), ("anti", (0.8, 0.3))],
)
def test_share_runs_from_start_to_end_without_turning(schedule: str, ends: tuple[float, float]) -> None:
    shares = [Schedule(schedule, 0.3, 0.8).hard_share(t / 50) for t in range(51)]
    assert (shares[0], shares[-1]) == pytest.approx(ends)
    direction = 1 if ends[0] < ends[1] else -1
    assert all(direction * a <= direction * b + 1e-12 for a, b in pairwise(shares))


def test_unknown_schedule_is_named_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="linear, cosine, step, self_paced, uniform, anti"):
        sampler("sudden")


@pytest.mark.parametrize(
    ("schedule", "share", "text"),
    [
        (
            "linear",
            0.73,
            r"73% of the pairs are hard and .*=linear draws 55% on average, fewer than without .*: narrow",
        ),
        ("linear", 0.55, None),
        ("self_paced", 0.73, None),
        ("self_paced", 0.9, "90% .* draws 80%"),
        ("uniform", 0.9, None),
    ],
)
def test_a_schedule_that_draws_fewer_hard_pairs_than_none_is_warned_of(
    schedule: str, share: float, text: str | None
) -> None:
    warning = Schedule(schedule, 0.3, 0.8).warning(np.arange(100) < round(100 * share))
    assert warning is None if text is None else re.match(text, warning or "")


@settings(max_examples=60)
@given(
    schedule=st.sampled_from(SCHEDULES),
    cut=st.integers(1, STEPS - 1),
    second=st.integers(0, STEPS),
    seed=st.integers(0, 2**40),
    balanced=st.booleans(),
)
def test_a_resumed_sampler_draws_what_an_uninterrupted_one_would(
    schedule: str, cut: int, second: int, seed: int, balanced: bool
) -> None:
    """Killed after `cut` steps and again after `second` more, from states that went through JSON."""
    shape: dict[str, Any] = {
        "seed": seed,
        "users": USERS if balanced else None,
        "pass_rates": [0.5] * PAIRS,
        "chains": 4,
    }
    whole = sampler(schedule, **shape)
    expected = run(whole, range(1, STEPS + 1))
    ends = [cut, min(cut + second, STEPS)]
    state, done, batches = None, 0, []
    for end in [*ends, STEPS]:
        resumed = sampler(schedule, **shape)
        if state is not None:
            resumed.load_state_dict(json.loads(state))
        batches += run(resumed, range(done + 1, end + 1))
        state, done = json.dumps(resumed.state_dict()), end
    assert batches == expected
    assert resumed.state_dict() == whole.state_dict()


def test_a_state_of_an_older_version_is_read() -> None:
    """There, moved cards, borders and evidence are lists of rows, not packed columns."""
    drawn = sampler("self_paced", seed=3)
    rows = {"order": (2, "<i4"), "borders": (3, "<i4"), "evidence": (3, "<f8")}
    run(drawn, range(1, 4))

    def older(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        return {
            name: unpack(part, *rows[name]).T.tolist() if name in rows else older(part)
            for name, part in state.items()
        }

    state = json.loads(json.dumps(older(drawn.state_dict())))
    assert all(len(row) == 3 for row in state["evidence"]) and state["evidence"]
    resumed = sampler("self_paced", seed=3)
    resumed.load_state_dict(state)
    assert run(resumed, range(4, 20)) == run(drawn, range(4, 20))


def test_a_sampler_that_has_drawn_can_be_set_back() -> None:
    """The trainer's sampler never is, but a state must not depend on what its loader did before."""
    drawn = sampler("self_paced")
    run(drawn, range(1, 4))
    state = json.loads(json.dumps(drawn.state_dict()))
    expected = run(drawn, range(4, 20))
    drawn.load_state_dict(state)
    assert run(drawn, range(4, 20)) == expected


@settings(max_examples=60)
@given(
    schedule=st.sampled_from(["linear", "cosine", "step", "anti"]),
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 20),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    balanced=st.booleans(),
)
def test_realised_mix_follows_the_target(
    schedule: str, seed: int, batch: int, ends: tuple[float, float], balanced: bool
) -> None:
    """To within one pair over any number of steps: the fractions are carried, never lost."""
    drawn = sampler(
        schedule,
        seed=seed,
        prompts_per_step=batch,
        start=ends[0],
        end=ends[1],
        users=USERS if balanced else None,
    )
    wanted = realised = 0.0
    for step in range(1, STEPS + 1):
        pairs = drawn.next_batch(step)
        assert drawn.target is not None and drawn.realised is not None
        wanted += drawn.target * batch
        realised += sum(HARD_ONES[i] for i in pairs)
        assert len(pairs) == batch
        assert sum(HARD_ONES[i] for i in pairs) == round(drawn.realised * batch)
        assert abs(wanted - realised) <= 0.5 + 1e-6


def test_suspects_are_drawn_by_their_weight() -> None:
    steps, doubtful = 600, SUSPECTS & ~HARD_ONES
    rest = ~SUSPECTS & ~HARD_ONES
    for weight in (1.0, 0.5, 0.0):
        drawn = sampler(steps=steps, suspect_weight=weight)
        counts = Counter(i for step in range(1, steps + 1) for i in drawn.next_batch(step))
        of_suspects = sum(counts[i] for i in np.flatnonzero(doubtful)) / doubtful.sum()
        of_rest = sum(counts[i] for i in np.flatnonzero(rest)) / rest.sum()
        assert of_suspects == pytest.approx(weight * of_rest, rel=0.02)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pair_is_reached(schedule: str, balanced: bool) -> None:
    drawn, counts = sampler(schedule, steps=400, users=USERS if balanced else None), Counter()
    for batch in run(drawn, range(1, 401)):
        counts.update(batch)
    assert set(counts) == set(range(PAIRS))
    if schedule == "uniform" and not balanced:
        assert max(counts.values()) - min(counts.values()) <= 1, "none twice before all once"


def test_users_take_turns() -> None:
    drawn = sampler("uniform", users=USERS)
    counts = Counter(USERS[i] for step in range(1, STEPS + 1) for i in drawn.next_batch(step))
    assert max(counts.values()) - min(counts.values()) <= 1
    plain = sampler("uniform")
    assert (
        Counter(USERS[i] for step in range(1, STEPS + 1) for i in plain.next_batch(step))["u9"]
        > 5 * counts["u9"]
    )


def test_self_paced_draws_what_wavers_now() -> None:
    drawn = sampler(
        "self_paced",
        suspect=None,
        hard=[True] * 30 + [False] * 30,
        pass_rates=[0.5] * 30 + [1.0] * 30,
        chains=4,
    )
    first = drawn.next_batch(1)
    learnt = [i for i in first if i < 30]
    drawn.observe(
        (i, 4, 4) for i in learnt
    )  # with the mined half, 6 of 6·½ … : rate (1 + 4) / (2 + 4) > 0.75
    assert drawn.pass_rate(learnt[0]) == pytest.approx(5 / 6)
    assert [drawn.bucket_of(i) for i in learnt] == [REST] * len(learnt)
    drawn.observe([(learnt[0], 0, 4)])
    assert drawn.bucket_of(learnt[0]) == HARD, "forgotten again"
    assert drawn.buckets[HARD].count == 30 - len(learnt) + 1


def test_self_paced_fills_up_with_others_when_the_band_is_empty() -> None:
    drawn = sampler("self_paced")
    for step in range(1, 60):
        drawn.observe((i, 4, 4) for i in drawn.next_batch(step))  # everything is learnt
    assert drawn.buckets[HARD].count == 0
    assert len(drawn.next_batch(60)) == BATCH
    assert (drawn.target, drawn.realised) == (0.8, 0.0)


def test_when_all_is_learnt_or_doubtful_training_continues() -> None:
    drawn = sampler(
        "self_paced", hard=[True] * 30 + [False] * 30, suspect=[False] * 32 + [True] * 28, suspect_weight=0.0
    )
    for step in range(1, 80):
        batch = drawn.next_batch(step)
        drawn.observe((i, 4, 4) for i in batch)
        assert len(batch) == BATCH and max(batch) < 32, "weight 0: no suspect pair while there are others"


def test_other_schedules_keep_what_was_measured_and_still_estimate() -> None:
    drawn = sampler("linear")
    drawn.observe([(0, 4, 4), (0, 2, 4)])
    assert drawn.bucket_of(0) == HARD
    assert drawn.pass_rate(0) == pytest.approx((0.5 * 4 + 2) / (0.5 * 4 + 4))
    assert drawn.pass_rate(1) is None


def test_seeds_differ_and_ranks_agree() -> None:
    assert sampler().next_batch(1) == sampler().next_batch(1)
    assert sampler().next_batch(1) != sampler(seed=4).next_batch(1)


def test_mini_batches_hold_the_mix() -> None:
    batch = sampler(prompts_per_step=20, start=0.5, end=0.5).next_batch(1)
    assert 0 < sum(HARD_ONES[i] for i in batch[:10]) < 10, "hard pairs do not all come first"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"hard": [False] * PAIRS},
            r"0 of 60 pairs are hard and a batch of .*schedule=linear needs 7: widen",
        ),
        ({"hard": [True] * PAIRS}, "0 of 60 pairs are not hard .* needs 7: narrow"),
        ({"hard": FEW}, r"6 of 60 pairs are hard .* needs 7: widen .* curriculum\.hard_share_end"),
        ({"hard": FEW, "schedule": "anti"}, "6 of 60 pairs are hard"),
        ({"hard": FEW, "schedule": "self_paced"}, "6 of 60 pairs are hard"),
        (
            {"hard": [True] * 48 + [False] * 12, "suspect": [False] * 50 + [True] * 10, "suspect_weight": 0},
            "2 of 60 pairs are not hard",
        ),
        ({"hard": None}, "needs the hardness of each of 60 pairs, got none"),
        ({"start": 1.2}, "hard_share_start"),
        ({"suspect_weight": -1}, "suspect_weight"),
        ({"prompts_per_step": 0}, "prompts_per_step"),
        ({"pass_rates": [1.5] * PAIRS}, r"pass rates must lie in \[0, 1\]"),
    ],
)
def test_an_impossible_schedule_is_refused_before_training(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        sampler(**changed)


def test_a_state_of_other_buckets_is_refused() -> None:
    state = sampler().state_dict()
    with pytest.raises(ConfigError, match="buckets"):
        sampler(suspect=None).load_state_dict(state)
    assert SUSPECT in state["buckets"]


def test_the_state_grows_with_what_was_drawn_and_not_with_the_pairs() -> None:
    sizes = []
    for pairs in (1_000, 100_000):
        drawn = CurriculumSampler(
            pairs,
            prompts_per_step=BATCH,
            steps=STEPS,
            seed=0,
            schedule=Schedule("linear"),
            facts=PairFacts(np.arange(pairs) % 2 == 0),
        )
        run(drawn, range(1, 11))
        sizes.append(len(json.dumps(drawn.state_dict())))
    assert sizes[1] < 1.5 * sizes[0]


@settings(max_examples=80)
@given(st.data())
def test_decks_hold_what_a_plain_model_holds(data: st.DataObject) -> None:
    """Random operations against sets: members, sizes, and no card twice in a round."""
    from pgenrm_train.curriculum.decks import Decks

    size, decks = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    deck_of = np.array(data.draw(st.lists(st.integers(0, decks - 1), min_size=size, max_size=size)))
    members = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    tested, held, dealt = Decks(deck_of, members), set(np.flatnonzero(members).tolist()), set()
    for _ in range(data.draw(st.integers(0, 40))):
        card = data.draw(st.integers(0, size - 1))
        deck, own = int(deck_of[card]), {c for c in held if deck_of[c] == deck_of[card]}
        action = data.draw(st.sampled_from(["deal", "move"]))
        if action == "move" and card in held:
            tested.remove(card)
            held.discard(card)
            dealt.discard(card)
        elif action == "move":
            tested.add(card)
            held.add(card)
            dealt.add(card)
        elif own:
            if own <= dealt:
                dealt -= own  # a new round
            got = tested.deal(deck, data.draw(st.floats(0, 1, exclude_max=True)))
            assert got in own - dealt
            dealt.add(got)
        else:
            with pytest.raises(IndexError, match="no cards"):
                tested.deal(deck, 0.0)
        assert {c for c in range(size) if c in tested} == held
        assert tested.size(deck) == sum(deck_of[c] == deck for c in held)
    again = Decks(deck_of, members)
    again.load_state_dict(json.loads(json.dumps(tested.state_dict())))
    assert again.state_dict() == tested.state_dict()


def test_rounds_are_uniform() -> None:
    """A fresh sampler first draws any pair with equal probability: χ² of 3,000 draws over 60 pairs."""
    counts = Counter(
        sampler("uniform", seed=seed, prompts_per_step=1).next_batch(1)[0] for seed in range(3000)
    )
    chi = sum((counts[i] - 50) ** 2 / 50 for i in range(PAIRS))
    assert chi < 59 + 5 * math.sqrt(2 * 59)
