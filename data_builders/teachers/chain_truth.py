"""Where a chain errs in PersonaWorld: each step of its reasoning against the truth.

A chain restates the votes, names criteria, describes the responses and scores them.  Votes and responses can
be read exactly, the criteria are known, and the ideal reader computes which criteria the votes allow.
"""

import re
from dataclasses import dataclass

from data_builders.sources.personaworld import OPPOSITE, Response, read_response
from data_builders.teachers.ideal import IdealReader
from data_builders.teachers.oracle import advantage, read_criteria
from pgenrm_train.bootstrap import mean
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
    named criteria, in their order, have a posterior above `ALLOWED` given the votes.  responses: descriptions
    of the responses.  scores: criterion scores that fit criterion and response.  quality: weight in percent.
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
    criteria, names = read_criteria(explicit), [name for name, _ in chain.criteria]
    named, total = tuple(n for n in names if n != QUALITY), sum(weight for _, weight in chain.criteria)
    responses = [response for answer in example.responses if (response := read_response(answer)) is not None]
    return ChainTruth(
        votes=_right(_VOTE, chain.analysis, [" ".join(advantage(v)) or "nothing" for v in example.history]),
        recalled=len({*named} & {*criteria[1]}) / len(criteria[1]) if criteria else None,
        allowed=float(reader.after_votes(example).get(named, 0.0) > ALLOWED) if named else None,
        responses=_right(_NOTE, text, [" ".join((*r.poles, r.quality)) for r in responses]),
        scores=mean(
            [
                _fits(name, score, response)
                for response, row in zip(responses, chain.criterion_scores or ())
                for name, score in zip(names, row, strict=True)
            ]
        ),
        quality=100 * dict(chain.criteria).get(QUALITY, 0.0) / total if total > 0 else None,
    )


def _right(pattern: re.Pattern[str], text: str, truth: list[str]) -> float | None:
    """Share of the numbered statements, from 1 on, that the text makes in the words of the truth."""
    stated = {int(number): words for number, words in pattern.findall(text)}
    return mean([stated.get(number) == words for number, words in enumerate(truth, start=1)])


def _fits(criterion: str, score: float, response: Response) -> bool:
    """The teacher's scale: 7 to 9 for a criterion that holds, 2 to 4 for its opposite, 5 for neither."""
    if criterion == QUALITY:
        return 7 <= score <= 9 if response.quality == "good" else 2 <= score <= 4
    if criterion in response.poles:
        return 7 <= score <= 9
    return 2 <= score <= 4 if OPPOSITE.get(criterion) in response.poles else score == 5
