"""The `features` teacher: a transparent rule in place of an LLM, and the baseline that an LLM teacher must beat.

It measures what a user's chosen answers have over the rejected ones, weights it per user with shrinkage to the population, and
writes an evaluation chain (METHOD §2) whose every claim can be re-measured:

    x(y) ∈ R^F                      text features, robustly standardised over the training texts, clipped to ±4
    P(y⁺ ≻ y⁻ | u) = σ(w_uᵀ(x⁺ − x⁻))                       Bradley–Terry with linear utility
    w_pop = ridge logistic regression over all users' rows (no intercept; both signs of every difference)
    w_u   = argmax_w Σ_rows(u) log σ(wᵀd) − τ/2·‖w − w_pop‖²     MAP under w_u ~ N(w_pop, I/τ)

τ is chosen by cross-validated likelihood on conversations new to the user, so that a data set without personal signal gets
(nearly) the population rule.  The MAP fits of all users run at once, by the EM of Polson, Scott & Windle 2013 (the bound of
Jaakkola & Jordan 2000): monotone, no step size.

The label of the asked pair is never used.  If the responses are a training pair of this user, its rows leave the user's fit, and
the population's is the one made without their fold (cross-fitting: a few fits, however many questions); a history item with these
same texts is ignored too.  (τ and the feature scales are not recomputed: ten candidate values for τ, and no label in the scales.)
A known user's weights rest on all their training rows, not only on the history pairs shown.

Features (`text_features`) and scales were chosen on train and val rows only; whole conversations in the folds came after a first
look at test (measured by benchmarks/learning/features_baseline.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from scipy import sparse
from scipy.special import expit, log_expit
from sklearn.linear_model import LogisticRegression

from data_builders.teachers.text_features import FEATURES, TABLE, measure_many
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import HistoryItem, PreferencePair

CLIP = 4.0
FOLDS = 5
PRECISIONS = (
    1e4,
    300.0,
    100.0,
    50.0,
    30.0,
    20.0,
    10.0,
    5.0,
    3.0,
    1.0,
)  # τ, descending: each fit starts from the one before
DEFAULT_PRECISION = 30.0  # when there are too few rows to choose
CLEAR = 0.5  # standard units by which a chosen answer must differ before a history pair "shows" something


class Question(Protocol):
    """What a chain is written for; `records.Example` is one."""

    @property
    def user_id(self) -> str: ...
    @property
    def history(self) -> Sequence[HistoryItem]: ...
    @property
    def query(self) -> str: ...
    @property
    def responses(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class _Question:
    user_id: str
    history: Sequence[HistoryItem]
    query: str
    responses: Sequence[str]


class ChainParts(NamedTuple):
    """Arguments of `chains.write_chain`: K criteria, integer weights that sum to 100; K scores 1..10 for each response."""

    analysis: str
    criteria: list[tuple[str, int]]
    scores: list[list[int]]
    notes: list[str] | None = None


class FeatureTeacher:
    """Per-user linear utility over `FEATURES`; see the module's docstring for the model.

    `top`: criteria in a chain.  `precision`: τ, or None to choose it by cross-validation.  `seed`: draws the folds, nothing else.
    """

    def __init__(self, top: int = 4, precision: float | None = None, seed: int = 0) -> None:
        if not 1 <= top <= len(FEATURES):
            raise DataError(f"top is {top}; expected 1 to {len(FEATURES)} criteria")
        if precision is not None and not precision > 0:
            raise DataError(f"precision is {precision}; expected a number above 0, or None to choose it")
        self.top, self.precision, self.seed = top, precision, seed

    def fit(self, train_pairs: Sequence[PreferencePair]) -> FeatureTeacher:
        """Learn scales, population weights, τ and each user's weights; linear in rows and users.  DataError without pairs."""
        if not train_pairs:
            raise DataError("FeatureTeacher.fit got no pairs; expected at least one training pair")
        chosen, rejected = [p.chosen for p in train_pairs], [p.rejected for p in train_pairs]
        self._fit_scale(measure_many(sorted({*chosen, *rejected})))
        self.differences = self.standardise(chosen) - self.standardise(rejected)
        self._total = self.differences.sum(axis=0)
        self.spread = np.sqrt((self.differences**2).mean(axis=0))  # around 0, so that the labels play no part
        self._row_texts = [frozenset(texts) for texts in zip(chosen, rejected)]
        self._user_rows: dict[str, list[int]] = defaultdict(list)
        for row, pair in enumerate(train_pairs):
            self._user_rows[pair.user_id].append(row)
        self._user_rows = dict(self._user_rows)  # a look-up of an unknown user must not create it
        index = {user: i for i, user in enumerate(self._user_rows)}
        owners = np.array([index[p.user_id] for p in train_pairs])
        conversations = _conversations(train_pairs)
        self._folds = _folds(owners, conversations, self.seed)
        self._populations: dict[frozenset[int], np.ndarray] = {}
        self.population = self._population_without(frozenset())
        enough = conversations.max() + 1 >= 4 * FOLDS
        self.tau = self.precision or (self._choose_precision(owners) if enough else DEFAULT_PRECISION)
        fitted = _user_weights(self.differences, owners, self.population, self.tau, len(index))
        self._user_weights = dict(zip(index, fitted))
        return self

    def standardise(self, texts: Sequence[str]) -> np.ndarray:
        """(N, F) in robust standard units of the training texts: 0 is their median; clipped to ±`CLIP`."""
        return np.clip((measure_many(texts) - self.median) / self.scale, -CLIP, CLIP)

    def weights(
        self, user_id: str, history: Iterable[HistoryItem] = (), asked: Iterable[str] = ()
    ) -> np.ndarray:
        """w_u, shape (F,), from the user's training rows and history items beyond them; rows between `asked` texts stay out."""
        rows, extra, left_out = self._evidence(user_id, history, asked)
        if not extra and not left_out:
            return self._user_weights.get(user_id, self.population)
        differences = self._differences_of(rows, extra)
        population = self._population_without(frozenset(self._folds[list(left_out)].tolist()))
        return _user_weights(differences, np.zeros(len(differences), int), population, self.tau, 1)[0]

    def score(
        self, user_id: str, history: Sequence[HistoryItem], query: str, responses: Sequence[str]
    ) -> tuple[float, ...]:
        """Utility of each response for this user on a 1..10 scale; 5.5 is the median training text.  `query` is not read."""
        utility = (self.standardise(responses) * self.weights(user_id, history, responses)).sum(axis=1)
        return tuple(float(s) for s in 1 + 9 * expit(utility / 2))

    def chain_parts(self, question: Question, rng: np.random.Generator | None = None) -> ChainParts:
        """A chain's contents; criteria are the features that move this user most, grades the responses' deciles on them.

        `question` is an `Example` or alike; its `chosen_index` is never read.  `rng` jitters each grade by −1, 0 or 1.
        """
        weights = self.weights(question.user_id, question.history, question.responses)
        top = self._top_features(question, weights)
        criteria = _criteria(weights, top)
        names = [name for name, _ in criteria]
        return ChainParts(
            self._analysis(question.history, names),
            criteria,
            self._grades(question.responses, top, weights, rng),
        )

    def preferences(self, user_id: str) -> list[tuple[str, int]]:
        """What moves this user most, as (criterion, percentage), by all their training rows; the population's for an unknown user."""
        weights = self.weights(user_id)
        return _criteria(weights, self._top_features(_Question(user_id, (), "", ()), weights))

    def write(
        self,
        user_id: str,
        history: Sequence[HistoryItem],
        query: str,
        responses: Sequence[str],
        rng: np.random.Generator | None = None,
    ) -> str:
        """One evaluation chain in the published format (METHOD §2)."""
        from pgenrm_train.chains.chain import write_chain

        return write_chain(*self.chain_parts(_Question(user_id, history, query, responses), rng))

    def _fit_scale(self, raw: np.ndarray) -> None:
        low, self.median, high = np.percentile(raw, [25, 50, 75], axis=0)
        scale = (high - low) / 1.349  # the interquartile range of a standard normal
        scale = np.where(scale > 1e-9, scale, raw.std(axis=0))  # rare features: most texts have none
        self.scale = np.where(scale > 1e-9, scale, 1.0)
        self._sorted = np.sort(raw, axis=0)

    def _evidence(
        self, user_id: str, history: Iterable[HistoryItem], asked: Iterable[str]
    ) -> tuple[list[int], list[HistoryItem], tuple[int, ...]]:
        """The user's training rows that may be used, the history items beyond them, and the rows left out."""
        asked, rows = frozenset(asked), self._user_rows.get(user_id, [])
        left_out = tuple(row for row in rows if self._row_texts[row] <= asked)
        known = {self._row_texts[row] for row in rows}
        extra = [
            h
            for h in history
            if (texts := frozenset((h.chosen, h.rejected))) not in known and not texts <= asked
        ]
        return [row for row in rows if row not in left_out], extra, left_out

    def _differences_of(self, rows: list[int], extra: list[HistoryItem]) -> np.ndarray:
        shown = self.standardise([h.chosen for h in extra]) - self.standardise([h.rejected for h in extra])
        return np.vstack([self.differences[rows], shown])

    def _mean_difference(self, question: Question) -> np.ndarray:
        """What the user's chosen answers have over the rejected ones, (F,); the population's mean counts as τ further rows."""
        rows, extra, left_out = self._evidence(question.user_id, question.history, question.responses)
        own = self._differences_of(rows, extra)
        others = (self._total - self.differences[list(left_out)].sum(axis=0)) / len(self.differences)
        return (own.sum(axis=0) + self.tau * others) / (len(own) + self.tau)

    def _top_features(self, question: Question, weights: np.ndarray) -> np.ndarray:
        """At most `top` features by |weight| × spread: a rare feature may weigh much and yet seldom decide.

        A feature whose weight opposes the mean difference only corrects for its neighbours (fewer different words, if long);
        to call that this user's preference would be untrue, so it is no criterion.
        """
        effect = np.abs(weights) * self.spread
        true_to_sign = weights * self._mean_difference(question) > 0
        order = np.argsort(-np.where(true_to_sign, effect, 0.0), kind="stable")
        return order[: min(self.top, max(1, int(true_to_sign.sum())))]

    def _population_without(self, folds: frozenset[int]) -> np.ndarray:
        if folds not in self._populations:
            self._populations[folds] = _population_weights(
                self.differences[~np.isin(self._folds, list(folds))]
            )
        return self._populations[folds]

    def _choose_precision(self, owners: np.ndarray) -> float:
        """τ of the best held-out log-likelihood on conversations that the user has no other row of."""
        users, likelihood = int(owners.max()) + 1, np.zeros(len(PRECISIONS))
        for fold in range(FOLDS):
            seen, held = self._folds != fold, self._folds == fold
            population, weights = self._population_without(frozenset({fold})), None
            for i, tau in enumerate(PRECISIONS):
                weights = _user_weights(
                    self.differences[seen], owners[seen], population, tau, users, weights, tolerance=1e-2
                )
                likelihood[i] += log_expit((self.differences[held] * weights[owners[held]]).sum(axis=1)).sum()
        return PRECISIONS[int(np.argmax(likelihood))]

    def _grades(
        self, responses: Sequence[str], top: np.ndarray, weights: np.ndarray, rng: np.random.Generator | None
    ) -> list[list[int]]:
        """Integers 1..10, one list per response: the decile of the training texts, counted in the preferred direction."""
        texts = sorted(set(responses))  # so that jitter, too, depends on the text and not on its place
        raw = measure_many(texts)
        grades = np.array([self._deciles(raw[:, i], i, weights[i]) for i in top]).T
        if rng is not None:
            grades = grades + rng.integers(-1, 2, size=grades.shape)
        by_text = dict(zip(texts, np.clip(grades, 1, 10).astype(int).tolist()))
        return [by_text[text] for text in responses]

    def _deciles(self, values: np.ndarray, feature: int, weight: float) -> np.ndarray:
        column = self._sorted[:, feature]
        below, upto = (np.searchsorted(column, values, side) for side in ("left", "right"))
        middle_rank = (below + upto) / (2 * len(column))
        return 1 + np.floor(10 * (middle_rank if weight >= 0 else 1 - middle_rank))

    def _analysis(self, history: Sequence[HistoryItem], names: Sequence[str]) -> str:
        gaps = self.standardise([h.chosen for h in history]) - self.standardise([h.rejected for h in history])
        shown = [f"Pair {i}: {_clearest(gap)}." for i, gap in enumerate(gaps, start=1)]
        return " ".join([*shown, f"This user prefers {', '.join(names)} answers."])


