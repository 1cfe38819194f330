"""LaMP-QA (METHOD §8): does a reward model rank several models' answers to a user's question as the user's rubric does?

    reference   rubric score of each answer (see `rubric_judge`), or the grades that came with the answers
    ours        mean over samples of the score that the model gives the answer; it reads `history_size` texts of the user's profile
                and all answers at once, in an order that rotates from sample to sample

Two Spearman correlations (ties take average ranks), for each subset and as the mean of the subsets:

    of models      between the two rankings of the *answering models* by mean score; scores are centred within a question first, so
                   that a model with fewer answers is not favoured by easy questions.  The published figures are of this kind: with
                   six models ρ = 1 − Σd²/35, and .543, .714, .657 are 1 − 16/35, 1 − 10/35, 1 − 12/35
    of answers     within each question, averaged over questions; not bound to a few values

Intervals resample questions within their subset.  A question that the model gave no readable scores, or equal ones, ranks nothing:
it stays with ρ = 0.  Only a question whose *reference* ranks nothing leaves the denominator, and is counted.

`view_of` takes a `Question` and texts: neither can hold a rubric or a narrative.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from eval.ask.harness import PredictionStore, Write
from eval.ask.scored import ScoreMany, checked
from pgenrm_train.backends.protocols import Generation, GenerationRequest, Generator
from pgenrm_train.chains.chain import ParseFailure, parse_chain
from pgenrm_train.prompts.masking import MaskedView
from pgenrm_train.records.pairs import Example, HistoryItem, Message
from pgenrm_train.records.questions import Answer, Question

Grades = Mapping[tuple[str, str], float | None]
"""(question id, answering model) → rubric score, None where there is none"""
MEASURES = ("spearman_models", "spearman_answers")


@dataclass(frozen=True)
class Task:
    """One question as a reward model is asked it: profile texts as history, answers in presentation order."""

    question: Question
    models: tuple[str, ...]
    view: MaskedView
    sample: int

    @property
    def key(self) -> str:
        """Names the task by what is read, texts included: scores of other answers under the same ids are none of these."""
        texts = (self.view.context, self.view.history, self.view.responses)
        content = hashlib.sha256(repr(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return json.dumps([self.question.id, self.sample, content])


def tasks(
    questions: Iterable[Question], answers: Iterable[Answer], *, history_size: int, samples: int, seed: int
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
    """A random order, turned by one place each sample: over b samples every answer stands once at every place."""
    order = list(models)
    random.Random(seed).shuffle(order)
    turn = sample % len(order)
    return tuple(order[turn:] + order[:turn])


def view_of(question: Question, answers: Sequence[str], history_size: int, seed: int) -> MaskedView:
    """What the reward model reads: `history_size` random texts of the profile in their order, the question and the answers."""
    drawn = random.Random(f"{seed}/{question.id}").sample(
        question.profile, min(history_size, len(question.profile))
    )
    history = tuple(HistoryItem(item.text, "", "") for item in question.profile if item in drawn)
    return MaskedView((Message("user", question.question),), history, tuple(answers))


# ---- asking


def ask_tasks(
    asked: Sequence[Task],
    start: Callable[[], Generator],
    write: Write,
    store: PredictionStore,
    *,
    temperature: float,
    progress: Callable[..., Iterable[Any]],
    what: str,
) -> pd.DataFrame:
    """Chains for every task that the store does not hold yet; the whole table, a row a task."""
    done, by_key = store.done(), {t.key: t for t in asked}
    todo = [t for t in asked if (t.key, t.sample) not in done]
    if todo:
        seeds = (random.Random(t.key).getrandbits(31) for t in todo)
        requests = (GenerationRequest(t.key, tuple(write(t.view)), 1, seed) for t, seed in zip(todo, seeds))
        try:
            for answer in progress(start()(requests, temperature=temperature), what, len(todo)):
                store.add([_chain_row(by_key[answer.key], answer)])
        finally:
            store.flush()
    table = store.read()
    return table[table["key"].isin(by_key.keys())] if len(table) else table


def score_tasks(asked: Sequence[Task], model: ScoreMany) -> pd.DataFrame:
    """Scores of a model that writes no chains; it sees each task as an example whose user is the question's."""
    examples = [
        Example(t.question.id, t.question.id, t.view.context, t.view.responses, -1, t.view.history)
        for t in asked
    ]
    return pd.DataFrame(
        [
            _row(task, checked(raw, len(task.models)))
            for task, raw in zip(asked, model(examples), strict=True)
        ],
    )


