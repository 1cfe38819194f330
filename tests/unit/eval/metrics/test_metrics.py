"""Accuracy under each protocol, worked by hand on small tables; intervals by simulation."""

import json
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prediction_tables import consistent, row

from eval.metrics.accuracy import accuracy_report, pair_accuracy, paired_difference
from pgenrm_train.errors import ConfigError, DataError


def hand_table():
    """p1 hit twice · p2 hit, miss · p3 tie, hit · p4 failed, hit · p5 failed twice.  User a: p1, p2."""
    return pd.DataFrame(
        [
            row("p1", "a", 0, 8, 5, kind="easy"),
            row("p1", "a", 1, 7, 6, kind="easy"),
            row("p2", "a", 0, 8, 5, kind="hard"),
            row("p2", "a", 1, 5, 8, kind="hard"),
            row("p3", "b", 0, 6, 6, kind="hard"),
            row("p3", "b", 1, 7, 6, kind="hard"),
            row("p4", "b", 0, None, None, "no_marker", kind="hard"),
            row("p4", "b", 1, 9, 2, kind="hard"),
            row("p5", "b", 0, None, None, "no_marker"),
            row("p5", "b", 1, None, None, "length"),
        ]
    )


def test_strict_by_hand():
    report = accuracy_report(hand_table())
    assert report["accuracy"] == pytest.approx((1 + 0.5 + 0.5 + 0.5 + 0) / 5)
    assert report["macro_accuracy"] == pytest.approx((0.75 + 1 / 3) / 2)
    assert (report["n_pairs"], report["n_users"], report["n_dropped"]) == (5, 2, 0)
    assert report["ties"] == 1
    assert report["failures"] == {"length": 1, "no_marker": 2}
    assert report["failed_orders"] == 3
    assert report["order_flip_rate"] == pytest.approx(
        2 / 3
    )  # of p1, p2, p3: p2 flips, p3 ties in one order only
    assert report["stderr"] is None
    assert (report["protocol"], report["seeds"], report["ind"]) == ("strict", [0], 1)


def test_failures_stay_in_the_strict_denominator_and_leave_the_others():
    table = accuracy_report(hand_table())["protocols"]
    assert table["strict"]["accuracy"] == pytest.approx(0.5)
    both = table["both_orders"]
    assert (both["accuracy"], both["stderr"], both["n_counted"], both["n_dropped"]) == (
        pytest.approx(0.75),
        None,
        4,
        1,
    )
    assert [table[name]["n_counted"] + table[name]["n_dropped"] for name in table] == [5, 5, 5]
    assert table["release"]["n_dropped"] >= 1  # p5 at least; p3 and p4 when the failed or tied order is drawn


def test_release_by_hand_over_every_draw():
    """One order per pair.

    p1 always hits, p2 hits in order 0 only, p3 and p4 hit in order 1 and leave in order 0, p5 leaves.
    """
    seen = set()
    for seed in range(40):
        report = accuracy_report(hand_table(), protocol="release", seed=seed, draws=10)
        seen.add((round(report["accuracy"], 6), report["n_dropped"]))
    expected = {(round((1 + p2 + extra) / (2 + extra), 6), 3 - extra) for p2 in (0, 1) for extra in (0, 1, 2)}
    assert seen == expected
    again = [accuracy_report(hand_table(), protocol="release", seed=5, draws=10) for _ in range(2)]
    assert again[0] == again[1]


def test_user_disjoint_is_a_split_and_computes_as_strict():
    strict, disjoint = (accuracy_report(hand_table(), protocol=p) for p in ("strict", "user_disjoint"))
    assert disjoint.pop("protocol") == "user_disjoint"
    assert strict.pop("protocol") == "strict"
    assert strict == disjoint


def test_scores_are_compared_as_numbers():
    frame = consistent([True], score=("10.0", "9.5"))
    assert accuracy_report(frame)["accuracy"] == 1.0  # as texts "10.0" < "9.5"


def test_samples_are_averaged_over_the_valid_ones():
    rows = [row("p", "u", order, 9, 5, sample=0) for order in (0, 1)]
    rows += [row("p", "u", order, 4, 6, sample=1) for order in (0, 1)]  # means 6.5 and 5.5
    rows += [
        row("p", "u", order, -99, 99, "not_finite", sample=2) for order in (0, 1)
    ]  # its scores must not count
    report = accuracy_report(pd.DataFrame(rows))
    assert (report["accuracy"], report["ind"], report["failures"]) == (1.0, 3, {"not_finite": 2})


def test_rounding_of_means_is_a_tie():
    rows = [
        row("p", "u", order, chosen, rejected, sample=i)
        for order in (0, 1)
        for i, (chosen, rejected) in enumerate([(0.1, 0.3), (0.2, 0.2), (0.3, 0.1)])
    ]
    report = accuracy_report(pd.DataFrame(rows))
    assert (report["accuracy"], report["ties"]) == (0.0, 2)


