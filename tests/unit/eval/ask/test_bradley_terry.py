"""Bradley–Terry on embeddings finds the taste behind votes, pools users in part, and reads no test label."""

import numpy as np
import pytest
from scipy.special import log_expit

from eval.ask.bradley_terry import BradleyTerry, map_weights
from eval.ask.scored import score_pairs
from eval.metrics.accuracy import accuracy_report
from pgenrm_train.records.pairs import Example, HistoryItem, Message, PreferencePair

WORDS = ("warm", "brief", "formal", "exact")


def embed(texts):
    """A text of the words above as their counts, length 1."""
    counts = np.array([[text.split().count(word) for word in WORDS] for text in texts], dtype=float).reshape(
        -1, len(WORDS)
    )
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def votes(user, likes, n, seed=0, **fields):
    """`n` votes of a user for the text with more of their favourite word, one conversation per vote."""
    rng, found = np.random.default_rng([seed, *user.encode()]), []
    while len(found) < n:
        a, b = (" ".join(rng.choice(WORDS, 5)) for _ in range(2))
        gap = a.split().count(likes) - b.split().count(likes)
        if gap:
            name = f"{user}-{seed}-{len(found)}"
            chosen, rejected = (a, b) if gap > 0 else (b, a)
            found.append(
                PreferencePair(
                    name, user, (Message("user", name),), chosen, rejected, conversation_id=name, **fields
                )
            )
    return found


def accuracy(train, test, adapted, histories=None):
    scorer = BradleyTerry(embed, adapted).fit(train, [*train, *test])
    return accuracy_report(score_pairs(scorer.score, test, histories), draws=20)["accuracy"]


def test_map_weights_is_the_maximum():
    rng = np.random.default_rng(0)
    rows, offset = rng.normal(size=(40, 4)), rng.normal(size=40)
    best = map_weights(rows, 0.5, offset)

    def value(w):
        return log_expit(rows @ w + offset).sum() - 0.25 * w @ w

    assert all(value(best) > value(best + 0.01 * step) for step in (*np.eye(4), *-np.eye(4)))


def test_a_shared_taste_is_found():
    train = [v for u in "abcdefgh" for v in votes(u, "warm", 20)]
    test = [v for u in "abz" for v in votes(u, "warm", 20, seed=1, split="test")]
    assert accuracy(train, test, adapted=False) > 0.85 and accuracy(train, test, adapted=True) > 0.85


def test_opposite_tastes_need_weights_of_their_own():
    likes = {"a": "warm", "b": "brief", "c": "formal", "d": "exact"}
    train = [v for u, word in likes.items() for v in votes(u, word, 60)]
    test = [v for u, word in likes.items() for v in votes(u, word, 60, seed=1, split="test")]
    assert accuracy(train, test, adapted=False) < 0.65
    assert accuracy(train, test, adapted=True) > 0.85


def test_where_all_users_agree_few_votes_move_a_user_little():
    train = [v for u in "abcdefgh" for v in votes(u, "warm", 30)] + votes("odd", "brief", 1)
    scorer = BradleyTerry(embed, adapted=True).fit(train, train)
    weights = scorer.by_user["odd"]
    assert weights[0] > 0.5 * scorer.weights[0], "still warm"


def test_an_unknown_user_is_adapted_to_the_history_that_is_shown():
    likes = {"a": "warm", "b": "brief", "c": "formal", "d": "exact"}
    train = [v for u, word in likes.items() for v in votes(u, word, 60)]
    test = votes("new", "formal", 60, seed=1, split="test")
    history = tuple(v.as_history() for v in votes("new", "formal", 8, seed=2))
    other = tuple(HistoryItem("q", h.rejected, h.chosen) for h in history)
    own, swapped = ({v.pair_id: shown for v in test} for shown in (history, other))
    assert accuracy(train, test, True, own) > 0.8 > 0.4 > accuracy(train, test, True, swapped)
    assert accuracy(train, test, False, own) == accuracy(train, test, False, swapped)


def test_each_text_is_embedded_once_and_votes_of_the_test_split_are_not_learnt():
    asked = []

    def counted(texts):
        asked.extend(texts)
        return embed(texts)

    train, test = votes("a", "warm", 12), votes("a", "warm", 6, seed=1, split="test")
    scorer = BradleyTerry(counted).fit(train, [*train, *test])
    score_pairs(scorer.score, test)
    assert len(asked) == len(set(asked))
    turned = [
        PreferencePair(p.pair_id, p.user_id, p.context, p.rejected, p.chosen, split="test") for p in test
    ]
    again = BradleyTerry(embed).fit(train, [*train, *turned])
    assert np.array_equal(scorer.weights, again.weights)


@pytest.mark.parametrize("adapted", [False, True])
def test_little_or_nothing_to_learn_from(adapted):
    test = votes("a", "warm", 3, split="test")
    same = [PreferencePair("s", "a", (Message("user", "q"),), "warm", "warm")]
    for train in ([], same):
        scorer = BradleyTerry(embed, adapted).fit(train, [*train, *test])
        assert accuracy_report(score_pairs(scorer.score, test), draws=20)["ties"] == 6
    one = votes("a", "warm", 1)
    scorer = BradleyTerry(embed, adapted).fit(one, one)
    assert scorer.score(Example("x", "a", one[0].context, (one[0].chosen, one[0].rejected), -1))[0] > 0
    unseen = scorer.score(Example("x", "a", one[0].context, ("", "日本語", "warm"), -1))
    assert len(unseen) == 3 and np.isfinite(unseen).all()


def test_the_same_votes_give_the_same_scores_in_any_order():
    train = [v for u in "abc" for v in votes(u, "warm", 20)]
    test = votes("a", "warm", 10, seed=1, split="test")
    forward = score_pairs(BradleyTerry(embed, True).fit(train, [*train, *test]).score, test)
    backward = score_pairs(BradleyTerry(embed, True).fit(train[::-1], [*test, *train]).score, test)
    assert np.allclose(forward["score_chosen"], backward["score_chosen"], atol=1e-3)
