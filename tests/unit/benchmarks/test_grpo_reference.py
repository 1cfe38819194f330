"""The plain reference of GRPO: its group-relative advantages."""

import math
import statistics

import pytest
from grpo_reference import group_advantages
from hypothesis import given
from hypothesis import strategies as st


def test_advantages_are_relative_to_the_group():
    totals = [1.0, 0.0, 0.5, -0.1]
    expected = [(t - statistics.mean(totals)) / (statistics.stdev(totals) + 1e-6) for t in totals]
    assert group_advantages(totals) == pytest.approx(expected)


@pytest.mark.parametrize("totals", [[], [1.0], [0.1] * 3, [-0.1] * 8])
def test_a_degenerate_group_gives_zeros(totals):
    assert group_advantages(totals) == [0.0] * len(totals)


@given(st.lists(st.floats(-2, 2), max_size=16))
def test_advantages_sum_to_zero_and_keep_the_order(totals):
    advantages = group_advantages(totals)
    assert len(advantages) == len(totals)
    assert math.isclose(sum(advantages), 0.0, abs_tol=1e-6)
    assert all(
        (a <= b)
        for (s, a), (t, b) in zip(sorted(zip(totals, advantages)), sorted(zip(totals, advantages))[1:])
        if s < t
    )
