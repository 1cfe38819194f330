"""Test-time user-based scaling: one score per response from own and similar users' chains (METHOD §7).

    s^i = (1/m) Σ_x Extract(S_x^i) + (1/n) Σ_w Extract(S^i of similar user u_w)

Source: P-GenRM, arXiv 2602.12116.  Where the paper is silent, our choices:
- A failed chain (with any score missing) is left out of its mean; the remaining count is returned with the
  score.
- A term without a usable chain drops out.  Without either term there is no score, and the failure is kept.
- `grid` fills every Ind-m/Pro-n cell from one pool.  A user's own samples are exchangeable, so Ind-m takes
  *disjoint* subsets of them: M // m replicates, and Ind-1 averages over all M samples.  Similar users are
  ranked, so Pro-n is always the n most similar ones: a subset of lower ranks would be another, weaker
  estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pgenrm_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd

GROUP = ["pair_id", "order", "seed"]
SCORES = ["score_chosen", "score_rejected"]
COLUMNS = (*GROUP, "user_id", "sample", "source", "neighbour", *SCORES, "failure", "kind")


class Scaled(NamedTuple):
    """`scores` (…, b), NaN without a usable chain; `own` and `similar` (…) count the chains of each mean."""

    scores: np.ndarray
    own: np.ndarray
    similar: np.ndarray


def scale(own: np.ndarray, similar: np.ndarray, weights: tuple[float, float] = (1.0, 1.0)) -> Scaled:
    """Score b responses from `own` (…, m, b) and `similar` (…, n, b); leading axes are independent.

    A chain is a row.  A chain with a NaN among its scores is a failure and counts in no mean.  With m = 0, n
    = 0 or a weight of 0 the other term remains.  Raises ConfigError for negative or all-zero weights.

    >>> scale(np.array([[8, 6], [6, 6]]), np.array([[9, 3]])).scores
    array([16.,  9.])
    """
    if min(weights) < 0 or not sum(weights):
        raise ConfigError(f"scaling weights {tuple(weights)} must be at least 0, and one of them above 0")
    own_mean, own_count = _mean(np.asarray(own, dtype=float))
    similar_mean, similar_count = _mean(np.asarray(similar, dtype=float))
    total = np.zeros(np.broadcast_shapes(own_mean.shape, similar_mean.shape))
    usable = np.zeros(total.shape[:-1], dtype=bool)
    for weight, mean, count in ((weights[0], own_mean, own_count), (weights[1], similar_mean, similar_count)):
        present = (count > 0) & (weight > 0)
        total = total + np.where(present[..., None], weight * mean, 0.0)
        usable = usable | present
    total[~usable] = np.nan
    return Scaled(
        total, np.broadcast_to(own_count, usable.shape), np.broadcast_to(similar_count, usable.shape)
    )


def grid(
    pool: pd.DataFrame,
    inds: Sequence[int],
    pros: Sequence[int],
    weights: tuple[float, float] = (1.0, 1.0),
    replicates: int | None = None,
) -> pd.DataFrame:
    """Predictions of every Ind-m/Pro-n cell, from one pool sampled at the largest m and n.

    `pool` has one row per chain, with COLUMNS.  `source` is "ind" or "pro".  `sample` numbers the chains of a
    source from 0; for "pro" it is the rank of the similar user, 0 the most similar.  A failed chain has a row
    too, with a `failure` or without scores.

    Returns one row per cell × pair × order × seed × replicate: `ind`, `pro`, `replicate`, `pool_seed`,
    `own_used`, `similar_used` and the columns of `eval.metrics.accuracy.accuracy_report`.  `sample` is 0;
    `seed` is unique per pool seed and replicate.  A row without a usable chain carries the first failure
    among its chains.  Cells have M // m replicates (one with m = 0), at most `replicates`.  The cell (0, 0)
    is empty and left out.

    Raises ConfigError for a cell that the pool cannot fill, DataError for gaps and duplicates.
    """
    import pandas as pd

    cells = [(m, n) for m in sorted(set(inds)) for n in sorted(set(pros)) if m or n]
    if not cells or min(*inds, *pros, 0) < 0:
        raise ConfigError(
            f"eval.ind={list(inds)} and eval.pro={list(pros)} must be numbers of chains, one of them above 0"
        )
    table = _pivot(pool)
    for name, wanted, source in (("ind", max(inds), table.own), ("pro", max(pros), table.similar)):
        if wanted > (held := len(source.scores[0])):
            raise ConfigError(
                f"eval.{name}={wanted} is more than the {held} chains per pair and order in the pool; "
                "sample more"
            )
    return pd.concat([_cell(table, m, n, weights, replicates) for m, n in cells], ignore_index=True)


class _Source(NamedTuple):
    """Scores (G, S, 2) and failures (G, S) of one source: G pair × order × seed groups, S chains each."""

    scores: np.ndarray
    failures: np.ndarray


class _Table(NamedTuple):
    """The pool as rectangles: G groups, with user and kind, and the chains of both sources."""

    groups: pd.DataFrame
    own: _Source
    similar: _Source


def _cell(
    table: _Table, m: int, n: int, weights: tuple[float, float], replicates: int | None
) -> pd.DataFrame:
    groups, own, similar = table
    subsets = len(own.scores[0]) // m if m else 1
    subsets = min(subsets, replicates or subsets)
    own_scores, own_failures = (
        x[:, : subsets * m].reshape(len(groups), subsets, m, *x.shape[2:]) for x in own
    )
    similar_scores, similar_failures = (x[:, None, :n] for x in similar)
    scaled = scale(own_scores, similar_scores, weights)
    lost = np.isnan(scaled.scores[..., 0])
    failures = np.concatenate([own_failures, np.broadcast_to(similar_failures, (*lost.shape, n))], axis=-1)
    out = groups.loc[groups.index.repeat(subsets)].reset_index(drop=True)
    replicate = np.tile(np.arange(subsets), len(groups))
    out = out.assign(
        ind=m,
        pro=n,
        replicate=replicate,
        pool_seed=out["seed"],
        seed=out["seed"] * subsets + replicate,
        sample=0,
    )
    out[SCORES] = scaled.scores.reshape(-1, 2)
    out["failure"] = _first_failure(failures.reshape(len(out), -1), lost.ravel())
    out["own_used"], out["similar_used"] = scaled.own.ravel(), scaled.similar.ravel()
    return out


def _first_failure(failures: np.ndarray, lost: np.ndarray) -> pd.Series:
    """First failure kind of each lost row; None for rows with a score."""
    import pandas as pd

    kinds = failures[np.arange(len(failures)), pd.notna(failures).argmax(axis=1)]
    kinds[~lost] = None
    return pd.Series(kinds, dtype=object)  # or pandas would turn None into NaN among texts


def _pivot(pool: pd.DataFrame) -> _Table:
    """Arrange a pool as rectangles.  Raises DataError if chains are missing or double."""
    import pandas as pd

    if missing := [name for name in COLUMNS if name not in pool.columns]:
        raise DataError(f"the pool of samples lacks the column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    if pool.empty or not pool["source"].isin(["ind", "pro"]).all():
        raise DataError(
            "the pool of samples must hold rows, and 'source' must be 'ind' or 'pro' in each of them"
        )
    pool = pool.sort_values([*GROUP, "source", "sample"], kind="stable")
    if pool.duplicated([*GROUP, "source", "sample"]).any():
        raise DataError(
            "the pool of samples holds a chain twice: "
            "pair_id, order, seed, source and sample must name one row"
        )
    groups = pool.drop_duplicates(GROUP)[[*GROUP, "user_id", "kind"]].reset_index(drop=True)
    scores = pool[SCORES].to_numpy(dtype=float, copy=True)
    failed = pool["failure"].notna().to_numpy() | ~np.isfinite(scores).all(axis=1)
    scores[failed] = np.nan
    failures = pool["failure"].astype(object).where(pool["failure"].notna(), "no_score").to_numpy(copy=True)
    failures[~failed] = None
    keys = pd.MultiIndex.from_frame(groups[GROUP])
    number = keys.get_indexer(pd.MultiIndex.from_frame(pool[GROUP]))
    rows = {source: (pool["source"] == source).to_numpy() for source in ("ind", "pro")}
    return _Table(
        groups,
        *(
            _rectangle(groups, number[inside], scores[inside], failures[inside], source)
            for source, inside in rows.items()
        ),
    )


def _rectangle(
    groups: pd.DataFrame, number: np.ndarray, scores: np.ndarray, failures: np.ndarray, source: str
) -> _Source:
    counts = np.bincount(number, minlength=len(groups))
    if len(set(counts)) > 1:
        where = ", ".join(f"{name} {value}" for name, value in groups.loc[counts.argmin(), GROUP].items())
        raise DataError(
            f"the pool of samples has gaps: {where} has {counts.min()} rows of source {source!r}, "
            f"others have {counts.max()}; a chain that failed needs its row, with a failure"
        )
    shape = (len(groups), int(counts[0]))
    return _Source(scores.reshape(*shape, 2), failures.reshape(shape))


def _mean(chains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (…, b) over the usable rows of (…, m, b), 0 without any, and their number (…)."""
    usable = np.isfinite(chains).all(axis=-1)
    count = usable.sum(axis=-1)
    total = np.where(usable[..., None], chains, 0.0).sum(axis=-2)
    return total / np.maximum(count, 1)[..., None], count
