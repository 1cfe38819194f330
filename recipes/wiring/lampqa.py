"""evaluate on data=lampqa: the models under test rank answers; the ranking is compared with the rubric's (see `eval.lampqa.ranking`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from eval.ask.baselines import fit_baseline
from eval.ask.scored import one_by_one
from eval.lampqa.ranking import MEASURES, Grades, Task, ask_tasks, report, score_tasks, tasks
from eval.lampqa.rubric_judge import ratings_schema, read_rubric_score, rubric_messages
from eval.report.console import text_table
from eval.report.published import LAMPQA_TEXT, published_rankings
from eval.report.report import Report, Section, write_markdown, write_report
from eval.studies.evaluation import Candidate, ScoredCandidate, kept_answers
from pgenrm_train.config import Config, sizes
from pgenrm_train.errors import BackendError, ConfigError, DataError
from pgenrm_train.files import write_json, write_table, write_text
from pgenrm_train.records.questions import (
    Answer,
    Question,
    QuestionSecret,
    read_answers,
    read_questions,
    read_secrets,
)
from pgenrm_train.run.concurrency import concurrently
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.progress import progress
from recipes.wiring.llm import endpoint

RULES = ("random", "longer", "shorter")  # baselines that need no votes of the user


@dataclass(frozen=True)
class Reference:
    """What the answers are ranked by; `source` names it for the report, `failures` counts answers without a grade by reason."""

    grades: Grades
    source: str
    failures: Mapping[str, int]


def evaluate(
    config: Config, folder: StageFolder, tracker: Any, everyone: Sequence[Candidate | ScoredCandidate]
) -> dict[str, Any]:
    """Grade, ask, compare; write results.json, predictions.parquet, report.html and table.txt."""
    built = Path(config.run_dir) / "build_data"
    questions, answers = read_questions(built), read_answers(built)
    asked = tasks(
        questions,
        answers,
        history_size=config.data.history_size,
        samples=max(sizes(config.eval.ind)),
        seed=config.seed,
    )
    if not asked:
        raise DataError(f"{built}: no question has answers of two models or more; nothing can be ranked")
    reference = _reference(config, folder.path, questions, read_secrets(built), answers)
    tables = {name: score_tasks([t for t in asked if t.sample == 0], one_by_one(fit_baseline(name, [], [], seed=config.seed).score))
              for name in _rules(config)}  # fmt: skip
    tables |= {candidate.name: _ask(config, candidate, asked, folder.path) for candidate in everyone}
    results = {
        name: report(questions, reference.grades, t, draws=config.eval.draws, seed=config.seed)
        for name, t in tables.items()
    }
    final = results[list(tables)[-1]]
    for step, result in enumerate(results[m.name] for m in everyone):
        tracker.log(
            step, {f"eval/{m}": result["average"][m] for m in MEASURES if result["average"][m] is not None}
        )
    _publish(config, folder.path, tables, results, reference)
    return {
        "model": list(tables)[-1],
        "spearman": _rounded(final["average"]["spearman_models"]),
        "reference": reference.source,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _rules(config: Config) -> list[str]:
    """The baselines that apply; a `model=baseline` comes last, for the headline."""
    own = [config.model.name] if config.model.kind == "baseline" else []
    if own and own[0] not in RULES:
        raise ConfigError(
            f"model.name={own[0]} learns from votes, of which data=lampqa has none; use one of {', '.join(RULES)}"
        )
    return [name for name in config.eval.baselines if name in RULES and name not in own] + own


def _reference(
    config: Config,
    folder: Path,
    questions: Sequence[Question],
    secrets: Sequence[QuestionSecret],
    answers: Sequence[Answer],
) -> Reference:
    """Grades that came with the answers, if all did; else an LLM judge's.  Raises ConfigError when there is neither."""
    given = {(a.question_id, a.model): a.rubric_score for a in answers}
    missing = sum(score is None for score in given.values())
    if not missing:
        return Reference(given, "grades that came with the answers", {})
    if config.judge.kind not in ("endpoint", "vllm"):
        raise ConfigError(
            f"{missing} of {len(answers)} answers have no rubric_score, and judge={config.judge.kind} grades none; use judge=endpoint or "
            "judge=vllm, or an answers file with a rubric_score in each row"
        )
    by_id, secret_of = {q.id: q for q in questions}, {s.question_id: s for s in secrets}
    failures: Counter[str] = Counter()
    with endpoint(config, "judge", folder) as judge:

        def grade(answer: Answer) -> float | str:
            if judge.stopped:
                raise BackendError(f"judge: {judge.stopped}")
            secret = secret_of[answer.question_id]
            n = len(secret.rubric_aspects)
            if not n:
                return "no_rubric"
            reply = judge.ask(
                rubric_messages(by_id[answer.question_id], secret, answer.text), schema=ratings_schema(n)
            )
            score = read_rubric_score(reply.text, n) if reply.text is not None else None
            return score if score is not None else reply.failure or "unreadable"

        grades: dict[tuple[str, str], float | None] = {}
        called = concurrently(grade, answers, judge.settings.max_in_flight)
        for at, found in progress(called, "grade answers", len(answers)):
            if isinstance(found, str):
                failures[found] += 1
            grades[answers[at].question_id, answers[at].model] = None if isinstance(found, str) else found
    return Reference(grades, f"judge {config.judge.name}", dict(failures))


