"""Signs that a policy has learnt to please its reward instead of judging better.

All of them are *our choice*:

    verified_disagreement   share of verifiable chains whose rubric's own sums name another winner
    unverifiable_share      share of chains in the right form whose totals cannot be recomputed
    faithful_share          share of verifiable chains that declare the recomputed totals
    heaviest_decides        share of verifiable chains whose verdict changes without the heaviest criterion
    criterion_kinds         effective number of criterion names: exponential of the entropy of their shares
    commonest_criteria      share of chains with the commonest set of criteria; 1 is a template for all users
    score_spread            mean of best minus worst score; near 0 the chain separates no responses
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pgenrm_train.bootstrap import mean
from pgenrm_train.chains.chain import DECLARED_DIFFERS, Chain, ParseFailure

# Whose history a validation question shows.
OWN, SWAPPED, EMPTY = "own", "swapped_history", "empty_history"
# Rounding of the difference of two totals with one decimal.
ROUNDING = 0.1 + 1e-6


@dataclass(frozen=True, slots=True)
class Ranking:
    """How a readable chain ranks the chosen response, and by which criteria.

    `margin`: score of the chosen response minus the best other score, by the totals that count.
    `verified_margin`, `declared_margin`: the same by the recomputed and by the declared totals.  `spread`:
    best minus worst score.  `faithful`: whether declared and recomputed totals agree to the last digit.
    `heaviest_decides`: whether the verdict changes without the heaviest criterion.  `verified_margin` and
    `heaviest_decides` are None without a complete rubric.
    """

    margin: float
    verified_margin: float | None
    spread: float
    criteria: tuple[str, ...]
    declared_margin: float
    faithful: bool
    heaviest_decides: bool | None = None

    @property
    def contradicts_itself(self) -> bool:
        """Whether the rubric's own sums name another winner, by more than rounding."""
        if self.verified_margin is None:
            return False
        declared, verified = self.declared_margin, self.verified_margin
        differs = (declared > 0, declared < 0) != (verified > 0, verified < 0)
        return differs and abs(declared - verified) > ROUNDING


def ranking_of(chain: Chain | ParseFailure, chosen_index: int) -> Ranking | None:
    """The chain's ranking; None for a chain that cannot be read."""
    if isinstance(chain, ParseFailure):
        return None
    verified = chain.verified_scores
    return Ranking(
        margin=_margin(chain.scores, chosen_index),
        verified_margin=None if verified is None else _margin(verified, chosen_index),
        spread=max(chain.scores) - min(chain.scores),
        criteria=tuple(name for name, _ in chain.criteria),
        declared_margin=_margin(chain.declared, chosen_index),
        faithful=verified is not None and DECLARED_DIFFERS not in chain.issues,
        heaviest_decides=None if verified is None else heaviest_decides(chain),
    )


def heaviest_decides(chain: Chain) -> bool:
    """Whether a verifiable chain prefers other responses without its heaviest criterion."""
    weights = [weight for _, weight in chain.criteria]
    heaviest = max(range(len(weights)), key=weights.__getitem__)
    rest = [weight if place != heaviest else 0.0 for place, weight in enumerate(weights)]
    return _preferred(chain, weights) != _preferred(chain, rest)


def _preferred(chain: Chain, weights: Sequence[float]) -> list[int]:
    """The responses with the highest total."""
    rows = chain.criterion_scores or ()
    totals = [sum(w * score for w, score in zip(weights, row, strict=True)) for row in rows]
    best = max(totals)
    return [i for i, total in enumerate(totals) if total > best - 1e-9]


def stability(groups: Iterable[Sequence[Iterable[str]]]) -> float | None:
    """Mean over groups of the mean Jaccard similarity of consecutive samples' criteria; linear in samples."""
    means = []
    for samples in groups:
        sets = [frozenset(name.casefold() for name in names) for names in samples]
        shares = [len(a & b) / len(a | b) for a, b in itertools.pairwise(sets) if a or b]
        if shares:
            means.append(sum(shares) / len(shares))
    return mean(means)


def _margin(scores: Sequence[float], chosen_index: int) -> float:
    return scores[chosen_index] - max(score for i, score in enumerate(scores) if i != chosen_index)


def signs(rankings: Iterable[Ranking | None], unverified: int = 0) -> dict[str, float | None]:
    """The signs over the chains of a step; null if no chain provides the value.

    `unverified`: chains that failed because only recomputed totals count.
    """
    readable = [ranking for ranking in rankings if ranking is not None]
    verified = [ranking for ranking in readable if ranking.verified_margin is not None]
    sets = [tuple(sorted({name.casefold() for name in r.criteria})) for r in readable if r.criteria]
    return {
        "verified_disagreement": mean([ranking.contradicts_itself for ranking in verified]),
        "unverifiable_share": mean(
            [*(ranking.verified_margin is None for ranking in readable), *[True] * unverified]
        ),
        "faithful_share": mean([ranking.faithful for ranking in verified]),
        "heaviest_decides": mean([r.heaviest_decides for r in verified if r.heaviest_decides is not None]),
        "criterion_kinds": _effective_number([name for names in sets for name in names]),
        "commonest_criteria": max(Counter(sets).values()) / len(sets) if sets else None,
        "score_spread": mean([ranking.spread for ranking in readable]),
    }


def _effective_number(names: Sequence[str]) -> float | None:
    shares = [count / len(names) for count in Counter(names).values()]
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else None
