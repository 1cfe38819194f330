"""PersonaWorld's candidates for best of n and the references: independence of the user, exact values."""

import numpy as np
import pytest

from data_builders.sources.personaworld import PersonaWorld, build, read_response, utility
from data_builders.teachers.choosers import READERS, draw_slate, references
from data_builders.teachers.ideal import IdealReader
from data_builders.teachers.oracle import read_criteria
from pgenrm_train.config import DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.records.slates import Slate

PAIRS = list(build(DataConfig(users=2, heldout_users=12), seed=3))
VOTES = [pair for pair in PAIRS if pair.split == "test" and pair.conversation_id == pair.pair_id]


def test_candidates_are_distinct_answers_drawn_without_the_user():
    vote = VOTES[0]
    slate = draw_slate(vote, 32, 0)
    assert len(set(slate.responses)) == 32 and slate == draw_slate(vote, 32, 0) != draw_slate(vote, 32, 1)
    assert draw_slate(vote, 8, 0).responses == slate.responses[:8], "smaller sets are beginnings"
    texts = [text for v in VOTES for text in draw_slate(v, 32, 0).responses]
    responses = [read_response(text) for text in texts]
    assert all(len(response.poles) == 3 for response in responses)
    assert 0.6 < np.mean([response.quality == "good" for response in responses]) < 0.73
    mean = np.mean(
        [
            utility(read_criteria(v.explicit)[1], read_response(text))
            for v in VOTES
            for text in draw_slate(v, 32, 0).responses
        ]
    )
    assert abs(mean - 0.1 / 3) < 0.03, "poles at random are worth nothing; two of three are good"


def test_the_ideal_choice_beats_the_favourite_and_is_below_the_best():
    sampler = HistorySampler(PAIRS, size=3, policy="same_scenario", kind="medium", seed=0)
    readers, world = {name: IdealReader(cohorts) for name, cohorts in READERS.items()}, PersonaWorld()
    gained = {"ideal": [], "ideal, all personas": [], "population": [], "utility": []}
    for vote in VOTES:
        slate = draw_slate(vote, 8, 0)
        values = references(slate, sampler(slate.prompt, shown=slate.responses), readers, world)
        for name, found in gained.items():
            found.append(values["utility"][values[name].argmax()])
    means = {name: np.mean(found) for name, found in gained.items()}
    assert means["utility"] > means["ideal, all personas"] > means["population"] > 0.03
    assert means["ideal"] > means["population"]


def test_a_known_user_makes_the_expected_utility_the_true_one():
    """With all criteria but the true ones ruled out, ideal is utility."""

    class Sure(IdealReader):
        def after_votes(self, example):
            return {read_criteria(VOTES[0].explicit)[1]: 1.0}

    values = references(draw_slate(VOTES[0], 8, 0), (), {"ideal": Sure()}, PersonaWorld())
    assert values["ideal"] == pytest.approx(values["utility"])


def test_other_data_end_in_a_sentence():
    with pytest.raises(DataError, match=r"expected a vote of PersonaWorld, with stated criteria"):
        references(Slate(VOTES[0], ("Hello.", "No.")), (), {}, PersonaWorld())
