"""True utility before and after, its intervals over users, and signs of reward hacking, from veRL's dumps."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.policy.world import Asker
from pgenrm_train.bootstrap import mean, user_bootstrap
from pgenrm_train.errors import ArtifactError

DRAWS, SEED = 10_000, 0  # of the bootstrap
PADDING = "pad"  # begin of the ids of veRL's padding
FOREIGN = 0.0  # utility of a text outside the language: it shows no attribute


@dataclass(frozen=True)
class Answer:
    """One answer of the policy, with the service's score and the true utility; None: a foreign text."""

    asker: Asker
    prompt: str
    text: str
    reward: float
    utility: float | None

    @property
    def value(self) -> float:
        return FOREIGN if self.utility is None else self.utility


def read_answers(dump: Path, askers: Iterable[Asker]) -> list[Answer]:
    """The answers in a dump of veRL.  Raises ArtifactError if there is none.

    veRL fills a training batch that lacks rollouts with empty rows of score 0, which are no answers.
    """
    by_key = {asker.key: asker for asker in askers}
    try:
        lines = dump.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ArtifactError(f"{dump} does not exist: veRL has not reached this step") from None
    answers = []
    for line in lines:
        row = json.loads(line)
        if row["uid"].startswith(PADDING):
            continue
        asker, text = by_key[row["gts"]], row["output"]
        answers.append(Answer(asker, row["input"], text, float(row["score"]), asker.utility(text)))
    return answers


def signs(answers: Sequence[Answer], expected: int) -> dict[str, float | None]:
    """Measures of a set of answers.

    reward      mean score by the service, on its scale of 1 to 10
    utility     mean true utility; a foreign text counts 0
    agreement   share of two answers to a prompt that the reward orders as the true utility does
    foreign     share of texts outside PersonaWorld's language
    sentences   mean number of sentences; the language has four
    different   different texts over all texts; near 0 the policy has collapsed
    unscored    of the `expected` answers, those that got no score: veRL leaves them out, they are no 0
    """
    return {
        "reward": mean([answer.reward for answer in answers]),
        "utility": mean([answer.value for answer in answers]),
        "agreement": mean(list(_agreements(answers))),
        "foreign": mean([answer.utility is None for answer in answers]),
        "sentences": mean([answer.text.count(".") for answer in answers]),
        "different": len({answer.text for answer in answers}) / len(answers) if answers else None,
        "unscored": float(expected - len(answers)),
    }


def _agreements(answers: Sequence[Answer]) -> Iterable[float]:
    prompts = defaultdict(list)
    for answer in answers:
        prompts[answer.asker.key, answer.prompt].append(answer)
    for group in prompts.values():
        for first, second in itertools.combinations(group, 2):
            if abs(first.value - second.value) > 1e-9:
                gap = (first.reward - second.reward) * (first.value - second.value)
                yield 0.5 if gap == 0 else float(gap > 0)


def hacking(steps: Sequence[Mapping[str, float | None]]) -> str:
    """One sentence on reward against true utility, between the first and the last fifth of the steps."""
    size = max(1, len(steps) // 5)
    rise = {
        name: _mean_of(steps[-size:], name) - _mean_of(steps[:size], name) for name in ("reward", "utility")
    }
    verdict = "the reward rises and the true utility does not: a sign of reward hacking"
    if rise["reward"] <= 0:
        verdict = "the reward does not rise"
    elif rise["utility"] > 0:
        verdict = "both rise"
    return f"reward {rise['reward']:+.2f}, true utility {rise['utility']:+.3f} over training: {verdict}"


def _mean_of(steps: Sequence[Mapping[str, float | None]], name: str) -> float:
    return mean([value for step in steps if (value := step[name]) is not None]) or 0.0


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval over users."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired(first: Sequence[Answer], second: Sequence[Answer]) -> Difference:
    """Mean true utility of `first` minus that of `second`, on the prompts of both; users are drawn."""
    ours, theirs = _by_prompt(first), _by_prompt(second)
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for user, key, prompt in sorted(ours.keys() & theirs.keys()):
        sums[user] += ours[user, key, prompt] - theirs[user, key, prompt]
        counts[user] += 1
    if not counts:
        raise ArtifactError("the two sets of answers have no prompt in common")
    totals, sizes = np.array([sums[u] for u in sums]), np.array([float(counts[u]) for u in sums])
    low, high = user_bootstrap(totals, sizes, draws=DRAWS, seed=SEED)
    return Difference(float(totals.sum() / sizes.sum()), low, high)


def _by_prompt(answers: Sequence[Answer]) -> dict[tuple[str, str, str], float]:
    values = defaultdict(list)
    for answer in answers:
        values[answer.asker.user, answer.asker.key, answer.prompt].append(answer.value)
    return {place: float(np.mean(each)) for place, each in values.items()}


def table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Signs as lines of text, one row per name."""
    names = list(next(iter(rows.values())))
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>11}" for name in names)]
    for name, row in rows.items():
        cells = ("–" if row[column] is None else f"{row[column]:.3g}" for column in names)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)
