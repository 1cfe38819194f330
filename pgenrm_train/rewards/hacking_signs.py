"""Signs that a policy has learnt to please its reward rather than to judge better: numbers over the chains of a step, pure.

A chain is the `info` of a reward: `criteria` (names), `spread` (best − worst declared score), `margin` and `verified_margin` (of the
chosen response, declared and recomputed from the rubric); all None where the chain could not be read.  *Our choice*, all of it.

    verified_disagreement   share of chains with a rubric whose own weighted sums rank the chosen response otherwise than declared
    unverifiable_share      share of readable chains without a complete rubric
    criterion_kinds         effective number of criterion names: the exponential of the entropy of their shares
    commonest_criteria      share of chains with the commonest set of criteria: 1 is a template, whoever the user is
    score_spread            mean distance of the best from the worst score; towards 0 every response is the same, towards 9 none is
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OWN, SWAPPED, EMPTY = (
    "own",
    "swapped_history",
    "empty_history",
)  # whose history the questions of a validation show
ROUNDING = 0.1 + 1e-6  # of the difference of two totals that are given to one decimal


def signs(infos: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """The numbers above; null where no chain tells anything of it."""
    chains = [info for info in infos if info["margin"] is not None]
    verified = [info for info in chains if info["verified_margin"] is not None]
    sets = [
        tuple(sorted({name.casefold() for name in info["criteria"]})) for info in chains if info["criteria"]
    ]
    return {
        "verified_disagreement": _share(
            [_disagrees(info["margin"], info["verified_margin"]) for info in verified]
        ),
        "unverifiable_share": _share([info["verified_margin"] is None for info in chains]),
        "criterion_kinds": _effective_number([name for names in sets for name in names]),
        "commonest_criteria": max(Counter(sets).values()) / len(sets) if sets else None,
        "score_spread": sum(info["spread"] for info in chains) / len(chains) if chains else None,
    }


def _disagrees(declared: float, verified: float) -> bool:
    """Another winner, and not by rounding."""
    return _sign(declared) != _sign(verified) and abs(declared - verified) > ROUNDING


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _effective_number(names: Sequence[str]) -> float | None:
    shares = [count / len(names) for count in Counter(names).values()]
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else None
