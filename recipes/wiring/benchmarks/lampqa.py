"""Evaluate on data=lampqa: compare rankings of answers with the rubric's (see `eval.lampqa.ranking`)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from eval.ask.baselines import fit_baseline
from eval.ask.scored import one_by_one
from eval.lampqa.ranking import MEASURES, Task, ask_tasks, report, score_tasks, tasks
from eval.lampqa.rubric_judge import SCHEMA, read_rubric_score, rubric_messages
from eval.lampqa.summary import Ranked, Reference, write_results
from eval.studies.evaluation import Candidate, ScoredCandidate, kept_answers
from pgenrm_train.config import Config, StageName, sizes
from pgenrm_train.errors import BackendError, ConfigError, DataError
from pgenrm_train.records.questions import (
    Answer,
    UserQuestion,
    read_answers,
    read_questions,
    read_secrets,
)
from pgenrm_train.run.concurrency import concurrently, progress
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import Tracker
from recipes.wiring.llm import endpoint

RULES = ("random", "longer", "shorter")  # baselines that need no votes


def evaluate(
    config: Config, folder: StageFolder, tracker: Tracker, everyone: Sequence[Candidate | ScoredCandidate]
) -> Mapping[str, object]:
    """Grade the answers, score them with every candidate and baseline, and publish the rank correlations."""
    built, ind = Path(config.run_dir) / StageName.BUILD_DATA, max(sizes(config.eval.ind))
    questions, answers = read_questions(built), read_answers(built)
    every = tasks(questions, answers, history_size=config.data.history_size, samples=ind, seed=config.seed)
    if not every:
        raise DataError(f"{built}: no question has answers of two models or more; nothing can be ranked")
    reference = _reference(config, folder.path, built, questions, answers)
    first = [t for t in every if t.sample == 0]
    tables = {
        name: score_tasks(first, one_by_one(fit_baseline(name, [], [], seed=config.seed)))
        for name in rules(config)
    }
    for candidate in everyone:
        tables[candidate.name] = ask(config, candidate, every, folder.path)
    reports = {
        name: report(questions, reference.grades, table, draws=config.eval.draws, seed=config.seed)
        for name, table in tables.items()
    }
    for step, average in enumerate(reports[candidate.name]["average"] for candidate in everyone):
        values = {f"eval/{measure}": average[measure] for measure in MEASURES}
        tracker.log(step, {name: value for name, value in values.items() if isinstance(value, float)})
    skipped = sorted(set(config.eval.baselines) - set(RULES))
    ranked = Ranked(tables, reports, reference, ind, config.data.history_size, skipped)
    write_results(ranked, folder.path)
    spearman = reports[ranked.final]["average"]["spearman_models"]
    return {
        "model": ranked.final,
        "spearman": round(spearman, 3) if isinstance(spearman, float) else None,
        "reference": reference.source,
    }


def rules(config: Config) -> list[str]:
    """The applicable baselines; a `model=baseline` comes last, for the headline."""
    headline = [config.model.name] if config.model.kind == "baseline" else []
    if headline and headline[0] not in RULES:
        raise ConfigError(
            f"model.name={headline[0]} learns from votes, of which data={config.data.name} has none; use one "
            f"of {', '.join(RULES)}"
        )
    return [name for name in config.eval.baselines if name in RULES and name not in headline] + headline


def _reference(
    config: Config, folder: Path, built: Path, questions: Sequence[UserQuestion], answers: Sequence[Answer]
) -> Reference:
    """Grades that came with all answers, else an LLM judge's.  Raises ConfigError without either."""
    given = {(a.question_id, a.model): a.rubric_score for a in answers}
    missing = sum(score is None for score in given.values())
    if not missing:
        return Reference(given, "grades that came with the answers", {})
    if config.judge.kind not in ("endpoint", "vllm"):
        raise ConfigError(
            f"{missing} of {len(answers)} answers have no rubric_score, and judge={config.judge.kind} "
            "grades none; use judge=endpoint or judge=vllm, or an answers file with a rubric_score in each "
            "row"
        )
    questions_by_id = {q.id: q for q in questions}
    secrets = {secret.question_id: secret for secret in read_secrets(built)}
    with endpoint(config, "judge", folder) as judge:

        def grade(answer: Answer) -> float | str:
            """The rubric score, or the reason for none."""
            if judge.stopped:
                raise BackendError(f"judge: {judge.stopped}")
            secret = secrets[answer.question_id]
            n = len(secret.rubric_aspects)
            if not n:
                return "no_rubric"
            messages = rubric_messages(questions_by_id[answer.question_id], secret, answer.text)
            reply = judge.complete(messages, schema=SCHEMA)
            score = read_rubric_score(reply.text, n) if reply.text is not None else None
            return score if score is not None else reply.failure or "unreadable"

        calls = concurrently(grade, answers, judge.settings.max_in_flight)
        results = dict(progress(calls, "grade answers", len(answers)))
    grades = {
        (answers[i].question_id, answers[i].model): None if isinstance(result, str) else result
        for i, result in results.items()
    }
    failures = Counter(result for result in results.values() if isinstance(result, str))
    return Reference(grades, f"judge {config.judge.name}", dict(failures))


def ask(
    config: Config,
    candidate: Candidate | ScoredCandidate,
    every: Sequence[Task],
    folder: Path,
    *,
    close: bool = True,
) -> pd.DataFrame:
    """The candidate's scores, one row per task; `close` closes the candidate."""
    try:
        if isinstance(candidate, ScoredCandidate):
            return score_tasks([t for t in every if t.sample == 0], candidate.start())
        return ask_tasks(
            every,
            candidate.start,
            candidate.write(),
            kept_answers(config, candidate, folder / candidate.name, "ranks", config.eval.temperature),
            temperature=config.eval.temperature,
            progress=progress,
            what=f"evaluate {candidate.name}",
            totals=config.model.counted,
        )
    finally:
        if close:
            candidate.close()
