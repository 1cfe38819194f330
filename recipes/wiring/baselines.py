"""The baselines without a language model that an evaluation asked for, fitted on training pairs (see `eval.baselines`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from eval.ask.baselines import Scorer, fit_baseline
from pgenrm_train.config import Config
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import Example, PreferencePair


def scorers(config: Config, pairs: Sequence[PreferencePair]) -> dict[str, Scorer]:
    """Name → scorer, in the order of the table.  A `model=baseline` comes last: it is what the headline reports."""
    own = [config.model.name] if config.model.kind == "baseline" else []
    names = [name for name in dict.fromkeys(config.eval.baselines) if name not in own] + own
    more: dict[str, Any] = {"features": _Features, "oracle": _Oracle, **_bradley_terry(config)}
    train = [p for p in pairs if p.trains]
    return {name: fit_baseline(name, train, pairs, seed=config.seed, more=more) for name in names}


def _bradley_terry(config: Config) -> dict[str, Any]:
    from eval.ask.bradley_terry import BradleyTerry
    from recipes.prototypes import make_embedder

    def make(adapted: bool) -> Callable[..., Any]:
        return lambda *, seed=0: BradleyTerry(make_embedder(config), adapted)

    return {"bradley_terry": make(False), "bradley_terry_user": make(True)}


class _Fitted:
    """Adapts a function of the example to the baseline protocol."""

    def __init__(self, score: Callable[[Example], tuple[float, ...]]) -> None:
        self.score = score


class _Features:
    """The features teacher's rule as a scorer."""

    def __init__(self, *, seed: int = 0) -> None:
        from data_builders.teachers.features import FeatureTeacher

        self.rule = FeatureTeacher()

    def fit(self, train: Sequence[PreferencePair], _all: Sequence[PreferencePair]) -> _Fitted:
        if not train:
            raise DataError(
                "the baseline features learns from votes with split=train, and the data holds none; leave it out"
            )
        self.rule.fit(train)
        return _Fitted(lambda e: self.rule.score(e.user_id, e.history, e.query, e.responses))


class _Oracle:
    """PersonaWorld's teacher with the stated criteria in sight: the ceiling of the table."""

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, _train: Sequence[PreferencePair], asked_pairs: Sequence[PreferencePair]) -> _Fitted:
        from data_builders.teachers.oracle import OracleTeacher
        from pgenrm_train.chains.chain import Chain, parse_chain

        teacher, explicit = OracleTeacher(self.seed), {p.pair_id: p.explicit for p in asked_pairs}

        def score(example: Example) -> tuple[float, ...]:
            chain = parse_chain(
                teacher.write(dataclasses.replace(example, explicit=explicit[example.pair_id]))
            )
            assert isinstance(chain, Chain)
            return chain.scores

        return _Fitted(score)
