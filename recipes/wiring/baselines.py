"""Fit the baselines that an evaluation names, on training pairs (see `eval.ask.baselines`)."""

import dataclasses
from collections.abc import Sequence
from functools import partial

from data_builders.teachers.ideal import SEEN, UNSEEN, Ideal, IdealChain, IdealReader, Imitator
from data_builders.teachers.oracle import OracleTeacher
from eval.ask.baselines import Fit, Votes, fit_baseline
from eval.ask.bradley_terry import BradleyTerry
from eval.ask.scored import Score
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.config import EXACT, PERSONA_BASELINE, Config
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import Example
from recipes.wiring.models import make_embedder


def scorers(config: Config, pairs: Votes) -> dict[str, Score]:
    """Name → fitted baseline, in the order of the table.  A `model=baseline` comes last: the headline."""
    headline = [config.model.name] if config.model.kind == "baseline" else []
    rules = (name for name in dict.fromkeys(config.eval.baselines) if name != PERSONA_BASELINE)
    names = [name for name in rules if name not in headline] + headline
    more: dict[str, Fit] = {
        "features": _fit_features,
        "oracle": _fit_oracle,
        **{name: partial(_fit_exact, name) for name in EXACT if name != "oracle"},
        "bradley_terry": lambda train, every, _: _fit_bradley_terry(config, train, every, adapted=False),
        "bradley_terry_user": lambda train, every, _: _fit_bradley_terry(config, train, every, adapted=True),
    }
    train = [p for p in pairs if p.trains]
    return {name: fit_baseline(name, train, pairs, seed=config.seed, more=more) for name in names}


def _fit_bradley_terry(config: Config, train_pairs: Votes, all_pairs: Votes, *, adapted: bool) -> Score:
    return BradleyTerry(make_embedder(config), adapted).fit(train_pairs, all_pairs).score


def _fit_features(train_pairs: Votes, _all: Votes, _seed: int) -> Score:
    from data_builders.teachers.features import FeatureTeacher

    if not train_pairs:
        raise DataError(
            "the baseline features learns from votes with split=train, and the data holds none; leave it out"
        )
    return FeatureTeacher().fit(train_pairs).score


def _fit_exact(name: str, _train: Votes, _all: Votes, seed: int) -> Score:
    """A reader of the masked prompt that knows how PersonaWorld is generated."""
    reader = IdealReader((SEEN, UNSEEN) if name == "ideal_all_personas" else (SEEN,))
    if name == "ideal_chain":
        return IdealChain(reader).score
    return Imitator(reader, seed).score if name == "imitator" else Ideal(reader).score


def _fit_oracle(_train: Votes, all_pairs: Votes, seed: int) -> Score:
    """PersonaWorld's teacher, which reads the stated criteria: the ceiling of the table."""
    teacher, explicit = OracleTeacher(seed), {p.pair_id: p.explicit for p in all_pairs}

    def score(example: Example) -> Sequence[float]:
        chain = parse_chain(teacher.write(dataclasses.replace(example, explicit=explicit[example.pair_id])))
        assert isinstance(chain, Chain)
        return chain.scores

    return score
