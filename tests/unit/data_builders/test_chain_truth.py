"""Chains against the truth of PersonaWorld: a teacher's chain is right, and each error shows in its step."""

import dataclasses
from functools import cache

import pytest

from data_builders.sources.personaworld import OPPOSITE, build
from data_builders.teachers.chain_truth import chain_truth
from data_builders.teachers.ideal import IdealReader
from data_builders.teachers.oracle import OracleTeacher, read_criteria
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.config import DataConfig
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import present


@cache
def examples():
    pairs = tuple(build(DataConfig(name="personaworld", users=30, heldout_users=2), 0))
    sampler = HistorySampler(pairs, size=3, policy="same_scenario", kind="medium", seed=0)
    return [(pair, present(pair, sampler(pair), 0)) for pair in pairs if pair.kind != "medium"][:60]


def truth(text, pair, example):
    chain = parse_chain(text)
    assert isinstance(chain, Chain)
    return chain_truth(chain, text, example, pair.explicit, IdealReader())


def written(pair, example):
    return OracleTeacher().write(dataclasses.replace(example, explicit=pair.explicit))


def test_every_step_of_a_teachers_chain_is_right():
    for pair, example in examples():
        found = truth(written(pair, example), pair, example)
        assert (found.votes, found.recalled, found.responses, found.scores) == (1.0, 1.0, 1.0, 1.0)
        assert found.quality in (10.0, 30.0, 50.0)


def test_the_votes_allow_the_true_criteria_but_for_label_noise():
    allowed = [truth(written(pair, example), pair, example).allowed for pair, example in examples()]
    assert sum(allowed) / len(allowed) >= 0.97


@pytest.mark.parametrize(
    ("old", "new", "step"),
    [("Pair 1: ", "Pair 1: brisk ", "votes"), (". Response 1: ", ". Response 1: brisk ", "responses")],
)
def test_an_error_shows_in_its_own_step(old, new, step):
    pair, example = examples()[0]
    found = truth(written(pair, example).replace(old, new), pair, example)
    assert getattr(found, step) < 1.0
    assert all(getattr(found, other) == 1.0 for other in ("votes", "recalled", "responses") if other != step)


def test_opposite_criteria_are_neither_recalled_nor_allowed():
    pair, example = examples()[0]
    criteria = read_criteria(pair.explicit)[1]
    head, marker, block = written(pair, example).partition("<JSON_START>")
    for pole in criteria:
        block = block.replace(f"{pole} ", f"~{OPPOSITE[pole]} ")
    found = truth(head + marker + block.replace("~", ""), pair, example)
    assert found.recalled == 0.0 and found.allowed == 0.0 and found.votes == 1.0
