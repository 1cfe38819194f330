"""Gain of a choice among n candidates: utility by chooser and n, with intervals over users.

    model        best mean score in the circle
    knockout     winner of the rounds (see `schemes`)
    random       the mean over the n candidates: a uniform choice, in expectation
    population   favourite of all users
    ideal        exact choice given the user's votes (two priors, see `data_builders.teachers.choosers`)
    best         the greatest true utility: a bound

    gain share = Σ (model − random) / Σ (ideal − random)     `best` in place of `ideal` where none is known
    KL(n) = ln n − (n − 1)/n     nats between best of n and the candidates' distribution; an upper bound

Utility: the true one of PersonaWorld, else the user's ratings.  The curve of over-optimisation sets it
against the model's own score of its choice: a score that rises while utility falls is over-optimised.  All
choosers see the same candidates, and differences are paired by prompt.  Our choice; the paper reports trained
policies.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from eval.choosing.schemes import Choice, Slot, best, chains_of
from eval.metrics.intervals import by_user, interval
from pgenrm_train.bootstrap import user_bootstrap

MODEL, KNOCKOUT, RANDOM, POPULATION, IDEAL, IDEAL_ALL, BEST = (
    "model",
    "model, knockout",
    "random",
    "population",
    "ideal",
    "ideal, all personas",
    "best",
)
CHOOSERS = (MODEL, KNOCKOUT, RANDOM, POPULATION, IDEAL, IDEAL_ALL, BEST)
Value = dict[str, object]


def choices(
    users: Sequence[str],
    scores: Mapping[Slot, np.ndarray],
    winners: Mapping[Slot, Choice],
    values: Sequence[Mapping[str, np.ndarray]],
) -> pd.DataFrame:
    """One row per slot and chooser: user, slate, n, chooser, candidate, utility, score, decided.

    `users` and `values` are by slate; `values` holds `utility`, and the scores of population and ideal.  The
    candidate of random is −1.
    """
    rows = []
    for slot, own in sorted(scores.items()):
        truth = values[slot.slate]["utility"][: slot.n]
        picked = {MODEL: best(own), KNOCKOUT: winners[slot], BEST: best(truth)}
        for name in (POPULATION, IDEAL, IDEAL_ALL):
            if name in values[slot.slate]:
                picked[name] = best(values[slot.slate][name][: slot.n])
        common = {"user_id": users[slot.slate], "slate": slot.slate, "n": slot.n}
        known = own[np.isfinite(own)]
        expected = {"utility": truth.mean(), "score": known.mean() if len(known) else math.nan}
        rows.append(common | {"chooser": RANDOM, "candidate": -1} | expected | {"decided": True})
        for name, choice in picked.items():
            place = choice.candidate
            rows.append(
                common
                | {"chooser": name, "candidate": place, "utility": float(truth[place])}
                | {"score": float(own[place]), "decided": choice.decided}
            )
    return pd.DataFrame(rows)


class Curves:
    """The tables of a set of choices; every mean is over prompts, every interval over users."""

    def __init__(self, table: pd.DataFrame, *, draws: int, seed: int) -> None:
        self.draws, self.seed = draws, seed
        self.by_n = {
            int(n): part.pivot(index=["user_id", "slate"], columns="chooser", values="utility")
            for n, part in table.groupby("n")
        }
        own = table[table["chooser"] == MODEL]
        self.scores = {
            int(n): part.set_index(["user_id", "slate"])["score"].sort_index() for n, part in own.groupby("n")
        }
        self.undecided = {
            (int(n), name): int((~part["decided"]).sum())
            for (n, name), part in table.groupby(["n", "chooser"])
        }

    @property
    def reference(self) -> str:
        """Chooser whose gain counts as 100 %: ideal, where it is known."""
        return IDEAL if all(IDEAL in wide for wide in self.by_n.values()) else BEST

    def rows(self) -> list[Value]:
        """Utility of every chooser at every n, its gains, and its share of the reference's gain."""
        rows = []
        for n, wide in self.by_n.items():
            for name in (chooser for chooser in CHOOSERS if chooser in wide):
                row: Value = {"n": n, "chooser": name, **self._mean("utility", wide[name])}
                for other in (RANDOM, POPULATION):
                    if other in wide and name != other:
                        row |= self._mean(f"gain over {other}", wide[name] - wide[other])
                if name in (MODEL, KNOCKOUT, POPULATION, IDEAL_ALL):
                    row |= self._share(wide, name)
                rows.append(row | {"prompts": len(wide)})
        return rows

    def scheme_rows(self, ind: int, pro: int) -> list[Value]:
        """Circle and knockout at the same number of chains."""
        return [
            {"n": n, "chains per prompt": chains_of(n, ind, pro)}
            | self._mean("circle utility", wide[MODEL])
            | self._mean("knockout utility", wide[KNOCKOUT])
            | self._mean("gain of knockout over circle", wide[KNOCKOUT] - wide[MODEL])
            | {"undecided circles": self.undecided[n, MODEL], "undecided finals": self.undecided[n, KNOCKOUT]}
            for n, wide in self.by_n.items()
        ]

    def optimisation_rows(self) -> list[Value]:
        """True utility and model score of the model's choice; the changes are from the size before."""
        rows: list[Value] = []
        before: int | None = None
        for n, wide in self.by_n.items():
            row: Value = {"n": n, "KL bound, nats": math.log(n) - (n - 1) / n}
            row |= self._mean("model score", self.scores[n]) | self._mean("utility", wide[MODEL])
            if before is not None:
                row |= self._mean("gain over the size before", wide[MODEL] - self.by_n[before][MODEL])
                row |= self._mean("gain of score", self.scores[n] - self.scores[before])
            rows.append(row | {"prompts": len(wide)})
            before = n
        return rows

    def _mean(self, name: str, values: pd.Series) -> Value:
        """Mean and interval; None for both without values, and for the interval of a single user."""
        known = values.dropna()
        if known.empty:
            return {name: None, f"{name} ci95": None}
        users = np.unique(known.index.get_level_values("user_id"), return_inverse=True)[1]
        several = users.max() > 0
        bounds = interval(known.to_numpy()[:, None], users, self.draws, self.seed) if several else None
        return {name: float(known.mean()), f"{name} ci95": bounds}

    def _share(self, wide: pd.DataFrame, name: str) -> Value:
        """Share of the reference's gain over random; None where that gain is not above 0."""
        label = f"{self.reference} gain share"
        users = np.unique(wide.index.get_level_values("user_id"), return_inverse=True)[1]
        gain, most = (wide[chooser] - wide[RANDOM] for chooser in (name, self.reference))
        if most.sum() <= 0:
            return {label: None, f"{label} ci95": None}
        sums, wholes = (by_user(values.to_numpy()[:, None], users)[0] for values in (gain, most))
        several = len(sums) > 1
        bounds = list(user_bootstrap(sums, wholes, draws=self.draws, seed=self.seed)) if several else None
        return {label: float(gain.sum() / most.sum()), f"{label} ci95": bounds}
