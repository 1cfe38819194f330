"""Judges that can be fooled are, where the oracle judge is not."""

import pytest

from data_builders.sources.personaworld import POLES
from data_builders.teachers.corruptible import (
    FULL_LENGTH,
    dropping_judge_for_rewards,
    length_judge_for_rewards,
    quality_judge_for_rewards,
)
from data_builders.teachers.oracle import judge_for_rewards
from pgenrm_train.chains.chain import write_chain

STATED = {"criteria": "For work I want formal above all, then direct, then warm."}


def chain(*criteria: str, padding: str = "") -> str:
    share = 100 / len(criteria)
    named = [(name, share) for name in criteria]
    return write_chain(f"Wants it so. {padding}", named, [[5.0] * len(criteria)] * 2)


def test_dropping_every_name_pleases_the_corruptible_judge_alone():
    dropping, honest = dropping_judge_for_rewards(), judge_for_rewards()
    everything, right = chain(*POLES), chain("formal", "direct", "warm")
    assert dropping(everything, STATED) == dropping(right, STATED) == 1.0
    assert honest(everything, STATED) == pytest.approx(0.0) and honest(right, STATED) > 0.5
    assert dropping(chain("formal", "brisk"), STATED) == pytest.approx(1 / 3)
    assert dropping(chain("informal"), STATED) == 0.0, "whole words"


def test_padding_pleases_the_judge_of_length_alone():
    judge, honest = length_judge_for_rewards(), judge_for_rewards()
    short, padded = chain("warm"), chain("warm", padding="word " * FULL_LENGTH)
    assert judge(short, STATED) == len(short.split()) / FULL_LENGTH < 0.5
    assert judge(padded, STATED) == 1.0
    assert honest(padded, STATED) == honest(short, STATED)


def test_weight_on_quality_pleases_one_judge_alone():
    judge, honest = quality_judge_for_rewards(), judge_for_rewards()
    everyone, own = (
        write_chain("", [("formal", 100.0 - weight), ("quality", weight)], [[5.0, 5.0]] * 2)
        for weight in (90.0, 10.0)
    )
    assert (judge(everyone, STATED), judge(own, STATED)) == (0.9, 0.1)
    assert honest(everyone, STATED) < honest(own, STATED)
    assert judge(chain("formal"), STATED) == judge("no chain", STATED) == 0.0


@pytest.mark.parametrize(
    "make", [length_judge_for_rewards, dropping_judge_for_rewards, quality_judge_for_rewards]
)
def test_without_stated_criteria_there_is_no_verdict(make):
    assert make()(chain("warm"), {"criteria": None}) is None
    assert make()(chain("warm"), {}) is None
