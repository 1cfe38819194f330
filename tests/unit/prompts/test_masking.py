"""Masking is a matter of type, and a masked prompt cannot carry the user's explicit signals."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgenrm_train.config.data import MASKINGS
from pgenrm_train.errors import ConfigError
from pgenrm_train.prompts.masking import FullView, MaskedView, Supervision, apply_masking, present
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem, Message, PreferencePair

TEXT = st.text(max_size=60)
# Private-use characters occur in no generated text, so a leak cannot hide behind a coincidence.
SIGNAL = st.text(alphabet="\ue000\ue001\ue002", min_size=1, max_size=5)
PLAIN = st.text(alphabet=st.characters(exclude_categories=["Co"]), max_size=60)


def an_example(history: int = 3) -> Example:
    items = tuple(HistoryItem(f"q{i}", f"good{i}", f"bad{i}") for i in range(history))
    explicit = ExplicitSignals("I like it short.", "a nurse", "be kind", (("fluency", 80.0),))
    return Example("p", "u", (Message("user", "ask"),), ("left", "right"), 1, items, explicit)


def a_pair() -> PreferencePair:
    explicit = ExplicitSignals(criteria="short")
    return PreferencePair(
        "p", "u", (Message("user", "ask"),), "good", "bad", kind="hard", scenario="work", explicit=explicit
    )


def test_a_masked_view_has_no_field_for_explicit_signals():
    names = {field.name for field in dataclasses.fields(MaskedView)}
    assert names == {"context", "history", "responses"}
    assert not hasattr(MaskedView((Message("user", "q"),), (), ("a", "b")), "explicit")
    with pytest.raises(TypeError):
        MaskedView((), (), (), explicit=ExplicitSignals())


def test_views_are_frozen():
    view, _ = apply_masking(an_example(), "full", random.Random(0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.history = ()


def test_full_shows_and_masked_withholds():
    example = an_example()
    full, supervision = apply_masking(example, "full", random.Random(0))
    assert isinstance(full, FullView) and full.explicit == example.explicit
    masked, same = apply_masking(example, "masked", random.Random(0))
    assert type(masked) is MaskedView and masked.history == example.history and masked.query == "ask"
    assert supervision == same == Supervision(1, example.explicit)


def test_history_dropout_keeps_order_and_reaches_every_amount():
    sizes = set()
    rng = random.Random(1)
    for _ in range(200):
        view, _ = apply_masking(an_example(), "history_dropout", rng, show_probability=0.0)
        assert type(view) is MaskedView
        assert list(view.history) == sorted(view.history, key=lambda item: item.query)
        sizes.add(len(view.history))
    assert sizes == {0, 1, 2, 3}


def test_history_dropout_keeps_the_configured_share_complete():
    whole = an_example().history
    rng = random.Random(1)
    views = [apply_masking(an_example(), "history_dropout", rng, show_probability=0.7)[0] for _ in range(400)]
    assert sum(view.history == whole for view in views) / 400 == pytest.approx(0.7 + 0.3 / 4, abs=0.06)
    assert all(
        apply_masking(an_example(), "history_dropout", rng, show_probability=1.0)[0].history == whole
        for _ in range(50)
    )


@pytest.mark.parametrize(
    ("probability", "expected"), [(0.0, 0), (1.0, 400), (0.25, pytest.approx(100, abs=40))]
)
def test_mixed_shows_with_the_given_probability(probability, expected):
    rng = random.Random(2)
    views = [apply_masking(an_example(), "mixed", rng, show_probability=probability)[0] for _ in range(400)]
    assert sum(isinstance(view, FullView) for view in views) == expected


@pytest.mark.parametrize("policy", MASKINGS)
def test_the_same_seed_gives_the_same_view(policy):
    first, second = (apply_masking(an_example(), policy, random.Random(7)) for _ in range(2))
    assert first == second


def test_unknown_policy_and_probability_name_key_value_and_choices():
    with pytest.raises(ConfigError, match=r"masking\.policy: 'hidden'.*full, masked, history_dropout, mixed"):
        apply_masking(an_example(), "hidden", random.Random(0))
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"masking\.show_probability"):
            apply_masking(an_example(), "mixed", random.Random(0), show_probability=value)


def test_present_places_the_chosen_response_by_the_order():
    history = [HistoryItem("q", "c", "r")]
    first, second = (present(a_pair(), history, order) for order in (0, 1))
    assert (first.responses, first.chosen_index) == (("good", "bad"), 0)
    assert (second.responses, second.chosen_index) == (("bad", "good"), 1)
    for example in (first, second):
        assert example.responses[example.chosen_index] == "good"
        assert (example.history, example.kind, example.scenario, example.explicit.criteria) == (
            tuple(history),
            "hard",
            "work",
            "short",
        )
    with pytest.raises(ValueError, match="order: 2"):
        present(a_pair(), history, 2)


@given(
    policy=st.sampled_from(["masked", "history_dropout"]),
    query=PLAIN,
    responses=st.lists(PLAIN, min_size=2, max_size=4).map(tuple),
    history=st.lists(st.builds(HistoryItem, PLAIN, PLAIN, PLAIN), max_size=3).map(tuple),
    explicit=st.builds(
        ExplicitSignals,
        SIGNAL,
        SIGNAL,
        SIGNAL,
        st.lists(st.tuples(SIGNAL, st.floats(0, 100)), max_size=3).map(tuple),
    ),
    seed=st.integers(0, 9),
    instructions=st.booleans(),
)
def test_no_explicit_text_reaches_a_masked_prompt(
    policy, query, responses, history, explicit, seed, instructions
):
    example = Example("p", "u", (Message("user", query),), responses, 0, history, explicit)
    view, supervision = apply_masking(example, policy, random.Random(seed))
    assert type(view) is MaskedView
    prompt = "\n".join(message["content"] for message in chat_messages(view, instructions=instructions))
    stated = [*explicit.texts(), *(name for name, _ in explicit.attributes)]
    assert not any(text in prompt for text in stated)
    assert supervision.explicit == explicit
