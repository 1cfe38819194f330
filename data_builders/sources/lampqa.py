"""data=lampqa: LaMP-QA (Salemi & Zamani 2025), questions with a narrative and a rubric, for evaluation only.

The three configurations are the three subsets.  `data.path` names a copy on disk, `data.answers` a file of
several models' answers (columns `id`, `model`, `answer`, and `rubric_score` if the answer was graded).
Rubric and narrative go to a file and a type of their own: see `pgenrm_train.records.questions`.  A profile
item that equals the question is left out and counted.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_builders.checks.card import write_card
from data_builders.sources import hub
from data_builders.sources.pairs import BadRows
from pgenrm_train.config import Config, DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_json
from pgenrm_train.records.ids import id_of, read_id, shown
from pgenrm_train.records.questions import (
    ANSWERS,
    Aspect,
    ProfileItem,
    QuestionSecret,
    UserQuestion,
    answers_of_file,
    write_answers,
    write_questions,
    write_secrets,
)
from pgenrm_train.records.raw_rows import LeftOut, check_texts

HUB = "alireza7/LaMP-QA"
SUBSETS = ("Art_and_Entertainment", "Lifestyle_and_Personal_Development", "Society_and_Culture")


def build(config: Config, folder: Path) -> dict[str, object]:
    """Write questions, secrets, any answers, and a card; returns the facts.

    DataError names file, row and field.
    """
    data, left_out = config.data, LeftOut()
    read = list(rows(data, left_out))
    questions = {question.id: question for question, _ in read}
    answers = list(answers_of_file(Path(data.answers), questions)) if data.answers else []
    write_questions(folder, questions.values())
    write_secrets(folder, (secret for _, secret in read))
    (folder / ANSWERS).unlink(missing_ok=True)
    if answers:
        write_answers(folder, answers)
    for reason, count in (+left_out).most_common():
        print(f"lampqa: left out {count} {reason}", flush=True)
    facts = {
        "questions": len(questions),
        "questions_by_subset": dict(Counter(q.subset for q in questions.values())),
        "without_profile": sum(not q.profile for q in questions.values()),
        "answers": len(answers),
        "answers_by_model": dict(Counter(a.model for a in answers)),
        "graded_answers": sum(a.rubric_score is not None for a in answers),
        "questions_with_answers": len({a.question_id for a in answers}),
        "left_out": dict(+left_out),
    }
    write_json(folder / "card.json", facts)
    left_out.write(folder)
    write_card(config, folder, facts)
    return facts


def rows(data: DataConfig, left_out: LeftOut) -> Iterator[tuple[UserQuestion, QuestionSecret]]:
    """Test questions of all subsets, each with its grading secret."""
    source, bad = data.path or HUB, BadRows(data.on_bad_row, left_out)
    ids: set[str] = set()
    for subset in SUBSETS:
        for where, row in hub.numbered(source, subset, "test"):
            try:
                question, secret = read(row, subset, where, left_out)
                if question.id in ids:
                    raise DataError(
                        f"{where}, field 'id': expected an id of its own, got {question.id[:60]!r} again"
                    )
            except DataError as error:
                bad.take(error)
                continue
            ids.add(question.id)
            yield question, secret
    bad.report(source)
    if not ids:
        raise DataError(f"{source} holds no usable rows; expected at least one question")


def read(row: hub.Row, subset: str, where: str, left_out: LeftOut) -> tuple[UserQuestion, QuestionSecret]:
    """Read one raw row.  DataError names the field and the expectation."""
    check_texts(row, where)
    name, question = id_of(row, "id", where), text(row, "question", where)
    profile = [
        ProfileItem(
            read_id(item.get("id")) or f"{name}/{i}",
            text(item, "text", f"{where}, profile[{i}]"),
            str(item.get("category") or ""),
        )
        for i, item in enumerate(objects(row, "profile", where))
    ]
    others = tuple(item for item in profile if item.id != name and item.text.strip() != question.strip())
    left_out["profile items that are the question itself"] += len(profile) - len(others)
    aspects = tuple(
        Aspect(
            text(a, "aspect", f"{where}, rubric_aspects[{i}]"),
            str(a.get("reason") or ""),
            str(a.get("evidence") or ""),
        )
        for i, a in enumerate(objects(row, "rubric_aspects", where))
    )
    narrative = row.get("narrative")
    return (
        UserQuestion(name, question, others, str(row.get("category") or ""), subset),
        QuestionSecret(name, aspects, narrative if isinstance(narrative, str) else ""),
    )


def text(row: hub.Row, name: str, where: str) -> str:
    """The text of a field.  DataError if it is missing or empty."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}, field '{name}': expected a non-empty text, got {shown(value)}")
    return value


def objects(row: hub.Row, name: str, where: str) -> list[hub.Row]:
    """The objects that a field lists.  DataError for anything else."""
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise DataError(f"{where}, field '{name}': expected a list of objects, got {shown(value)}")
    return value
