"""Records of evaluation sets of questions (LaMP-QA, METHOD §10, and others): users' questions and answers.

A judge of answers may read the rubric and the user's narrative; a reward model may not.  Both have a type and
a file of their own.  Neither `UserQuestion` nor `Answer` has a field for them, nor has
`prompts.masking.MaskedView`, from which prompts are written.

    build_data/questions.parquet   UserQuestion
    build_data/secrets.parquet     QuestionSecret
    build_data/answers.parquet     Answer; absent before the first answers
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import write_table
from pgenrm_train.records.ids import id_of
from pgenrm_train.records.raw_rows import read_rows

QUESTIONS, SECRETS, ANSWERS = "questions.parquet", "secrets.parquet", "answers.parquet"


@dataclass(frozen=True, slots=True)
class ProfileItem:
    """One earlier text of the asking user."""

    id: str
    text: str
    category: str = ""


@dataclass(frozen=True, slots=True)
class UserQuestion:
    """A user's question and their earlier texts (`profile`, in the order of the source).

    `subset` is the part of the data set.  Questions of one `group` ask the same in other words, and those of
    one `instance` are about the same responses; empty where a question is alone.
    """

    id: str
    question: str
    profile: tuple[ProfileItem, ...]
    category: str
    subset: str
    group: str = ""
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Aspect:
    """One thing that the user wants an answer to cover."""

    aspect: str
    reason: str
    evidence: str


@dataclass(frozen=True, slots=True)
class QuestionSecret:
    """The rubric of a question, for judges and reference rankings; no prompt of a reward model holds it."""

    question_id: str
    rubric_aspects: tuple[Aspect, ...]
    narrative: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's answer; `rubric_score` is its grade by the rubric, if it has one."""

    question_id: str
    model: str
    text: str
    rubric_score: float | None = None


def write_questions(folder: Path, questions: Iterable[UserQuestion]) -> None:
    """Write `questions.parquet`, atomically."""
    texts = ("id", "question", "category", "subset", "group", "instance")
    _write(folder / QUESTIONS, questions, texts, profile=("id", "text", "category"))


def write_secrets(folder: Path, secrets: Iterable[QuestionSecret]) -> None:
    """Write `secrets.parquet`, atomically."""
    aspect = ("aspect", "reason", "evidence")
    _write(folder / SECRETS, secrets, ("question_id", "narrative"), rubric_aspects=aspect)


def write_answers(folder: Path, answers: Iterable[Answer]) -> None:
    """Write `answers.parquet`, atomically."""
    _write(folder / ANSWERS, answers, ("question_id", "model", "text"), numbers=("rubric_score",))


def read_questions(folder: Path) -> list[UserQuestion]:
    """Read the questions of a `build_data` folder.  Raises ArtifactError if they are missing."""
    return [
        UserQuestion(
            r["id"],
            r["question"],
            tuple(ProfileItem(**item) for item in r["profile"]),
            r["category"],
            r["subset"],
            r.get("group", ""),
            r.get("instance", ""),
        )
        for r in _rows(folder / QUESTIONS)
    ]


def read_secrets(folder: Path) -> list[QuestionSecret]:
    """Read rubrics and narratives, in the order of the questions."""
    return [
        QuestionSecret(r["question_id"], tuple(Aspect(**a) for a in r["rubric_aspects"]), r["narrative"])
        for r in _rows(folder / SECRETS)
    ]


def read_answers(folder: Path) -> list[Answer]:
    """Read the answers.  Raises ArtifactError if the set was built without any."""
    if not (folder / ANSWERS).exists():
        raise ArtifactError(f"{folder / ANSWERS} does not exist; build the data with data.answers=FILE")
    return [Answer(**row) for row in _rows(folder / ANSWERS)]


def answers_of_file(path: Path, questions: Mapping[str, UserQuestion]) -> Iterator[Answer]:
    """Read a user's parquet or JSONL of answers.

    Columns are `id` (of the question), `model`, `answer`, and `rubric_score` if graded.  Raises DataError
    with file, row, field and expectation, also for a question that is not among `questions`, and for a
    model's second answer to one.
    """
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(read_rows(path), start=1):
        answer = _answer(row, f"{path}, row {number}")
        if answer.question_id not in questions:
            raise DataError(
                f"{path}, row {number}, field 'id': expected the id of a question, got "
                f"{answer.question_id[:60]!r}"
            )
        if (answer.question_id, answer.model) in seen:
            raise DataError(
                f"{path}, row {number}: expected one answer per model and question, got a second one of "
                f"{answer.model[:60]!r} to {answer.question_id[:60]!r}"
            )
        seen.add((answer.question_id, answer.model))
        yield answer
    if not seen:
        raise DataError(f"{path} holds no rows; expected at least one answer")


def _answer(row: Mapping[str, object], where: str) -> Answer:
    texts = [id_of(row, "id", where)]
    for name in ("model", "answer"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}, field '{name}': expected a non-empty text, got {str(value)[:60]!r}")
        texts.append(value)
    score = row.get("rubric_score")
    if isinstance(score, float) and math.isnan(score):  # pandas writes it for null
        score = None
    if score is not None and (
        isinstance(score, bool) or not isinstance(score, int | float | Decimal) or not math.isfinite(score)
    ):
        raise DataError(
            f"{where}, field 'rubric_score': expected a finite number or null, got {str(score)[:60]!r}"
        )
    question, model, text = texts
    return Answer(question, model, text, None if score is None else float(score))


def _rows(path: Path) -> Iterator[Any]:
    """Rows of a file that this module wrote."""
    if not path.exists():
        raise ArtifactError(
            f"{path} does not exist; run recipe=build_data with the same data= and run_dir first"
        )
    return read_rows(path)


def _write(
    path: Path,
    records: Iterable[Any],
    texts: Iterable[str],
    *,
    numbers: Iterable[str] = (),
    **lists: Iterable[str],
) -> None:
    """Write columns of texts, of numbers and of lists of records, whose members are texts."""
    import pyarrow as pa

    texts_of = {name: [(member, pa.string()) for member in members] for name, members in lists.items()}
    schema = pa.schema(
        [
            *((name, pa.string()) for name in texts),
            *((name, pa.float64()) for name in numbers),
            *((name, pa.list_(pa.struct(members))) for name, members in texts_of.items()),
        ]
    )
    write_table(path, pa.Table.from_pylist([asdict(record) for record in records], schema=schema))
