"""Accuracy of pairwise preference predictions, under named protocols (METHOD §8).

Samples of one (pair, order, evaluation seed) are averaged over the valid ones, `s = (1/m) Σ Extract(S_x)` (METHOD §7, Ind-m), and
the two means are compared as numbers.  What a protocol then does with ties and failures is the whole difference:

    strict         both orders; an order is a hit only if the chosen response scores strictly higher; a tie and an order whose
                   samples all failed count 0.  Every pair stays in the denominator.  The default.
    both_orders    SynthesizeMe: both orders, a tie is wrong.  METHOD §8 grants "every pair stays in the denominator" to strict
                   alone and lists failures that leave it among the defects of the field (§11), so here an order without a
                   valid sample leaves the mean, and a pair without a valid order leaves the denominator.
    release        the authors' script: one random order per pair and seed, ties and failures leave the denominator.
    user_disjoint  P-Check: a split of the users, not another metric; computed as strict.

What leaves a denominator is counted in `n_dropped`, never lost.  A *pair* is one vote, identified by (user_id, pair_id): several
data sets give one `pair_id` to all who voted on the same two responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from pgenrm_train.errors import ConfigError, DataError

COLUMNS = ("pair_id", "user_id", "order", "seed", "sample", "score_chosen", "score_rejected", "failure")
PROTOCOLS = ("strict", "both_orders", "release", "user_disjoint")
NO_KIND = "(none)"
TIE_RTOL = 1e-12  # means of the same scores summed in another order differ by rounding alone; that is a tie


@dataclass(frozen=True)
class _Outcomes:
    """What the model preferred on the full grid of pairs × evaluation seeds × orders."""

    pairs: pd.DataFrame  # pair_id, user_id, kind (str|None); sorted, one row a pair
    seeds: np.ndarray
    sign: np.ndarray  # float (pairs, seeds, 2): +1 chosen, −1 rejected, 0 tie, NaN when every sample failed
    failures: dict[str, int]
    samples: int  # most samples that a (pair, order, seed) has


def accuracy_report(
    predictions: pd.DataFrame,
    *,
    protocol: str = "strict",
    draws: int = 2000,
    seed: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `results.json` fields of an evaluation; JSON-ready, accuracies are fractions in [0, 1].

    predictions: one row a pair × order × seed × sample with `COLUMNS` and, optionally, `kind`.  `order` 0 is the presentation
    with the chosen response first; scores need to be finite only where `failure` is null; texts such as "10.0" are numbers.
    draws, seed: bootstrap draws and their seed (`seed` also draws the orders of `release`).
    extra: facts to add (model, data, pro, …); `ind` is measured unless given here.

    Fields: `accuracy` mean over evaluation seeds; `stderr` sd/√seeds (None with one); `ci95` percentile bootstrap over users, the
    whole range [0, 1] when only one user was seen; `macro_accuracy` mean over users; `n_pairs` all pairs; `n_dropped` the (pair,
    seed) cells that left the denominator; `ties` the (pair, order, seed) with equal means; `failed_orders` those without a valid
    sample; `failures` failed samples by kind; `order_flip_rate` the share of (pair, seed) with both orders valid whose preferred
    response differs between orders, a tie in one order only included (None without such a cell); `slices` by `kind`;
    `protocols` the same predictions under every protocol.

    Raises DataError for a table that does not fit, ConfigError for an unknown protocol or an `extra` that hides a measurement.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"eval.protocol={protocol!r} is unknown; expected one of {', '.join(PROTOCOLS)}")
    outcomes = _outcomes(predictions)
    values = _values(outcomes, protocol, seed)
    users, n_users = _user_codes(outcomes.pairs)
    report = {
        "accuracy": _accuracy(values),
        "stderr": _stderr(values),
        "ci95": _interval(values, users, draws, seed),
        "macro_accuracy": _macro(values, users),
        "n_pairs": len(values),
        "n_users": n_users,
        "n_dropped": int(np.isnan(values).sum()),
        "ties": int((outcomes.sign == 0).sum()),
        "failed_orders": int(np.isnan(outcomes.sign).sum()),
        "failures": outcomes.failures,
        "order_flip_rate": _flip_rate(outcomes.sign),
        "protocol": protocol,
        "seeds": [int(s) for s in outcomes.seeds],
        "slices": _slices(outcomes.pairs, values, users, draws, seed),
        "protocols": _protocols(outcomes, seed),
    }
    extra = dict(extra or {})
    if hidden := sorted(report.keys() & extra.keys()):
        raise ConfigError(f"extra holds {', '.join(hidden)}, which accuracy_report measures; expected other names")
    return {**report, "ind": outcomes.samples, **extra}


def pair_accuracy(predictions: pd.DataFrame) -> pd.DataFrame:
    """One row a pair: pair_id, user_id, kind and `hit` in [0, 1], its strict accuracy averaged over orders and seeds."""
    outcomes = _outcomes(predictions)
    return outcomes.pairs.assign(hit=_values(outcomes, "strict", 0).mean(axis=1))


def paired_difference(
    a: pd.DataFrame, b: pd.DataFrame, *, draws: int = 2000, seed: int = 0, common_only: bool = False
) -> dict[str, Any]:
    """Strict accuracy of predictions `a` minus that of `b` on the same pairs.

    `ci95` resamples users with all their pairs, and is the figure to trust when users hold many pairs; `p_value` is the exact
    sign test over pairs that differ (McNemar's when hits are 0 or 1), which treats pairs as independent.  `better`, `worse`
    and `equal` count pairs.  Pairs that only one table holds raise DataError, unless `common_only`: then `only_a` and `only_b`
    count them.
    """
    keys = ["pair_id", "user_id"]
    both = pair_accuracy(a).merge(pair_accuracy(b), on=keys, how="outer", suffixes=("_a", "_b"), indicator=True)
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
    change = (common["hit_a"] - common["hit_b"]).to_numpy()
    change = np.where(np.abs(change) < TIE_RTOL, 0.0, change)
    users, n_users = _user_codes(common)
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    return {
        "difference": float(change.mean()),
        "ci95": _interval(change[:, None], users, draws, seed, whole_range=(-1.0, 1.0)),
        "p_value": float(binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0,
        "accuracy_a": float(common["hit_a"].mean()),
        "accuracy_b": float(common["hit_b"].mean()),
        "better": better,
        "worse": worse,
        "equal": len(change) - better - worse,
        "n_pairs": len(change),
        "n_users": n_users,
        "only_a": int((both["_merge"] == "left_only").sum()),
        "only_b": int((both["_merge"] == "right_only").sum()),
    }


def user_bootstrap(sums: np.ndarray, counts: np.ndarray, *, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of Σsums/Σcounts when users are drawn with replacement; `sums`, `counts`: float (users,).

    A user comes with all their pairs, for pairs of one user are not independent.  Memory stays below ~64 MB at any size.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(sums))
    ratios = []
    for start in range(0, draws, chunk):
        drawn = rng.integers(0, len(sums), size=(min(chunk, draws - start), len(sums)))
        with np.errstate(invalid="ignore"):
            ratios.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.nanpercentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


# ---- protocols: outcomes → values, float (pairs, seeds), NaN where a cell leaves the denominator


def _values(outcomes: _Outcomes, protocol: str, seed: int) -> np.ndarray:
    sign = outcomes.sign
    hit = (sign > 0).astype(float)  # a comparison with NaN is false, so a failed order is no hit
    if protocol in ("strict", "user_disjoint"):
        return hit.mean(axis=2)
    if protocol == "both_orders":
        valid = ~np.isnan(sign)
        with np.errstate(invalid="ignore"):
            return hit.sum(axis=2) / valid.sum(axis=2)
    order = _drawn_orders(outcomes.seeds, len(sign), seed)
    drawn = np.take_along_axis(sign, order[:, :, None], axis=2)[:, :, 0]
    return np.where(np.isnan(drawn) | (drawn == 0), np.nan, drawn > 0)


def _drawn_orders(seeds: np.ndarray, n_pairs: int, seed: int) -> np.ndarray:
    """An order per (pair, seed), int (pairs, seeds): another draw in every evaluation seed, the same in every call."""
    columns = [np.random.default_rng([seed, int(s)]).integers(0, 2, size=n_pairs) for s in seeds]
    return np.stack(columns, axis=1)


def _protocols(outcomes: _Outcomes, seed: int) -> dict[str, dict[str, Any]]:
    table = {}
    for name in ("strict", "both_orders", "release"):
        values = _values(outcomes, name, seed)
        dropped = int(np.isnan(values).sum())
        table[name] = {"accuracy": _accuracy(values), "stderr": _stderr(values), "n_dropped": dropped}
    return table


# ---- statistics of values


def _per_seed(values: np.ndarray) -> np.ndarray:
    """Accuracy of each evaluation seed that scored at least one pair."""
    scored = values[:, ~np.isnan(values).all(axis=0)]
    return np.nanmean(scored, axis=0)


def _accuracy(values: np.ndarray) -> float | None:
    by_seed = _per_seed(values)
    return float(by_seed.mean()) if by_seed.size else None


def _stderr(values: np.ndarray) -> float | None:
    by_seed = _per_seed(values)
    return float(by_seed.std(ddof=1) / np.sqrt(by_seed.size)) if by_seed.size > 1 else None


def _by_user(values: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of the scored cells per user, both float (users with a scored cell,)."""
    sums = np.bincount(users, weights=np.nansum(values, axis=1))
    counts = np.bincount(users, weights=(~np.isnan(values)).sum(axis=1))
    return sums[counts > 0], counts[counts > 0]


def _macro(values: np.ndarray, users: np.ndarray) -> float | None:
    sums, counts = _by_user(values, users)
    return float((sums / counts).mean()) if sums.size else None


def _interval(
    values: np.ndarray,
    users: np.ndarray,
    draws: int,
    seed: int,
    whole_range: tuple[float, float] = (0.0, 1.0),
) -> list[float]:
    sums, counts = _by_user(values, users)
    if sums.size < 2:  # one user says nothing about the next one: no resampling can narrow the range
        return list(whole_range)
    return list(user_bootstrap(sums, counts, draws=draws, seed=seed))


def _flip_rate(sign: np.ndarray) -> float | None:
    valid = ~np.isnan(sign).any(axis=2)
    return float((sign[..., 0] != sign[..., 1])[valid].mean()) if valid.any() else None


def _slices(pairs: pd.DataFrame, values: np.ndarray, users: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    if pairs["kind"].isna().all():
        return {}
    kinds = pairs["kind"].fillna(NO_KIND).to_numpy()
    table = {}
    for kind in sorted(set(kinds)):
        rows = kinds == kind
        interval = _interval(values[rows], users[rows], draws, seed)
        table[kind] = {"accuracy": _accuracy(values[rows]), "ci95": interval, "n_pairs": int(rows.sum())}
    return table


def _user_codes(pairs: pd.DataFrame) -> tuple[np.ndarray, int]:
    codes, users = pd.factorize(pairs["user_id"], sort=True)
    return codes, len(users)


# ---- the table of predictions → outcomes


def _outcomes(predictions: pd.DataFrame) -> _Outcomes:
    frame = _checked(predictions)
    pair, pairs = _pairs(frame)
    seeds, seed = np.unique(frame["seed"], return_inverse=True)
    cell = (pair * len(seeds) + seed) * 2 + frame["order"].to_numpy()
    shape = (len(pairs), len(seeds), 2)
    counts = np.bincount(cell, minlength=int(np.prod(shape)))
    _refuse_duplicates(frame, cell)
    _refuse_gaps(counts.reshape(shape), pairs, seeds)
    valid = frame["failure"].isna().to_numpy()
    means = []
    for column in ("score_chosen", "score_rejected"):
        sums = np.bincount(cell[valid], weights=frame[column].to_numpy()[valid], minlength=counts.size)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(sums / np.bincount(cell[valid], minlength=counts.size))
    chosen, rejected = means
    sign = np.where(np.isclose(chosen, rejected, rtol=TIE_RTOL, atol=0.0), 0.0, np.sign(chosen - rejected))
    failures = {str(k): int(n) for k, n in frame["failure"].value_counts().sort_index().items()}
    return _Outcomes(pairs, seeds, sign.reshape(shape), failures, int(counts.max()))


def _checked(predictions: pd.DataFrame) -> pd.DataFrame:
    """A copy with the columns of the schema only, ids as text and numbers as numbers; DataError at the first misfit."""
    if missing := [c for c in COLUMNS if c not in predictions.columns]:
        raise DataError(f"predictions: column {missing[0]!r} is missing; expected {', '.join(COLUMNS)}")
    if predictions.empty:
        raise DataError("predictions: no rows; expected at least one pair in both orders")
    source = predictions.reset_index(drop=True)
    failure = _optional_text(source, "failure")
    frame = {c: _ids(source, c) for c in ("pair_id", "user_id")}
    frame |= {c: _integers(source, c) for c in ("order", "seed", "sample")}
    _refuse(frame["order"] > 1, source, "order", "0 (chosen response first) or 1")
    valid = failure.isna().to_numpy()
    for column in ("score_chosen", "score_rejected"):
        numbers = _numbers(source, column)
        _refuse(valid & ~np.isfinite(numbers), source, column, "a finite number where 'failure' is null")
        frame[column] = numbers
    frame["failure"] = failure
    frame["kind"] = _optional_text(source, "kind") if "kind" in source else pd.Series([None] * len(source), dtype=object)
    return pd.DataFrame(frame)


def _pairs(frame: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """(code of the pair of each row, table of pairs sorted by id)."""
    code = frame.groupby(["pair_id", "user_id"], sort=True).ngroup().to_numpy()
    first = np.unique(code, return_index=True)[1]
    kind = pd.factorize(frame["kind"])[0]
    _refuse(kind != kind[first][code], frame, "kind", "one kind for all rows of a pair")
    return code, frame.iloc[first][["pair_id", "user_id", "kind"]].reset_index(drop=True)


def _refuse_duplicates(frame: pd.DataFrame, cell: np.ndarray) -> None:
    again = pd.DataFrame({"cell": cell, "sample": frame["sample"]}).duplicated().to_numpy()
    _refuse(again, frame, "sample", "one row per pair_id, user_id, order, seed and sample")


def _refuse_gaps(counts: np.ndarray, pairs: pd.DataFrame, seeds: np.ndarray) -> None:
    gaps = np.argwhere(counts == 0)
    if len(gaps):
        pair, seed, order = gaps[0]
        raise DataError(
            f"predictions: pair_id {pairs['pair_id'][pair]!r} of user {pairs['user_id'][pair]!r} has no row with column "
            f"'order' {order} and 'seed' {seeds[seed]} ({len(gaps)} such gaps); expected every pair in both orders in every "
            "seed, with a kind in 'failure' where a generation failed"
        )


def _ids(source: pd.DataFrame, column: str) -> pd.Series:
    _refuse(source[column].isna() | (source[column] == ""), source, column, "an identifier")
    return source[column].astype(str)


def _optional_text(source: pd.DataFrame, column: str) -> pd.Series:
    values = source[column].astype(object)
    wrong = {v for v in values[values.notna()].unique() if not isinstance(v, str) or not v.strip()}
    _refuse(values.isin(wrong) if wrong else np.zeros(len(values), bool), source, column, "a text or null")
    return values.where(values.notna(), None)


def _integers(source: pd.DataFrame, column: str) -> np.ndarray:
    numbers = _numbers(source, column)
    with np.errstate(invalid="ignore"):
        _refuse(~((numbers >= 0) & (numbers % 1 == 0)), source, column, "a whole number from 0")
    return numbers.astype(np.int64)


def _numbers(source: pd.DataFrame, column: str) -> np.ndarray:
    """Float values; what is not a number ("n/a", True) becomes NaN, and the caller decides whether that is allowed."""
    values = source[column]
    if values.dtype == object:
        values = values.mask(values.map(type).isin((bool, np.bool_)))
    elif values.dtype == bool:
        values = pd.Series(np.nan, index=values.index)
    return pd.to_numeric(values, errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def _refuse(wrong: Any, source: pd.DataFrame, column: str, expected: str) -> None:
    rows = np.flatnonzero(np.asarray(wrong, dtype=bool))
    if rows.size:
        got = repr(source[column].iloc[rows[0]])
        raise DataError(f"predictions, row {rows[0] + 1}, column {column!r}: expected {expected}, got {got[:80]}")
