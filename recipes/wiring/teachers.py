"""Teachers that `teacher=` names: writers of chains, and of synthetic criteria."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_builders.teachers.oracle import OracleTeacher
from pgenrm_train.backends.api.roles import LlmCriteria, LlmTeacher
from pgenrm_train.backends.protocols import CriteriaWriter, Generation, Teacher
from pgenrm_train.config import Config
from pgenrm_train.errors import ConfigError
from pgenrm_train.records.pairs import Example, HistoryItem, PreferencePair
from pgenrm_train.rewards.synthetic_criteria import write_criteria
from recipes.wiring.llm import endpoint


@contextmanager
def teacher(config: Config, pairs: Sequence[PreferencePair], folder: Path) -> Iterator[Teacher]:
    """The teacher of `teacher=`; `folder` keeps the answers of a language model."""
    if config.teacher.kind == "oracle":
        yield RuleTeacher(OracleTeacher(config.seed).write)
    elif config.teacher.kind == "features":
        yield RuleTeacher(features_teacher(config, pairs))
    else:
        with endpoint(config, "teacher", folder) as model:
            yield LlmTeacher(model)


@contextmanager
def criteria_writer(
    config: Config, pairs: Sequence[PreferencePair], folder: Path
) -> Iterator[CriteriaWriter]:
    """The features rule, or the language model of `teacher=`, whose answers `folder` keeps."""
    if config.teacher.kind == "oracle":
        raise ConfigError(
            "recipe=criteria needs teacher=features, endpoint or vllm: "
            "the oracle's users state their criteria"
        )
    if config.teacher.kind == "features":
        yield FeatureCriteria(pairs)
    else:
        with endpoint(config, "teacher", folder) as model:
            yield LlmCriteria(model)


class Rule:
    """A writer that is a rule: instant and free."""

    in_flight = 1
    by_rule = True

    def expect(self, *_: object) -> None:
        return None

    def spending(self) -> None:
        return None


class RuleTeacher(Rule):
    """Teacher by rule, which always answers; see `protocols.Teacher`."""

    def __init__(self, text: Callable[[Example, int], str]) -> None:
        self.text = text

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation:
        return Generation(example.pair_id, attempt, self.text(example, attempt))


class FeatureCriteria(Rule):
    """Criteria writer by rule: each user's heaviest text features; see `protocols.CriteriaWriter`."""

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        from data_builders.teachers.features import FeatureTeacher

        self.rule = FeatureTeacher().fit([pair for pair in pairs if pair.trains])

    def infer(self, user_id: str, votes: Sequence[HistoryItem], attempt: int) -> Generation:
        return Generation(user_id, attempt, write_criteria(self.rule.preferences(user_id)))


def features_teacher(config: Config, pairs: Sequence[PreferencePair]) -> Callable[[Example, int], str]:
    """The `features` rule, fitted on the training pairs."""
    from data_builders.teachers.features import FeatureTeacher

    rule = FeatureTeacher().fit([pair for pair in pairs if pair.trains])

    def write(example: Example, attempt: int) -> str:
        key = f"{config.seed}/{example.pair_id}/{example.responses[0]}/{attempt}"
        # The first chain is the rule's own, without jitter.
        rng = np.random.default_rng(list(key.encode())) if attempt else None
        return rule.write(example, rng)

    return write
