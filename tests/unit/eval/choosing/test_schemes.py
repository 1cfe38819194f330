"""Schemes of choosing: equal chains, the winner of a known order, positions, ties and failures."""

import numpy as np
import pandas as pd
import pytest

from eval.choosing.schemes import Choice, Match, Player, Slot, best, chains_of, circles, knockouts
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.slates import Slate


def played(strength, place=0.0, calls=None):
    """A play whose scores are the candidates' strengths; `place` favours the response shown first."""

    def play(matches, times=1):
        if calls is not None:
            calls.update({match: max(times, calls.get(match, 0)) for match in matches})
        one = {m: (strength[m.slate][m.first], strength[m.slate][m.second]) for m in matches}
        return {m: np.array([[a + place, b], [a, b + place]], dtype=float) for m, (a, b) in one.items()}

    return play


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 32])
def test_both_schemes_find_the_best_candidate_at_equal_chains(n):
    rng = np.random.default_rng(n)
    strength = [rng.permutation(n) for _ in range(5)]
    slots = [Slot(number, n) for number in range(5)]
    for scheme in (lambda play: {s: best(v) for s, v in circles(slots, play).items()}, None):
        calls = {}
        play = played(strength, place=40.0, calls=calls)
        chosen = scheme(play) if scheme else knockouts(slots, play)
        if scheme is None or n < 4:  # in a circle of strengths the neighbours of a candidate do not matter
            assert {slot: Choice(int(strength[slot.slate].argmax()), True) for slot in slots} == chosen
        assert 2 * sum(calls.values()) == 5 * chains_of(n, 1, 0)


def test_a_circle_averages_pairs_and_positions():
    play = {
        Match(0, 0, 1): [[9, 1], [7, 1]],
        Match(0, 1, 2): [[3, 5], [3, 5]],
        Match(0, 0, 2): [[8, 2], [8, 4]],
    }
    scores = circles([Slot(0, 3)], lambda matches, times=1: {m: np.array(play[m], float) for m in matches})
    assert scores[Slot(0, 3)].tolist() == [8.0, 2.0, 4.0]


def test_the_final_has_twice_the_chains_and_an_odd_entrant_waits():
    calls = {}
    winner = knockouts([Slot(0, 5)], played([[1, 2, 3, 4, 9]], calls=calls))
    assert winner == {Slot(0, 5): Choice(4, True)}
    assert calls == {Match(0, 0, 1): 1, Match(0, 2, 3): 1, Match(0, 1, 3): 1, Match(0, 3, 4): 2}


def test_without_a_verdict_the_earlier_candidate_goes_on_undecided():
    equal, lost = played([[5, 5, 5, 5]]), lambda m, times=1: {x: np.full((2, 2), np.nan) for x in m}
    one_position = lambda m, times=1: {x: np.array([[1, 9], [np.nan, np.nan]]) for x in m}  # noqa: E731
    for play in (equal, lost, one_position):
        assert knockouts([Slot(0, 4)], play) == {Slot(0, 4): Choice(0, False)}
        assert best(circles([Slot(0, 4)], play)[Slot(0, 4)]) == Choice(0, False)
    assert best(np.array([np.nan, 2.0, 7.0])) == Choice(2, True)


def test_a_player_asks_each_question_in_both_positions_with_the_history_of_its_slate():
    prompt = PreferencePair("p", "ann", (Message("user", "q"),), "", "")
    slates = [Slate(prompt, ("aa", "b", "ccc"))]
    asked = []

    def ask(questions):
        asked.extend(questions)
        rows = [
            {"pair_id": q.pair.pair_id, "user_id": "ann", "order": q.order, "seed": 0, "sample": sample}
            | {"score_chosen": float(len(q.pair.chosen)), "score_rejected": float(len(q.pair.rejected))}
            | {"failure": None, "kind": None, "neighbour": None, "key": q.key, "text": "", "tokens": 1}
            for q in questions
            for sample in range(q.samples)
        ]
        return pd.DataFrame(rows)

    history = object()
    player = Player(slates, {"ann/p": (history,)}, ask, None, ind=2)
    scores = circles([Slot(0, 3)], player)[Slot(0, 3)]
    assert scores.tolist() == [2.0, 1.0, 3.0]
    assert {(q.pair.pair_id, q.order, q.history, q.samples) for q in asked} == {
        (f"ann/p/{pair}", order, (history,), 2) for pair in ("0-1", "1-2", "0-2") for order in (0, 1)
    }
    assert player({Match(0, 0, 1)}, 2) and len(player.chains()) == chains_of(3, 2, 0) + 4
