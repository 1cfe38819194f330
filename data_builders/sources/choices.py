"""Benchmarks of questions with one preferred response, for evaluation only.

    personalized_rewardbench   Personalized RewardBench (Ma et al. 2026, arXiv 2604.07343): LaMP-QA's
                               questions, profiles and rubrics, with a response that follows the rubric and
                               one that does not.  From the hub, or `data.path=FOLDER` with its three subsets
    rmgap                      RMGAP (Zhou & Li 2026, arXiv 2605.01831): four responses, and for each of them
                               three prompts that ask for it in other words.  `data.path=test.jsonl`

Rubric and narrative go to `secrets.parquet`, of which no prompt can be written (`pgenrm_train.records.
questions`).  RMGAP's styles are not read: they describe the answers.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_builders.checks.card import write_card
from data_builders.sources import hub, lampqa
from data_builders.sources.pairs import BadRows
from pgenrm_train.config import Config, DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_json
from pgenrm_train.records.ids import id_of
from pgenrm_train.records.questions import (
    Answer,
    QuestionSecret,
    UserQuestion,
    write_answers,
    write_questions,
    write_secrets,
)
from pgenrm_train.records.raw_rows import LeftOut, check_texts

HUB = "QiyaoMa/Personalized-RewardBench"
CHOSEN, REJECTED = "chosen", "rejected"
RESPONSES = GROUPS = 4  # per row of RMGAP
PROMPTS = 3  # of a group of RMGAP

Built = tuple[list[UserQuestion], list[Answer], QuestionSecret | None]


def build(config: Config, folder: Path) -> dict[str, object]:
    """Write questions, secrets, answers and a card; returns the facts.  DataError names file, row, field."""
    left_out = LeftOut()
    questions: dict[str, UserQuestion] = {}
    answers: list[Answer] = []
    secrets: list[QuestionSecret] = []
    for of_row, answers_of_row, secret in rows(config.data, left_out):
        questions |= {question.id: question for question in of_row}
        answers += answers_of_row
        secrets += [secret] if secret else []
    write_questions(folder, questions.values())
    write_secrets(folder, secrets)
    write_answers(folder, answers)
    for reason, count in (+left_out).most_common():
        print(f"{config.data.name}: left out {count} {reason}", flush=True)
    facts: dict[str, object] = {
        "questions": len(questions),
        "questions_by_subset": dict(Counter(q.subset for q in questions.values())),
        "instances": len({q.instance or q.id for q in questions.values()}),
        "without_profile": sum(not q.profile for q in questions.values()),
        "answers": len(answers),
        "left_out": dict(+left_out),
    }
    write_json(folder / "card.json", facts)
    left_out.write(folder)
    write_card(config, folder, facts)
    return facts


def rows(data: DataConfig, left_out: LeftOut) -> Iterator[Built]:
    """The questions of each raw row, with their answers: grade 1 for the preferred one, 0 for the others."""
    source, bad, ids = data.path or HUB, BadRows(data.on_bad_row, left_out), set[str]()
    for where, row, subset in _raw(data.name, source):
        try:
            check_texts(row, where)
            built = _rmgap(row, where) if data.name == "rmgap" else _rewardbench(row, subset, where, left_out)
            if (name := built[0][0].instance or built[0][0].id) in ids:
                raise DataError(f"{where}, field 'id': expected an id of its own, got {name[:60]!r} again")
        except DataError as error:
            bad.take(error)
            continue
        ids.add(name)
        yield built
    bad.report(source)
    if not ids:
        raise DataError(f"{source} holds no usable rows; expected at least one question")


def _raw(name: str, source: str) -> Iterator[tuple[str, hub.Row, str]]:
    if name == "rmgap" or Path(source).is_file():
        yield from ((where, row, Path(source).stem) for where, row in hub.numbered(source, split="test"))
        return
    for subset in lampqa.SUBSETS:
        yield from ((where, row, subset) for where, row in hub.numbered(source, subset, "test"))


def _rewardbench(row: hub.Row, subset: str, where: str, left_out: LeftOut) -> Built:
    question, secret = lampqa.read(row, subset, where, left_out)
    grades = ((CHOSEN, 1.0), (REJECTED, 0.0))
    answers = [Answer(question.id, name, lampqa.text(row, name, where), grade) for name, grade in grades]
    return [question], answers, secret


def _rmgap(row: hub.Row, where: str) -> Built:
    name, domain = id_of(row, "id", where), lampqa.text(row, "domain", where)
    responses = {
        lampqa.text(item, "key", f"{where}, responses[{i}]"): lampqa.text(
            item, "text", f"{where}, responses[{i}]"
        )
        for i, item in enumerate(lampqa.objects(row, "responses", where))
    }
    groups = lampqa.objects(row, "prompt_groups", where)
    if len(responses) != RESPONSES or len(groups) != GROUPS:
        raise DataError(
            f"{where}: expected {RESPONSES} responses with keys of their own and {GROUPS} prompt_groups, got "
            f"{len(responses)} and {len(groups)}"
        )
    questions, answers = [], []
    for number, group in enumerate(groups):
        place = f"{where}, prompt_groups[{number}]"
        winner, prompts = lampqa.text(group, "winner", place), group.get("prompts")
        if winner not in responses:
            raise DataError(
                f"{place}, field 'winner': expected one of {', '.join(responses)}, got {winner[:60]!r}"
            )
        if not isinstance(prompts, list) or len(prompts) != PROMPTS:
            raise DataError(
                f"{place}, field 'prompts': expected {PROMPTS} prompts, got {str(prompts)[:60]!r}"
            )
        for i, prompt in enumerate(prompts):
            asked = prompt if isinstance(prompt, dict) else {"text": prompt}
            question = UserQuestion(
                f"{name}/{number}/{i}", lampqa.text(asked, "text", f"{place}, prompts[{i}]"), (), "", domain
            )
            questions.append(replace(question, group=f"{name}/{number}", instance=name))
            answers += [
                Answer(question.id, key, text, float(key == winner)) for key, text in responses.items()
            ]
    return questions, answers, None
