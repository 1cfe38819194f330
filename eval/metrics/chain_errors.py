"""Where chains err, on any data: totals against the rubric, orders, criteria.

A chain is *verifiable* if its totals can be recomputed from its own weights and criterion scores.  It is
*faithful* if the declared totals are the recomputed ones up to their last digit.  A reward model whose chains
are not faithful does not explain its scores.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass

import pandas as pd

from pgenrm_train.bootstrap import mean
from pgenrm_train.chains.chain import DECLARED_DIFFERS, Chain, parse_chain
from pgenrm_train.rewards.hacking_signs import heaviest_decides, stability


@dataclass(frozen=True, slots=True)
class ChainErrors:
    """Shares in [0, 1]; None where nothing can be counted.

    chains: answers.  readable: of all answers.  verifiable: of readable chains.  faithful: of verifiable
    chains.
    criteria_stability: mean Jaccard similarity of the criteria that two samples of one question name.
    heaviest_decides: verifiable chains whose verdict changes without their heaviest criterion.
    """

    chains: int
    readable: float | None
    verifiable: float | None
    faithful: float | None
    criteria_stability: float | None
    heaviest_decides: float | None


def chain_errors(predictions: pd.DataFrame) -> ChainErrors:
    """Count over predictions with the columns `key`, `failure` and `text`; linear in rows."""
    by_question: dict[tuple[str, int], list[Chain]] = defaultdict(list)
    # Evaluation seeds are samples of one question.
    for pair, order, text in predictions[["pair_id", "order", "text"]].itertuples(index=False):
        chain = parse_chain(text) if isinstance(text, str) else None
        if isinstance(chain, Chain):
            by_question[pair, order].append(chain)
    chains = list(itertools.chain.from_iterable(by_question.values()))
    verifiable = [chain for chain in chains if chain.verified_scores is not None]
    return ChainErrors(
        chains=len(predictions),
        readable=len(chains) / len(predictions) if len(predictions) else None,
        verifiable=len(verifiable) / len(chains) if chains else None,
        faithful=mean([DECLARED_DIFFERS not in chain.issues for chain in verifiable]),
        criteria_stability=stability(
            [[name for name, _ in chain.criteria] for chain in samples] for samples in by_question.values()
        ),
        heaviest_decides=mean([heaviest_decides(chain) for chain in verifiable]),
    )
