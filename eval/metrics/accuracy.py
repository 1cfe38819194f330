"""Accuracy of pairwise preference predictions, under named protocols (METHOD §8).

The protocols differ in their treatment of ties and failures:

    strict         Both orders.  An order is a hit only if the chosen response scores strictly higher.
                   A tie, or an order whose samples all failed, counts 0.  Every pair stays in the
                   denominator.  The default.
    both_orders    SynthesizeMe: both orders, a tie is wrong.  An order without a valid sample leaves the
                   mean; a pair without a valid order leaves the denominator.  METHOD §8 keeps every pair
                   only for strict; §11 lists failures that leave it among the defects of the field.
    release        The authors' script: one random order per pair and seed; ties and failures leave the
                   denominator.
    user_disjoint  P-Check: a split of the users, not another metric; computed as strict.

`n_dropped` counts everything that leaves a denominator.
"""

from typing import NotRequired, TypedDict

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from eval.metrics import intervals
from eval.metrics.intervals import few_users, interval
from eval.metrics.outcomes import TIE_RTOL, Outcomes, outcomes, user_codes
from pgenrm_train.bootstrap import mean
from pgenrm_train.config.evaluation import PROTOCOLS
from pgenrm_train.errors import ConfigError, DataError

SAME_PREDICTIONS = PROTOCOLS[:3]  # metrics; `user_disjoint` is a split
NO_KIND = "(none)"


class Accuracy(TypedDict):
    """An accuracy, a fraction in [0, 1], with its interval.  None without a counted pair."""

    accuracy: float | None  # mean over evaluation seeds
    ci95: list[float]  # percentile bootstrap over users; [0, 1] for a single user


class SliceAccuracy(Accuracy):
    n_pairs: int
    n_users: int


class ProtocolAccuracy(Accuracy):
    stderr: float | None
    n_counted: int  # (pair, seed) cells in the denominator
    n_dropped: int  # (pair, seed) cells that left it


class AccuracyReport(Accuracy):
    """The `results.json` fields of an evaluation, ready for JSON."""

    stderr: float | None  # sd/√seeds; None with one evaluation seed
    ci95_note: str | None  # a sentence if users are too few for the interval
    macro_accuracy: float | None  # mean over users
    n_pairs: int  # all pairs
    n_users: int
    n_dropped: int
    ties: int  # (pair, order, seed) with equal means
    failed_orders: int  # (pair, order, seed) without a valid sample
    failures: dict[str, int]  # failed samples by kind
    order_flip_rate: float | None  # see `_flip_rate`
    protocol: str
    seeds: list[int]
    slices: dict[str, SliceAccuracy]  # by `kind`
    protocols: dict[str, ProtocolAccuracy]  # the same predictions under every protocol
    ind: int
    pro: NotRequired[int]
    model: NotRequired[str]


class Difference(TypedDict):
    """Accuracy of one table minus that of another on the same pairs; see `difference`."""

    difference: float | None
    ci95: list[float]  # resamples users with all their pairs
    ci95_note: str | None
    p_value_users: float
    p_value: float
    accuracy_a: float | None
    accuracy_b: float | None
    better: int  # pairs, as `worse` and `equal`
    worse: int
    equal: int
    users_better: int
    users_worse: int
    n_pairs: int
    n_users: int
    n_dropped: int  # pairs that the protocol drops in either table
    only_a: NotRequired[int]
    only_b: NotRequired[int]


