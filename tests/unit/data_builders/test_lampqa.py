"""LaMP-QA: three subsets become questions, and their grading secrets reach no prompt of a reward model."""

import dataclasses
import json
import typing
from collections import Counter

import pytest

from data_builders.sources import lampqa
from pgenrm_train.config import Config, DataConfig, load
from pgenrm_train.errors import ArtifactError, ConfigError, DataError
from pgenrm_train.prompts import masking
from pgenrm_train.prompts import messages as prompts
from pgenrm_train.prompts.masking import FullView, MaskedView, apply_masking
from pgenrm_train.prompts.messages import chat_messages
from pgenrm_train.records import pairs as records
from pgenrm_train.records import questions
from pgenrm_train.records.pairs import HistoryItem, Message
from pgenrm_train.records.questions import (
    Answer,
    ProfileItem,
    QuestionSecret,
    UserQuestion,
    read_answers,
    read_questions,
    read_secrets,
)
from pgenrm_train.records.raw_rows import LeftOut
from recipes import build_data


def row(number, **change):
    return {
        "id": f"q{number}",
        "question": f"How do I do {number}?",
        "category": "music",
        "narrative": f"NARRATIVE {number}",
        "rubric_aspects": [
            {"aspect": f"ASPECT {number}", "reason": f"REASON {number}", "evidence": f"EVIDENCE {number}"}
        ],
        "profile": [
            {"id": f"old{number}", "text": f"I once asked {number}", "category": "music"},
            {"id": f"q{number}", "text": "the question's own post", "category": "music"},
        ],
    } | change


def write(folder, rows=None):
    """Layout of the hub: one folder per configuration, one file per split; only `test` is used."""
    for n, subset in enumerate(lampqa.SUBSETS):
        (folder / subset).mkdir(parents=True, exist_ok=True)
        of_subset = rows if rows is not None and n == 0 else [row(10 * n), row(10 * n + 1)]
        (folder / subset / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in of_subset))
        (folder / subset / "train.jsonl").write_text(json.dumps(row(1000 + n)) + "\n")
    return folder


