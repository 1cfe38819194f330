"""Ideal readers of PersonaWorld: equal to an independent computation, symmetric, calibrated.

`tests/data/ideal_posteriors.json` holds the results of another program, computed per pair from the
generator's definition.
"""

import dataclasses
import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from data_builders.sources.personaworld import build
from data_builders.teachers.ideal import SEEN, UNSEEN, Ideal, IdealChain, IdealReader, Imitator
from pgenrm_train.config import DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import present
from pgenrm_train.records.pairs import Message

TABLE = json.loads(Path("tests/data/ideal_posteriors.json").read_text(encoding="utf-8"))
PRIORS = {"training": (SEEN,), "all": (SEEN, UNSEEN)}


@cache
def world():
    data = DataConfig(name="personaworld", users=TABLE["users"], heldout_users=TABLE["heldout_users"])
    return tuple(build(data, TABLE["seed"]))


@cache
def examples(size, order=0):
    sampler = HistorySampler(world(), size=size, policy="same_scenario", kind="medium", seed=0)
    return {p.pair_id: present(p, sampler(p), order) for p in world() if p.split == "test"}


@pytest.mark.parametrize("name", TABLE["readers"])
def test_each_pair_agrees_with_the_independent_computation(name):
    prior, size = name.split("/")
    reader = IdealReader(PRIORS[prior])
    other_chain = 0
    for pair_id, (first_wins, chain_hits, hit) in TABLE["readers"][name].items():
        example = examples(int(size))[pair_id]
        assert abs(Ideal(reader).score(example)[0] - first_wins) <= 0.01
        assert abs(Imitator(reader).hit_probability(example, 0) - hit) <= 0.01
        scores = IdealChain(reader).score(example)
        other_chain += (scores[0] - scores[1] > 1e-9) != chain_hits
    assert other_chain <= 5  # criteria of equal probability may be taken in another order


def test_accuracies_by_kind_and_cohort_agree_with_the_independent_computation():
    reader, pairs = IdealReader((SEEN,)), [p for p in world() if p.split == "test"]
    hits = defaultdict(list)
    for pair in pairs:
        example = examples(3)[pair.pair_id]
        ideal, chain = Ideal(reader).score(example), IdealChain(reader).score(example)
        hit = ideal[0] > ideal[1], chain[0] - chain[1] > 1e-9, Imitator(reader).hit_probability(example, 0)
        for part in ("all", pair.kind, pair.cohort):
            hits[part].append(hit)
    for part, rows in hits.items():
        accuracies = [100 * sum(column) / len(column) for column in zip(*rows, strict=True)]
        assert accuracies == pytest.approx(TABLE["accuracies"]["training/3"][part], abs=0.3)


def test_presentation_order_and_label_do_not_matter():
    reader = IdealReader((SEEN,))
    for pair_id in list(examples(3))[:60]:
        first, second = examples(3)[pair_id], examples(3, order=1)[pair_id]
        assert reader.read(first).first_wins == pytest.approx(1 - reader.read(second).first_wins)
        assert reader.read(first).probabilities == pytest.approx(reader.read(second).probabilities)
        assert reader.read(first).probabilities.sum() == pytest.approx(1)


def test_its_probabilities_are_calibrated_on_users_drawn_from_the_prior():
    reader = IdealReader((SEEN, UNSEEN))
    asked = [p for p in world() if p.split == "test" and not p.pair_id.endswith("-twin")]
    probabilities = [Ideal(reader).score(examples(3)[p.pair_id])[0] for p in asked]
    for low, high in ((0.5, 0.7), (0.7, 0.85), (0.85, 0.95), (0.95, 1.01)):
        # confidence in the more probable response, against how often that one was chosen
        confident = [max(p, 1 - p) for p in probabilities if low <= max(p, 1 - p) < high]
        right = [p > 0.5 for p in probabilities if low <= max(p, 1 - p) < high]
        expected = sum(confident) / len(confident)
        error = (expected * (1 - expected) / len(right)) ** 0.5
        assert sum(right) / len(right) == pytest.approx(expected, abs=3 * error + 0.01)


def test_the_sampled_imitator_hits_with_its_probability():
    reader, pairs = IdealReader((SEEN,)), list(examples(3).values())[:150]
    expected = sum(Imitator(reader).hit_probability(example, 0) for example in pairs)
    draws = [Imitator(reader, seed).score(example) for seed in range(12) for example in pairs]
    assert sum(a - b > 1e-9 for a, b in draws) / 12 == pytest.approx(expected, abs=0.05 * len(pairs))


@pytest.mark.parametrize(
    "change",
    [
        {"responses": ("Hello there.", "It is so.")},
        {"responses": ("Dear reader. Check first. Studies agree. Quite right.",) * 3},
        {"responses": ("Dear reader. Check first. Studies agree. Quite right.", "Hey there. Quite right.")},
        {"context": (Message("user", "What is the capital of France?"),)},
    ],
)
def test_a_pair_of_other_data_is_refused_in_one_sentence(change):
    example = dataclasses.replace(next(iter(examples(3).values())), **change)
    with pytest.raises(DataError, match="PersonaWorld's pairs only; leave them out"):
        Ideal(IdealReader()).score(example)