def accuracy_report(
    predictions: pd.DataFrame,
    *,
    protocol: str = "strict",
    draws: int = 2000,
    seed: int = 0,
) -> AccuracyReport:
    """Compute the accuracy fields of `results.json`.

    predictions: one row per pair × order × seed × sample with `outcomes.COLUMNS` and, optionally, `kind`.
    `order` 0 presents the chosen response first.  Scores must be finite only where `failure` is null; texts
    such as "10.0" count as numbers.
    draws, seed: bootstrap draws and their seed (`seed` also draws the orders of `release`).

    Raises DataError for a table that does not fit, ConfigError for an unknown protocol.

    >>> row = {"pair_id": "p1", "user_id": "ann", "seed": 0, "sample": 0, "failure": None, "kind": None}
    >>> orders = [{"order": 0, "score_chosen": 8.0, "score_rejected": 6.0},
    ...           {"order": 1, "score_chosen": 7.0, "score_rejected": 7.0}]
    >>> report = accuracy_report(pd.DataFrame([row | order for order in orders]))
    >>> report["accuracy"], report["ties"]
    (0.5, 1)
    """
    grid = outcomes(predictions)
    values, users = protocol_values(grid, protocol, seed), grid.users
    n_users = int(users.max()) + 1
    kinds = grid.pairs["kind"].fillna(NO_KIND).to_numpy()
    slices = sorted(set(kinds)) if grid.pairs["kind"].notna().any() else []
    return {
        "accuracy": intervals.accuracy(values),
        "stderr": intervals.stderr(values),
        "ci95": interval(values, users, draws, seed),
        "ci95_note": few_users(n_users),
        "macro_accuracy": intervals.macro(values, users),
        "n_pairs": len(values),
        "n_users": n_users,
        "n_dropped": int(np.isnan(values).sum()),
        "ties": int((grid.margin == 0).sum()),
        "failed_orders": int(np.isnan(grid.margin).sum()),
        "failures": grid.failures,
        "order_flip_rate": _flip_rate(grid.sign),
        "protocol": protocol,
        "seeds": [int(s) for s in grid.seeds],
        "slices": {kind: slice_statistics(values, users, kinds == kind, draws, seed) for kind in slices},
        "protocols": {name: _under(name, grid, users, draws, seed) for name in SAME_PREDICTIONS},
        "ind": grid.samples,
    }


def pair_accuracy(predictions: pd.DataFrame, protocol: str = "strict", seed: int = 0) -> pd.DataFrame:
    """One row per pair: pair_id, user_id, kind and `hit` in [0, 1], averaged over orders and seeds.

    NaN where the protocol drops the pair in every seed; `seed` draws the orders of `release`.
    """
    grid = outcomes(predictions)
    values = protocol_values(grid, protocol, seed)
    with np.errstate(invalid="ignore"):
        return grid.pairs.assign(hit=np.nansum(values, axis=1) / (~np.isnan(values)).sum(axis=1))


def paired_difference(
    a: pd.DataFrame,
    b: pd.DataFrame,
    *,
    draws: int = 2000,
    seed: int = 0,
    common_only: bool = False,
    protocol: str = "strict",
) -> Difference:
    """Accuracy of predictions `a` minus that of `b` on the same pairs; statistics as in `difference`.

    Pairs of only one table raise DataError, unless `common_only`: then `only_a` and `only_b` count them.
    """
    both = paired_hits(a, b, protocol=protocol, seed=seed)
    if not common_only:
        refuse_unpaired(both, "the predictions to compare", "the first table", "the second table")
    common = both[both["_merge"] == "both"]
    if common.empty:
        raise DataError("predictions to compare: no pair_id is in both tables; expected common pairs")
    return difference(common, draws=draws, seed=seed) | {
        "only_a": int((both["_merge"] == "left_only").sum()),
        "only_b": int((both["_merge"] == "right_only").sum()),
    }


def paired_hits(a: pd.DataFrame, b: pd.DataFrame, *, protocol: str = "strict", seed: int = 0) -> pd.DataFrame:
    """One row per pair of either table: pair_id, user_id, hit_a, hit_b, and pandas' merge indicator.

    The indicator `_merge` is both, left_only or right_only.
    """
    hits = [pair_accuracy(table, protocol, seed).drop(columns="kind") for table in (a, b)]
    return hits[0].merge(
        hits[1], on=["pair_id", "user_id"], how="outer", suffixes=("_a", "_b"), indicator=True
    )


