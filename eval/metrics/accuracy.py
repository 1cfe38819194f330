"""Accuracy of pairwise preference predictions, under named protocols (METHOD §8).

What a protocol does with ties and failures is the whole difference:

    strict         both orders; an order is a hit only if the chosen response scores strictly higher; a tie and an order whose
                   samples all failed count 0.  Every pair stays in the denominator.  The default.
    both_orders    SynthesizeMe: both orders, a tie is wrong.  METHOD §8 grants "every pair stays in the denominator" to strict
                   alone and lists failures that leave it among the defects of the field (§11), so here an order without a
                   valid sample leaves the mean, and a pair without a valid order leaves the denominator.
    release        the authors' script: one random order per pair and seed, ties and failures leave the denominator.
    user_disjoint  P-Check: a split of the users, not another metric; computed as strict.

What leaves a denominator is counted in `n_dropped`, never lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from eval.metrics import intervals
from eval.metrics.intervals import few_users, interval
from eval.metrics.outcomes import TIE_RTOL, Outcomes, outcomes, user_codes
from pgenrm_train.errors import ConfigError, DataError

PROTOCOLS = ("strict", "both_orders", "release", "user_disjoint")
SAME_PREDICTIONS = ("strict", "both_orders", "release")  # metrics; `user_disjoint` is a split
NO_KIND = "(none)"


def accuracy_report(
    predictions: pd.DataFrame,
    *,
    protocol: str = "strict",
    draws: int = 2000,
    seed: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `results.json` fields of an evaluation; JSON-ready, accuracies are fractions in [0, 1].

    predictions: one row a pair × order × seed × sample with `outcomes.COLUMNS` and, optionally, `kind`.  `order` 0 is the
    presentation with the chosen response first; scores need to be finite only where `failure` is null; texts such as "10.0" are
    numbers.
    draws, seed: bootstrap draws and their seed (`seed` also draws the orders of `release`).
    extra: facts to add (model, data, pro, …); `ind` is measured unless given here.

    Fields: `accuracy` mean over evaluation seeds; `stderr` sd/√seeds (None with one); `ci95` percentile bootstrap over users, the
    whole range [0, 1] when only one user was seen, and `ci95_note` a sentence when users are too few for it; `macro_accuracy` mean
    over users; `n_pairs` all pairs; `n_dropped` the (pair, seed) cells that left the denominator; `ties` the (pair, order, seed)
    with equal means; `failed_orders` those without a valid sample; `failures` failed samples by kind; `order_flip_rate` the share
    of (pair, seed) with both orders valid whose preferred response differs between orders, a tie in one order only included (None
    without such a cell); `slices` by `kind`; `protocols` the same predictions under every protocol.

    Raises DataError for a table that does not fit, ConfigError for an unknown protocol or an `extra` that hides a measurement.
    """
    found = outcomes(predictions)
    values, users = protocol_values(found, protocol, seed), found.users
    n_users = int(users.max()) + 1
    report = {
        "accuracy": intervals.accuracy(values),
        "stderr": intervals.stderr(values),
        "ci95": interval(values, users, draws, seed),
        "ci95_note": few_users(n_users),
        "macro_accuracy": intervals.macro(values, users),
        "n_pairs": len(values),
        "n_users": n_users,
        "n_dropped": int(np.isnan(values).sum()),
        "ties": int((found.margin == 0).sum()),
        "failed_orders": int(np.isnan(found.margin).sum()),
        "failures": found.failures,
        "order_flip_rate": _flip_rate(found.sign),
        "protocol": protocol,
        "seeds": [int(s) for s in found.seeds],
        "slices": _slices(found.pairs, values, users, draws, seed),
        "protocols": _protocols(found, users, draws, seed),
    }
    extra = dict(extra or {})
    if hidden := sorted(report.keys() & extra.keys()):
        raise ConfigError(
            f"extra holds {', '.join(hidden)}, which accuracy_report measures; expected other names"
        )
    return {**report, "ind": found.samples, **extra}


def pair_accuracy(predictions: pd.DataFrame, protocol: str = "strict", seed: int = 0) -> pd.DataFrame:
    """One row a pair: pair_id, user_id, kind and `hit` in [0, 1], its accuracy averaged over orders and seeds.

    NaN where the protocol drops the pair in every seed; `seed` draws the orders of `release`.
    """
    found = outcomes(predictions)
    sums, counts = _row_sums(protocol_values(found, protocol, seed))
    with np.errstate(invalid="ignore"):
        return found.pairs.assign(hit=sums / counts)


def paired_difference(
    a: pd.DataFrame,
    b: pd.DataFrame,
    *,
    draws: int = 2000,
    seed: int = 0,
    common_only: bool = False,
    protocol: str = "strict",
) -> dict[str, Any]:
    """Accuracy of predictions `a` minus that of `b` on the same pairs; see `difference` for the statistics.

    Pairs that only one table holds raise DataError, unless `common_only`: then `only_a` and `only_b` count them.
    """
    both = paired_hits(a, b, protocol=protocol, seed=seed)
    alone = both[both["_merge"] != "both"]
    if len(alone) and not common_only:
        row = alone.iloc[0]
        raise DataError(
            f"predictions to compare: pair_id {row['pair_id']!r} of user {row['user_id']!r} is in the "
            f"{'first' if row['_merge'] == 'left_only' else 'second'} table only ({len(alone)} such pairs); "
            "expected the same pairs in both"
        )
    common = both[both["_merge"] == "both"]
    if common.empty:
        raise DataError("predictions to compare: no pair_id is in both tables; expected common pairs")
    return difference(common, draws=draws, seed=seed) | {
        "only_a": int((both["_merge"] == "left_only").sum()),
        "only_b": int((both["_merge"] == "right_only").sum()),
    }


