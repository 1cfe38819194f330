"""Evaluate on data=personalized_rewardbench or data=rmgap (see `eval.benchmarks.choices`)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from eval.ask.baselines import fit_baseline
from eval.ask.scored import ScoreMany, one_by_one
from eval.benchmarks.choices import (
    ORDERS,
    Choices,
    best_of_n,
    choices_of,
    consistency,
    pointwise,
    refuse_pairwise,
    tasks_of,
    votes_table,
)
from eval.benchmarks.summary import Chosen, write_results
from eval.lampqa.ranking import score_tasks
from eval.metrics.accuracy import accuracy_report
from eval.studies.evaluation import Candidate, ScoredCandidate, headline
from pgenrm_train.config import Config, StageName
from pgenrm_train.config.evaluation import TASKS
from pgenrm_train.records.questions import read_answers, read_questions
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import Tracker
from recipes.wiring.benchmarks.lampqa import RULES, ask, rules


def evaluate(
    config: Config, folder: StageFolder, tracker: Tracker, everyone: Sequence[Candidate | ScoredCandidate]
) -> Mapping[str, object]:
    """Query every candidate and rule with all questions, and publish the accuracies."""
    built = Path(config.run_dir) / StageName.BUILD_DATA
    questions = read_questions(built)[: config.data.max_test_pairs]
    choices = choices_of(questions, read_answers(built))
    size = config.data.history_size
    every = tasks_of(choices, history_size=size, seeds=config.eval.seeds, seed=config.seed)
    first = [task for task in every if task.sample < ORDERS]
    tested = []
    for name in rules(config):
        rule = one_by_one(fit_baseline(name, [], [], seed=config.seed))
        tested.append(_measured(config, choices, name, score_tasks(first, rule), rule))
    for step, candidate in enumerate(everyone):
        model = candidate.start() if isinstance(candidate, ScoredCandidate) else None
        table = (
            score_tasks(first, model) if model else ask(config, candidate, every, folder.path, close=False)
        )
        refuse_pairwise(table, choices, candidate.name)
        tested.append(_measured(config, choices, candidate.name, table, model))
        candidate.close()
        tracker.log(step, headline(tested[-1].report))
    skipped = sorted(set(config.eval.baselines) - set(RULES))
    notes = [f"Skipped baselines, which learn from votes: {', '.join(skipped)}."] if skipped else []
    facts = {
        "model_name": config.model.path or config.model.name,
        "data": config.data.name,
        "data_sha256": _digest(choices),
        "judge": config.judge.kind,
        "totals": config.model.counted,
        "masking": config.eval.masking,
        "history_size": size,
    }
    results = write_results(TASKS[config.data.name], tested, facts, notes, folder.path)
    return {key: results[key] for key in ("accuracy", "ci95", "model")}


def _measured(
    config: Config, choices: Choices, name: str, table: pd.DataFrame, model: ScoreMany | None
) -> Chosen:
    draws, seed = config.eval.draws, config.seed
    votes = votes_table(table, choices)
    alone = (
        pointwise(choices, model, history_size=config.data.history_size, draws=draws, seed=seed)
        if model
        else None
    )
    return Chosen(
        name,
        votes,
        accuracy_report(votes, protocol=config.eval.protocol, draws=draws, seed=seed),
        {
            "best_of_n": best_of_n(table, choices, draws=draws, seed=seed)
            if choices.n_responses > 2
            else None,
            "consistency": consistency(table, choices, draws=draws, seed=seed),
            "pointwise": alone,
        },
    )


def _digest(choices: Choices) -> str:
    """Hash of the questions, their answers and the preferred ones, in any order."""
    rows = sorted(
        repr((name, question.question, sorted(choices.texts[name].items()), choices.winners[name]))
        for name, question in choices.questions.items()
    )
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogatepass")).hexdigest()[:16]
