"""PersonaWorld's rule-based teacher and judge, who know the truth that a real LLM would have to guess.

The **teacher** reads history, responses and explicit criteria and writes a correct chain in the contract of
`chains`.  Like LLM judges it over-weights general quality (PATTERNS).  Rejection sampling filters this only
if it flips the ranking; the rest is headroom for reinforcement learning.  Both responses share the noise of a
criterion's scores, so that equal attributes score equally.

The **judge** compares the rubric of a chain with the withheld criteria (process reward, METHOD §4):

    PR = max(0, Σ_c min(ŵ_c, w_c) − Σ_c ŵ_{opposite(c)}) / Σ_c w_c

with ŵ the chain's weights and w the user's.  Naming every attribute earns nothing: the opposites cancel the
hits.
"""

import random
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from data_builders.sources.personaworld import (
    OPPOSITE,
    POLES,
    QUALITY_WEIGHT,
    WEIGHTS,
    Response,
    read_response,
)
from pgenrm_train.chains.chain import ParseFailure, parse_chain, write_chain
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem
from pgenrm_train.rewards.rubric_dropout import RubricDropout

Judge = Callable[[str, Mapping[str, Any]], float | None]

# Weights of (criteria, quality); the first pattern is the truth.
PATTERNS = (((45, 30, 15), 10), ((30, 25, 15), 30), ((25, 15, 10), 50))
PATTERN_SHARES = (0.2, 0.3, 0.5)
_CRITERIA = re.compile(r"For (\w+) I want (\w+) above all, then (\w+), then (\w+)\.")
_PROTOTYPE = re.compile(r"People call me a (\w+)\.")


def read_criteria(explicit: ExplicitSignals) -> tuple[str, tuple[str, ...]] | None:
    """(scenario, three criteria by rank) as the user stated them."""
    match = _CRITERIA.search(explicit.criteria or "")
    return (match[1], (match[2], match[3], match[4])) if match else None


def advantage(item: HistoryItem) -> tuple[str, ...]:
    """Attributes of a vote's chosen response that its rejected one lacks."""
    chosen, rejected = read_response(item.chosen), read_response(item.rejected)
    if chosen is None or rejected is None:
        return ()
    return tuple(a for a in chosen.poles if a not in rejected.poles)


class OracleTeacher:
    """Writes correct chains from the stated criteria, without the label.

    Deterministic in (seed, pair, order, attempt).
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def write(self, example: Example, attempt: int = 0) -> str:
        """Write one chain.  Raises ValueError for an example that is not of PersonaWorld."""
        stated = read_criteria(example.explicit)
        responses = [read_response(text) for text in example.responses]
        if stated is None or any(r is None for r in responses):
            raise ValueError(
                f"pair {example.pair_id}: the oracle teacher reads PersonaWorld's texts and criteria only"
            )
        rng = random.Random(f"{self.seed}/{example.pair_id}/{example.responses[0]}/{attempt}")
        weights, quality_weight = rng.choices(PATTERNS, PATTERN_SHARES)[0]
        scale, criteria = _Scale(rng), stated[1]
        return write_chain(
            _analysis(example, *stated),
            [*zip(criteria, weights), ("quality", quality_weight)],
            [scale.scores(r, criteria) for r in responses if r is not None],
            [" ".join((*r.poles, r.quality)) for r in responses if r is not None],
        )


class _Scale:
    """Scores of one chain: the same attribute gets the same score in every response."""

    def __init__(self, rng: random.Random) -> None:
        self.of = {a: rng.randint(7, 9) for a in (*POLES, "good")}
        self.against = {a: rng.randint(2, 4) for a in (*POLES, "bad")}

    def scores(self, response: Response, criteria: tuple[str, ...]) -> list[float]:
        held = {a: self.of[a] for a in response.poles}
        opposed = {OPPOSITE[a]: self.against[OPPOSITE[a]] for a in response.poles}
        quality = self.of["good"] if response.quality == "good" else self.against["bad"]
        return [float(score) for score in (*((opposed | held).get(c, 5) for c in criteria), quality)]


def _analysis(example: Example, scenario: str, criteria: tuple[str, ...]) -> str:
    pairs = [
        f"Pair {i}: {' '.join(advantage(item)) or 'nothing'}."
        for i, item in enumerate(example.history, start=1)
    ]
    match = _PROTOTYPE.search(example.explicit.self_description or "")
    wish = f"This {match[1] if match else 'person'} for {scenario} wants {' '.join(criteria)}."
    return " ".join((*pairs, wish))


def oracle_judge(
    chain_text: str, explicit: ExplicitSignals, dropout: RubricDropout | None = None
) -> float | None:
    """Process reward in [0, 1]; None if the chain is unreadable or no criteria were stated.

    `dropout` hides criteria, never the quality.
    """
    stated, chain = read_criteria(explicit), parse_chain(chain_text)
    if stated is None or isinstance(chain, ParseFailure):
        return None
    seen = list(zip(stated[1], WEIGHTS))
    true = {**dict(dropout.keep(seen) if dropout else seen), "quality": QUALITY_WEIGHT}
    positive = {name: max(0.0, weight) for name, weight in dict(chain.criteria).items()}
    total = sum(positive.values())
    named = {name: weight / total for name, weight in positive.items() if total}
    covered = sum(min(named.get(c, 0.0), w) for c, w in true.items())
    contradicted = sum(named.get(OPPOSITE[c], 0.0) for c in true if c != "quality")
    return max(0.0, covered - contradicted) / sum(true.values())


def names_judge(
    chain_text: str, explicit: ExplicitSignals, dropout: RubricDropout | None = None
) -> float | None:
    """Share of the stated criteria that the chain names, less the share whose opposites it names.

    Weights do not count, so that no chain gains by shifting them.  None as for `oracle_judge`.
    """
    stated, chain = read_criteria(explicit), parse_chain(chain_text)
    if stated is None or isinstance(chain, ParseFailure):
        return None
    true = dropout.keep(stated[1]) if dropout else stated[1]
    named = {name for name, weight in chain.criteria if weight > 0}
    right, wrong = (sum(name in named for name in names) for names in (true, [OPPOSITE[n] for n in true]))
    return max(0, right - wrong) / len(true)


def judge_for_rewards(**_: object) -> Judge:
    """Make a judge that reads the withheld criteria in `extra_info`; the GRPO backend names this factory."""
    return partial(_judge_extra, oracle_judge)


def names_judge_for_rewards(**_: object) -> Judge:
    """`judge_for_rewards` with `names_judge`."""
    return partial(_judge_extra, names_judge)


def _judge_extra(
    judge: Callable[[str, ExplicitSignals, RubricDropout | None], float | None],
    chain_text: str,
    extra_info: Mapping[str, Any],
) -> float | None:
    explicit = ExplicitSignals(criteria=extra_info.get("criteria"))
    return judge(chain_text, explicit, extra_info.get("dropout"))
