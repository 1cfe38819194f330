"""The `features` teacher: a transparent rule, and the baseline that an LLM teacher must beat.

It measures the advantages of a user's chosen answers over the rejected ones, and weights them per user with
shrinkage to the population.  Then it writes an evaluation chain (METHOD §2) whose every claim can be measured
again:

    x(y) ∈ R^F       text features, robustly standardised over the training texts, clipped to ±4
    P(y⁺ ≻ y⁻ | u) = σ(w_uᵀ(x⁺ − x⁻))        Bradley–Terry with linear utility
    w_pop = ridge logistic regression over all users' rows (no intercept; both signs of every difference)
    w_u   = argmax_w Σ_rows(u) log σ(wᵀd) − τ/2·‖w − w_pop‖²     MAP under w_u ~ N(w_pop, I/τ)

τ is chosen by cross-validated likelihood on conversations new to the user, so that a data set without
personal signal gets (nearly) the population rule.  The MAP fits of all users run at once, by the EM of
Polson, Scott & Windle 2013 (the bound of Jaakkola & Jordan 2000): monotone, no step size.

The label of the scored pair is never used.  If the responses are a training pair of this user, its rows leave
the user's fit, and the population's fit is the one without their fold (cross-fitting: a few fits, however
many pairs are scored).  A history item with the same texts is ignored too.  τ and the feature scales are not
recomputed: τ has ten candidate values, and the scales use no label.  A known user's weights use all their
training rows, not only the history pairs of the prompt.

Features (`text_features`) and scales were chosen on train and val rows only.  Folds of complete conversations
came after a first look at test (measured by benchmarks/learning/features_baseline.py).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import expit, log_expit
from sklearn.linear_model import LogisticRegression

from data_builders.teachers.text_features import FEATURES, TABLE, measure_many
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import Example, HistoryItem, PreferencePair

CLIP = 4.0
FOLDS = 5
# τ, descending: each fit starts from the one before.
PRECISIONS = (1e4, 300.0, 100.0, 50.0, 30.0, 20.0, 10.0, 5.0, 3.0, 1.0)
DEFAULT_PRECISION = 30.0  # for too few rows to choose
CLEAR = 0.5  # standard units by which the chosen answer of a clear history pair differs


class ChainParts(NamedTuple):
    """Arguments of `write_chain`: K criteria, weights that sum to 100, and K scores 1..10 per response."""

    analysis: str
    criteria: list[tuple[str, int]]
    scores: list[list[int]]
    notes: list[str] | None = None


class FeatureTeacher:
    """Per-user linear utility over `FEATURES`; see the module's docstring for the model.

    `top`: criteria per chain.  `precision`: τ, or None to choose it by cross-validation.  `seed`: only for
    the folds.
    """

    def __init__(self, top: int = 4, precision: float | None = None, seed: int = 0) -> None:
        if not 1 <= top <= len(FEATURES):
            raise DataError(f"top is {top}; expected 1 to {len(FEATURES)} criteria")
        if precision is not None and not precision > 0:
            raise DataError(f"precision is {precision}; expected a number above 0, or None to choose it")
        self.top, self.precision, self.seed = top, precision, seed

    def fit(self, train_pairs: Sequence[PreferencePair]) -> "FeatureTeacher":
        """Learn scales, population weights, τ and each user's weights.  Raises DataError without pairs.

        Linear in rows and users.
        """
        if not train_pairs:
            raise DataError("FeatureTeacher.fit got no pairs; expected at least one training pair")
        chosen, rejected = [p.chosen for p in train_pairs], [p.rejected for p in train_pairs]
        self._fit_scale(measure_many(sorted({*chosen, *rejected})))
        self.differences = self.standardise(chosen) - self.standardise(rejected)
        self._total = self.differences.sum(axis=0)
        self.spread = np.sqrt((self.differences**2).mean(axis=0))  # around 0, so independent of the labels
        self._row_texts = [frozenset(texts) for texts in zip(chosen, rejected)]
        self._user_rows: dict[str, list[int]] = {}
        for row, pair in enumerate(train_pairs):
            self._user_rows.setdefault(pair.user_id, []).append(row)
        index = {user: i for i, user in enumerate(self._user_rows)}
        owners = np.array([index[p.user_id] for p in train_pairs])
        conversations = _conversations(train_pairs)
        self._folds = _folds(owners, conversations, self.seed)
        self._populations: dict[frozenset[int], np.ndarray] = {}
        self.population = self._population_without(frozenset())
        enough = conversations.max() + 1 >= 4 * FOLDS
        self.tau = self.precision or (self._choose_precision(owners) if enough else DEFAULT_PRECISION)
        weights = _user_weights(self.differences, owners, self.population, self.tau, len(index))
        self._user_weights = dict(zip(index, weights))
        return self

    def standardise(self, texts: Sequence[str]) -> np.ndarray:
        """(N, F) in robust standard units of the training texts: 0 is their median; clipped to ±`CLIP`."""
        return np.clip((measure_many(texts) - self.median) / self.scale, -CLIP, CLIP)

    def weights(
        self, user_id: str, history: Iterable[HistoryItem] = (), scored: Iterable[str] = ()
    ) -> np.ndarray:
        """w_u, (F,), from the user's training rows and further history items, without the `scored` texts."""
        rows, extra, left_out = self._evidence(user_id, history, scored)
        if not extra and not left_out:
            return self._user_weights.get(user_id, self.population)
        differences = self._differences_of(rows, extra)
        population = self._population_without(frozenset(self._folds[list(left_out)].tolist()))
        return _user_weights(differences, np.zeros(len(differences), int), population, self.tau, 1)[0]

    def score(self, example: Example) -> tuple[float, ...]:
        """Utility of each response for this user on a 1..10 scale; 5.5 is the median training text."""
        weights = self.weights(example.user_id, example.history, example.responses)
        utility = (self.standardise(example.responses) * weights).sum(axis=1)
        return tuple(float(s) for s in 1 + 9 * expit(utility / 2))

    def chain_parts(self, example: Example, rng: np.random.Generator | None = None) -> ChainParts:
        """Content of a chain: this user's strongest features as criteria, the responses' deciles as grades.

        The example's `chosen_index` is never read.  `rng` jitters each grade by −1, 0 or 1.
        """
        user_id, history, responses = example.user_id, example.history, example.responses
        weights = self.weights(user_id, history, responses)
        top = self._top_features(weights, user_id, history, responses)
        criteria = _criteria(weights, top)
        shown = [f"Pair {i}: {_clearest(gap)}." for i, gap in enumerate(self._gaps(history), start=1)]
        wish = f"This user prefers {', '.join(name for name, _ in criteria)} answers."
        return ChainParts(" ".join([*shown, wish]), criteria, self._grades(responses, top, weights, rng))

    def preferences(self, user_id: str) -> list[tuple[str, int]]:
        """This user's strongest criteria as (criterion, percentage); the population's for an unknown user."""
        weights = self.weights(user_id)
        return _criteria(weights, self._top_features(weights, user_id))

    def write(self, example: Example, rng: np.random.Generator | None = None) -> str:
        """One evaluation chain in the published format (METHOD §2)."""
        from pgenrm_train.chains.chain import write_chain

        return write_chain(*self.chain_parts(example, rng))

    def _fit_scale(self, raw: np.ndarray) -> None:
        low, self.median, high = np.percentile(raw, [25, 50, 75], axis=0)
        scale = (high - low) / 1.349  # the interquartile range of a standard normal
        scale = np.where(scale > 1e-9, scale, raw.std(axis=0))  # rare features: most texts have none
        self.scale = np.where(scale > 1e-9, scale, 1.0)
        self._sorted = np.sort(raw, axis=0)

    def _evidence(
        self, user_id: str, history: Iterable[HistoryItem], scored: Iterable[str]
    ) -> tuple[list[int], list[HistoryItem], tuple[int, ...]]:
        """The user's usable training rows, the history items beyond them, and the left-out rows."""
        scored, rows = frozenset(scored), self._user_rows.get(user_id, [])
        left_out = tuple(row for row in rows if self._row_texts[row] <= scored)
        known = {self._row_texts[row] for row in rows}
        extra = [
            h
            for h in history
            if (texts := frozenset((h.chosen, h.rejected))) not in known and not texts <= scored
        ]
        return [row for row in rows if row not in left_out], extra, left_out

    def _differences_of(self, rows: list[int], extra: list[HistoryItem]) -> np.ndarray:
        return np.vstack([self.differences[rows], self._gaps(extra)])

    def _gaps(self, history: Sequence[HistoryItem]) -> np.ndarray:
        """Standardised features of each chosen answer minus those of the rejected one."""
        return self.standardise([h.chosen for h in history]) - self.standardise([h.rejected for h in history])

    def _top_features(
        self,
        weights: np.ndarray,
        user_id: str,
        history: Iterable[HistoryItem] = (),
        scored: Iterable[str] = (),
    ) -> np.ndarray:
        """At most `top` features by |weight| × spread: a rare feature may weigh much and yet seldom decide.

        A feature whose weight opposes the mean difference only corrects for its neighbours (fewer different
        words, if long).  It would be untrue to call that a preference of this user, so it is no criterion.
        """
        rows, extra, left_out = self._evidence(user_id, history, scored)
        differences = self._differences_of(rows, extra)
        others = (self._total - self.differences[list(left_out)].sum(axis=0)) / len(self.differences)
        # Mean advantage of the user's chosen answers, (F,); the population's counts as τ further rows.
        mean = (differences.sum(axis=0) + self.tau * others) / (len(differences) + self.tau)
        true_to_sign = weights * mean > 0
        order = np.argsort(-np.where(true_to_sign, np.abs(weights) * self.spread, 0.0), kind="stable")
        return order[: min(self.top, max(1, int(true_to_sign.sum())))]

    def _population_without(self, folds: frozenset[int]) -> np.ndarray:
        if folds not in self._populations:
            self._populations[folds] = _population_weights(
                self.differences[~np.isin(self._folds, list(folds))]
            )
        return self._populations[folds]

    def _choose_precision(self, owners: np.ndarray) -> float:
        """τ of the best held-out log-likelihood on conversations without another row of the user."""
        users, likelihood = int(owners.max()) + 1, np.zeros(len(PRECISIONS))
        for fold in range(FOLDS):
            held = self._folds == fold
            differences, users_of_rows = self.differences[~held], owners[~held]
            population, weights = self._population_without(frozenset({fold})), None
            for i, tau in enumerate(PRECISIONS):
                weights = _user_weights(
                    differences, users_of_rows, population, tau, users, weights, tolerance=1e-2
                )
                likelihood[i] += log_expit((self.differences[held] * weights[owners[held]]).sum(axis=1)).sum()
        return PRECISIONS[int(np.argmax(likelihood))]

    def _grades(
        self, responses: Sequence[str], top: np.ndarray, weights: np.ndarray, rng: np.random.Generator | None
    ) -> list[list[int]]:
        """Per response integers 1..10: deciles of the training texts, counted in the preferred direction."""
        texts = sorted(set(responses))  # so that jitter, too, depends on the text, not on its place
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


