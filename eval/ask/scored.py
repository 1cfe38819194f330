"""Models that return numbers and write no chain: any Python function, or a reward model with a scalar head.

    score(example) -> one number per response, in presentation order; higher is better, equal is a tie

The function sees what a masked model sees: label and stated criteria are removed, `chosen_index` is −1.
Anything but one finite number per response is a failure of that question, with its kind, in the table:

    scores:none         the function returned None
    scores:count        wrong number of scores
    scores:not_numbers  a value that is not a finite number (nor are booleans and texts)
    engine:<Type>       an exception; another start repeats the question

Pure scores count as deterministic: one evaluation seed, one sample.  Use without configuration or recipe:

    pairs = list(read_pairs("votes.parquet"))
    test = [p for p in pairs if p.split == "test"]
    history = HistorySampler(pairs, size=3, policy="random")
    table = score_pairs(my_function, test, {p.pair_id: history(p) for p in test})
    print(accuracy_report(table))
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import pandas as pd

from eval.ask.harness import (
    ENGINE_FAILURE,
    Histories,
    Prediction,
    PredictionStore,
    Progress,
    Question,
    answer_row,
    by_choice,
    keep,
    own_questions,
)
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.masking import present
from pgenrm_train.records.pairs import Example, ExplicitSignals, PreferencePair

Score = Callable[[Example], Any]
Scored = tuple[float, ...] | str  # the scores of one example, or the kind of its failure
# A batched model: yields for each example the result of a `Score`, or a failure as text.
ScoreMany = Callable[[Sequence[Example]], Iterable[Any]]
CHUNK = 256  # questions that a batched model sees at a time


def score_pairs(
    score: Score,
    pairs: Iterable[PreferencePair],
    histories: Histories | None = None,
) -> pd.DataFrame:
    """The predictions table of a function, both orders of every pair.

    `histories`: pair_id → earlier votes; None for no histories.  Raises DataError without pairs, or if a pair
    lacks its history.
    """
    pairs = list(pairs)
    if not pairs:
        raise DataError("no pairs to score; expected at least one")
    if histories is None:
        histories = dict.fromkeys((p.pair_id for p in pairs), ())
    if missing := [p for p in pairs if p.pair_id not in histories]:
        raise DataError(
            f"pair_id {missing[0].pair_id!r} of user {missing[0].user_id!r} has no history; expected an entry"
        )
    return scored(own_questions(pairs, histories), one_by_one(score))


def scored(questions: Sequence[Question], model: ScoreMany) -> pd.DataFrame:
    """The predictions table of `questions`, one row each."""
    return pd.DataFrame(list(_rows(questions, model)))


def one_by_one(score: Score) -> ScoreMany:
    """A batched model from a function of one example; prints the first exception of each type."""
    printed: set[str] = set()

    def many(examples: Sequence[Example]) -> Iterator[Any]:
        for example in examples:
            try:
                yield score(example)
            except Exception as error:  # user code: any exception is this question's failure
                kind = type(error).__name__
                if kind not in printed:
                    print(f"the scoring function failed: {kind}: {str(error)[:200]}", flush=True)
                    printed.add(kind)
                yield f"{ENGINE_FAILURE}{kind}"

    return many


def ask_scores(
    questions: Sequence[Question],
    start: Callable[[], ScoreMany],
    store: PredictionStore,
    *,
    progress: Progress,
    what: str,
) -> pd.DataFrame:
    """Score the questions that the store lacks, as `harness.ask` does; start the model only for those."""
    done = store.done()
    todo = [q for q in questions if (q.key, 0) not in done]
    if todo:
        model = start()
        rows = (row for at in range(0, len(todo), CHUNK) for row in _rows(todo[at : at + CHUNK], model))
        keep(rows, len(todo), store, progress, what)
    frame = store.read()
    return frame[frame["key"].isin({q.key for q in questions})].reset_index(drop=True)


def blind(question: Question) -> Example:
    """The example of a question, without its label and the user's statements."""
    example = present(question.pair, question.history, question.order)
    return dataclasses.replace(example, chosen_index=-1, explicit=ExplicitSignals())


def validate_scores(scores: Any, n_responses: int) -> Scored:
    """A model's result → finite floats, one per response, or the kind of failure."""
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


def _rows(questions: Sequence[Question], model: ScoreMany) -> Iterator[Prediction]:
    examples = [blind(q) for q in questions]
    for question, example, raw in zip(questions, examples, model(examples), strict=True):
        scores = validate_scores(raw, len(example.responses))
        row = answer_row(question, sample=0, failure=scores if isinstance(scores, str) else None)
        if not isinstance(scores, str):
            row["score_chosen"], row["score_rejected"] = by_choice(question, scores)
        yield row
