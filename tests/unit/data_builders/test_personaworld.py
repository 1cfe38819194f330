"""PersonaWorld: readable texts, held-out personas, graded kinds, twins, little noise, and constant memory."""

import itertools
import random
import tracemalloc
from collections import Counter, defaultdict

import pytest

from data_builders.sources.personaworld import (
    AXIS,
    KINDS,
    OPPOSITE,
    POLES,
    PROTOTYPES,
    SCENARIOS,
    PersonaWorld,
    Response,
    User,
    build,
    read_response,
    utility,
)
from pgenrm_train.config import DataConfig

DATA = DataConfig(users=150, heldout_users=60)
WORLD = PersonaWorld()


@pytest.fixture(scope="module")
def pairs():
    return list(build(DATA, 3))


def stated(pair):
    """(scenario, criteria by rank) in the user's own words."""
    words = pair.explicit.criteria.replace(",", "").replace(".", "").split()
    return words[1], (words[4], words[8], words[10])


def responses(pair):
    return read_response(pair.chosen), read_response(pair.rejected)


def test_the_same_seed_gives_the_same_votes_and_another_seed_others(pairs):
    assert list(build(DATA, 3)) == pairs
    assert [p.chosen for p in build(DATA, 4)] != [p.chosen for p in pairs]


def test_ids_are_unique_and_users_stay_in_their_split(pairs):
    assert len({p.pair_id for p in pairs}) == len(pairs)
    splits = defaultdict(set)
    for pair in pairs:
        splits[pair.user_id].add(pair.user_split)
    assert all(len(found) == 1 for found in splits.values())
    assert {s for found in splits.values() for s in found} == {"train", "val", "test"}
    assert Counter(next(iter(s)) for s in splits.values()) == {"train": 150, "val": 15, "test": 60}


def test_a_held_out_user_has_a_history_part_and_a_query_part(pairs):
    for pair in pairs:
        assert (
            pair.split
            in {"train": ("train",), "val": ("train", "val"), "test": ("train", "test")}[pair.user_split]
        )
        if pair.split == "train" and pair.user_split != "train":
            assert pair.kind == "medium" and not pair.trains
    history = Counter((p.user_id, p.scenario) for p in pairs if p.user_split == "test" and p.split == "train")
    assert set(history.values()) == {
        2
    }  # every scenario is covered, so that the history shows what matters there


@pytest.mark.parametrize("poles", [("formal", "direct", "warm"), ("casual",), ()])
@pytest.mark.parametrize("quality", ["good", "bad"])
def test_a_rendered_response_is_read_back(poles, quality):
    response = Response(poles, quality)
    for seed in range(20):
        assert read_response(response.render(random.Random(seed))) == response


@pytest.mark.parametrize(
    "text",
    ["", "Hello there.", "Dear reader.", "Dear reader. Hello. Well researched.", "Well researched. Dear"],
)
def test_other_texts_are_not_read(text):
    assert read_response(text) is None


def test_every_text_is_read_back_with_the_same_axes(pairs):
    for pair in pairs:
        chosen, rejected = responses(pair)
        assert [AXIS[p] for p in chosen.poles] == [AXIS[p] for p in rejected.poles]
        assert len(chosen.poles) == 3 and pair.chosen != pair.rejected


def test_explicit_criteria_never_occur_in_a_response_or_query(pairs):
    for pair in pairs:
        words = {
            w.strip(".,?").lower() for text in (pair.chosen, pair.rejected, pair.query) for w in text.split()
        }
        assert not words & {*POLES, *PROTOTYPES}
        assert pair.explicit.criteria not in (pair.chosen, pair.rejected)


def test_personas_of_unseen_users_are_never_given_to_a_training_user():
    votes = list(build(DataConfig(users=1500, heldout_users=120), 0))
    personas = defaultdict(set)
    for pair in votes:
        personas[pair.user_split == "train", pair.cohort].add(stated(pair))
    given = personas[True, "seen_persona"]
    assert (True, "unseen_persona") not in personas
    unseen = personas[False, "unseen_persona"]
    assert unseen and not unseen & given
    seen = personas[False, "seen_persona"]
    assert len(seen & given) / len(seen) > 0.95  # variants that 1,500 users happen not to cover
    by_user = Counter(p.cohort for p in {p.user_id: p for p in votes if p.user_split == "test"}.values())
    assert by_user == {"seen_persona": 60, "unseen_persona": 60}


def test_every_cell_has_variants_of_both_sorts_and_they_are_apart():
    for prototype, scenario in itertools.product(PROTOTYPES, SCENARIOS):
        open_, held_out = (set(WORLD.variants(prototype, scenario, held_out=flag)) for flag in (False, True))
        assert WORLD.cells[prototype, scenario] in open_ and held_out and not open_ & held_out
        for criteria in open_ | held_out:
            assert len({AXIS[p] for p in criteria}) == 3


def test_prototypes_change_with_the_scenario_and_differ_from_each_other():
    for prototype in PROTOTYPES:
        assert len({WORLD.cells[prototype, s] for s in SCENARIOS}) > 1
    for scenario in SCENARIOS:
        assert len({WORLD.cells[p, scenario] for p in PROTOTYPES}) == len(PROTOTYPES)


