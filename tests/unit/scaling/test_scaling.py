"""Test-time scaling: the two means, visible failures, and a grid that equals brute force."""

import itertools

import numpy as np
import pandas as pd
import pytest

from pgenrm_train.errors import ConfigError, DataError
from pgenrm_train.scaling.combine import COLUMNS, grid, scale

NAN = np.nan
NOTHING = np.zeros((0, 2))


def test_scale_adds_the_mean_of_own_and_the_mean_of_similar():
    scores, own, similar = scale(np.array([[8, 4], [6, 2]]), np.array([[5, 7]]))
    assert scores.tolist() == [7 + 5, 3 + 7]
    assert (own, similar) == (2, 1)


def test_failures_leave_the_mean_and_show_in_the_counts():
    scores, own, similar = scale(np.array([[8, 4], [NAN, 9], [NAN, NAN]]), np.array([[5, 7], [NAN, NAN]]))
    assert scores.tolist() == [13, 11]
    assert (own, similar) == (1, 1)


@pytest.mark.parametrize(
    ("own", "similar", "expected"),
    [
        (NOTHING, np.array([[5.0, 7.0]]), [5, 7]),
        (np.array([[8.0, 4.0]]), NOTHING, [8, 4]),
        (np.array([[NAN, NAN]]), np.array([[5.0, 7.0]]), [5, 7]),
    ],
)
def test_a_term_without_usable_chains_drops_out(own, similar, expected):
    assert scale(own, similar).scores.tolist() == expected


def test_without_any_usable_chain_there_is_no_score():
    scores, own, similar = scale(np.array([[NAN, 1]]), NOTHING)
    assert np.isnan(scores).all()
    assert (own, similar) == (0, 0)


def test_weights():
    assert scale(np.array([[8, 4]]), np.array([[5, 7]]), (1, 0.5)).scores.tolist() == [10.5, 7.5]
    assert scale(np.array([[8, 4]]), np.array([[5, 7]]), (0, 1)).scores.tolist() == [5, 7]
    for weights in ((0, 0), (-1, 1)):
        with pytest.raises(ConfigError, match="weights"):
            scale(np.array([[8, 4]]), NOTHING, weights)


def test_scale_takes_more_than_two_responses():
    assert scale(np.ones((4, 5)), np.ones((3, 5))).scores.tolist() == [2] * 5


def make_pool(pairs=3, seeds=(0, 5), own=4, similar=2, fail=0.25, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for pair, order, s in itertools.product(range(pairs), (0, 1), seeds):
        for source, count in (("ind", own), ("pro", similar)):
            for sample in range(count):
                failed = rng.random() < fail
                chosen, rejected = (NAN, NAN) if failed else rng.integers(1, 11, 2).astype(float)
                neighbour, failure = f"n{sample}" if source == "pro" else None, "length" if failed else None
                kind = "hard" if pair else "easy"
                row = (
                    f"p{pair}",
                    order,
                    s,
                    f"u{pair % 2}",
                    sample,
                    source,
                    neighbour,
                    chosen,
                    rejected,
                    failure,
                    kind,
                )
                rows.append(dict(zip(COLUMNS, row)))
    return pd.DataFrame(rows).sample(frac=1, random_state=1)


def brute_force(pool: pd.DataFrame, m: int, n: int) -> dict[tuple, tuple]:
    out = {}
    for (pair, order, s), rows in pool.groupby(["pair_id", "order", "seed"]):
        own, similar = (rows[rows.source == name].sort_values("sample") for name in ("ind", "pro"))
        for replicate in range(len(own) // m if m else 1):
            terms, used = [], []
            for part in (own.iloc[replicate * m : (replicate + 1) * m], similar.iloc[:n]):
                good = part[part.failure.isna()]
                used.append(len(good))
                if len(good):
                    terms.append(good[["score_chosen", "score_rejected"]].mean().to_numpy())
            out[pair, order, s, replicate] = (tuple(sum(terms)) if terms else None, *used)
    return out


@pytest.mark.parametrize(("m", "n"), [(1, 0), (2, 0), (3, 1), (4, 2), (0, 2), (1, 2)])
def test_grid_equals_brute_force(m, n):
    pool = make_pool()
    cell = grid(pool, [m], [n])
    expected = brute_force(pool, m, n)
    assert len(cell) == len(expected)
    for row in cell.itertuples():
        scores, own_used, similar_used = expected[row.pair_id, row.order, row.pool_seed, row.replicate]
        assert (row.own_used, row.similar_used) == (own_used, similar_used)
        if scores is None:
            assert np.isnan([row.score_chosen, row.score_rejected]).all()
            assert row.failure == "length"
        else:
            assert (row.score_chosen, row.score_rejected) == pytest.approx(scores)
            assert row.failure is None


def test_ind_1_averages_over_all_samples():
    pool = make_pool(pairs=40, own=8, similar=0, fail=0)
    cell = grid(pool, [1], [0])
    assert len(cell) == len(pool)
    assert (cell.score_chosen > cell.score_rejected).mean() == (
        pool.score_chosen > pool.score_rejected
    ).mean()


def test_pro_n_takes_the_most_similar_users():
    pool = make_pool(similar=4, fail=0)
    cell = grid(pool, [0], [1])
    nearest = pool[(pool.source == "pro") & (pool["sample"] == 0)]
    assert sorted(cell.score_chosen) == sorted(nearest.score_chosen)


def test_grid_rows_feed_an_accuracy_report():
    cells = grid(make_pool(), [0, 1, 4], [0, 2])
    report_columns = {
        "pair_id",
        "user_id",
        "order",
        "seed",
        "sample",
        "score_chosen",
        "score_rejected",
        "failure",
        "kind",
    }
    assert report_columns <= set(cells.columns)
    assert set(zip(cells["ind"], cells["pro"])) == {(0, 2), (1, 0), (1, 2), (4, 0), (4, 2)}
    for _, cell in cells.groupby(["ind", "pro"]):
        assert not cell.duplicated(["pair_id", "order", "seed", "sample"]).any()
        assert set(cell.groupby("pair_id").user_id.first()) == {"u0", "u1"}
    assert cells.groupby(["ind", "pro"]).seed.nunique()[1, 0] == 2 * 4


def test_replicates_can_be_capped():
    assert set(grid(make_pool(), [1], [0], replicates=2).replicate) == {0, 1}


def test_a_score_that_is_missing_without_a_failure_is_a_failure():
    pool = make_pool(fail=0)
    pool["score_chosen"] = NAN
    assert set(grid(pool, [4], [2]).failure) == {"no_score"}


def test_scores_with_a_failure_are_not_used():
    pool = make_pool(fail=0)
    pool["failure"] = "judge"
    assert grid(pool, [4], [2]).score_chosen.isna().all()


def test_gaps_doubles_and_cells_beyond_the_pool_are_refused():
    pool = make_pool()
    with pytest.raises(DataError, match=r"gaps: pair_id .* 'ind'"):
        grid(pool.drop(pool[pool.source == "ind"].index[0]), [1], [0])
    with pytest.raises(DataError, match="twice"):
        grid(pd.concat([pool, pool.iloc[:1]]), [1], [0])
    with pytest.raises(DataError, match="'kind'"):
        grid(pool.drop(columns="kind"), [1], [0])
    with pytest.raises(ConfigError, match=r"eval\.ind=8 is more than the 4"):
        grid(pool, [1, 8], [0])
    with pytest.raises(ConfigError, match=r"eval\.pro"):
        grid(pool, [0], [0])
