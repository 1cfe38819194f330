"""Properties of the curriculum's sampler: mix, reach, determinism, exact resume."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from pgenrm_train.curriculum import SCHEDULES, CurriculumSampler, checked_rates, hard_share
from pgenrm_train.errors import ConfigError

RATES = [0.0 if i % 4 == 0 else 0.25 + 0.75 * (i % 3) / 2 for i in range(60)]
RATES = [min(rate, 1.0) for rate in RATES]


def sampler(schedule: str = "linear", **changed: object) -> CurriculumSampler:
    settings: dict = {
        "prompts_per_step": 8, "steps": 40, "seed": 3, "schedule": schedule, "pass_rates": RATES, "hard_low": 0.0, "hard_high": 0.2,
        "start": 0.2, "end": 0.9,
    }  # fmt: skip
    return CurriculumSampler(len(RATES), **(settings | changed))


def test_rates_are_checked_and_unknowns_kept() -> None:
    found = checked_rates([0.0, 0.25, 1.0, None])
    assert found[:3].tolist() == [0.0, 0.25, 1.0]
    assert np.isnan(found[3])
    with pytest.raises(ConfigError, match="0, 1"):
        checked_rates([1.5])


def test_pairs_on_which_the_model_wavers_are_hard_and_the_label_does_not_choose_them() -> None:
    rates = [0.0, 0.25, 0.5, 0.75, 1.0, None]
    drawn = CurriculumSampler(6, prompts_per_step=2, steps=4, seed=0, schedule="linear", pass_rates=rates)
    assert drawn.is_hard.tolist() == [False, True, True, True, False, False]
    turned = [None if rate is None else 1 - rate for rate in rates]  # had every vote been the other way
    again = CurriculumSampler(6, prompts_per_step=2, steps=4, seed=0, schedule="linear", pass_rates=turned)
    assert again.is_hard.tolist() == drawn.is_hard.tolist()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step"])
def test_share_runs_from_start_to_end_without_falling(schedule: str) -> None:
    shares = [hard_share(schedule, t / 50, 0.3, 0.8) for t in range(51)]
    assert shares[0] == pytest.approx(0.3)
    assert shares[-1] == pytest.approx(0.8)
    assert all(a <= b + 1e-12 for a, b in pairwise(shares))


def test_unknown_schedule_is_named_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="linear, cosine, step, uniform"):
        sampler("sudden")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_sampler_draws_what_an_uninterrupted_one_would(schedule: str) -> None:
    whole = sampler(schedule)
    expected = [whole.next_batch(step) for step in range(1, 41)]
    for cut in random.Random(0).sample(range(1, 40), 8):
        first = sampler(schedule)
        for step in range(1, cut + 1):
            first.next_batch(step)
        resumed = sampler(schedule)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [resumed.next_batch(step) for step in range(cut + 1, 41)] == expected[cut:]
        assert resumed.drawn == whole.drawn


def test_realised_mix_follows_the_target() -> None:
    drawn = sampler(steps=400)
    hard = {i for i, rate in enumerate(RATES) if rate <= 0.2}
    for first in range(1, 400, 50):
        steps = range(first, first + 50)
        targets, realised = [], []
        for step in steps:
            batch = drawn.next_batch(step)
            targets.append(drawn.target)
            realised.append(sum(i in hard for i in batch) / 8)
            assert realised[-1] == drawn.realised
        assert abs(np.mean(targets) - np.mean(realised)) < 1 / (8 * 50) + 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pair_is_reached_and_none_twice_before_all_once(schedule: str) -> None:
    drawn, seen = sampler(schedule, steps=60), Counter()
    for step in range(1, 61):
        seen.update(drawn.next_batch(step))
    assert set(seen) == set(range(len(RATES)))
    if schedule == "uniform":
        assert max(seen.values()) - min(seen.values()) <= 1


def test_seeds_differ_and_ranks_agree() -> None:
    assert sampler().next_batch(1) == sampler().next_batch(1)
    assert sampler().next_batch(1) != sampler(seed=4).next_batch(1)


def test_a_batch_larger_than_a_bucket_wraps_around() -> None:
    batch = sampler(prompts_per_step=100, start=0.9).next_batch(1)
    assert len(batch) == 100
    assert len(set(batch)) <= len(RATES)


def test_unmeasured_pairs_count_as_not_hard() -> None:
    drawn = CurriculumSampler(3, prompts_per_step=2, steps=4, seed=0, schedule="linear", pass_rates=[0.5, None, None])
    assert drawn.is_hard.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pass_rates": [1.0] * 60}, "0 of 60 pairs are hard"),
        ({"pass_rates": [0.0] * 60}, "60 of 60 pairs are hard"),
        ({"pass_rates": None}, "needs a pass rate for each of 60 pairs"),
        ({"pass_rates": [0.5]}, "got 1"),
        ({"start": 1.2}, "hard_share_start"),
        ({"prompts_per_step": 0}, "prompts_per_step"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_training(changed: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sampler(**changed)


def test_draws_stay_cheap_with_many_pairs() -> None:
    rates = np.where(np.arange(300_000) % 3 == 0, 0.5, 1.0).tolist()
    drawn = CurriculumSampler(300_000, prompts_per_step=512, steps=100, seed=0, schedule="linear", pass_rates=rates)
    assert len({i for step in range(1, 101) for i in drawn.next_batch(step)}) == 51_200
