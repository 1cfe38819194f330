"""The protocols at the boundary: what a stage may ask of an engine, and nothing else.

Stages and `eval` know these names only; recipes choose the concrete engines (`sft`, `grpo`, `vllm`, …).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pgenrm_train.records.pairs import Example, HistoryItem
from pgenrm_train.rewards.training_rows import RowExtra


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`samples` completions of one prompt; `key` is echoed in the results and seeds the sampling together with `seed`."""

    key: str
    messages: tuple[Mapping[str, str], ...]
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion, or the reason why there is none.  `failure` is null for text that ended by itself."""

    key: str
    sample: int
    text: str | None
    failure: str | None = None  # "length" (no end within the limit) · "prompt_too_long" · "engine:<type>"
    tokens: int = 0


class Generator(Protocol):
    """Runs every request through one global queue and yields completions as they finish, in any order."""

    def __call__(
        self, requests: Iterable[GenerationRequest], *, temperature: float
    ) -> Iterator[Generation]: ...

    def close(self) -> None: ...


class Teacher(Protocol):
    """Writes evaluation chains.  Sees history and explicit signals, never which response was chosen.

    `complaint` says what was wrong with the form of the attempt before.  `in_flight`: calls worth making at a time.  `by_rule`: it
    writes by template, so that its chains resemble each other.  Raises BackendError when no further chain can be had (the server is
    down, the budget spent).
    """

    in_flight: int
    by_rule: bool

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation: ...

    def expect(self, examples: Sequence[Example], questions: int, tries: int) -> Mapping[str, Any]:
        """Tell what up to `tries` calls on each of `questions` like these will cost, and return it; empty for a rule."""
        ...

    def facts(self) -> Mapping[str, Any]: ...


class CriteriaWriter(Protocol):
    """Infers a user's criteria from their votes, as the JSON text that `synthesis` reads.  Raises BackendError as a teacher does."""

    in_flight: int

    def infer(self, user_id: str, votes: Sequence[HistoryItem], attempt: int) -> Generation: ...

    def expect(self, users: Sequence[Sequence[HistoryItem]], tries: int) -> Mapping[str, Any]: ...

    def facts(self) -> Mapping[str, Any]: ...


class Judge(Protocol):
    """Process reward: how well a chain covers the withheld criteria, in [0, 1]; None when no verdict could be had."""

    def __call__(self, chain_text: str, example: RowExtra) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training backend reports back."""

    steps: int
    checkpoint: Path
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Validated:
    """What a validation found: numbers for metrics.jsonl (`eval/accuracy` among them) and rows of a table of sample chains."""

    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]


class Validator(Protocol):
    """Scores a model while it is trained: asks a fixed slice of questions and judges the answers."""

    def __call__(self, generator: Generator) -> Validated: ...
