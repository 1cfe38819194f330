"""LaMP-QA (METHOD §8): agreement of a reward model with a user's rubric on the ranking of answers.

    reference   rubric score of each answer (see `rubric_judge`), or the grades that came with the answers
    ours        mean over samples of the model's score of the answer.  The model reads `history_size` texts of
                the user's profile and all answers at once, in an order that rotates from sample to sample

Two Spearman correlations (ties take average ranks), for each subset and as the mean of the subsets:

    of models      between the two rankings of the *answering models* by mean score.  Scores are first centred
                   within a question, so that easy questions do not favour a model with fewer answers.  The
                   published figures are of this kind: with six models ρ = 1 − Σd²/35, and .543, .714, .657
                   are 1 − 16/35, 1 − 10/35, 1 − 12/35
    of answers     within each question, averaged over questions; not limited to a few values

Intervals resample questions within their subset.  A question with unreadable or equal scores of the model
keeps its place, with ρ = 0.  Only a question whose *reference* ranks nothing leaves the denominator, and is
counted.

`view_of` takes a `UserQuestion` and texts: neither has a field for a rubric or a narrative.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from eval.ask.harness import PredictionStore, Progress
from eval.ask.scored import ScoreMany, validate_scores
from pgenrm_train.backends.protocols import Generation, GenerationRequest, Generator
from pgenrm_train.chains.chain import ParseFailure
from pgenrm_train.chains.totals import failure_of, read_chain
from pgenrm_train.config import Totals
from pgenrm_train.prompts.masking import MaskedView
from pgenrm_train.prompts.writer import Write
from pgenrm_train.records.pairs import Example, HistoryItem, Message
from pgenrm_train.records.questions import Answer, UserQuestion

Grades = Mapping[tuple[str, str], float | None]  # (question id, answering model) → rubric score or None
# Both measures, their intervals as `<measure>_ci95`, and the counts of a subset.
Statistics = dict[str, float | list[float] | None]
MEASURES = ("spearman_models", "spearman_answers")
COUNTS = ("n_questions", "unranked", "tied", "no_reference")


@dataclass(frozen=True)
class Task:
    """One question for a reward model: profile texts as history, answers in presentation order."""

    question: UserQuestion
    models: tuple[str, ...]
    view: MaskedView
    sample: int

    @property
    def key(self) -> str:
        """Identity of the task by content: other answers under the same ids need new scores."""
        texts = (self.view.context, self.view.history, self.view.responses)
        content = hashlib.sha256(repr(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return json.dumps([self.question.id, self.sample, content])


class RankingReport(TypedDict):
    """Rank correlations of one model."""

    average: Statistics  # mean of the subsets; None if no question of a subset can be ranked
    subsets: dict[str, Statistics]
    failures: dict[str, int]  # failed samples by kind
    answer_models: list[str]


def tasks(
    questions: Iterable[UserQuestion],
    answers: Iterable[Answer],
    *,
    history_size: int,
    samples: int,
    seed: int,
) -> list[Task]:
    """Every question with at least two answers, `samples` times."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for answer in answers:
        texts[answer.question_id][answer.model] = answer.text
    return [
        Task(
            question,
            order,
            view_of(question, [texts[question.id][m] for m in order], history_size, seed),
            sample,
        )
        for question in questions
        if len(texts[question.id]) > 1
        for sample in range(samples)
        for order in [rotated(sorted(texts[question.id]), f"{seed}/{question.id}", sample)]
    ]


def rotated(models: Sequence[str], seed: str, sample: int) -> tuple[str, ...]:
    """A random order, rotated by one place per sample: over b samples every answer takes every place once."""
    order = list(models)
    random.Random(seed).shuffle(order)
    turn = sample % len(order)
    return tuple(order[turn:] + order[:turn])


def view_of(question: UserQuestion, answers: Sequence[str], history_size: int, seed: int) -> MaskedView:
    """The model's view: `history_size` random profile texts in their order, the question and the answers."""
    drawn = random.Random(f"{seed}/{question.id}").sample(
        question.profile, min(history_size, len(question.profile))
    )
    history = tuple(HistoryItem(item.text, "", "") for item in question.profile if item in drawn)
    return MaskedView((Message("user", question.question),), history, tuple(answers))


# ---- asking


def ask_tasks(
    tasks: Sequence[Task],
    start: Callable[[], Generator],
    write: Write,
    store: PredictionStore,
    *,
    temperature: float,
    progress: Progress,
    what: str,
    totals: Totals = Totals.DECLARED,
) -> pd.DataFrame:
    """Sample chains for the tasks that the store lacks; returns all rows, one per task."""
    done, by_key = store.done(), {t.key: t for t in tasks}
    todo = [t for t in tasks if (t.key, t.sample) not in done]
    if todo:
        seeds = (random.Random(t.key).getrandbits(31) for t in todo)
        requests = (GenerationRequest(t.key, tuple(write(t.view)), 1, seed) for t, seed in zip(todo, seeds))
        try:
            for answer in progress(start()(requests, temperature=temperature), what, len(todo)):
                store.add(_chain_row(by_key[answer.key], answer, totals))
        finally:
            store.flush()
    table = store.read()
    return table[table["key"].isin(by_key.keys())] if len(table) else table


def score_tasks(tasks: Sequence[Task], model: ScoreMany) -> pd.DataFrame:
    """Score with a model without chains; each task becomes an example whose user is the question's."""
    examples = [
        Example(t.question.id, t.question.id, t.view.context, t.view.responses, -1, t.view.history)
        for t in tasks
    ]
    return pd.DataFrame(
        [
            _row(task, validate_scores(raw, len(task.models)))
            for task, raw in zip(tasks, model(examples), strict=True)
        ]
    )


