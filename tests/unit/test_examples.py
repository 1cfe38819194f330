"""Examples in the docstrings of public modules run and give what they show."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

MODULES = (
    "pgenrm_train.chains.chain",
    "pgenrm_train.rewards.reward",
    "pgenrm_train.records.pairs",
    "pgenrm_train.records.rows",
    "pgenrm_train.prompts.masking",
    "pgenrm_train.curriculum.sampler",
    "pgenrm_train.scaling.combine",
    "eval.metrics.accuracy",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name: str) -> None:
    failed, attempted = doctest.testmod(import_module(name))
    assert attempted > 0 and failed == 0
