"""PRISM becomes pairs: ratings far enough apart, the user's statements, nothing that reveals the label."""

import copy
import json
from collections import Counter

import pytest
from prism_world import CONVERSATION, SURVEY, model, user

from data_builders.sources import hub
from data_builders.sources.pairs import build as build_personalised
from data_builders.sources.prism import build
from pgenrm_train.config import Config, DataConfig, load
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_table
from pgenrm_train.prompts.writer import load_pairs
from pgenrm_train.records.raw_rows import LeftOut
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages import build_data


def write(folder, survey=(SURVEY,), conversations=(CONVERSATION,)):
    folder.mkdir(exist_ok=True)
    for name, rows in (("survey", survey), ("conversations", conversations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pairs(folder, **more):
    return list(build(DataConfig(name="prism", path=str(folder), **more), 0, LeftOut()))


def split_pairs(folder, by):
    """The pairs as the stage writes them."""
    data = DataConfig(name="prism", path=str(folder), split_by=by)
    build_data.run(Config(data=data), StageFolder(folder / "build_data", "build_data"), build)
    return load_pairs(folder)


def test_every_two_ratings_far_enough_apart_are_a_pair(tmp_path):
    left_out = LeftOut()
    found = list(build(DataConfig(name="prism", path=str(write(tmp_path))), 0, left_out))
    assert [(p.chosen, p.rejected, p.chosen_score, p.rejected_score, p.turn) for p in found] == [
        ("A", "B", 90.0, 40.0, 0),
        ("C", "B", 85.0, 40.0, 0),
        ("E", "D", 70.0, 20.0, 1),
    ]
    assert [p.position for p in found] == [0, 1, 1]
    assert +left_out == {"responses without text or rating": 2, "pairs rated less than 10 points apart": 1}
    assert len(pairs(tmp_path, min_rating_gap=5)) == 4 and len(pairs(tmp_path, min_rating_gap=50)) == 2
    assert len({p.pair_id for p in found}) == 3


def test_the_context_is_the_conversation_that_the_user_went_on_with(tmp_path):
    first, *_, last = pairs(write(tmp_path))
    assert [(m.role, m.content) for m in first.context] == [("user", "Hi")]
    assert [(m.role, m.content) for m in last.context] == [
        ("user", "Hi"),
        ("assistant", "A"),
        ("user", "More"),
    ]


def test_a_conversation_without_a_chosen_response_ends_there(tmp_path):
    row = copy.deepcopy(CONVERSATION)
    row["conversation_history"][1]["if_chosen"] = False
    assert {p.turn for p in pairs(write(tmp_path, conversations=[row]))} == {0}


def test_what_the_user_stated_is_typed_and_the_feedback_is_nowhere(tmp_path):
    first = pairs(write(tmp_path))[0]
    assert (
        first.explicit.style == "Be brief."
        and first.explicit.self_description == "A cook."
        and first.explicit.criteria is None
    )
    assert first.explicit.attributes == (("values", 60.0), ("fluency", 90.0), ("factuality", 80.0)), (
        "of this conversation, the survey's for the rest, nulls left out"
    )
    assert "SECRET" not in repr(first)
    without = CONVERSATION | {"choice_attributes": None}
    quiet = SURVEY | {"self_description": "EMPTY STRING", "system_string": None}
    explicit = pairs(write(tmp_path, [quiet], [without]))[0].explicit
    assert explicit.attributes == (("values", 10.0), ("fluency", 90.0)) and explicit.texts() == ()


def world(users=40, conversations=10):
    survey = [SURVEY | {"user_id": f"user{u}"} for u in range(users)]
    names = [(u, c) for u in range(users) for c in range(conversations)]
    talk = CONVERSATION["conversation_history"]
    rows = [
        CONVERSATION
        | {
            "conversation_id": f"c{u}-{c}",
            "user_id": f"user{u}",
            "conversation_history": [user(0, f"Hi, {u} {c}"), *talk[1:]],
        }
        for u, c in names
    ]
    return survey, rows


def test_whole_conversations_are_split_within_each_user(tmp_path):
    write(tmp_path, *world())
    found = split_pairs(tmp_path, "within_user")
    assert Counter(p.split for p in found) == {"train": 40 * 7 * 3, "val": 40 * 3, "test": 40 * 2 * 3}
    assert all(len({p.split for p in found if p.conversation_id == c}) == 1 for c in ("c0-0", "c7-3"))
    assert {p.user_split for p in found} == {"train"}
    assert found == split_pairs(tmp_path, "within_user"), "reproducible"
    write(tmp_path, *world(users=5, conversations=1))
    assert {p.split for p in split_pairs(tmp_path, "within_user")} == {"train"}, (
        "a single conversation is a history"
    )


def test_held_out_users_are_asked_about_conversations_that_are_not_their_history(tmp_path):
    write(tmp_path, *world())
    found = split_pairs(tmp_path, "user_disjoint")
    held_out = {p.user_id: p.user_split for p in found if p.user_split != "train"}
    assert Counter(held_out.values()) == {"test": 4, "val": 2}
    assert all(p.split in ("train", held_out.get(p.user_id, "train")) for p in found)
    asked = {p.conversation_id for p in found if p.split == "test"}
    assert len(asked) == 4 * 5 and not asked & {p.conversation_id for p in found if p.split == "train"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"user_id": None}, r"conversations\.jsonl, row 1, field 'user_id': expected a value"),
        ({"conversation_history": "Hi"}, "row 1, field 'conversation_history': expected a list of messages"),
        (
            {"conversation_history": [user("first", "Hi")]},
            r"conversation_history\[0\]'.turn: expected a number, got 'first'",
        ),
        (
            {"conversation_history": [{"turn": 0, "role": "bot"}]},
            r"row 1, field 'conversation_history\[0\]': expected \{turn, role",
        ),
        (
            {"conversation_history": [user(10**400, "Hi")]},
            r"conversation_history\[0\]'.turn: expected a number",
        ),
        (
            {"conversation_history": [user(0, "Hi \ud83d")]},
            "row 1, field 'conversation_history': expected text that UTF-8",
        ),
        (
            {"conversation_history": [user(0, "Hi"), model(0, "A", "high")]},
            r"conversation_history\[1\]'.score: expected a number",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, said):
    with pytest.raises(DataError, match=said) as error:
        pairs(write(tmp_path, conversations=[CONVERSATION | change]))
    assert "\n" not in str(error.value)


def test_parquet_tables_give_the_same_pairs_as_json_lines(tmp_path):
    """As the hub stores them: structs with nulls, one file per table, and tables that are not read."""
    lines, tables = write(tmp_path / "lines", *world(users=3, conversations=2)), tmp_path / "tables"
    for name in ("survey", "conversations"):
        rows = [json.loads(line) for line in (lines / f"{name}.jsonl").read_text().splitlines()]
        write_table(tables / name / "train-00000-of-00001.parquet", rows)
    (tables / "utterances.jsonl").write_text('{"utterance_id": "ut0"}\n')
    (tables / ".cache").mkdir()
    (tables / ".cache" / "survey.json").write_text("half-written {")
    assert pairs(tables) == pairs(lines) != []


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; expected a file, a folder, or the id"):
        pairs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no survey\*.parquet or survey\*.jsonl"):
        pairs(tmp_path / "empty")
    with pytest.raises(DataError, match="prism survey holds no rows"):
        pairs(write(tmp_path, survey=[]))


def test_a_conversation_of_a_user_without_a_survey_is_counted(tmp_path):
    left_out = LeftOut()
    write(tmp_path, survey=[SURVEY | {"user_id": "other"}])
    assert list(build(DataConfig(name="prism", path=str(tmp_path)), 0, left_out)) == []
    assert left_out == {"conversations whose user is not in the survey": 1}


def test_a_second_survey_answer_is_an_error_and_the_first_stays_where_rows_are_skipped(
    tmp_path,
):
    write(tmp_path, survey=[SURVEY, SURVEY | {"system_string": "Be long."}])
    with pytest.raises(
        DataError,
        match=r"survey\.jsonl, row 2, field 'user_id': expected one row per user, got 'user0' again",
    ):
        pairs(tmp_path)
    assert {p.explicit.style for p in pairs(tmp_path, on_bad_row="skip")} == {"Be brief."}


def test_bad_rows_may_be_skipped_counted_and_listed(tmp_path, capsys):
    left_out = LeftOut()
    bad = [
        CONVERSATION | {"conversation_history": [{"role": "bot"}]},
        CONVERSATION | {"user_id": None},
        CONVERSATION,
    ]
    data = DataConfig(name="prism", path=str(write(tmp_path, conversations=bad)), on_bad_row="skip")
    assert len(list(build(data, 0, left_out))) == 3 and left_out["rows that do not fit"] == 2
    message = capsys.readouterr().out
    assert (
        "conversations.jsonl, row 1, field 'conversation_history[0]'" in message
        and "row 2, field 'user_id'" in message
    )


# ---- PersonalRewardBench ----


def vote(number, split):
    return {
        "conversation_id": f"c{number}",
        "user_id": f"u{number % 3}",
        "context": [{"role": "user", "content": f"q{number}"}],
        "chosen": {"role": "model", "content": "good"},
        "rejected": {"role": "model", "content": "bad"},
        "turns": 1,
        "type": "unguided",
        "split": split,
        "flip": False,
        "chosen_score": 90.0,
        "rejected_score": 10.0,
        "judge_llama_verdict": "LEAK",
        "judge_llama_score": 1,
    }


def test_all_files_of_a_copy_are_read_by_their_split_column_and_judges_are_ignored(tmp_path):
    for name, split in (("train-0", "train"), ("validation-0", "val"), ("test-0", "test")):
        rows = [vote(n, split) for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = load("recipe=build_data", "data=chatbot_arena", f"data.path={tmp_path}")
    found = list(build_personalised(config.data, 0, LeftOut()))
    assert Counter(p.split for p in found) == {"train": 4, "val": 4, "test": 4}
    assert "LEAK" not in repr(found) and found[0].chosen_score == 90.0
    (tmp_path / "test-0.jsonl").write_text(json.dumps(vote(0, "dev")) + "\n")
    with pytest.raises(DataError, match="field 'split': expected train, val or test"):
        list(build_personalised(config.data, 0, LeftOut()))


def test_the_hub_s_own_loader_reads_a_data_set(tmp_path):
    """`load_dataset` on a local repository: the path that a hub id takes."""
    (tmp_path / "train.jsonl").write_text(json.dumps(vote(0, "train")) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(vote(1, "test")) + "\n")
    assert [
        (name[-5:], [row["split"] for row in rows]) for name, rows in hub._from_hub(str(tmp_path), None)
    ] == [("train", ["train"]), ("/test", ["test"])]
    assert [row["split"] for _, rows in hub._from_hub(str(tmp_path), None, "test") for row in rows] == [
        "test"
    ]
