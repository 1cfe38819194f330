"""Baselines on small invented votes, run through the same harness as a model."""

from dataclasses import replace

import pytest

from eval.ask.baselines import BASELINES, fit_baseline
from eval.ask.scored import score_pairs
from eval.metrics.accuracy import accuracy_report
from pgenrm_train.errors import ConfigError
from pgenrm_train.records.pairs import Message, PreferencePair


def vote(pair_id, user, chosen, rejected, query="q", **fields):
    return PreferencePair(pair_id, user, (Message("user", query),), chosen, rejected, **fields)


def accuracy(name, test, train=(), everything=None):
    score = fit_baseline(name, train, everything or [*train, *test])
    return accuracy_report(score_pairs(score, test), draws=20)


def test_lengths_by_hand():
    test = [
        vote("1", "a", "long text", "short"),
        vote("2", "b", "ab", "abcd"),
        vote("3", "b", "same", "size"),
    ]
    assert accuracy("longer", test)["accuracy"] == pytest.approx(1 / 3)
    assert accuracy("shorter", test)["accuracy"] == pytest.approx(1 / 3)
    assert accuracy("longer", test)["ties"] == 2  # pair 3 in both orders


def test_length_counts_characters_of_the_unchanged_response():
    test = [vote("1", "a", "ab   ", "abc"), vote("2", "b", "日本語", "zz")]
    assert accuracy("longer", test)["accuracy"] == 1.0


def test_user_length_learns_each_users_direction():
    train = [vote(f"a{i}", "a", "long text", "short") for i in range(12)]
    train += [vote(f"b{i}", "b", "short", "long text") for i in range(12)]
    test = [vote("1", "a", "xxxx", "x"), vote("2", "b", "x", "xxxx")]
    assert accuracy("user_length", test, train)["accuracy"] == 1.0


def test_user_length_shrinks_few_votes_and_strangers_to_the_population():
    train = [vote(f"a{i}", "a", "long text", "short") for i in range(12)]
    train += [vote("b", "b", "short", "long text")]  # one vote against a strong population
    test = [vote("1", "b", "xxxx", "x"), vote("2", "stranger", "xxxx", "x")]
    assert accuracy("user_length", test, train)["accuracy"] == 1.0


def test_user_length_without_any_vote_ties():
    report = accuracy("user_length", [vote("1", "a", "xxxx", "x")], [vote("t", "a", "ab", "cd")])
    assert (report["accuracy"], report["ties"]) == (0.0, 2)


def test_user_length_never_reads_the_evaluated_pairs():
    test = [vote("1", "a", "x", "xxxx")]
    assert accuracy("user_length", test, [vote("t", "a", "long text", "short")])["accuracy"] == 0.0


def test_majority_counts_other_users_on_the_same_content_only():
    everything = [
        vote("1", "a", "yes", "no"),
        vote("2", "b", "yes", "no"),
        vote("3", "c", "no", "yes"),
        vote("4", "d", "yes", "no"),
        vote("5", "d", "no", "yes", query="another question"),
    ]
    rows = score_pairs(fit_baseline("majority", [], everything), everything)
    first = rows[rows["order"] == 0].set_index("pair_id")[["score_chosen", "score_rejected"]]
    assert first.loc["1"].tolist() == [2, 1]  # b and d against c; the user's own vote does not count
    assert first.loc["3"].tolist() == [0, 3]
    assert first.loc["5"].tolist() == [0, 0]  # no other user saw it: a tie
    report = accuracy_report(rows, draws=20)
    assert (report["accuracy"], report["ties"]) == (pytest.approx(3 / 5), 2)


def test_majority_goes_by_the_sources_own_count_of_the_other_voters():
    everything = [
        vote("1", "a", "yes", "no", others=(1, 3)),
        vote("2", "b", "yes", "no", others=(2, 2)),
        vote("3", "c", "yes", "no"),
    ]
    rows = score_pairs(fit_baseline("majority", [], everything), everything)
    first = rows[rows["order"] == 0].set_index("pair_id")[["score_chosen", "score_rejected"]]
    assert first.to_numpy().tolist() == [[1, 3], [2, 2], [2, 0]]


def test_majority_scores_a_text_without_votes_zero():
    counted = replace(vote("1", "a", "yes", "no"), others=(3, 1))
    score = fit_baseline("majority", [], [counted])
    changed = replace(counted, rejected="no, really")
    assert (
        score_pairs(score, [counted, changed])[["score_chosen", "score_rejected"]].values.tolist()
        == [[3, 1]] * 2 + [[0, 0]] * 2
    )


def test_majority_leaves_out_every_vote_of_the_same_user():
    everything = [vote("1", "a", "yes", "no"), vote("2", "a", "yes", "no"), vote("3", "b", "no", "yes")]
    assert accuracy("majority", everything[:1], everything=everything)["accuracy"] == 0.0


def test_random_depends_on_the_pair_and_seed_only():
    test = [vote(str(i), "u", f"x{i}", f"y{i}") for i in range(400)]
    forward = score_pairs(fit_baseline("random", [], []), test)
    backward = score_pairs(fit_baseline("random", [], []), test[::-1])
    key = ["pair_id", "order"]
    assert (
        forward.sort_values(key)
        .reset_index(drop=True)
        .equals(backward.sort_values(key).reset_index(drop=True))
    )
    report = accuracy_report(forward, draws=20)
    assert report["order_flip_rate"] == 0.0
    assert 0.42 < report["accuracy"] < 0.58
    other = score_pairs(fit_baseline("random", [], [], seed=1), test)
    assert not forward["score_chosen"].equals(other["score_chosen"])


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"model\.name='taller'.*longer"):
        fit_baseline("taller", [], [])


def test_a_recipe_may_add_baselines():
    def fit_first(_train, _all, _seed):
        return lambda example: [float(-i) for i in range(len(example.responses))]

    score = fit_baseline("first", [], [], more={"first": fit_first})
    report = accuracy_report(score_pairs(score, [vote("1", "u", "a", "b")]), draws=20)
    assert (report["accuracy"], report["order_flip_rate"]) == (0.5, 1.0)
    assert "first" not in BASELINES
