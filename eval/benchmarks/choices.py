"""Benchmarks of choices: one question, b ≥ 2 responses, one of them preferred.

Every question shows its responses in a random order and in the reverse, so each two of them are seen in
both orders.  Per evaluation seed:

    pair         the preferred response against each other one, as votes: `eval.metrics` counts them, under
                 every protocol
    best of n    the preferred response scores strictly above all others
    consistency  all prompts of a group give one ranking of the mean scores of both orders; equal scores rank
                 by name
    pointwise    the preferred response scores above the other one, each scored alone; for b = 2, and for
                 models that return scores

Ties and failures are misses, and stay in the denominator.  Intervals resample instances (questions about the
same responses).  Two equal texts are a tie.

Deviations from the authors: Personalized RewardBench shows one shuffled order and counts an unreadable answer
as the first response.  RMGAP scores one order, and leaves failures out of pair and best of n.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from eval.ask.scored import ScoreMany
from eval.lampqa.ranking import Task, score_tasks, view_of
from eval.metrics.accuracy import Accuracy
from eval.metrics.intervals import accuracy, interval
from pgenrm_train.errors import DataError
from pgenrm_train.records.questions import Answer, UserQuestion

ORDERS = 2  # of a question, per evaluation seed


@dataclass(frozen=True)
class Choices:
    """The questions and answers of a benchmark; `winners`: question id → name of its preferred answer."""

    questions: Mapping[str, UserQuestion]
    texts: Mapping[str, Mapping[str, str]]  # question id → name → text
    winners: Mapping[str, str]

    @property
    def n_responses(self) -> int:
        return max(len(texts) for texts in self.texts.values())


def choices_of(questions: Sequence[UserQuestion], answers: Sequence[Answer]) -> Choices:
    """Group the answers.  Raises DataError for a question without exactly one preferred answer."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    winners: dict[str, list[str]] = defaultdict(list)
    for answer in answers:
        texts[answer.question_id][answer.model] = answer.text
        winners[answer.question_id] += [answer.model] if answer.rubric_score == 1 else []
    for question in questions:
        if len(winners[question.id]) != 1 or len(texts[question.id]) < 2:
            raise DataError(
                f"question {question.id!r} has {len(texts[question.id])} answers, of which "
                f"{len(winners[question.id])} are preferred; expected two or more, and one preferred"
            )
    by_id = {question.id: question for question in questions}
    return Choices(by_id, texts, {name: winners[name][0] for name in by_id})


def tasks_of(choices: Choices, *, history_size: int, seeds: int, seed: int) -> list[Task]:
    """Every question in a random order and its reverse, in each evaluation seed: sample 2·seed + order."""
    return [
        Task(
            question,
            shown,
            view_of(question, [texts[name] for name in shown], history_size, seed),
            number,
        )
        for question in choices.questions.values()
        for texts in [choices.texts[question.id]]
        for number in range(ORDERS * seeds)
        for shown in [_order(sorted(texts), f"{seed}/{question.id}/{number // ORDERS}", number % ORDERS)]
    ]


def _order(names: list[str], seed: str, reverse: int) -> tuple[str, ...]:
    random.Random(seed).shuffle(names)
    return tuple(reversed(names)) if reverse else tuple(names)


def refuse_pairwise(table: pd.DataFrame, choices: Choices, name: str) -> None:
    """Raise DataError if the model returned another number of scores than each question's responses."""
    if choices.n_responses > 2 and len(table) and (table["failure"] == "scores:count").all():
        raise DataError(
            f"{name} never returned one score for each of the {choices.n_responses} responses of a question: "
            "a model of pairs cannot rank more; use one that scores any number of responses"
        )


def votes_table(table: pd.DataFrame, choices: Choices) -> pd.DataFrame:
    """The answers as a predictions table of `eval.metrics`: the preferred response against each other one."""
    return pd.DataFrame(list(_votes(table, choices)))


def _votes(table: pd.DataFrame, choices: Choices) -> Iterator[dict[str, object]]:
    for row in table.itertuples():
        question, names = choices.questions[row.question_id], list(row.models)
        winner, texts = choices.winners[row.question_id], choices.texts[row.question_id]
        scores = _scores(row, texts)
        for other in names:
            if other == winner:
                continue
            yield {
                "pair_id": f"{row.question_id}/{other}",
                "user_id": question.instance or question.id,
                "order": int(names.index(winner) > names.index(other)),
                "seed": row.sample // ORDERS,
                "sample": 0,
                "score_chosen": scores.get(winner),
                "score_rejected": scores.get(other),
                "failure": row.failure if isinstance(row.failure, str) else None,
                "kind": question.subset,
                "set": "own",
                "tokens": row.tokens,
                "text": row.text,
            }