def refuse_unpaired(hits: pd.DataFrame, both: str, first: str, second: str) -> None:
    """Raise DataError for a pair of only one table; `both`, `first` and `second` name the tables."""
    alone = hits[hits["_merge"] != "both"]
    if len(alone):
        row = alone.iloc[0]
        raise DataError(
            f"{both} hold different data: pair_id {row['pair_id']!r} of user {row['user_id']!r} is in "
            f"{first if row['_merge'] == 'left_only' else second} only ({len(alone)} such pairs); evaluate "
            "both on the same pairs"
        )


def difference(hits: pd.DataFrame, *, draws: int = 2000, seed: int = 0) -> Difference:
    """Mean of `hit_a` − `hit_b` over the rows of `paired_hits`, with an interval and two exact tests.

    `p_value_users` is the exact sign test over users whose mean differs: users are independent, so trust this
    one.  `p_value` is the exact sign test over pairs that differ (McNemar's when hits are 0 or 1).  It takes
    the pairs of one user for independent, and is too sure where they are not.
    """
    kept = hits.dropna(subset=["hit_a", "hit_b"])
    change = _unrounded((kept["hit_a"] - kept["hit_b"]).to_numpy(dtype=float))
    users = user_codes(kept)
    by_user = _unrounded(np.bincount(users, weights=change))
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    users_better, users_worse = int((by_user > 0).sum()), int((by_user < 0).sum())
    return {
        "difference": mean(change),
        "ci95": interval(change[:, None], users, draws, seed, whole_range=(-1.0, 1.0)),
        "ci95_note": few_users(len(by_user)),
        "p_value_users": _sign_test(users_better, users_worse),
        "p_value": _sign_test(better, worse),
        "accuracy_a": mean(kept["hit_a"].to_numpy()),
        "accuracy_b": mean(kept["hit_b"].to_numpy()),
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


# ---- protocols: outcomes → values, float (pairs, seeds), NaN where a cell leaves the denominator


def protocol_values(grid: Outcomes, protocol: str, seed: int) -> np.ndarray:
    """Accuracy per pair and evaluation seed under `protocol`.  Raises ConfigError for an unknown one."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"eval.protocol={protocol!r} is unknown; expected one of {', '.join(PROTOCOLS)}")
    sign = grid.sign
    hit = (sign > 0).astype(float)  # a comparison with NaN is false, so a failed order is no hit
    if protocol in ("strict", "user_disjoint"):
        return hit.mean(axis=2)
    if protocol == "both_orders":
        valid = ~np.isnan(sign)
        with np.errstate(invalid="ignore"):
            return hit.sum(axis=2) / valid.sum(axis=2)
    # Drawn per evaluation seed, equal in every call.
    orders = [np.random.default_rng([seed, int(s)]).integers(0, 2, size=len(sign)) for s in grid.seeds]
    drawn = np.take_along_axis(sign, np.stack(orders, axis=1)[:, :, None], axis=2)[:, :, 0]
    return np.where(np.isnan(drawn) | (drawn == 0), np.nan, drawn > 0)


def _under(protocol: str, grid: Outcomes, users: np.ndarray, draws: int, seed: int) -> ProtocolAccuracy:
    values = protocol_values(grid, protocol, seed)
    return {
        "accuracy": intervals.accuracy(values),
        "ci95": interval(values, users, draws, seed),
        "stderr": intervals.stderr(values),
        "n_counted": int((~np.isnan(values)).sum()),
        "n_dropped": int(np.isnan(values).sum()),
    }


def _flip_rate(sign: np.ndarray) -> float | None:
    """Share of (pair, seed), both orders valid, whose preferred response differs between the orders.

    A tie in one order only counts as a flip.  None without such a cell.
    """
    valid = ~np.isnan(sign).any(axis=2)
    return float((sign[..., 0] != sign[..., 1])[valid].mean()) if valid.any() else None


def slice_statistics(
    values: np.ndarray, users: np.ndarray, rows: np.ndarray, draws: int, seed: int
) -> SliceAccuracy:
    """Accuracy, interval and sizes of some rows of `values`."""
    return {
        "accuracy": intervals.accuracy(values[rows]),
        "ci95": interval(values[rows], users[rows], draws, seed),
        "n_pairs": int(rows.sum()),
        "n_users": len(np.unique(users[rows])),
    }