def test_kinds_are_as_defined(pairs):
    for pair in pairs:
        chosen, rejected = responses(pair)
        differing = sum(a != b for a, b in zip(chosen.poles, rejected.poles, strict=True))
        population = WORLD.population_utility(pair.scenario, chosen) - WORLD.population_utility(
            pair.scenario, rejected
        )
        match pair.kind:
            case "easy":
                assert chosen.quality == "good" and rejected.quality == "bad"
            case "medium":
                assert chosen.quality == rejected.quality and differing >= 2
            case "hard":
                assert chosen.quality == rejected.quality and differing == 1
                (axis,) = (
                    i for i, (a, b) in enumerate(zip(chosen.poles, rejected.poles, strict=True)) if a != b
                )
                assert {chosen.poles[axis], rejected.poles[axis]} & set(
                    stated(pair)[1]
                )  # it is one that the user cares for
            case "rival":
                assert population < 0
            case _:
                pytest.fail(f"unknown kind {pair.kind}")


def test_kinds_and_scenarios_are_equally_frequent_among_questions(pairs):
    asked = [p for p in pairs if p.split == "test" and not p.pair_id.endswith("-twin")]
    kinds = Counter(p.kind for p in asked)
    assert set(kinds) == set(KINDS) and max(kinds.values()) < 1.5 * min(kinds.values())
    scenarios = Counter(p.scenario for p in asked)
    assert set(scenarios) == set(SCENARIOS) and max(scenarios.values()) < 1.5 * min(scenarios.values())


def test_twins_are_the_same_question_of_a_user_who_prefers_the_other(pairs):
    by_id = {p.pair_id: p for p in pairs}
    twins = [p for p in pairs if p.pair_id.endswith("-twin")]
    assert len(twins) > 50
    for twin in twins:
        original = by_id[twin.conversation_id]
        assert original.split == twin.split == "test" and twin.user_split == "test"
        assert twin.user_id != original.user_id and twin.cohort == original.cohort
        assert (twin.query, twin.scenario) == (original.query, original.scenario)
        assert (twin.chosen, twin.rejected) == (original.rejected, original.chosen)
        chosen, rejected = responses(twin)
        assert chosen.quality == rejected.quality
        criteria = stated(twin)[1]
        assert utility(criteria, chosen) - utility(criteria, rejected) >= 0.15
        assert twin.explicit != original.explicit


def test_most_questions_of_equal_quality_have_a_twin(pairs):
    asked = [p for p in pairs if p.split == "test" and not p.pair_id.endswith("-twin")]
    twinned = {p.conversation_id for p in pairs if p.pair_id.endswith("-twin")}
    equal = [p for p in asked if responses(p)[0].quality == responses(p)[1].quality]
    assert sum(p.pair_id in twinned for p in equal) / len(equal) > 0.8


def test_no_surface_rule_decides_among_equal_quality(pairs):
    equal = [p for p in pairs if p.split == "test" and responses(p)[0].quality == responses(p)[1].quality]
    longer = sum((len(p.chosen) > len(p.rejected)) + 0.5 * (len(p.chosen) == len(p.rejected)) for p in equal)
    assert abs(longer / len(equal) - 0.5) < 0.1
    for pole in POLES[::2]:  # nor do all users prefer one pole
        votes = [
            pole in responses(p)[0].poles
            for p in equal
            if {pole, OPPOSITE[pole]} <= {*responses(p)[0].poles, *responses(p)[1].poles}
        ]
        assert 0.25 < sum(votes) / len(votes) < 0.75


def test_label_noise_is_there_and_small(pairs):
    votes = [p for p in pairs if not p.pair_id.endswith("-twin")]
    against = [
        p for p in votes if utility(stated(p)[1], responses(p)[0]) < utility(stated(p)[1], responses(p)[1])
    ]
    assert 0 < len(against) / len(votes) < 0.03
    for pair in votes:  # no pair within the margin is voted on
        assert (
            abs(utility(stated(pair)[1], responses(pair)[0]) - utility(stated(pair)[1], responses(pair)[1]))
            >= 0.15 - 1e-9
        )


def test_utility_counts_what_is_cared_for_by_rank():
    criteria = ("formal", "direct", "warm")
    best, worst = (
        Response(("formal", "direct", "warm"), "good"),
        Response(("casual", "cautious", "brisk"), "bad"),
    )
    assert utility(criteria, best) == pytest.approx(1.0) and utility(criteria, worst) == pytest.approx(-1.0)
    silent = Response(("listed",), "good")
    assert utility(criteria, silent) == pytest.approx(0.10)
    first, second, third = (utility(criteria, Response((pole,), "good")) for pole in criteria)
    assert first > second > third > utility(criteria, silent)


def test_explicit_signals_state_criteria_and_prototype():
    user = User("u", "mentor", {"work": ("formal", "direct", "warm")}, "seen_persona")
    explicit = user.explicit("work")
    assert explicit.criteria == "For work I want formal above all, then direct, then warm."
    assert explicit.self_description == "People call me a mentor."


def test_votes_are_streamed():
    def peak(count: int) -> int:
        tracemalloc.start()
        for _ in itertools.islice(build(DataConfig(users=10**9, heldout_users=4), 0), count):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)  # caches warm
    assert peak(3000) < peak(300) + 200_000


def test_tiny_worlds_still_have_every_split():
    votes = list(build(DataConfig(users=1, heldout_users=0, pairs_per_user=1), 0))
    assert {p.user_split for p in votes} == {"train", "val", "test"}