def _pole(feature: int, sign: float) -> str:
    named = TABLE[FEATURES[feature]]
    return named.more if sign >= 0 else named.less


def _criteria(weights: np.ndarray, top: np.ndarray) -> list[tuple[str, int]]:
    return list(zip([_pole(i, weights[i]) for i in top], _percentages(np.abs(weights[top]))))


def _clearest(gap: np.ndarray) -> str:
    """At most two poles by which the chosen answer stands out most, in standard units."""
    order = np.argsort(-np.abs(gap), kind="stable")[:2]
    return ", ".join(_pole(i, gap[i]) for i in order if abs(gap[i]) >= CLEAR) or "nothing clear"


def _percentages(sizes: np.ndarray) -> list[int]:
    """Integers ≥ 1 that sum to 100, in proportion to `sizes` (largest remainder)."""
    total = sizes.sum()
    shares = sizes / total if total > 0 else np.full(len(sizes), 1 / len(sizes))
    exact = shares * (100 - len(sizes))  # one point each is given first: no criterion of weight 0
    whole = np.floor(exact).astype(int)
    short = 100 - len(sizes) - int(whole.sum())
    whole[np.argsort(-(exact - whole), kind="stable")[:short]] += 1
    return (whole + 1).tolist()


def _population_weights(differences: np.ndarray) -> np.ndarray:
    if not len(differences):
        return np.zeros(len(FEATURES))
    model = LogisticRegression(fit_intercept=False, solver="newton-cholesky")
    model.fit(np.vstack([differences, -differences]), np.repeat([1, 0], len(differences)))
    return model.coef_[0]