def _chain_row(task: Task, answer: Generation, totals: Totals) -> dict[str, object]:
    if answer.failure is not None:
        return _row(task, answer.failure, answer)
    text, chain = read_chain(answer.text or "", totals, len(task.models))
    answer = replace(answer, text=text)
    if not isinstance(chain, ParseFailure):
        return _row(task, chain.scores, answer)
    return _row(task, failure_of(chain), answer)


def _row(task: Task, scores: tuple[float, ...] | str, answer: Generation | None = None) -> dict[str, object]:
    failed = isinstance(scores, str)
    return {
        "key": task.key,
        "question_id": task.question.id,
        "subset": task.question.subset,
        "sample": task.sample,
        "models": list(task.models),
        "scores": None if failed else list(scores),
        "failure": scores if failed else None,
        "tokens": answer.tokens if answer else 0,
        "text": answer.text if answer else None,
    }


def mean_scores(table: pd.DataFrame) -> dict[tuple[str, str], float]:
    """(question id, answering model) → mean over readable samples; no entry without one."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in table[table["failure"].isna()].itertuples():
        for model, score in zip(row.models, row.scores, strict=True):
            scores[row.question_id, model].append(float(score))
    return {key: float(np.mean(values)) for key, values in scores.items()}


# ---- rank correlations


def report(
    questions: Sequence[UserQuestion],
    grades: Grades,
    table: pd.DataFrame,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> RankingReport:
    """Both correlations by subset and their means, each with `_ci95`.

    By subset: `n_questions` in the denominator, of which `unranked` had no readable sample and `tied` got
    equal scores.  `no_reference` counts questions left out: fewer than two answers have a grade, or all
    grades are equal.
    """
    ours = mean_scores(table)
    models = sorted({model for _, model in grades})
    by_subset: dict[str, list[UserQuestion]] = defaultdict(list)
    for question in questions:
        by_subset[question.subset].append(question)
    subsets: dict[str, Statistics] = {}
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for number, name in enumerate(sorted(by_subset)):
        rows, counts = _matrices(by_subset[name], grades, ours, models)
        subsets[name] = dict(counts)
        if len(rows):
            drawn[name] = _drawn(rows, draws, np.random.default_rng([seed, number]))
            subsets[name] |= _summary(_correlations(rows, np.ones((1, len(rows)))), drawn[name])
        else:
            subsets[name] |= dict.fromkeys([*MEASURES, *(f"{measure}_ci95" for measure in MEASURES)])
    average: Statistics = dict.fromkeys(MEASURES)
    if drawn:
        average = _summary(
            {m: np.array([np.mean([subsets[name][m] for name in drawn])]) for m in MEASURES},
            {m: np.mean([d[m] for d in drawn.values()], axis=0) for m in MEASURES},
        )
    failures = Counter(table["failure"].dropna())
    return {
        "average": average,
        "subsets": subsets,
        "failures": dict(sorted(failures.items())),
        "answer_models": models,
    }


def _matrices(
    questions: Sequence[UserQuestion],
    grades: Grades,
    ours: Mapping[tuple[str, str], float],
    models: Sequence[str],
) -> tuple[np.ndarray, dict[str, int]]:
    """Scores float (questions, 2, models), reference first, centred per question; NaN without a grade."""
    rows, counts = [], Counter(dict.fromkeys(COUNTS, 0))
    for question in questions:
        keys = [(question.id, model) for model in models]
        reference = np.array([np.nan if grades.get(k) is None else grades[k] for k in keys], dtype=float)
        graded = ~np.isnan(reference)
        if graded.sum() < 2 or np.ptp(reference[graded]) == 0:
            counts["no_reference"] += 1
            continue
        scores = np.array([ours.get(k, np.nan) for k in keys])
        counts["n_questions"] += 1
        if np.isnan(scores[graded]).any():
            counts["unranked"] += 1
            scores = np.zeros(len(models))
        elif np.ptp(scores[graded]) < 1e-12:
            counts["tied"] += 1
        pair = np.where(graded, np.stack([reference, scores]), np.nan)
        rows.append(pair - np.nanmean(pair, axis=1, keepdims=True))
    return np.array(rows).reshape(-1, 2, len(models)), dict(counts)


def _drawn(rows: np.ndarray, draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Both measures for `draws` resamples of the questions, in pieces that bound the memory."""
    chunk = max(1, 4_000_000 // len(rows))
    pieces = [
        _correlations(
            rows, rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), min(chunk, draws - at))
        )
        for at in range(0, draws, chunk)
    ]
    return {measure: np.concatenate([piece[measure] for piece in pieces]) for measure in MEASURES}


def _correlations(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Both measures, float (draws,), if question i counts `weights[:, i]` times."""
    graded = ~np.isnan(rows[:, 0])
    totals = np.einsum("dq,qkm->dkm", weights.astype(float), np.nan_to_num(rows))
    counts = (weights @ graded)[:, None]
    means = np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
    within = np.array([spearman(*row[:, ~np.isnan(row[0])]) for row in rows])
    of_models = np.array([spearman(*mean[:, ~np.isnan(mean[0])]) for mean in means.round(12)])
    return {"spearman_models": of_models, "spearman_answers": weights @ within / weights.sum(axis=1)}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of average ranks; 0 if one side ranks nothing."""
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def _summary(point: Mapping[str, np.ndarray], drawn: Mapping[str, np.ndarray]) -> Statistics:
    statistics: Statistics = {}
    for measure in MEASURES:
        low, high = np.percentile(drawn[measure], [2.5, 97.5])
        statistics |= {measure: float(point[measure][0]), f"{measure}_ci95": [float(low), float(high)]}
    return statistics
