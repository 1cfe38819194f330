"""Bradley–Terry on frozen sentence embeddings: preferences from two texts without a language model.

    P(y⁺ ≻ y⁻ | u) = σ(w_uᵀd),   d = e(y⁺) − e(y⁻)               e: embedding of a response, length 1
    global         w   = argmax_w Σ_all rows log σ(wᵀd) − λ/2·‖w‖²
    adapted        w_u = w + argmax_δ Σ_rows(u) log σ((w + δ)ᵀd) − τ/2·‖δ‖²      MAP under w_u ~ N(w, I/τ)

A user without votes has w_u = w, and few votes move it little: partial pooling.  λ and τ have the best
likelihood on held-out folds of whole conversations of a user; τ = ∞, nothing personal, is among the choices.
All fits are convex, and linear in votes.  A user without training votes is adapted to the history in the
example, so that swapped histories matter.

The utility of a response ignores its query.  If a user's train votes are on other pairs of the *same*
responses, the adapted model gains by transitivity: an accuracy that new responses would not show.

The label of an evaluated pair is not used, unless the training split itself is evaluated.  Our choice
throughout: the paper's Bradley–Terry models are language models with a head (`model=reward_head`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from pgenrm_train.records.pairs import Example, HistoryItem, PreferencePair

T = TypeVar("T")
Embed = Callable[[Sequence[str]], np.ndarray]  # texts → float (N, d), rows of length 1

FOLDS = 3
RIDGES = (1.0, 0.1, 10.0)  # λ; here and below the first is the default without folds
PRECISIONS = (np.inf, 10.0, 3.0, 1.0, 0.3)  # τ


@dataclass(frozen=True)
class BradleyTerry:
    """The unfitted baseline; `adapted` fits weights per user."""

    embed: Embed
    adapted: bool = False

    def fit(
        self, train_pairs: Sequence[PreferencePair], all_pairs: Sequence[PreferencePair]
    ) -> "BradleyTerryScorer":
        """Embed all responses once and learn from `train_pairs` alone.  Without votes all scores tie."""
        vectors = Vectors(
            self.embed, (text for p in (*train_pairs, *all_pairs) for text in (p.chosen, p.rejected))
        )
        votes = [p for p in train_pairs if p.chosen != p.rejected]
        if not votes:
            return BradleyTerryScorer(vectors, np.zeros(len(vectors(""))), {}, np.inf)
        rows = vectors.differences(votes)
        fold_of_vote = np.array([_fold(p) for p in votes])
        folds = [fold_of_vote == k for k in np.unique(fold_of_vote)] if np.ptp(fold_of_vote) else []
        ridge = max(
            RIDGES,
            key=lambda value: sum(
                log_expit(rows[fold] @ map_weights(rows[~fold], value)).sum() for fold in folds
            ),
        )
        weights = map_weights(rows, ridge)
        if not self.adapted:
            return BradleyTerryScorer(vectors, weights, {}, np.inf)
        users = [p.user_id for p in votes]
        outside = [map_weights(rows[~fold], ridge) for fold in folds]
        precision = max(
            PRECISIONS,
            key=lambda value: sum(
                _held_out_user_likelihood(rows, users, fold, base, value)
                for fold, base in zip(folds, outside, strict=True)
            ),
        )
        return BradleyTerryScorer(vectors, weights, adapt(rows, users, weights, precision), precision)


@dataclass(frozen=True)
class BradleyTerryScorer:
    """w_uᵀe(response); `by_user` holds the adapted weights.

    `precision` τ adapts other users to the history in the example; ∞ does not.
    """

    vectors: "Vectors"
    weights: np.ndarray
    by_user: Mapping[str, np.ndarray]
    precision: float
    _by_history: dict[tuple[HistoryItem, ...], np.ndarray] = field(
        default_factory=dict, repr=False, compare=False
    )

    def score(self, example: Example) -> tuple[float, ...]:
        weights = self.by_user.get(example.user_id)
        if weights is None:
            weights = self._of_history(example.history)
        return tuple(float(weights @ self.vectors(text)) for text in example.responses)

    def _of_history(self, history: tuple[HistoryItem, ...]) -> np.ndarray:
        if not history or np.isinf(self.precision):
            return self.weights
        if history not in self._by_history:
            rows = self.vectors.differences(history)
            self._by_history[history] = adapt(rows, [""] * len(rows), self.weights, self.precision)[""]
        return self._by_history[history]


class Vectors:
    """Embeddings of texts, computed at once except for unforeseen ones."""

    def __init__(self, embed: Embed, texts: Iterable[str]) -> None:
        self.embed = embed
        distinct = list(dict.fromkeys(texts))
        self._known = dict(zip(distinct, embed(distinct), strict=True))

    def __call__(self, text: str) -> np.ndarray:
        if text not in self._known:
            self._known[text] = self.embed([text])[0]
        return self._known[text]

    def differences(self, votes: Sequence[PreferencePair] | Sequence[HistoryItem]) -> np.ndarray:
        """d of each vote, float64 (votes, dimension)."""
        return np.stack([self(v.chosen) - self(v.rejected) for v in votes]).astype(float)


def map_weights(rows: np.ndarray, precision: float, offset: np.ndarray | None = None) -> np.ndarray:
    """argmax_w Σ log σ(wᵀd + offset) − precision/2·‖w‖² over `rows` (n, d); `offset` (n,): given margins."""
    base = np.zeros(len(rows)) if offset is None else offset

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = rows @ w + base
        return precision / 2 * float(w @ w) - float(log_expit(margin).sum()), precision * w - expit(
            -margin
        ) @ rows

    return np.asarray(minimize(loss, np.zeros(rows.shape[1]), jac=True, method="L-BFGS-B").x)


def adapt(rows: np.ndarray, users: Sequence[T], weights: np.ndarray, precision: float) -> dict[T, np.ndarray]:
    """w_u of every user; `users` has one entry per row of `rows`."""
    if np.isinf(precision):
        return dict.fromkeys(users, weights)
    of_user: dict[T, list[int]] = defaultdict(list)
    for row, user in enumerate(users):
        of_user[user].append(row)
    return {
        user: weights + map_weights(rows[indices], precision, rows[indices] @ weights)
        for user, indices in of_user.items()
    }


def _held_out_user_likelihood(
    rows: np.ndarray, users: Sequence[str], fold: np.ndarray, weights: np.ndarray, precision: float
) -> float:
    names = np.asarray(users, dtype=object)
    adapted = adapt(rows[~fold], list(names[~fold]), weights, precision)
    return sum(
        float(log_expit(adapted.get(user, weights) @ row))
        for user, row in zip(names[fold], rows[fold], strict=True)
    )


def _fold(pair: PreferencePair) -> int:
    """Fold of a pair; conversations of a user stay whole, so each fold tests conversations new to them."""
    name = repr((pair.user_id, pair.conversation_id or pair.query)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(name).digest()[0] % FOLDS
