"""Models that give numbers and write no chain: any Python function, or a reward model with a scalar head.

    score(example) -> one number a response, in presentation order; higher is better, equal is a tie

The function sees what a masked model sees.  The label and the user's stated criteria are taken out of the example first: its
`chosen_index` is −1.  What is not a finite number for each response is a failure of that question, with its kind, in the table:

    scores:none         nothing was returned
    scores:count        another number of scores than responses
    scores:not_numbers  something that is no finite number (booleans and texts are none)
    engine:<Type>       an exception was raised; another start asks again

Pure scores are taken to be deterministic: one evaluation seed, one sample.  Alone, without configuration or recipe:

    pairs = list(read_pairs("votes.parquet"))
    test = [p for p in pairs if p.split == "test"]
    history = HistorySampler(pairs, size=3, policy="random")
    table = score_pairs(my_function, test, {p.pair_id: history(p) for p in test})
    print(accuracy_report(table))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import pandas as pd

from eval.ask.harness import (
    ENGINE_FAILURE,
    PredictionStore,
    Question,
    Running,
    answer_row,
    own_questions,
    scores_of,
)
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.masking import present
from pgenrm_train.records.pairs import Example, ExplicitSignals, HistoryItem, PreferencePair

Score = Callable[[Example], Any]
Scored = tuple[float, ...] | str
"""The scores of one example, or the kind of its failure."""
ScoreMany = Callable[[Sequence[Example]], Iterable[Any]]
"""What a batched model is: for each example what a `Score` returns, or a failure as text."""
CHUNK = 256  # questions that a batched model sees at a time


def score_pairs(
    score: Score,
    pairs: Iterable[PreferencePair],
    histories: Mapping[str, tuple[HistoryItem, ...]] | None = None,
) -> pd.DataFrame:
    """The predictions table of a function, both orders of every pair; `histories`: pair_id → earlier votes, None for none.

    Raises DataError when there are no pairs or one lacks its history.
    """
    pairs = list(pairs)
    if not pairs:
        raise DataError("no pairs to score; expected at least one")
    known = dict.fromkeys((p.pair_id for p in pairs), ()) if histories is None else histories
    if missing := [p for p in pairs if p.pair_id not in known]:
        raise DataError(
            f"pair_id {missing[0].pair_id!r} of user {missing[0].user_id!r} has no history; expected an entry"
        )
    return scored(own_questions(pairs, known), one_by_one(score))


def scored(questions: Sequence[Question], model: ScoreMany) -> pd.DataFrame:
    """The predictions table of some questions, one row each."""
    return pd.DataFrame(list(_rows(questions, model)))


def one_by_one(score: Score) -> ScoreMany:
    """A function of one example as a model; the first exception of each type is told."""
    told: set[str] = set()

    def many(examples: Sequence[Example]) -> Iterator[Any]:
        for example in examples:
            try:
                yield score(example)
            except Exception as error:  # somebody else's code: whatever it raises is this question's failure
                kind = type(error).__name__
                if kind not in told:
                    print(f"the scoring function failed: {kind}: {str(error)[:200]}", flush=True)
                    told.add(kind)
                yield f"{ENGINE_FAILURE}{kind}"

    return many


def ask_scores(
    questions: Sequence[Question],
    start: Callable[[], ScoreMany],
    store: PredictionStore,
    *,
    progress: Callable[..., Iterable[Any]],
    what: str,
) -> pd.DataFrame:
    """Answer every question that the store does not hold yet, as `harness.ask` does; the model is started only when one is left."""
    done = store.done()
    todo = [q for q in questions if (q.key, 0) not in done]
    if todo:
        model, running = start(), Running()
        bar = iter(progress(range(len(todo)), what, len(todo), running))
        try:
            for at in range(0, len(todo), CHUNK):
                for row in _rows(todo[at : at + CHUNK], model):
                    store.add([row])
                    running.add(row)
                    next(bar, None)
            next(bar, None)
        finally:  # Ctrl-C loses no answer
            store.flush()
    frame = store.read()
    return frame[frame["key"].isin({q.key for q in questions})].reset_index(drop=True)


def blind(question: Question) -> Example:
    """The example of a question without its label and without what the user stated."""
    example = present(question.pair, question.history, question.order)
    return dataclasses.replace(example, chosen_index=-1, explicit=ExplicitSignals())


def checked(scores: Any, n_responses: int) -> Scored:
    """What a model returned → finite floats, one a response, or the kind of failure."""
    if isinstance(scores, str):
        return scores if scores.startswith(ENGINE_FAILURE) else "scores:not_numbers"
    if scores is None:
        return "scores:none"
    try:
        values = list(scores)
    except TypeError:
        return "scores:count"
    if len(values) != n_responses:
        return "scores:count"
    if not all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        return "scores:not_numbers"
    return tuple(float(v) for v in values)


def _rows(questions: Sequence[Question], model: ScoreMany) -> Iterator[dict[str, Any]]:
    examples = [blind(q) for q in questions]
    for question, example, raw in zip(questions, examples, model(examples), strict=True):
        scores = checked(raw, len(example.responses))
        row = answer_row(question, sample=0, failure=scores if isinstance(scores, str) else None)
        if not isinstance(scores, str):
            row |= scores_of(question, scores)
        yield row