def _scores(row: object, texts: Mapping[str, str]) -> dict[str, float]:
    """name → score; equal texts get their mean.  Empty for a failure."""
    if isinstance(row.failure, str):  # type: ignore[attr-defined]
        return {}
    given = dict(zip(row.models, row.scores, strict=True))  # type: ignore[attr-defined]
    same: dict[str, list[str]] = defaultdict(list)
    for name in given:
        same[texts[name]].append(name)
    return {name: float(np.mean([given[other] for other in same[texts[name]]])) for name in given}


@dataclass(frozen=True)
class Measure:
    """One measure over all questions or groups: overall, by subset, and its mean over the subsets."""

    overall: Accuracy
    by_subset: Mapping[str, float | None]

    @property
    def macro(self) -> float | None:
        known = [value for value in self.by_subset.values() if value is not None]
        return float(np.mean(known)) if known else None


def best_of_n(table: pd.DataFrame, choices: Choices, *, draws: int, seed: int) -> Measure:
    """Share of (question, order) whose preferred response scores strictly above all others."""
    hits: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in table.itertuples():
        scores, winner = _scores(row, choices.texts[row.question_id]), choices.winners[row.question_id]
        others = [score for name, score in scores.items() if name != winner]
        hits[row.question_id, row.sample // ORDERS].append(
            float(bool(scores) and scores[winner] > max(others))
        )
    values = {key: float(np.mean(of_orders)) for key, of_orders in hits.items()}
    return _measure(values, choices, {name: name for name in choices.questions}, draws, seed)


def consistency(table: pd.DataFrame, choices: Choices, *, draws: int, seed: int) -> Measure | None:
    """Share of groups whose prompts all give one ranking; None without groups of several prompts."""
    groups: dict[str, list[str]] = defaultdict(list)
    for question in choices.questions.values():
        groups[question.group or question.id].append(question.id)
    groups = {name: members for name, members in groups.items() if len(members) > 1}
    if not groups:
        return None
    means: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for row in table.itertuples():
        means[row.question_id, row.sample // ORDERS].append(_scores(row, choices.texts[row.question_id]))
    values: dict[tuple[str, int], float] = {}
    for name, members in groups.items():
        for number in sorted({seed_number for _, seed_number in means}):
            rankings = {_ranking(means[member, number]) for member in members}
            values[name, number] = float(len(rankings) == 1 and None not in rankings)
    return _measure(values, choices, {name: members[0] for name, members in groups.items()}, draws, seed)


def _ranking(orders: Sequence[Mapping[str, float]]) -> tuple[str, ...] | None:
    """Names by falling mean over the orders; None if an order failed."""
    if len(orders) != ORDERS or not all(orders):
        return None
    mean = {name: round(float(np.mean([scores[name] for scores in orders])), 9) for name in orders[0]}
    return tuple(sorted(mean, key=lambda name: (-mean[name], name)))


def _measure(
    values: Mapping[tuple[str, int], float],
    choices: Choices,
    question_of: Mapping[str, str],
    draws: int,
    seed: int,
) -> Measure:
    names, seeds = sorted({name for name, _ in values}), sorted({number for _, number in values})
    grid = np.array([[values[name, number] for number in seeds] for name in names])
    of = [choices.questions[question_of[name]] for name in names]
    units = pd.factorize(np.array([question.instance or question.id for question in of]))[0]
    subsets = np.array([question.subset for question in of])
    return Measure(
        {"accuracy": accuracy(grid), "ci95": interval(grid, units, draws, seed)},
        {str(subset): accuracy(grid[subsets == subset]) for subset in sorted(set(subsets))},
    )


def pointwise(
    choices: Choices, model: ScoreMany, *, history_size: int, draws: int, seed: int
) -> Measure | None:
    """Win rate of the preferred response when each is scored alone; None for more than two responses."""
    if choices.n_responses > 2:
        return None
    both = [t for t in tasks_of(choices, history_size=history_size, seeds=1, seed=seed) if t.sample == 0]
    alone = [
        replace(task, models=(name,), view=replace(task.view, responses=(text,)))
        for task in both
        for name, text in zip(task.models, task.view.responses, strict=True)
    ]
    scores = {
        (row.question_id, row.models[0]): row.scores[0] if row.scores is not None else float("nan")
        for row in score_tasks(alone, model).itertuples()
    }
    values = {
        (name, 0): float(
            all(
                scores[name, winner] > scores[name, other] for other in choices.texts[name] if other != winner
            )
        )
        for name, winner in choices.winners.items()
    }
    return _measure(values, choices, {name: name for name in choices.questions}, draws, seed)