def build(tmp_path, answers=None, rows=None, **data):
    if answers is not None:
        (tmp_path / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
        data["answers"] = str(tmp_path / "answers.jsonl")
    config = Config(data=DataConfig(name="lampqa", path=str(write(tmp_path / "raw", rows)), **data))
    folder = tmp_path / "build_data"
    return folder, lampqa.build(config, folder)


ANSWERS = [
    {"id": f"q{n}", "model": m, "answer": f"{m} on {n}", "rubric_score": s}
    for n in (0, 10)
    for m, s in (("a", 0.5), ("b", None))
]


def test_the_test_questions_of_three_subsets_are_built(tmp_path, capsys):
    folder, facts = build(tmp_path, ANSWERS)
    found = read_questions(folder)
    assert [q.id for q in found] == ["q0", "q1", "q10", "q11", "q20", "q21"] and facts["questions"] == 6
    assert Counter(q.subset for q in found) == dict.fromkeys(lampqa.SUBSETS, 2)
    assert found[0] == UserQuestion(
        "q0", "How do I do 0?", (ProfileItem("old0", "I once asked 0", "music"),), "music", lampqa.SUBSETS[0]
    )
    assert "left out 6 profile items that are the question itself" in capsys.readouterr().out
    assert read_secrets(folder)[1].rubric_aspects[0].evidence == "EVIDENCE 1"
    assert read_answers(folder) == [
        Answer(a["id"], a["model"], a["answer"], a["rubric_score"]) for a in ANSWERS
    ]
    assert facts["answers_by_model"] == {"a": 2, "b": 2} and facts["graded_answers"] == 2
    assert "| answers by model: a | 2 |" in (folder / "README.md").read_text()


def test_without_answers_there_is_no_file_of_them_and_the_error_names_the_key(tmp_path):
    build(tmp_path, ANSWERS)
    folder, facts = build(tmp_path)
    assert facts["answers"] == 0 and not (folder / "answers.parquet").exists(), (
        "an earlier build's answers do not stay"
    )
    with pytest.raises(ArtifactError, match=r"data\.answers=FILE"):
        read_answers(folder)
    with pytest.raises(ArtifactError, match="recipe=build_data with the same data="):
        read_questions(tmp_path)


def test_rubric_and_narrative_stand_in_their_own_file_only(tmp_path):
    folder, _ = build(tmp_path, ANSWERS)
    for file in folder.iterdir():
        found = [
            word for word in (b"NARRATIVE", b"ASPECT", b"REASON", b"EVIDENCE") if word in file.read_bytes()
        ]
        assert bool(found) == (file.name == "secrets.parquet"), file.name


def members(kind) -> set[type]:
    """All types that a record can hold, recursively."""
    found: set[type] = set()
    waiting = [kind]
    while waiting:
        now = waiting.pop()
        waiting += typing.get_args(now)
        if dataclasses.is_dataclass(now) and now not in found:
            found.add(now)
            waiting += typing.get_type_hints(now).values()
    return found


def test_no_record_that_a_prompt_is_written_from_can_hold_a_secret():
    secret = {QuestionSecret, questions.Aspect}
    for kind in (
        UserQuestion,
        Answer,
        MaskedView,
        FullView,
        records.Example,
        records.PreferencePair,
        masking.Supervision,
    ):
        assert not members(kind) & secret, kind
    assert members(QuestionSecret) == secret
    view = typing.get_type_hints(prompts.chat_messages)["view"]
    assert set(typing.get_args(view)) == {MaskedView, FullView}
    assert typing.get_type_hints(apply_masking)["example"] is records.Example


def test_a_secret_in_place_of_a_view_is_no_prompt(tmp_path):
    folder, _ = build(tmp_path, ANSWERS)
    with pytest.raises(AttributeError):
        chat_messages(read_secrets(folder)[0])
    question = read_questions(folder)[0]
    history = tuple(HistoryItem(item.text, "", "") for item in question.profile)
    shown = tuple(a.text for a in read_answers(folder) if a.question_id == question.id)
    text = str(chat_messages(MaskedView((Message("user", question.question),), history, shown)))
    assert "I once asked 0" in text and "a on 0" in text
    assert not [word for word in ("NARRATIVE", "ASPECT", "REASON", "EVIDENCE") if word in text]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": None}, r"test\.jsonl, row 1, field 'id': expected a text or a number"),
        ({"question": " "}, "row 1, field 'question': expected a non-empty text"),
        ({"profile": None}, "row 1, field 'profile': expected a list of objects"),
        ({"profile": [{"id": "x"}]}, r"row 1, profile\[0\], field 'text'"),
        ({"rubric_aspects": ["short"]}, "row 1, field 'rubric_aspects': expected a list of objects"),
        ({"rubric_aspects": [{"reason": "x"}]}, r"rubric_aspects\[0\], field 'aspect'"),
        ({"question": "cut \ud83d"}, "row 1, field 'question': expected text that UTF-8 can hold"),
        ({"id": "q1"}, "row 2, field 'id': expected an id of its own, got 'q1' again"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, change, said):
    rows = [row(0, **change), row(1)]
    with pytest.raises(DataError, match=said):
        build(tmp_path, rows=rows)
    assert build(tmp_path, rows=rows, on_bad_row="skip")[1]["questions"] == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "q999"}, r"answers\.jsonl, row 4, field 'id': expected the id of a question, got 'q999'"),
        ({"answer": None}, "row 4, field 'answer': expected a non-empty text"),
        ({"model": 3}, "row 4, field 'model'"),
        ({"rubric_score": "good"}, "row 4, field 'rubric_score': expected a finite number or null"),
        (
            {"model": "a"},
            "row 4: expected one answer per model and question, got a second one of 'a' to 'q10'",
        ),
    ],
)
def test_a_bad_answer_is_named(tmp_path, change, said):
    with pytest.raises(DataError, match=said):
        build(tmp_path, [*ANSWERS[:3], ANSWERS[3] | change])


def test_missing_parts_are_refused(tmp_path):
    write(tmp_path / "raw")
    for file in (tmp_path / "raw" / lampqa.SUBSETS[2]).iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"holds no Society_and_Culture\*\.parquet"):
        list(lampqa.rows(DataConfig(name="lampqa", path=str(tmp_path / "raw")), LeftOut()))


@pytest.mark.parametrize("recipe", ["psi", "pipeline", "cre", "prototypes", "build_sec"])
def test_no_stage_trains_on_it(tmp_path, recipe):
    with pytest.raises(ConfigError, match=f"data=lampqa is for evaluation only; recipe={recipe}"):
        build_data.run(load(f"recipe={recipe}", "data=lampqa", f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
