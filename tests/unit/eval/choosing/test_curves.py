"""Curves of best of n: means, paired gains, shares, intervals over users, and their plot."""

import math

import numpy as np
import pytest

from eval.choosing.curves import BEST, IDEAL, KNOCKOUT, MODEL, POPULATION, RANDOM, Curves, choices
from eval.choosing.schemes import Choice, Slot
from eval.report.console import text_table
from eval.report.plots import line_plot

SIZES = (2, 4)


def world(users=40, seed=0, noise=0.0, ideal=True):
    """Slates of four: the model's scores are the utility and noise, the knockout takes the first."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(users, 4))
    scores = 5 + truth + noise * rng.normal(size=truth.shape)
    values = [{"utility": row, "population": -row, **({"ideal": row} if ideal else {})} for row in truth]
    slots = [Slot(i, n) for i in range(users) for n in SIZES]
    return (
        choices(
            [f"u{i // 2}" for i in range(users)],
            {slot: scores[slot.slate][: slot.n] for slot in slots},
            {slot: Choice(0, slot.n == 2) for slot in slots},
            values,
        ),
        truth,
    )


def row_of(curves, n, name):
    return next(row for row in curves.rows() if (row["n"], row["chooser"]) == (n, name))


def test_every_chooser_gets_the_utility_of_its_choice():
    table, truth = world()
    curves = Curves(table, draws=200, seed=0)
    for n in SIZES:
        expected = {
            MODEL: truth[:, :n].max(axis=1),
            BEST: truth[:, :n].max(axis=1),
            IDEAL: truth[:, :n].max(axis=1),
            POPULATION: truth[:, :n].min(axis=1),
            RANDOM: truth[:, :n].mean(axis=1),
            KNOCKOUT: truth[:, 0],
        }
        for name, values in expected.items():
            row = row_of(curves, n, name)
            assert row["utility"] == pytest.approx(values.mean()) and row["prompts"] == 40
            low, high = row["utility ci95"]
            assert low < row["utility"] < high
        model = row_of(curves, n, MODEL)
        gain = (expected[MODEL] - expected[RANDOM]).mean()
        assert model["gain over random"] == pytest.approx(gain) and model["gain over random ci95"][0] > 0
        assert model["ideal gain share"] == pytest.approx(1) == model["ideal gain share ci95"][0]
        assert row_of(curves, n, POPULATION)["ideal gain share"] < 0
        assert "gain over random" not in row_of(curves, n, RANDOM)


def test_an_interval_covers_users_and_not_prompts():
    table, _ = world(users=400, noise=1.0)
    wide = table[(table["chooser"] == MODEL) & (table["n"] == 4)].set_index("slate")["utility"]
    by_user = wide.groupby(wide.index // 2).mean()
    low, high = row_of(Curves(table, draws=4000, seed=1), 4, MODEL)["utility ci95"]
    assert (high - low) / 2 == pytest.approx(1.96 * by_user.std() / math.sqrt(len(by_user)), rel=0.1)
    alone, _ = world(users=2)
    assert row_of(Curves(alone, draws=50, seed=0), 4, MODEL)["utility ci95"] is None, "one user"


def test_without_an_ideal_the_share_is_of_the_best():
    curves = Curves(world(ideal=False)[0], draws=50, seed=0)
    assert curves.reference == BEST and row_of(curves, 4, MODEL)["best gain share"] == pytest.approx(1)
    same = choices(["u"], {Slot(0, 2): np.ones(2)}, {Slot(0, 2): Choice(0, False)}, [{"utility": np.ones(2)}])
    assert row_of(Curves(same, draws=50, seed=0), 2, MODEL)["best gain share"] is None, "nothing to gain"


def test_over_optimisation_is_a_score_that_rises_while_utility_does_not():
    table, _ = world(noise=0.0)
    rising = Curves(table, draws=200, seed=0).optimisation_rows()
    assert rising[0]["KL bound, nats"] == pytest.approx(math.log(2) - 0.5)
    assert rising[1]["gain over the size before"] == pytest.approx(rising[1]["gain of score"])
    noisy = Curves(world(users=2000, noise=100.0)[0], draws=200, seed=0).optimisation_rows()[1]
    assert noisy["gain of score"] > 30 and noisy["gain of score ci95"][0] > 20
    low, high = noisy["gain over the size before ci95"]
    assert low < 0.1 and high < 0.2


def test_schemes_are_compared_at_equal_chains_and_undecided_choices_counted():
    rows = Curves(world()[0], draws=200, seed=0).scheme_rows(ind=3, pro=1)
    assert [(row["n"], row["chains per prompt"]) for row in rows] == [(2, 8), (4, 32)]
    assert [(row["undecided circles"], row["undecided finals"]) for row in rows] == [(0, 0), (0, 40)]
    assert rows[1]["gain of knockout over circle ci95"][1] < 0


def test_a_slot_without_scores_counts_as_its_first_candidate():
    scores = {Slot(0, 2): np.array([np.nan, np.nan]), Slot(1, 2): np.array([1.0, 2.0])}
    winners = {slot: Choice(0, False) for slot in scores}
    table = choices(["a", "b"], scores, winners, [{"utility": np.array([3.0, 5.0])}] * 2)
    curves = Curves(table, draws=50, seed=0)
    assert row_of(curves, 2, MODEL)["utility"] == 4.0
    assert curves.optimisation_rows()[0]["model score"] == 2.0, "of slots with scores"


def test_tables_and_plots_show_utilities_as_they_are_with_their_intervals():
    curves = Curves(world()[0], draws=200, seed=0)
    row = row_of(curves, 4, MODEL)
    text = text_table([row], "title", 150)
    low, high = row["utility ci95"]
    assert f"{row['utility']:.3f} [{low:.3f}, {high:.3f}]" in text and "100.0 [100.0, 100.0]" in text
    plain = line_plot([2, 4], {"model": [1, 2]}, "n", "utility", prefix="p")
    shaded = line_plot([2, 4], {"model": [1, 2]}, "n", "utility", {"model": [[0, 2], None]}, prefix="p")
    assert "PolyCollection" in shaded and "PolyCollection" not in plain
