"""The question of `recipe=score`: read as votes are, or refused in one sentence that names file and field."""

import json

import pytest

from pgenrm_train.errors import DataError
from pgenrm_train.records.question_file import read_question

QUESTION = {
    "user_id": "ann",
    "query": "Explain my slides?",
    "responses": ["First text.", "Second text."],
    "history": [{"query": "Plan?", "chosen": "Yes.", "rejected": "No."}],
}


def write(folder, **changes):
    path = folder / "question.json"
    path.write_text(json.dumps(QUESTION | changes))
    return path


@pytest.mark.parametrize(("user", "text"), [(7, "7"), (7.0, "7"), (" ann ", "ann"), ("7.0", "7.0")])
def test_the_user_is_that_of_the_votes(tmp_path, user, text):
    assert read_question(write(tmp_path, user_id=user)).user_id == text


def test_a_mark_before_the_text_is_passed_over(tmp_path):
    path = tmp_path / "question.json"
    path.write_text(json.dumps(QUESTION), encoding="utf-8-sig")
    assert read_question(path).query == "Explain my slides?"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"histroy": [1]}, "unknown key 'histroy'; did you mean 'history'?"),
        ({"Criteria": "short"}, "unknown key 'Criteria'; did you mean 'criteria'?"),
        ({"context": []}, "unknown key 'context'; keys are user_id, history, criteria, query, responses"),
        ({"user_id": True}, "field 'user_id': expected a text or a number"),
        ({"user_id": None}, "field 'user_id': expected a text or a number"),
        ({"query": "cut \ud83d"}, "field 'query': expected text that UTF-8 can hold"),
        ({"query": [{"role": "user", "content": "u"}]}, "field 'query': expected a text"),
        ({"responses": [{"role": "assistant", "content": "a"}] * 2}, "field 'responses': expected a list of"),
        ({"responses": ["alone"]}, "field 'responses': expected a list of at least two texts"),
        ({"history": [{"query": "q"}]}, r"field 'history\[0\].chosen': expected a text"),
    ],
)
def test_a_mistake_is_named(tmp_path, changes, sentence):
    with pytest.raises(DataError, match=rf"question\.json.*{sentence}"):
        read_question(write(tmp_path, **changes))


def test_a_key_twice_is_refused(tmp_path):
    path = tmp_path / "question.json"
    path.write_text('{"user_id": "a", "query": "q", "query": "z", "responses": ["a", "b"]}')
    with pytest.raises(DataError, match=r"is not JSON .*the key 'query' twice"):
        read_question(path)


def test_any_number_of_any_texts_is_scored(tmp_path):
    texts = ["same", "same", "", "nul \0 \u202e", *map(str, range(8))]
    question = read_question(write(tmp_path, responses=texts, history=None, query="\0"))
    assert question.responses == tuple(texts) and question.history == () and question.query == "\0"


def test_a_list_and_an_empty_file_are_no_question(tmp_path):
    path = tmp_path / "question.json"
    path.write_text(json.dumps([QUESTION, QUESTION]))
    with pytest.raises(DataError, match="expected one JSON object, got list"):
        read_question(path)
    path.write_text("")
    with pytest.raises(DataError, match="is not JSON"):
        read_question(path)


def test_a_folder_or_other_bytes_in_place_of_the_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        read_question(tmp_path)
    (tmp_path / "question.json").write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(DataError, match="is not JSON"):
        read_question(tmp_path / "question.json")
