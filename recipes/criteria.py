"""criteria: what users who stated nothing seem to want, inferred from their training votes by `teacher=` → supervision for CRE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgenrm_train.backends.protocols import CriteriaWriter, Generation
from pgenrm_train.config import Config
from pgenrm_train.errors import ConfigError
from pgenrm_train.prompts.writer import load_pairs
from pgenrm_train.records.pairs import HistoryItem, PreferencePair
from pgenrm_train.run.progress import progress
from pgenrm_train.stages import criteria
from pgenrm_train.stages.registry import CRITERIA
from pgenrm_train.stages.stage import prepare, run_stage
from recipes import build_data
from recipes.wiring.llm import endpoint


def run(config: Config) -> None:
    prepare(config)
    build_data.run(config)

    def body(folder, _tracker):  # type: ignore[no-untyped-def]
        pairs = load_pairs(Path(config.run_dir))
        with writer(config, pairs, folder.path) as infers:
            return criteria.run(config, folder, pairs, infers, progress)

    say = "criteria of {inferred} of {users} users who stated none; failures: {failures}; teacher: {teacher}"
    run_stage(config, CRITERIA, body, say, renew=True)


@contextmanager
def writer(config: Config, pairs: Sequence[PreferencePair], folder: Path) -> Iterator[CriteriaWriter]:
    """Who infers: the features rule, or the language model of `teacher=`, whose answers `folder` keeps."""
    if config.teacher.kind == "oracle":
        raise ConfigError(
            "recipe=criteria needs teacher=features, endpoint or vllm: the oracle's users state their criteria"
        )
    if config.teacher.kind == "features":
        yield FeatureCriteria(pairs)
    else:
        from pgenrm_train.backends.api.roles import LlmCriteria

        with endpoint(config, "teacher", folder) as found:
            yield LlmCriteria(found)


class FeatureCriteria:
    """Each user's heaviest text features, by the rule of `teacher=features`; see `base.CriteriaWriter`."""

    in_flight = 1

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        from data_builders.teachers.features import FeatureTeacher

        self.rule = FeatureTeacher().fit([p for p in pairs if p.trains])

    def infer(self, user_id: str, votes: Sequence[HistoryItem], attempt: int) -> Generation:
        from pgenrm_train.rewards.synthetic_criteria import write_criteria

        return Generation(user_id, attempt, write_criteria(self.rule.preferences(user_id)))

    def expect(self, users: Sequence[Sequence[HistoryItem]], tries: int) -> Mapping[str, Any]:
        return {}

    def facts(self) -> Mapping[str, Any]:
        return {}