def _user_weights(
    differences: np.ndarray,
    owners: np.ndarray,
    population: np.ndarray,
    tau: float,
    users: int,
    start: np.ndarray | None = None,
    tolerance: float = 1e-5,
) -> np.ndarray:
    """MAP weights of all users at once, (U, F); `owners[n]` is the user of row n.  A user without rows gets the population's."""
    n, f = differences.shape
    by_user = sparse.csr_matrix((np.ones(n), (owners, np.arange(n))), shape=(users, n))
    outer = (differences[:, :, None] * differences[:, None, :]).reshape(n, f * f)
    target = by_user @ differences / 2 + tau * population
    weights = np.tile(population, (users, 1)) if start is None else start
    for _ in range(200):
        margin = np.abs((differences * weights[owners]).sum(axis=1))
        omega = np.where(margin > 1e-6, np.tanh(margin / 2) / (2 * np.maximum(margin, 1e-6)), 0.25)
        curvature = by_user.multiply(omega) @ outer
        updated = np.linalg.solve(curvature.reshape(users, f, f) + tau * np.eye(f), target[..., None])[..., 0]
        moved, weights = np.abs(updated - weights).max(initial=0.0), updated
        if moved < tolerance:
            break
    return weights


def _conversations(pairs: Sequence[PreferencePair]) -> np.ndarray:
    """(N,) which conversation of which user each pair belongs to; a data set without ids is grouped by the query."""
    keys = [(pair.user_id, pair.conversation_id or pair.query) for pair in pairs]
    index = {key: i for i, key in enumerate(sorted(set(keys)))}
    return np.array([index[key] for key in keys])


def _folds(owners: np.ndarray, conversations: np.ndarray, seed: int) -> np.ndarray:
    """(N,) the fold of each row.

    Folds hold whole conversations: rows of one share their texts, so that splitting them would flatter the personal weights.
    """
    _, first = np.unique(conversations, return_index=True)
    shuffled = np.random.default_rng(seed).permutation(len(first))
    fold_of = np.empty(len(first), int)
    fold_of[shuffled[np.argsort(owners[first][shuffled], kind="stable")]] = (
        np.arange(len(first)) % FOLDS
    )  # even within users
    return fold_of[conversations]
