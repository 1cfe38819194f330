"""Protocols between stages and engines, and the records that pass between them.

Stages and `eval` import only these names; recipes choose the concrete engines (`sft`, `grpo`, `vllm`, …).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from pgenrm_train.records.pairs import Example, HistoryItem
from pgenrm_train.rewards.training_rows import RowExtra

T = TypeVar("T")
SAMPLE = 200


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for `samples` completions of one prompt.

    The results repeat `key`, which seeds the sampling together with `seed`.
    """

    key: str
    messages: tuple[Mapping[str, str], ...]
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion, or the reason why there is none; `failure` is None for a text that is complete."""

    key: str
    sample: int
    text: str | None
    # "length" (no end within the limit) · "prompt_too_long" · "prompt_refused" · "engine:<type>"
    failure: str | None = None
    tokens: int = 0
    words: str = ""  # a server's own, on the failure


Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected cost of a stage, each figure as (low, high); `dollars` is None without prices."""

    calls: Range
    prompt_tokens: Range
    completion_tokens: Range
    dollars: Range | None
    minutes: Range

    def for_manifest(self) -> dict[str, list[float]]:
        """Rounded figures by the names that manifests use."""
        return {
            "calls": [round(count) for count in self.calls],
            "prompt tokens": [round(count) for count in self.prompt_tokens],
            "completion tokens": [round(count) for count in self.completion_tokens],
            **({"dollars": [round(price, 4) for price in self.dollars]} if self.dollars else {}),
            "minutes": [round(time, 1) for time in self.minutes],
        }


def estimate_sample(items: Sequence[T]) -> Sequence[T]:
    """At most SAMPLE items at even distances, whose prompts give an estimate for all."""
    return items[:: max(1, len(items) // SAMPLE)][:SAMPLE]


@dataclass(frozen=True, slots=True)
class Spending:
    """Calls of this start by outcome, with a server's words on each failure; cost of all starts."""

    calls: int
    tries: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float
    failures: Mapping[str, int]
    words: Mapping[str, str] = field(default_factory=dict)

    def __add__(self, other: "Spending") -> "Spending":
        return Spending(
            self.calls + other.calls,
            self.tries + other.tries,
            self.cached + other.cached,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.dollars + other.dollars,
            Counter(self.failures) + Counter(other.failures),
            {**self.words, **other.words},
        )

    def for_manifest(self) -> dict[str, object]:
        """Rounded figures by the names that manifests use."""
        return {
            "calls": self.calls,
            "tries": self.tries,
            "from cache": self.cached,
            "prompt tokens": self.prompt_tokens,
            "completion tokens": self.completion_tokens,
            "dollars": round(self.dollars, 4),
            "failures": dict(self.failures),
            **({"messages": dict(self.words)} if self.words else {}),
        }


def server_words(spending: Spending | None) -> str:
    """The end of an error's sentence: a server's words on each failure; empty if there are none."""
    return f"; the server's messages: {dict(spending.words)}" if spending and spending.words else ""


class Generator(Protocol):
    """Generate all requests from one global queue; completions come as they finish, in any order."""

    def __call__(
        self, requests: Iterable[GenerationRequest], *, temperature: float
    ) -> Iterator[Generation]: ...

    def close(self) -> None: ...


class Teacher(Protocol):
    """A writer of evaluation chains from history and explicit signals, never from the choice.

    `in_flight` is the number of calls to make at a time.  A teacher `by_rule` writes by template, so that its
    chains resemble each other.  Raises BackendError if it can write no further chain (server down, budget
    spent).
    """

    in_flight: int
    by_rule: bool

    def write(self, example: Example, attempt: int, complaint: str | None = None) -> Generation:
        """Write a chain; `complaint` names the problem of the previous attempt's form."""

    def expect(self, examples: Sequence[Example], questions: int, tries: int) -> Estimate | None:
        """Print and return the cost of up to `tries` calls per question; None for a rule."""

    def spending(self) -> Spending | None:
        """The cost so far; None for a rule."""


class CriteriaWriter(Protocol):
    """A writer of a user's criteria, inferred from their votes, as JSON for `synthetic_criteria`.

    Raises BackendError as a teacher does.
    """

    in_flight: int

    def infer(self, user_id: str, votes: Sequence[HistoryItem], attempt: int) -> Generation: ...

    def expect(self, users: Sequence[Sequence[HistoryItem]], tries: int) -> Estimate | None: ...

    def spending(self) -> Spending | None: ...


class Judge(Protocol):
    """Process reward in [0, 1]: how well a chain covers the withheld criteria; None without a verdict."""

    def __call__(self, chain_text: str, example: RowExtra) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Trained:
    """The report of a training backend."""

    steps: int
    checkpoint: Path
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Validated:
    """The result of a validation: numbers for metrics.jsonl with `eval/accuracy`, and sample chains."""

    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, object]]


TRUTH = "eval/truth/"  # prefix of the metrics of a `ChainReader`


class ChainReader(Protocol):
    """Compare validation chains, as (pair_id, order, text), with the truth: shares of right steps by name."""

    def __call__(self, chains: Iterable[tuple[str, int, str | None]]) -> Mapping[str, float]: ...


class Validator(Protocol):
    """Score a model in training on a fixed slice of questions."""

    def __call__(self, generator: Generator) -> Validated: ...
