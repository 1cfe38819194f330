"""Where a chain errs in PersonaWorld: each step of its reasoning against the truth.

A chain restates the votes, names criteria, describes the responses and scores them.  Votes and responses can
be read exactly, the criteria are known, and the ideal reader computes which criteria the votes allow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_builders.sources.personaworld import OPPOSITE, Response, read_response
from data_builders.teachers.ideal import IdealReader
from data_builders.teachers.oracle import advantage, read_criteria
from pgenrm_train.chains.chain import Chain
from pgenrm_train.records.pairs import Example, ExplicitSignals

ALLOWED = 1e-4  # least posterior probability of criteria that the votes allow
QUALITY = "quality"
_VOTE = re.compile(r"Pair (\d{1,3}): ([^.]{0,200})\.")
_NOTE = re.compile(r"Response (\d{1,3}): ([^;]{0,200});")


@dataclass(frozen=True, slots=True)
class ChainTruth:
    """Shares of one chain's statements that are right; None where the chain makes none.

    votes: earlier votes restated right.  recalled: the user's criteria that are named.  allowed: 1.0 if the
    named criteria have a posterior above `ALLOWED` given the votes.  responses: descriptions of the responses.
    scores: criterion scores that fit criterion and response.  quality: weight of quality in percent.
    """

    votes: float | None
    recalled: float | None
    allowed: float | None
    responses: float | None
    scores: float | None
    quality: float | None


def chain_truth(
    chain: Chain, text: str, example: Example, explicit: ExplicitSignals, reader: IdealReader
) -> ChainTruth:
    """Compare a chain with the truth.  Raises DataError for an example that is not of PersonaWorld."""
    named = tuple(name for name, _ in chain.criteria if name != QUALITY)
    responses = [read_response(response) for response in example.responses]
    read = [response for response in responses if response is not None]
    return ChainTruth(
        votes=_share(_restated(chain.analysis, example)),
        recalled=_recalled(named, explicit),
        allowed=float(reader.after_votes(example).get(named, 0.0) > ALLOWED) if named else None,
        responses=_share(_described(text, read)),
        scores=_share(_fitting(chain, read)),
        quality=_quality_share(chain),
    )


def _restated(analysis: str, example: Example) -> list[bool]:
    stated = {int(number): words for number, words in _VOTE.findall(analysis)}
    return [
        stated.get(number) == (" ".join(advantage(item)) or "nothing")
        for number, item in enumerate(example.history, start=1)
    ]


def _recalled(named: tuple[str, ...], explicit: ExplicitSignals) -> float | None:
    criteria = read_criteria(explicit)
    return None if criteria is None else len(set(named) & set(criteria[1])) / len(criteria[1])


def _described(text: str, responses: list[Response]) -> list[bool]:
    notes = {int(number): words for number, words in _NOTE.findall(text)}
    return [
        notes.get(number) == " ".join((*response.poles, response.quality))
        for number, response in enumerate(responses, start=1)
    ]


def _fitting(chain: Chain, responses: list[Response]) -> list[bool]:
    names = [name for name, _ in chain.criteria]
    return [
        _fits(name, score, response)
        for response, row in zip(responses, chain.criterion_scores or ())
        for name, score in zip(names, row, strict=True)
    ]


def _fits(criterion: str, score: float, response: Response) -> bool:
    """The teacher's scale: 7 to 9 for a criterion that holds, 2 to 4 for its opposite, 5 for neither."""
    if criterion == QUALITY:
        return 7 <= score <= 9 if response.quality == "good" else 2 <= score <= 4
    if criterion in response.poles:
        return 7 <= score <= 9
    return 2 <= score <= 4 if OPPOSITE.get(criterion) in response.poles else score == 5


def _quality_share(chain: Chain) -> float | None:
    total = sum(weight for _, weight in chain.criteria)
    return 100 * dict(chain.criteria).get(QUALITY, 0.0) / total if total > 0 else None


def _share(right: list[bool]) -> float | None:
    return sum(right) / len(right) if right else None