def _ask(
    config: Config, candidate: Candidate | ScoredCandidate, asked: Sequence[Task], folder: Path
) -> pd.DataFrame:
    try:
        if isinstance(candidate, ScoredCandidate):
            return score_tasks([t for t in asked if t.sample == 0], candidate.start())
        return ask_tasks(
            asked, candidate.start, candidate.write(), kept_answers(config, candidate, folder / candidate.name, "ranks"),
            temperature=config.eval.temperature, progress=progress, what=f"evaluate {candidate.name}",
        )  # fmt: skip
    finally:
        candidate.close()


def _publish(
    config: Config,
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    results: Mapping[str, Any],
    reference: Reference,
) -> None:
    name = list(tables)[-1]
    facts = {
        "model": name, "data": "lampqa", "reference": reference.source, "ungraded_answers": dict(reference.failures),
        "ind": max(sizes(config.eval.ind)), "history_size": config.data.history_size, "seeds": [0],
    }  # fmt: skip
    row = _leaderboard_row(results[name], facts)
    write_json(
        folder / "results.json", {**results[name], **facts, "models": dict(results), "leaderboard_row": row}
    )
    write_table(
        folder / "predictions.parquet",
        pd.concat([t.assign(model=n) for n, t in tables.items()], ignore_index=True),
    )
    rows = [
        _line(model, "all subsets", {**_totals(found), **found["average"]})
        for model, found in results.items()
    ]
    parts = [
        _line(model, subset, counts)
        for model, found in results.items()
        for subset, counts in found["subsets"].items()
    ]
    notes = [f"Reference ranking: {reference.source}."]
    if reference.failures:
        told = ", ".join(f"{n} × {kind}" for kind, n in reference.failures.items())
        notes.append(f"{sum(reference.failures.values())} answers have no grade ({told}).")
    if left := sorted(set(config.eval.baselines) - set(RULES)):
        notes.append(f"Not asked, as they learn from votes: {', '.join(left)}.")
    title = "LaMP-QA: Spearman × 100 [95 % interval over questions]; of models, and within questions"
    write_text(
        folder / "table.txt",
        text_table([*rows, *parts], title, 150) + "".join(f"- {note}\n" for note in notes),
    )
    page = Report(
        title=f"{name} on LaMP-QA", run=facts, stages=rows, notes=notes,
        sections=[
            Section("By subset", "A question that the model did not rank counts as 0.", parts),
            Section("Published figures", LAMPQA_TEXT, published_rankings()),
            Section("Leaderboard row", "Mean of the subsets, with interval and denominator.", [row]),
        ],
    )  # fmt: skip
    write_report(folder / "report.html", page)
    write_markdown(folder / "report.md", page)


def _line(model: str, subset: str, found: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"stage": model, "subset": subset}
    for measure in MEASURES:
        label = measure.replace("_", " ")
        line |= {label: found.get(measure), f"{label} ci95": found.get(f"{measure}_ci95")}
    counts = {
        "questions": "n_questions",
        "unranked": "unranked",
        "tied": "tied",
        "no reference": "no_reference",
    }
    return (
        line | {label: found[key] for label, key in counts.items()} | {"failed samples": found.get("failed")}
    )


def _leaderboard_row(found: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    line = _line(
        f"{facts['model']} (Ind-{facts['ind']})", "all subsets", {**_totals(found), **found["average"]}
    )
    known = {
        "model": line.pop("stage"),
        "data": "lampqa",
        "reference": facts["reference"],
        "history texts": facts["history_size"],
    }
    return known | line | {"answer models": len(found["answer_models"])}


def _totals(found: Mapping[str, Any]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for subset in found["subsets"].values():
        totals.update({key: subset[key] for key in ("n_questions", "unranked", "tied", "no_reference")})
    return {**totals, "failed": sum(found["failures"].values())}
