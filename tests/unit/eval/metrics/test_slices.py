"""Slices are read off the pairs, and each has its own accuracy and denominator."""

import numpy as np
import pytest
from prediction_tables import consistent

from eval.metrics.slices import history_label, length_label, prototype_macro, slice_labels, slice_rows
from pgenrm_train.records.pairs import Message, PreferencePair


def vote(
    number: int, chosen: str = "tea", rejected: str = "coffee", turns: int = 1, **more
) -> PreferencePair:
    context = tuple(Message(("user", "assistant")[i % 2], f"turn {i}") for i in range(2 * turns - 1))
    return PreferencePair(f"p{number}", f"u{number}", context, chosen, rejected, **more)


def test_length_and_history_labels():
    labels = [length_label("a" * n, "b" * 100) for n in (10, 50, 51, 79, 81, 100, 125, 126, 200, 201)]
    assert [labels.index(label) for label in dict.fromkeys(labels)] == [0, 2, 4, 7, 9]
    assert length_label("", "") == "similar (4/5–5/4)"
    assert [history_label(n) for n in (0, 1, 3, 4, 8)] == [
        "0 votes",
        "1 vote",
        "3 votes",
        "4–7 votes",
        "8 votes or more",
    ]


def test_rows_by_hand_and_dimensions_without_difference_are_left_out():
    pairs = [vote(0, scenario="work"), vote(1, scenario="work", turns=2), vote(2, scenario="home"), vote(3)]
    labels = slice_labels(pairs, {p.pair_id: () for p in pairs})
    rows = slice_rows(consistent([1, 0, 1, 0]), labels, protocol="strict", draws=50, seed=0)
    found = {(r["slice"], r["value"]): (r["accuracy"], r["pairs"], r["users"]) for r in rows}
    assert found == {
        ("scenario", "(none)"): (0.0, 1, 1),
        ("scenario", "home"): (1.0, 1, 1),
        ("scenario", "work"): (0.5, 2, 2),
        ("conversation", "one turn"): (pytest.approx(2 / 3), 3, 3),
        ("conversation", "several turns"): (0.0, 1, 1),
    }


def test_macro_accuracy_over_prototypes_weighs_prototypes_equally():
    pairs = [vote(n) for n in range(4)]
    none = {p.pair_id: () for p in pairs}
    labels = slice_labels(pairs, none, {"p0": 0, "p1": 0, "p2": 7})  # p3's analysis could not be read
    table = consistent([1, 0, 1, 0])
    assert prototype_macro(table, labels, protocol="strict", seed=0) == pytest.approx((0.5 + 1.0) / 2)
    assert prototype_macro(table, slice_labels(pairs, none), protocol="strict", seed=0) is None
    rows = slice_rows(table, labels, protocol="strict", draws=50, seed=0)
    assert [(r["value"], r["pairs"]) for r in rows] == [("(none)", 1), ("000", 2), ("007", 1)]
    assert np.isfinite([bound for r in rows for bound in r["ci95"]]).all()