def _pole(feature: int, sign: float) -> str:
    named = TABLE[FEATURES[feature]]
    return named.more if sign >= 0 else named.less


def _criteria(weights: np.ndarray, top: np.ndarray) -> list[tuple[str, int]]:
    return list(zip([_pole(i, weights[i]) for i in top], _percentages(np.abs(weights[top]))))


def _clearest(gap: np.ndarray) -> str:
    """At most two poles by which the chosen answer differs most, in standard units."""
    order = np.argsort(-np.abs(gap), kind="stable")[:2]
    return ", ".join(_pole(i, gap[i]) for i in order if abs(gap[i]) >= CLEAR) or "nothing clear"


def _percentages(sizes: np.ndarray) -> list[int]:
    """Integers ≥ 1 that sum to 100, in proportion to `sizes` (largest remainder)."""
    total = sizes.sum()
    shares = sizes / total if total > 0 else np.full(len(sizes), 1 / len(sizes))
    exact = shares * (100 - len(sizes))  # one point each is given first: no criterion of weight 0
    floors = np.floor(exact).astype(int)
    short = 100 - len(sizes) - int(floors.sum())
    floors[np.argsort(-(exact - floors), kind="stable")[:short]] += 1
    return (floors + 1).tolist()


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
    """MAP weights of all users at once, (U, F); `owners[n]` is the user of row n.

    A user without rows gets the population's weights.
    """
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
    """(N,) number of each pair's conversation and user; data without conversation ids is grouped by query."""
    keys = [(pair.user_id, pair.conversation_id or pair.query) for pair in pairs]
    index = {key: i for i, key in enumerate(sorted(set(keys)))}
    return np.array([index[key] for key in keys])


def _folds(owners: np.ndarray, conversations: np.ndarray, seed: int) -> np.ndarray:
    """(N,) fold of each row.

    A conversation is in one fold: its rows share texts, so that splitting it would flatter the personal
    weights.
    """
    _, first = np.unique(conversations, return_index=True)
    shuffled = np.random.default_rng(seed).permutation(len(first))
    fold_of = np.empty(len(first), int)
    # even within users
    fold_of[shuffled[np.argsort(owners[first][shuffled], kind="stable")]] = np.arange(len(first)) % FOLDS
    return fold_of[conversations]