def test_stderr_is_over_evaluation_seeds():
    tables = [consistent(hits).assign(seed=s) for s, hits in enumerate([[1, 1], [1, 0], [1, 0]])]
    report = accuracy_report(pd.concat(tables))
    assert report["accuracy"] == pytest.approx(2 / 3)
    assert report["stderr"] == pytest.approx(np.std([1, 0.5, 0.5], ddof=1) / np.sqrt(3))
    assert (report["seeds"], report["n_pairs"]) == ([0, 1, 2], 2)


def test_slices_keep_rows_without_a_kind():
    slices = accuracy_report(hand_table())["slices"]
    assert {k: (v["accuracy"], v["n_pairs"]) for k, v in slices.items()} == {
        "easy": (1.0, 1),
        "hard": (0.5, 3),
        "(none)": (0.0, 1),
    }
    assert accuracy_report(hand_table().drop(columns="kind"))["slices"] == {}


def test_one_pair_id_may_be_voted_on_by_several_users():
    frame = pd.concat([consistent([True], ["a"]), consistent([False], ["b"])])
    report = accuracy_report(frame)
    assert (report["accuracy"], report["n_pairs"], report["n_users"]) == (0.5, 2, 2)


def test_report_is_json():
    report = accuracy_report(hand_table())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    with pytest.raises(ConfigError, match=r"eval\.protocol='lenient'.*strict"):
        accuracy_report(hand_table(), protocol="lenient")


def test_everything_dropped_gives_no_accuracy():
    ties = consistent([True, True], score=(5, 5))
    report = accuracy_report(ties, protocol="release")
    assert (report["accuracy"], report["macro_accuracy"], report["n_dropped"]) == (None, None, 2)
    assert accuracy_report(ties)["accuracy"] == 0.0
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("order", 2, "row 3, column 'order'.*0 .*or 1"),
        ("order", None, "row 3, column 'order'"),
        ("seed", -1, "column 'seed'.*whole number"),
        ("sample", 0.5, "column 'sample'.*whole number"),
        (
            "score_chosen",
            float("nan"),
            "column 'score_chosen': expected a finite number where 'failure' is null, got nan",
        ),
        ("score_rejected", float("inf"), "column 'score_rejected'"),
        ("score_rejected", "n/a", "column 'score_rejected'.*'n/a'"),
        ("score_rejected", True, "column 'score_rejected'.*True"),
        ("failure", 3, "column 'failure'.*text or null"),
        ("failure", "", "column 'failure'.*text or null"),
        ("user_id", None, "row 3, column 'user_id'.*identifier"),
        ("kind", "other", "column 'kind'.*one kind"),
    ],
)
def test_a_bad_cell_is_named(column, value, words):
    frame = consistent([True, False]).astype(object)
    frame.loc[2, column] = value
    with pytest.raises(DataError, match=words):
        accuracy_report(frame)


def test_missing_duplicated_and_empty_tables_are_refused():
    frame = hand_table()
    with pytest.raises(DataError, match=r"pair_id 'p2' of user 'a'.*'order' 1 and 'seed' 0"):
        accuracy_report(frame.drop(index=3))
    with pytest.raises(DataError, match=r"row 11, column 'sample'.*one row per"):
        accuracy_report(pd.concat([frame, frame.iloc[[4]]]))
    with pytest.raises(DataError, match="column 'failure' is missing"):
        accuracy_report(frame.drop(columns="failure"))
    with pytest.raises(DataError, match="no rows"):
        accuracy_report(frame.iloc[:0])
    with pytest.raises(DataError, match="'seed' 1"):  # a pair that another seed did not evaluate
        accuracy_report(pd.concat([frame, frame[frame["pair_id"] == "p1"].assign(seed=1)]))


def test_the_input_is_left_alone_and_row_order_does_not_matter():
    frame = hand_table()
    before = frame.copy()
    shuffled = frame.sample(frac=1.0, random_state=1)
    assert accuracy_report(shuffled, protocol="release") == accuracy_report(frame, protocol="release")
    pd.testing.assert_frame_equal(frame, before)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 4), min_size=4, max_size=4)),
        min_size=1,
        max_size=12,
    )
)
def test_any_table_keeps_the_bounds(votes):
    rows = []
    for i, (user, (c0, r0, c1, r1)) in enumerate(votes):
        for order, (chosen, rejected) in enumerate([(c0, r0), (c1, r1)]):
            failure = "no_marker" if chosen == 4 else None
            rows.append(row(f"p{i}", f"u{user}", order, chosen, rejected, failure))
    report = accuracy_report(pd.DataFrame(rows), draws=50)
    low, high = report["ci95"]
    assert 0 <= low <= high <= 1
    assert report["n_pairs"] == len(votes)
    table = report["protocols"]
    assert (
        table["both_orders"]["accuracy"] is None
        or table["strict"]["accuracy"] <= table["both_orders"]["accuracy"]
    )
    hits = sum((a > b and a != 4) / 2 for _, (c0, r0, c1, r1) in votes for a, b in [(c0, r0), (c1, r1)])
    assert report["accuracy"] == pytest.approx(hits / len(votes))


