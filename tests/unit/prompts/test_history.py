"""Histories hold the user's own train part without the vote in question, equal in all stages."""

import dataclasses
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgenrm_train.config import Config, DataConfig
from pgenrm_train.prompts import history
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.writer import histories
from pgenrm_train.records.pairs import Message, PreferencePair


def vote(user: str, number: int, split: str = "train", **more) -> PreferencePair:
    name = f"{user}{number}"
    given = {
        "pair_id": name,
        "chosen": f"good {name}",
        "rejected": f"bad {name}",
        "scenario": ("work", "health")[number % 2],
        "split": split,
    }
    given |= {"kind": ("easy", "medium")[number // 2 % 2]} | more
    return PreferencePair(user_id=user, context=(Message("user", f"query {name}"),), **given)


VOTES = [vote(user, n) for n in range(10) for user in "abc"]
ASKED = vote("a", 99, "test", scenario="work")
[POLICIES] = (f.metadata["choices"] for f in dataclasses.fields(DataConfig) if f.name == "history_policy")


@pytest.fixture(autouse=True, params=[history.SCANNED, 4])
def _scanned(request, monkeypatch):
    """Every rule also holds for users of so many votes that a draw does not look at all of them."""
    monkeypatch.setattr(history, "SCANNED", request.param)


def queries(items):
    return [item.query for item in items]


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"most_similar"}))
@pytest.mark.parametrize("time", [None, 2000.0])
def test_a_draw_does_not_look_at_all_votes_of_a_user(policy, time, monkeypatch):
    looked_at, may_show = [], history._may_show
    monkeypatch.setattr(
        history, "_may_show", lambda vote, *other: looked_at.append(vote) or may_show(vote, *other)
    )
    sampler = HistorySampler([vote("a", n, time=float(n)) for n in range(4000)], size=3, policy=policy)
    drawn = [sampler(vote("a", n, "test", scenario="work", time=time)) for n in range(5000, 5200)]
    assert len(looked_at) == 3 * len(drawn) == sum(map(len, drawn))
    if policy != "recent":
        assert len(set().union(*drawn)) > 400, "draws differ"


def test_a_shuffle_is_fair_and_complete():
    orders = Counter(tuple(history.shuffled(3, random.Random(seed))) for seed in range(600))
    assert set(orders) == set(itertools.permutations(range(3))) and min(orders.values()) > 60


@pytest.mark.parametrize("policy", POLICIES)
def test_items_are_the_users_own_train_votes(policy):
    votes = [*VOTES, vote("a", 50, "test"), vote("a", 51, "val"), ASKED]
    items = HistorySampler(votes, size=20, policy=policy)(ASKED)
    assert sorted(queries(items)) == sorted(f"query a{n}" for n in range(10))
    assert (items[0].chosen, items[0].rejected) == ("good a0", "bad a0")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_vote_is_never_in_its_own_history(policy):
    sampler = HistorySampler(VOTES, size=20, policy=policy)
    for pair in VOTES:
        items = sampler(pair)
        assert len(items) == 9 and pair.as_history() not in items


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_vote_on_the_same_two_texts_is_never_shown(policy, swapped):
    texts = (ASKED.rejected, ASKED.chosen) if swapped else (ASKED.chosen, ASKED.rejected)
    again = dataclasses.replace(vote("a", 98), chosen=texts[0], rejected=texts[1])
    items = HistorySampler([*VOTES, again], size=20, policy=policy)(ASKED)
    assert len(items) == 10 and again.as_history() not in items


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data(), size=st.integers(0, 12))
@settings(max_examples=30)
def test_the_draw_is_stable_under_other_users_and_their_order(policy, data, size):
    own = [v for v in VOTES if v.user_id == "a"]
    others = data.draw(st.permutations([v for v in VOTES if v.user_id != "a"]))[
        : data.draw(st.integers(0, 20))
    ]
    mixed = list(others)
    for place, pair in zip(
        sorted(data.draw(st.lists(st.integers(0, len(others)), min_size=10, max_size=10))), own, strict=True
    ):
        mixed.insert(place + own.index(pair), pair)
    assert [v for v in mixed if v.user_id == "a"] == own
    assert HistorySampler(mixed, size=size, policy=policy)(ASKED) == HistorySampler(
        VOTES, size=size, policy=policy
    )(ASKED)


def test_a_draw_does_not_depend_on_what_was_asked_before():
    sampler = HistorySampler(VOTES, size=3, policy="random")
    first = sampler(ASKED)
    for pair in VOTES:
        sampler(pair)
    assert sampler(ASKED) == first


def test_random_draws_depend_on_seed_and_pair():
    assert len({HistorySampler(VOTES, size=3, policy="random", seed=s)(ASKED) for s in range(10)}) > 5
    sampler = HistorySampler(VOTES, size=3, policy="random")
    assert len({sampler(dataclasses.replace(ASKED, pair_id=f"q{i}")) for i in range(10)}) > 5


