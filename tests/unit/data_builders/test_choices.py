"""Benchmarks of choices are built from their published schemas, and their secrets reach no prompt."""

import random

import pytest
from benchmark_files import SECRETS, rewardbench, rewardbench_row, rmgap, rmgap_row

from data_builders.sources import choices
from eval.benchmarks.choices import choices_of, tasks_of
from pgenrm_train.config import PROMPTS, Config, DataConfig, load
from pgenrm_train.config.data import MASKINGS
from pgenrm_train.errors import ConfigError, DataError
from pgenrm_train.prompts.masking import apply_masking
from pgenrm_train.prompts.styles import styled_messages
from pgenrm_train.records.pairs import Example
from pgenrm_train.records.questions import read_answers, read_questions, read_secrets
from recipes import build_data

MAKE = {
    "personalized_rewardbench": rewardbench,
    "rmgap": lambda folder, rows=None: rmgap(folder / "test.jsonl", rows),
}


def built(tmp_path, name, rows=None, **data):
    path = MAKE[name](tmp_path / "raw", rows)
    folder = tmp_path / "build_data"
    return folder, choices.build(Config(data=DataConfig(name=name, path=str(path), **data)), folder)


def test_personalized_rewardbench(tmp_path):
    folder, facts = built(tmp_path, "personalized_rewardbench")
    questions, answers = read_questions(folder), read_answers(folder)
    assert facts["questions"] == len(questions) == 9 and len(questions[0].profile) == 4
    assert [(a.model, a.rubric_score) for a in answers[:2]] == [("chosen", 1.0), ("rejected", 0.0)]
    assert read_secrets(folder)[0].narrative == "zebranarrative"
    assert "Apache 2.0" in (folder / "README.md").read_text()


def test_rmgap(tmp_path):
    folder, facts = built(tmp_path, "rmgap")
    questions = read_questions(folder)
    assert (facts["questions"], facts["instances"], facts["answers"]) == (36, 3, 144)
    assert (questions[3].group, questions[3].instance, questions[3].subset) == ("g0/1", "g0", "Chat")
    preferred = {a.question_id: a.model for a in read_answers(folder) if a.rubric_score}
    assert preferred["g0/0/0"] == "A" and preferred["g2/3/2"] == "D"
    assert "MIT" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("policy", MASKINGS)
def test_no_policy_and_no_style_shows_a_secret(tmp_path, name, policy):
    folder, _ = built(tmp_path, name)
    for file in folder.iterdir():
        held = [word for word in SECRETS if word.encode() in file.read_bytes()]
        assert not held or file.name == "secrets.parquet", file.name
    every = choices_of(read_questions(folder), read_answers(folder))
    for task in tasks_of(every, history_size=3, seeds=1, seed=0):
        example = Example("p", "u", task.view.context, task.view.responses, 0, task.view.history)
        view, _ = apply_masking(example, policy, random.Random(0), show_probability=1.0)
        for style in PROMPTS:
            text = str(styled_messages(style, view))
            assert task.question.question in text and not any(word in text for word in SECRETS)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("personalized_rewardbench", {"chosen": None}, "row 1, field 'chosen': expected a non-empty text"),
        ("personalized_rewardbench", {"profile": "none"}, "field 'profile': expected a list of objects"),
        ("personalized_rewardbench", {"id": "q1"}, "row 2, field 'id': expected an id of its own, got 'q1'"),
        ("rmgap", {"responses": []}, "row 1: expected 4 responses with keys of their own"),
        ("rmgap", {"prompt_groups": [{"winner": "E", "prompts": []}] * 4}, "'winner': expected one of A, B"),
        ("rmgap", {"prompt_groups": [{"winner": "A", "prompts": ["x"]}] * 4}, "expected 3 prompts"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_skipped(tmp_path, name, change, said):
    row = rewardbench_row if name == "personalized_rewardbench" else rmgap_row
    rows = [row(0, **change), row(1)]
    with pytest.raises(DataError, match=said):
        built(tmp_path, name, rows)
    _, facts = built(tmp_path, name, rows, on_bad_row="skip")
    assert facts["left_out"] == {"rows that do not fit": 1} | (
        {} if name == "rmgap" else {k: v for k, v in facts["left_out"].items() if "profile" in k}
    )


def test_a_cut_file_is_named(tmp_path):
    path = rmgap(tmp_path / "test.jsonl")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataError, match=r"test\.jsonl, row 3: .*a line that is not JSON"):
        list(choices.rows(DataConfig(name="rmgap", path=str(path)), choices.LeftOut()))


def test_settings_that_would_show_a_rubric_or_train_are_refused(tmp_path):
    data = ("data=personalized_rewardbench", f"run_dir={tmp_path / 'run'}")
    for key in ("eval.masking=full", "masking=mixed"):
        with pytest.raises(ConfigError, match="withholds its rubrics from every prompt"):
            load("recipe=evaluate", *data, key)
    with pytest.raises(ConfigError, match=r"model\.prompt=persona is written from votes"):
        load("recipe=evaluate", *data, "model=endpoint", "model.base_url=http://x/v1", "model.prompt=persona")
    with pytest.raises(ConfigError, match="is for evaluation only; recipe=psi"):
        build_data.run(load("recipe=psi", *data))
