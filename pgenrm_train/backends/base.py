"""The protocols at the boundary: what a stage may ask of an engine, and nothing else.

Stages and `eval` know these names only; recipes choose the concrete rooms (`deepspeed_sft`, `vllm_engine`, `verl_grpo`, …).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pgenrm_train.records import Example


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

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]: ...

    def close(self) -> None: ...


class Teacher(Protocol):
    """Writes evaluation chains.  Sees history and explicit signals, never which response was chosen.

    `complaint` says what was wrong with the form of the attempt before.  `in_flight`: calls worth making at a time.  Raises
    BackendError when no further chain can be had (the server is down, the budget spent).
    """

    in_flight: int

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation: ...

    def facts(self) -> Mapping[str, Any]: ...


class Judge(Protocol):
    """Process reward: how well a chain covers the withheld criteria, in [0, 1]; None when no verdict could be had."""

    def __call__(self, chain_text: str, example: Mapping[str, Any]) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training backend reports back."""

    steps: int
    checkpoint: Path
    metrics: Mapping[str, float] = field(default_factory=dict)


class SupervisedTrainer(Protocol):
    """SFT on chat rows; resumes from the newest complete checkpoint in `work_dir`."""

    def __call__(self, rows: Sequence[Mapping[str, Any]], *, start: Path, work_dir: Path) -> Trained: ...