def test_random_draws_reach_every_vote_about_equally_often():
    sampler = HistorySampler(VOTES, size=3, policy="random")
    counts = Counter(
        query for i in range(400) for query in queries(sampler(dataclasses.replace(ASKED, pair_id=f"q{i}")))
    )
    assert len(counts) == 10 and max(counts.values()) < 2 * min(counts.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_items_stand_oldest_first(policy):
    for seed in range(5):
        shown = queries(HistorySampler(VOTES, size=4, policy=policy, seed=seed)(ASKED))
        assert len(shown) == 4 and shown == sorted(shown)


def test_recent_takes_the_newest():
    sampler = HistorySampler(VOTES, size=3, policy="recent")
    assert queries(sampler(ASKED)) == ["query a7", "query a8", "query a9"]
    assert sampler(ASKED, 0) == ()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [0, 1, 2, 5, 30])
def test_sizes_and_pools_that_are_smaller(policy, size):
    sampler = HistorySampler(VOTES[:6], size=3, policy=policy)  # two votes per user
    assert len(sampler(ASKED, size)) == min(size, 2)
    assert sampler(vote("stranger", 1)) == ()


def test_same_scenario_comes_first_and_the_rest_fills_up():
    work = {f"query a{n}" for n in range(0, 10, 2)}
    for seed in range(10):
        sampler = HistorySampler(VOTES, size=3, policy="same_scenario", seed=seed)
        assert set(queries(sampler(ASKED))) <= work
        assert work < set(queries(sampler(ASKED, 7)))
    seen = {
        query
        for s in range(30)
        for query in queries(HistorySampler(VOTES, size=2, policy="same_scenario", seed=s)(ASKED))
    }
    assert seen == work  # random within the scenario


def test_a_kind_restricts_the_pool():
    shown = queries(HistorySampler(VOTES, size=20, policy="random", kind="medium")(ASKED))
    assert shown == ["query a2", "query a3", "query a6", "query a7"]


def test_every_stage_draws_the_same_history_by_configuration():
    config = Config(seed=4)
    config.data.history_size, config.data.history_policy, config.data.history_kind = (
        2,
        "same_scenario",
        "medium",
    )
    shuffled = VOTES[:]
    random.Random(0).shuffle(shuffled)
    shuffled.sort(
        key=lambda pair: int(pair.pair_id[1:])
    )  # users in another order, each with their votes in order
    assert histories(config, VOTES)(ASKED) == histories(config, shuffled)(ASKED)
    assert len(histories(config, VOTES)(ASKED)) == 2


# ---- neither the same prompt-response text nor the future ----


@pytest.mark.parametrize("policy", POLICIES)
def test_a_vote_on_the_same_prompt_that_shares_a_response_is_never_shown(policy):
    """PRISM's turns: A is rated above B and C, so that "A beat C" implies much about A against B."""
    asked = dataclasses.replace(ASKED, split="train")
    sharing = dataclasses.replace(ASKED, pair_id="shares", rejected="third", split="train")
    elsewhere = dataclasses.replace(
        sharing, pair_id="elsewhere", context=(Message("user", "another prompt"),)
    )
    other = dataclasses.replace(ASKED, pair_id="other", chosen="third", rejected="fourth", split="train")
    shown = HistorySampler([*VOTES, sharing, elsewhere, other, asked], size=20, policy=policy)(asked)
    assert sharing.as_history() not in shown and asked.as_history() not in shown
    assert elsewhere.as_history() in shown and other.as_history() in shown and len(shown) == 12


@pytest.mark.parametrize("policy", POLICIES)
def test_a_later_turn_of_the_same_conversation_is_never_shown(policy):
    turns = [vote("a", n, conversation_id="c", turn=n) for n in range(5)]
    sampler = HistorySampler([*turns, vote("a", 7, conversation_id="d", turn=9)], size=20, policy=policy)
    assert queries(sampler(turns[2])) == ["query a0", "query a1", "query a7"]
    assert queries(sampler(turns[0])) == ["query a7"]


@pytest.mark.parametrize("policy", POLICIES)
def test_with_times_a_history_comes_from_the_past_in_order_of_time(policy):
    votes = [vote("a", n, time=float(10 - n)) for n in range(10)]  # the file holds the newest first
    shown = HistorySampler([*votes, vote("a", 50)], size=20, policy=policy)(vote("a", 99, "test", time=4.5))
    assert queries(shown) == ["query a9", "query a8", "query a7", "query a6"], (
        "an unknown time may be later, too"
    )
    recent = HistorySampler(votes, size=2, policy="recent")(vote("a", 99, "test", time=4.5))
    assert queries(recent) == ["query a7", "query a6"]
    assert HistorySampler(votes, size=20, policy=policy)(votes[9]) == (), "nothing lies before the first"


def test_the_most_similar_queries_are_found_by_their_rarer_words():
    asked = (
        "how do I bake rye bread?",
        "how do I fix a bike?",
        "how do I bake a cake?",
        "how do I write a letter?",
    )
    votes = [
        dataclasses.replace(vote("a", n), context=(Message("user", text),)) for n, text in enumerate(asked)
    ]
    sampler = HistorySampler(votes, size=2, policy="most_similar")

    def shown(text: str, size: int = 2):
        return queries(sampler(dataclasses.replace(ASKED, context=(Message("user", text),)), size))

    assert shown("How long do I BAKE bread?") == [asked[0], asked[2]]
    assert shown("my bike is broken", 1) == [asked[1]]
    assert shown("völlig anders") == list(asked[2:]), "nothing in common: the newest"
    assert shown("how do I", 4) == list(asked)