def _chain_row(task: Task, answer: Generation) -> dict[str, Any]:
    if answer.failure is not None:
        return _row(task, answer.failure, answer)
    chain = parse_chain(answer.text or "", len(task.models))
    return _row(task, f"parse:{chain.kind}" if isinstance(chain, ParseFailure) else chain.scores, answer)


def _row(task: Task, scores: tuple[float, ...] | str, answer: Generation | None = None) -> dict[str, Any]:
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
    """(question id, answering model) → mean over the samples that could be read; nothing for a question without any."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in table[table["failure"].isna()].itertuples():
        for model, score in zip(row.models, row.scores, strict=True):
            found[row.question_id, model].append(float(score))
    return {key: float(np.mean(values)) for key, values in found.items()}


# ---- rank correlations


def report(
    questions: Sequence[Question], grades: Grades, table: pd.DataFrame, *, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Both correlations by subset and their means, each with `_ci95`; None where no question of a subset can be ranked.

    `failures` counts samples by kind.  By subset: `n_questions` in the denominator, of which `unranked` had no readable sample and
    `tied` got equal scores; `no_reference` are those left out because fewer than two answers have a grade or all grades are equal.
    """
    ours = mean_scores(table)
    models = sorted({model for _, model in grades})
    by_subset: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_subset[question.subset].append(question)
    subsets: dict[str, dict[str, Any]] = {}
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for number, name in enumerate(sorted(by_subset)):
        rows, counts = _matrices(by_subset[name], grades, ours, models)
        subsets[name] = dict(counts)
        if len(rows):
            drawn[name] = _drawn(rows, draws, np.random.default_rng([seed, number]))
            subsets[name] |= _summary(_correlations(rows, np.ones((1, len(rows)))), drawn[name])
        else:
            subsets[name] |= dict.fromkeys([*MEASURES, *(f"{measure}_ci95" for measure in MEASURES)])
    average: dict[str, Any] = dict.fromkeys(MEASURES)
    if drawn:
        found = [s for s in subsets.values() if s["spearman_answers"] is not None]
        average = _summary(
            {m: np.array([np.mean([s[m] for s in found])]) for m in MEASURES},
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
    questions: Sequence[Question],
    grades: Grades,
    ours: Mapping[tuple[str, str], float],
    models: Sequence[str],
) -> tuple[np.ndarray, dict[str, int]]:
    """Scores float (questions, 2, models), reference first, each centred within its question; NaN where there is no grade."""
    rows, counts = [], Counter(n_questions=0, unranked=0, tied=0, no_reference=0)
    for question in questions:
        keys = [(question.id, model) for model in models]
        reference = np.array([np.nan if grades.get(k) is None else grades[k] for k in keys], dtype=float)
        known = ~np.isnan(reference)
        if known.sum() < 2 or np.ptp(reference[known]) == 0:
            counts["no_reference"] += 1
            continue
        mine = np.array([ours.get(k, np.nan) for k in keys])
        counts["n_questions"] += 1
        if np.isnan(mine[known]).any():
            counts["unranked"] += 1
            mine = np.zeros(len(models))
        elif np.ptp(mine[known]) < 1e-12:
            counts["tied"] += 1
        pair = np.where(known, np.stack([reference, mine]), np.nan)
        rows.append(pair - np.nanmean(pair, axis=1, keepdims=True))
    return np.array(rows).reshape(-1, 2, len(models)), dict(counts)


def _drawn(rows: np.ndarray, draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Both measures of `draws` resamples of the questions, in pieces that bound the memory."""
    chunk = max(1, 4_000_000 // len(rows))
    pieces = [
        _correlations(
            rows, rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), min(chunk, draws - at))
        )
        for at in range(0, draws, chunk)
    ]
    return {measure: np.concatenate([piece[measure] for piece in pieces]) for measure in MEASURES}


def _correlations(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Both measures, float (draws,), when question i counts `weights[:, i]` times."""
    known = ~np.isnan(rows[:, 0])
    totals = np.einsum("dq,qkm->dkm", weights.astype(float), np.nan_to_num(rows))
    counts = (weights @ known)[:, None]
    means = np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
    within = np.array([spearman(*row[:, ~np.isnan(row[0])]) for row in rows])
    of_models = np.array([spearman(*mean[:, ~np.isnan(mean[0])]) for mean in means.round(12)])
    return {"spearman_models": of_models, "spearman_answers": weights @ within / weights.sum(axis=1)}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of average ranks; 0 where one side ranks nothing."""
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def _summary(point: Mapping[str, np.ndarray], drawn: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for measure in MEASURES:
        low, high = np.percentile(drawn[measure], [2.5, 97.5])
        found |= {measure: float(point[measure][0]), f"{measure}_ci95": [float(low), float(high)]}
    return found