def paired_hits(a: pd.DataFrame, b: pd.DataFrame, *, protocol: str = "strict", seed: int = 0) -> pd.DataFrame:
    """One row a pair of either table: pair_id, user_id, hit_a, hit_b, and `_merge` (both | left_only | right_only)."""
    hits = [pair_accuracy(table, protocol, seed).drop(columns="kind") for table in (a, b)]
    return hits[0].merge(
        hits[1], on=["pair_id", "user_id"], how="outer", suffixes=("_a", "_b"), indicator=True
    )


def difference(hits: pd.DataFrame, *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Mean of `hit_a` − `hit_b` over the rows of `paired_hits`, with an interval and two exact tests.

    `ci95` resamples users with all their pairs.  `p_value_users` is the exact sign test over users whose mean differs: users are
    independent, so it is the one to trust.  `p_value` is the exact sign test over pairs that differ (McNemar's when hits are 0 or
    1), which takes the pairs of one user for independent and is too sure where they are not.  `better`, `worse` and `equal` count
    pairs, `users_better` and `users_worse` users; `n_dropped` pairs that the protocol drops in either table.
    """
    kept = hits.dropna(subset=["hit_a", "hit_b"])
    change = _unrounded((kept["hit_a"] - kept["hit_b"]).to_numpy(dtype=float))
    users = user_codes(kept)
    by_user = _unrounded(np.bincount(users, weights=change)) if len(kept) else change
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    users_better, users_worse = int((by_user > 0).sum()), int((by_user < 0).sum())
    return {
        "difference": _mean(change),
        "ci95": interval(change[:, None], users, draws, seed, whole_range=(-1.0, 1.0))
        if len(kept)
        else [-1.0, 1.0],
        "ci95_note": few_users(len(by_user)),
        "p_value_users": _sign_test(users_better, users_worse),
        "p_value": _sign_test(better, worse),
        "accuracy_a": _mean(kept["hit_a"]),
        "accuracy_b": _mean(kept["hit_b"]),
        "better": better,
        "worse": worse,
        "equal": len(change) - better - worse,
        "users_better": users_better,
        "users_worse": users_worse,
        "n_pairs": len(change),
        "n_users": len(by_user),
        "n_dropped": len(hits) - len(kept),
    }


def _sign_test(better: int, worse: int) -> float:
    return float(binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0


def _unrounded(change: np.ndarray) -> np.ndarray:
    return np.where(np.abs(change) < TIE_RTOL, 0.0, change)


def _mean(values: Any) -> float | None:
    return float(values.mean()) if len(values) else None


# ---- protocols: outcomes → values, float (pairs, seeds), NaN where a cell leaves the denominator


def protocol_values(found: Outcomes, protocol: str, seed: int) -> np.ndarray:
    """Accuracy of every pair in every evaluation seed under `protocol`.  Raises ConfigError for an unknown one."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"eval.protocol={protocol!r} is unknown; expected one of {', '.join(PROTOCOLS)}")
    sign = found.sign
    hit = (sign > 0).astype(float)  # a comparison with NaN is false, so a failed order is no hit
    if protocol in ("strict", "user_disjoint"):
        return hit.mean(axis=2)
    if protocol == "both_orders":
        valid = ~np.isnan(sign)
        with np.errstate(invalid="ignore"):
            return hit.sum(axis=2) / valid.sum(axis=2)
    order = _drawn_orders(found.seeds, len(sign), seed)
    drawn = np.take_along_axis(sign, order[:, :, None], axis=2)[:, :, 0]
    return np.where(np.isnan(drawn) | (drawn == 0), np.nan, drawn > 0)


def _drawn_orders(seeds: np.ndarray, n_pairs: int, seed: int) -> np.ndarray:
    """An order per (pair, seed), int (pairs, seeds): another draw in every evaluation seed, the same in every call."""
    columns = [np.random.default_rng([seed, int(s)]).integers(0, 2, size=n_pairs) for s in seeds]
    return np.stack(columns, axis=1)


def _protocols(found: Outcomes, users: np.ndarray, draws: int, seed: int) -> dict[str, dict[str, Any]]:
    table = {}
    for name in SAME_PREDICTIONS:
        values = protocol_values(found, name, seed)
        table[name] = {
            "accuracy": intervals.accuracy(values),
            "ci95": interval(values, users, draws, seed),
            "stderr": intervals.stderr(values),
            "n_counted": int((~np.isnan(values)).sum()),
            "n_dropped": int(np.isnan(values).sum()),
        }
    return table


def _row_sums(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.nansum(values, axis=1), (~np.isnan(values)).sum(axis=1)


def _flip_rate(sign: np.ndarray) -> float | None:
    valid = ~np.isnan(sign).any(axis=2)
    return float((sign[..., 0] != sign[..., 1])[valid].mean()) if valid.any() else None


def _slices(
    pairs: pd.DataFrame, values: np.ndarray, users: np.ndarray, draws: int, seed: int
) -> dict[str, Any]:
    if pairs["kind"].isna().all():
        return {}
    kinds = pairs["kind"].fillna(NO_KIND).to_numpy()
    return {kind: slice_statistics(values, users, kinds == kind, draws, seed) for kind in sorted(set(kinds))}


def slice_statistics(
    values: np.ndarray, users: np.ndarray, rows: np.ndarray, draws: int, seed: int
) -> dict[str, Any]:
    """Accuracy, interval and sizes of some rows of `values`."""
    return {
        "accuracy": intervals.accuracy(values[rows]),
        "ci95": interval(values[rows], users[rows], draws, seed),
        "n_pairs": int(rows.sum()),
        "n_users": len(np.unique(users[rows])),
    }