def test_too_few_users_are_noted():
    report = accuracy_report(consistent([1, 1, 0], users=["u"] * 3))
    assert report["ci95"] == [0.0, 1.0] and report["ci95_note"].startswith("1 user: no interval")
    assert accuracy_report(consistent([1, 1, 0]))["ci95_note"].startswith("3 users: too few")
    assert accuracy_report(consistent([1, 0] * 10))["ci95_note"] is None
    one = paired_difference(consistent([1, 1], ["u", "u"]), consistent([0, 1], ["u", "u"]))
    assert one["ci95"] == [-1.0, 1.0] and one["ci95_note"].startswith("1 user")


def test_pair_accuracy_averages_orders_and_seeds():
    frame = pd.concat(
        [hand_table(), hand_table().assign(seed=1, score_chosen=1, score_rejected=2, failure=None)]
    )
    hits = pair_accuracy(frame).set_index("pair_id")["hit"]
    assert hits.to_dict() == {"p1": 0.5, "p2": 0.25, "p3": 0.25, "p4": 0.25, "p5": 0.0}


def test_paired_difference_by_hand():
    users = ["a", "a", "b", "b", "c", "c"]
    a, b = consistent([1, 1, 1, 1, 0, 1], users), consistent([0, 1, 0, 0, 0, 0], users)
    result = paired_difference(a, b)
    assert result["difference"] == pytest.approx(4 / 6)
    assert (result["better"], result["worse"], result["equal"], result["n_pairs"], result["n_users"]) == (
        4,
        0,
        2,
        6,
        3,
    )
    assert result["p_value"] == pytest.approx(2 / 2**4)  # four pairs better, none worse
    assert (result["users_better"], result["users_worse"], result["p_value_users"]) == (
        3,
        0,
        pytest.approx(2 / 2**3),
    )
    assert result["ci95"][0] > 0
    mirrored = paired_difference(b, a)
    assert (mirrored["difference"], mirrored["p_value"]) == (pytest.approx(-4 / 6), result["p_value"])
    same = paired_difference(a, a)
    assert (same["difference"], same["ci95"], same["p_value"]) == (0.0, [0.0, 0.0], 1.0)


def test_paired_difference_under_a_protocol_that_drops_counts_what_it_drops():
    """In `release` a pair that ties in the first table has no accuracy there and cannot be compared."""
    a, b = consistent([1, 1, 0]), consistent([1, 0, 0])
    a.loc[a["pair_id"] == "p2", ["score_chosen", "score_rejected"]] = 5
    result = paired_difference(a, b, protocol="release")
    assert (result["n_pairs"], result["n_dropped"], result["difference"]) == (2, 1, 0.5)
    assert paired_difference(a, b)["n_pairs"] == 3


def test_paired_difference_refuses_uncommon_pairs_by_default():
    a, b = consistent([1, 0, 1]), consistent([1, 0])
    with pytest.raises(DataError, match=r"pair_id 'p2'.*first table only"):
        paired_difference(a, b)
    result = paired_difference(a, b, common_only=True)
    assert (result["n_pairs"], result["only_a"], result["only_b"]) == (2, 1, 0)
    with pytest.raises(DataError, match="no pair_id is in both"):
        paired_difference(a, b.assign(user_id="z"), common_only=True)


def test_a_million_predictions_take_seconds():
    n_pairs, seeds, samples = 25_000, 5, 4
    grid = pd.MultiIndex.from_product([range(n_pairs), (0, 1), range(seeds), range(samples)])
    pair, order, seed, sample = (grid.get_level_values(i) for i in range(4))
    scores = np.random.default_rng(0).integers(1, 11, size=(len(grid), 2))
    frame = pd.DataFrame(
        {
            "pair_id": "p" + pair.astype(str),
            "user_id": "u" + (pair % 2000).astype(str),
            "order": order,
            "seed": seed,
            "sample": sample,
            "score_chosen": scores[:, 0],
            "score_rejected": scores[:, 1],
            "failure": None,
            "kind": np.where(pair % 3 == 0, "hard", "easy"),
        }
    )
    start = time.process_time()
    report = accuracy_report(frame)
    assert time.process_time() - start < 40  # loosely; about 5 s on two idle cores
    assert (len(frame), report["n_pairs"], report["n_users"]) == (1_000_000, n_pairs, 2000)
