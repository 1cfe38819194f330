"""Validate a table of predictions and reduce it to a grid of margins: pairs × seeds × orders.

Valid samples of one (pair, order, evaluation seed) are averaged, `s = (1/m) Σ Extract(S_x)` (METHOD §7,
Ind-m), and the two means are compared as numbers.  A *pair* is one vote, identified by (user_id, pair_id):
several data sets give one `pair_id` to all who voted on the same two responses.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pgenrm_train.errors import DataError
from pgenrm_train.records.ids import read_id

COLUMNS = ("pair_id", "user_id", "order", "seed", "sample", "score_chosen", "score_rejected", "failure")
# Means of the same scores, summed in another order, differ by rounding alone: a tie.
TIE_RTOL = 1e-12


@dataclass(frozen=True)
class Outcomes:
    """Preferences of a model on the full grid of pairs × evaluation seeds × orders.

    `margin`: mean score of the chosen response − that of the rejected one; 0 for a tie, NaN if every sample
    failed.
    """

    pairs: pd.DataFrame  # pair_id, user_id, kind (str|None); sorted, one row per pair
    seeds: np.ndarray
    margin: np.ndarray  # float (pairs, seeds, 2), see above
    failures: dict[str, int]
    samples: int  # the most samples of any (pair, order, seed)

    @property
    def sign(self) -> np.ndarray:
        """float (pairs, seeds, 2): +1 chosen, −1 rejected, 0 tie, NaN if every sample failed."""
        return np.sign(self.margin)

    @property
    def users(self) -> np.ndarray:
        """int (pairs,): the user of each pair, numbered from 0."""
        return user_codes(self.pairs)


def user_codes(pairs: pd.DataFrame) -> np.ndarray:
    return pd.factorize(pairs["user_id"], sort=True)[0]


def outcomes(predictions: pd.DataFrame) -> Outcomes:
    """Compute the grid of a table with `COLUMNS` and optionally `kind`.  Raises DataError for a bad table."""
    frame = _validated(predictions)
    pair, pairs = _pairs(frame)
    seeds, seed = np.unique(frame["seed"], return_inverse=True)
    cell = (pair * len(seeds) + seed) * 2 + frame["order"].to_numpy()
    shape = (len(pairs), len(seeds), 2)
    counts = np.bincount(cell, minlength=int(np.prod(shape)))
    repeated = pd.DataFrame({"cell": cell, "sample": frame["sample"]}).duplicated()
    _refuse(repeated, frame, "sample", "one row per pair_id, user_id, order, seed and sample")
    _refuse_gaps(counts.reshape(shape), pairs, seeds)
    valid = frame["failure"].isna().to_numpy()
    n_valid = np.bincount(cell[valid], minlength=counts.size)
    scores = (frame[column].to_numpy()[valid] for column in ("score_chosen", "score_rejected"))
    with np.errstate(invalid="ignore", divide="ignore"):
        chosen, rejected = (np.bincount(cell[valid], s, minlength=counts.size) / n_valid for s in scores)
    margin = np.where(np.isclose(chosen, rejected, rtol=TIE_RTOL, atol=0.0), 0.0, chosen - rejected)
    failures = {str(k): int(n) for k, n in frame["failure"].value_counts().sort_index().items()}
    return Outcomes(pairs, seeds, margin.reshape(shape), failures, int(counts.max()))


def _validated(predictions: pd.DataFrame) -> pd.DataFrame:
    """A copy of the schema's columns, with ids as texts and numbers as numbers.  Raises DataError."""
    if missing := [c for c in COLUMNS if c not in predictions.columns]:
        raise DataError(f"predictions: column {missing[0]!r} is missing; expected {', '.join(COLUMNS)}")
    if predictions.empty:
        raise DataError("predictions: no rows; expected at least one pair in both orders")
    source = predictions.reset_index(drop=True)
    failure = _optional_text(source, "failure")
    frame = {c: _ids(source, c) for c in ("pair_id", "user_id")}
    frame |= {c: _integers(source, c) for c in ("order", "seed", "sample")}
    _refuse(frame["order"] > 1, source, "order", "0 (chosen response first) or 1")
    for column in ("score_chosen", "score_rejected"):
        frame[column] = _numbers(source, column)
        wrong = failure.isna() & ~np.isfinite(frame[column])
        _refuse(wrong, source, column, "a finite number where 'failure' is null")
    frame["failure"] = failure
    frame["kind"] = (
        _optional_text(source, "kind") if "kind" in source else pd.Series([None] * len(source), dtype=object)
    )
    return pd.DataFrame(frame)


def _pairs(frame: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """(pair code per row, table of pairs sorted by id)."""
    code = frame.groupby(["pair_id", "user_id"], sort=True).ngroup().to_numpy()
    first = np.unique(code, return_index=True)[1]
    kind = pd.factorize(frame["kind"])[0]
    _refuse(kind != kind[first][code], frame, "kind", "one kind for all rows of a pair")
    return code, frame.iloc[first][["pair_id", "user_id", "kind"]].reset_index(drop=True)


def _refuse_gaps(counts: np.ndarray, pairs: pd.DataFrame, seeds: np.ndarray) -> None:
    gaps = np.argwhere(counts == 0)
    if len(gaps):
        pair, seed, order = gaps[0]
        raise DataError(
            f"predictions: pair_id {pairs['pair_id'][pair]!r} of user {pairs['user_id'][pair]!r} has no row "
            f"with column 'order' {order} and 'seed' {seeds[seed]} ({len(gaps)} such gaps); expected every "
            "pair in both orders in every seed, with a kind in 'failure' where a generation failed"
        )


def _ids(source: pd.DataFrame, column: str) -> pd.Series:
    names = source[column].astype(object).map(read_id)
    _refuse(names.isna() | (names == ""), source, column, "an identifier")
    return names.astype(str)


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
    """Float values; anything else ("n/a", True) becomes NaN, which the caller may refuse."""
    values = source[column]
    if values.dtype == object:
        values = values.mask(values.map(type).isin((bool, np.bool_)))
    elif values.dtype == bool:
        values = pd.Series(np.nan, index=values.index)
    return pd.to_numeric(values, errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def _refuse(wrong: np.ndarray | pd.Series, source: pd.DataFrame, column: str, expected: str) -> None:
    rows = np.flatnonzero(np.asarray(wrong, dtype=bool))
    if rows.size:
        got = repr(source[column].iloc[rows[0]])
        raise DataError(
            f"predictions, row {rows[0] + 1}, column {column!r}: expected {expected}, got {got[:80]}"
        )
