"""Pairs survive their rows; an error on a bad file names file, row, field and expectation in one sentence."""

import json
import tempfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgenrm_train.errors import DataError
from pgenrm_train.files import write_table
from pgenrm_train.records import shards
from pgenrm_train.records.ids import read_id
from pgenrm_train.records.pairs import ExplicitSignals, Message, PreferencePair
from pgenrm_train.records.rows import (
    pair_schema,
    pair_tables,
    pair_to_row,
    read_built,
    read_pairs,
    row_to_pair,
)


def a_pair(number: int = 0, **changes) -> PreferencePair:
    explicit = ExplicitSignals(
        "short please", "a nurse", "kind", (("fluency", 80.0), ("wit", 0.5)), synthetic=True
    )
    given = {
        "pair_id": f"p{number}",
        "user_id": "u",
        "context": (
            Message("system", "be nice"),
            Message("user", "hi"),
            Message("assistant", "hello"),
            Message("user", "tell me"),
        ),
        "chosen": "good ünïcode 漢",
        "rejected": "bad\n\nlines",
        "conversation_id": "c",
        "chosen_score": 7.5,
        "rejected_score": None,
        "turn": 2,
        "kind": "hard",
        "scenario": "work",
        "split": "val",
        "user_split": "test",
        "cohort": "seen_persona",
        "explicit": explicit,
    }
    return PreferencePair(**(given | changes))


def a_row(**changes) -> dict:
    """A raw row in the form of the published data sets."""
    row = {
        "user_id": "u1",
        "context": [{"role": "user", "content": "hi"}],
        "chosen": {"role": "model", "content": "good"},
        "rejected": {"role": "model", "content": "bad"},
    }
    return row | changes


def write_jsonl(folder: Path, *rows) -> Path:
    path = folder / "votes.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def problem(path: Path) -> str:
    """The one-sentence error of reading a file."""
    with pytest.raises(DataError) as error:
        list(read_pairs(path))
    sentence = str(error.value)
    assert "\n" not in sentence and str(path) in sentence
    return sentence


def test_parquet_round_trip(tmp_path):
    pairs = [
        a_pair(0),
        a_pair(1, explicit=ExplicitSignals(), chosen_score=None, kind=None, cohort=None),
        a_pair(2, split="train"),
    ]
    write_table(tmp_path / "pairs.parquet", [pair_to_row(p) for p in pairs])
    assert list(read_pairs(tmp_path / "pairs.parquet")) == pairs


def test_a_built_table_is_read_the_same_with_and_without_checks(tmp_path):
    pairs = [
        a_pair(1),
        replace(a_pair(2), others=(3, 1), time=5.5, position=1, kind="hard", cohort="c", chosen_score=2.0),
        replace(
            a_pair(3),
            context=(Message("user", "a"), Message("assistant", "b"), Message("user", "c")),
            explicit=ExplicitSignals("be brief", "a cook", "plain", (("warm", 80.0), ("dry", 0.5)), True),
        ),
    ]
    with shards.ShardWriter(tmp_path / "pairs.parquet", pair_schema()) as writer:
        for table in pair_tables(pairs):
            writer.table(table)
    assert (
        list(read_built(tmp_path / "pairs.parquet")) == list(read_pairs(tmp_path / "pairs.parquet")) == pairs
    )


def test_jsonl_round_trip_passes_over_blank_lines(tmp_path):
    pairs = [a_pair(0), a_pair(1)]
    path = write_jsonl(tmp_path, pair_to_row(pairs[0]), "", pair_to_row(pairs[1]))
    assert list(read_pairs(str(path))) == pairs


@pytest.mark.parametrize(
    ("given", "time"),
    [
        ({"time": 12.5}, 12.5),
        ({"timestamp": "1970-01-02"}, 86400.0),
        ({"timestamp": "1970-01-01T01:00:00+01:00"}, 0.0),
        ({"timestamp": ""}, None),
        ({"time": float("nan")}, None),
        ({}, None),
    ],
)
def test_times_are_read_in_seconds_or_iso_8601(tmp_path, given, time):
    (pair,) = read_pairs(write_jsonl(tmp_path, a_row(**given)))
    assert pair.time == time


def test_a_parquet_timestamp_is_a_time(tmp_path):
    write_table(tmp_path / "votes.parquet", [a_row(timestamp=datetime(1970, 1, 1, 0, 1))])
    assert next(read_pairs(tmp_path / "votes.parquet")).time == 60.0


def test_a_bad_time_is_an_error(tmp_path):
    assert "row 1, field 'timestamp': expected seconds since 1970" in problem(
        write_jsonl(tmp_path, a_row(timestamp="yesterday"))
    )


@pytest.mark.parametrize("text", ["1710121412", "1710121412345", "20240102123456"])
def test_a_number_as_text_is_no_date_of_another_century(tmp_path, text):
    """ISO 8601 as Python reads it takes the second for the evening of 14 December 1710."""
    path = write_jsonl(tmp_path, a_row(time=text))
    assert f"row 1, field 'time': expected seconds since 1970 or a date in ISO 8601, got '{text}'" in problem(
        path
    )
    [pair] = read_pairs(write_jsonl(tmp_path, a_row(time="20240102")))
    assert pair.time == 1_704_153_600


@pytest.mark.parametrize("name", ["votes.parquet", "votes.jsonl", "votes.arrow"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert f"{name} is a pointer of Git LFS" in problem(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "position"),
    [
        ({"position": 1}, 1),
        ({"position": 0.0}, 0),
        ({"position_of_chosen": "right"}, 1),
        ({"position_of_chosen": "A1"}, 0),
        ({"position_of_chosen": "somewhere"}, None),
        ({"position": -1}, None),
        ({"position": True}, None),
        ({}, None),
    ],
)
def test_where_the_chosen_response_was_shown(tmp_path, given, position):
    (pair,) = read_pairs(write_jsonl(tmp_path, a_row(**given)))
    assert pair.position == position


def test_a_json_array_is_read_or_refused(tmp_path):
    path = tmp_path / "votes.json"
    path.write_text(json.dumps([a_row(), a_row(user_id="u2")], indent=1))
    assert [p.user_id for p in read_pairs(path)] == ["u1", "u2"]
    path.write_text(json.dumps([a_row(), 3]))
    assert "row 2: expected a JSON object, got int" in problem(path)
    path.write_text(json.dumps([a_row()])[:-9])
    assert "expected a JSON array of objects" in problem(path)
    path.write_text(json.dumps(a_row()) + "\n" + json.dumps(a_row()))
    assert len(list(read_pairs(path))) == 2, "one row per line under this name"


def test_pretty_printed_json_is_read_as_an_array_and_refused_as_an_object(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps([a_row()], indent=2))
    assert [p.user_id for p in read_pairs(path)] == ["u1"], "an array under this name, too"
    path.write_text(json.dumps([a_row()]), encoding="utf-8-sig")
    assert len(list(read_pairs(path))) == 1
    path.write_text(json.dumps(a_row()), encoding="utf-8-sig")
    assert len(list(read_pairs(path))) == 1
    path.write_text(json.dumps(a_row(), indent=2))
    assert (
        "row 1: expected one JSON object per line, or one array of them, got an object on several lines"
        in problem(path)
    )


def test_more_rows_than_one_batch_of_parquet(tmp_path):
    write_table(tmp_path / "pairs.parquet", [pair_to_row(a_pair(i)) for i in range(1500)])
    assert [p.pair_id for p in read_pairs(tmp_path / "pairs.parquet")] == [f"p{i}" for i in range(1500)]


def test_the_least_row_and_the_names_of_the_published_sets(tmp_path):
    row = a_row(
        context=[
            {"role": "user", "content": "a"},
            {"role": "model", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        split="validation",
    )
    (pair,) = read_pairs(write_jsonl(tmp_path, row))
    assert [m.role for m in pair.context] == ["user", "assistant", "user"]
    assert (pair.chosen, pair.rejected, pair.query, pair.split) == ("good", "bad", "c", "val")
    assert pair.pair_id and pair.user_split == "train" and pair.explicit == ExplicitSignals()


def test_a_text_context_is_one_user_turn_and_plain_texts_are_responses(tmp_path):
    (pair,) = read_pairs(write_jsonl(tmp_path, a_row(context="hi there", chosen="x", rejected="y")))
    assert pair.context == (Message("user", "hi there"),) and (pair.chosen, pair.rejected) == ("x", "y")


@pytest.mark.parametrize("absent", [None, "", "  ", float("nan")])
def test_optional_columns_may_be_absent_in_every_way(tmp_path, absent):
    names = (
        "criteria",
        "self_description",
        "style",
        "attributes",
        "type",
        "scenario",
        "cohort",
        "user_split",
    )
    (pair,) = read_pairs(write_jsonl(tmp_path, a_row(**dict.fromkeys(names, absent))))
    assert pair.explicit == ExplicitSignals() and pair.kind is pair.scenario is pair.cohort is None


def test_attributes_are_read_from_json_text_and_from_objects(tmp_path):
    path = write_jsonl(tmp_path, a_row(attributes='{"wit": 3}'), a_row(attributes={"wit": 3, "tact": None}))
    assert [p.explicit.attributes for p in read_pairs(path)] == [(("wit", 3.0),), (("wit", 3.0),)]


@pytest.mark.parametrize(
    "columns,others",
    [
        ({"n_other_agree": 3, "n_other_disagree": 1}, (3, 1)),
        ({"n_other_agree": 3.0, "n_other_disagree": 0.0, "n_other_judges": 9, "n_other_tie": 9}, (3, 0)),
        ({"n_other_agree": 3, "n_other_judges": 7, "n_other_tie": 2}, (3, 2)),
        ({"n_other_agree": 3, "n_other_judges": 7}, None),
        ({"n_other_disagree": 3, "n_other_agree": None}, None),
    ],
)
def test_votes_of_others_as_sources_count_them(tmp_path, columns, others):
    [pair] = read_pairs(write_jsonl(tmp_path, a_row(**columns)))
    assert pair.others == others and row_to_pair(pair_to_row(pair), tmp_path, 1).others == others


@pytest.mark.parametrize(
    "columns,name",
    [
        ({"n_other_agree": -1, "n_other_disagree": 1}, "n_other_agree"),
        ({"n_other_agree": 1, "n_other_disagree": 0.5}, "n_other_disagree"),
        ({"n_other_agree": 3, "n_other_judges": 4, "n_other_tie": 2}, "n_other_judges"),
    ],
)
def test_counts_that_are_none_are_named(tmp_path, columns, name):
    assert f"row 1, field '{name}'" in problem(write_jsonl(tmp_path, a_row(**columns)))


def test_missing_file(tmp_path):
    assert "does not exist" in problem(tmp_path / "nothing.parquet")


@pytest.mark.parametrize("name", ["votes.csv", "votes", "votes.jsonl.gz"])
def test_wrong_suffix(tmp_path, name):
    (tmp_path / name).write_text("a,b\n")
    assert "expected .parquet or .jsonl" in problem(tmp_path / name)


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.parquet"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    problem(tmp_path / name)


def test_a_parquet_table_without_rows(tmp_path):
    pq.write_table(pa.table({"user_id": pa.array([], pa.string())}), tmp_path / "votes.parquet")
    assert "expected at least one" in problem(tmp_path / "votes.parquet")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_parquet(tmp_path, share):
    path = tmp_path / "votes.parquet"
    write_table(path, [pair_to_row(a_pair(i, chosen=f"text {i} " * 20)) for i in range(200)])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "cannot be read as parquet" in problem(path)


def test_a_damaged_parquet_page(tmp_path):
    path = tmp_path / "votes.parquet"
    write_table(path, [pair_to_row(a_pair(i, chosen=f"text {i} " * 20)) for i in range(200)])
    content = bytearray(path.read_bytes())
    content[200:800] = bytes(600)
    path.write_bytes(content)
    problem(path)


@pytest.mark.parametrize("line", ['{"user_id": "u1", "conte', "user_id,context", '"a text"', "[1, 2]"])
def test_a_line_that_is_no_json_object(tmp_path, line):
    sentence = problem(write_jsonl(tmp_path, a_row(), line))
    assert "row 2" in sentence and "expected" in sentence


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_bytes(json.dumps(a_row()).encode() + b"\n\xff\xfe\x00broken\n")
    assert "UTF-8" in problem(path)


def test_another_encoding_than_utf8(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(a_row()), encoding="utf-16")
    assert "after row 0: expected UTF-8 text, got other bytes" in problem(path)


def test_an_object_around_the_rows_is_no_vote(tmp_path):
    path = tmp_path / "votes.json"
    path.write_text(json.dumps({"data": [a_row()]}))
    assert "row 1, field 'user_id': expected a value (the row has only 'data')" in problem(path)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "votes.jsonl").mkdir()
    problem(tmp_path / "votes.jsonl")


BAD_FIELDS = {
    "null user": ({"user_id": None}, "user_id", "a value"),
    "empty user": ({"user_id": " "}, "user_id", "a value"),
    "user that is not a number": ({"user_id": float("nan")}, "user_id", "a value"),
    "null context": ({"context": None}, "context", "a value"),
    "empty context": ({"context": []}, "context", "non-empty list"),
    "context of another type": ({"context": 3}, "context", "non-empty list"),
    "turn without content": ({"context": [{"role": "user"}]}, "context[0]", "{role, content}"),
    "turn with null content": (
        {"context": [{"role": "user", "content": None}]},
        "context[0]",
        "{role, content}",
    ),
    "bad role": ({"context": [{"role": "human", "content": "hi"}]}, "context[0].role", "user, assistant"),
    "ends with the assistant": (
        {"context": [{"role": "user", "content": "hi"}, {"role": "model", "content": "yo"}]},
        "context",
        "ends with a user turn",
    ),
    "null chosen": ({"chosen": None}, "chosen", "a value"),
    "empty chosen": ({"chosen": " \n"}, "chosen", "non-empty text"),
    "empty rejected": ({"rejected": {"role": "model", "content": ""}}, "rejected", "non-empty text"),
    "chosen of another type": ({"chosen": ["good"]}, "chosen", "non-empty text"),
    "a conversation as chosen": (
        {"chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        "chosen",
        "non-empty text",
    ),
    "parts as content": (
        {"context": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        "context[0]",
        "{role, content} with two texts",
    ),
    "a tool's turn": (
        {"context": [{"role": "tool", "content": "42"}, {"role": "user", "content": "hi"}]},
        "context[0].role",
        "user, assistant, model or system",
    ),
    "ends with the system": (
        {"context": [{"role": "user", "content": "hi"}, {"role": "system", "content": "Be terse."}]},
        "context",
        "ends with a user turn",
    ),
    "another spelling of a split": ({"split": "Train"}, "split", "train, val or test"),
    "score that is a number as text": ({"chosen_score": "8"}, "chosen_score", "a number or null"),
    "type that is a number": ({"type": 3}, "type", "a text or null"),
    "criteria that are a list": ({"criteria": ["short", "kind"]}, "criteria", "a text or null"),
    "bad split": ({"split": "dev"}, "split", "train, val or test"),
    "split that is a list": ({"split": ["train"]}, "split", "train, val or test"),
    "split that is a number": ({"split": 1}, "split", "train, val or test"),
    "score that is a text": ({"chosen_score": "high"}, "chosen_score", "a number or null"),
    "score that is a boolean": ({"rejected_score": True}, "rejected_score", "a number or null"),
    "user that is a list": ({"user_id": ["u"]}, "user_id", "a text or a number"),
    "half an emoji": ({"chosen": "so good \ud83d"}, "chosen", "text that UTF-8 can hold"),
    "half an emoji in a context": (
        {"context": [{"role": "user", "content": "\udc4d"}]},
        "context",
        "text that UTF-8 can hold",
    ),
    "endless score": ({"chosen_score": float("inf")}, "chosen_score", "a number or null"),
    "score without end": ({"chosen_score": 10**400}, "chosen_score", "a number or null"),
    "time without end": ({"time": 10**400}, "time", "seconds since 1970"),
    "turn that no file can hold": ({"turn": 2**70}, "turn", "a whole number"),
    "counts that no file can hold": (
        {"n_other_agree": 2**70, "n_other_disagree": 0},
        "n_other_agree",
        "a whole number",
    ),
    "endless attributes": ({"attributes": {"fluency": float("inf")}}, "attributes", "numbers as weights"),
    "attributes that are booleans": ({"attributes": {"fluency": True}}, "attributes", "numbers as weights"),
    "synthetic in words": ({"synthetic_criteria": "false"}, "synthetic_criteria", "true, false or null"),
    "endless turn": ({"turn": float("inf")}, "turn", "a whole number"),
    "attributes that are no JSON": ({"attributes": "fluency: 80"}, "attributes", "JSON object"),
    "attributes that are a list": ({"attributes": '["fluency"]'}, "attributes", "name → weight"),
    "attributes that are texts": ({"attributes": {"fluency": "high"}}, "attributes", "numbers as weights"),
    "criteria that are a number": ({"criteria": 4}, "criteria", "a text or null"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_bad_field_names_file_row_field_and_expectation(tmp_path, name):
    changes, field, expectation = BAD_FIELDS[name]
    sentence = problem(write_jsonl(tmp_path, a_row(), a_row(), a_row(**changes)))
    assert "row 3" in sentence and f"'{field}'" in sentence and expectation in sentence
    assert len(sentence) < len(str(tmp_path)) + 250


def test_a_text_column_of_other_bytes_is_one_sentence(tmp_path):
    """Arrow checks no text when a file is written; pandas and Spark would fail on this file too."""
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff"]).buffers())
    table = pa.table({"user_id": ["u", "u"], "context": ["q", "r"], "chosen": texts, "rejected": ["a", "b"]})
    pq.write_table(table, tmp_path / "votes.parquet")
    assert "rows 1 to 2: expected UTF-8 text, got other bytes" in problem(tmp_path / "votes.parquet")


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        (pa.large_string(), True),
        (pa.string_view(), True),
        (pa.dictionary(pa.int8(), pa.string()), True),
        (pa.binary(), False),
    ],
    ids=str,
)
def test_texts_in_arrows_other_types(tmp_path, kind, fits):
    columns = {"user_id": "7", "context": "q", "chosen": "a\u200b\0", "rejected": "b"}
    table = pa.table({name: pa.array([text], pa.string()).cast(kind) for name, text in columns.items()})
    users = pa.array([7], pa.uint64())
    for one in (table, table.set_column(0, "user_id", users)):
        pq.write_table(one, tmp_path / "votes.parquet")
        if fits:
            [pair] = read_pairs(tmp_path / "votes.parquet")
            assert (pair.user_id, pair.query, pair.chosen, pair.rejected) == ("7", "q", "a\u200b\0", "b")
        else:
            assert "row 1, field" in problem(tmp_path / "votes.parquet")


@pytest.mark.parametrize("column", ["user_id", "context", "chosen", "rejected"])
def test_a_missing_column(tmp_path, column):
    row = pair_to_row(a_pair())
    del row[column]
    write_table(tmp_path / "votes.parquet", [row])
    sentence = problem(tmp_path / "votes.parquet")
    assert "row 1" in sentence and f"'{column}'" in sentence and "missing or null" in sentence


def test_rows_before_the_bad_one_were_streamed(tmp_path):
    reader = read_pairs(write_jsonl(tmp_path, a_row(), a_row(split="dev")))
    assert next(reader).user_id == "u1"
    with pytest.raises(DataError):
        next(reader)


@pytest.mark.parametrize(
    "split,user_split,trains",
    [
        ("train", "train", True),
        ("train", "overlapping", True),
        ("train", "test", False),
        ("train", "val", False),
        ("test", "train", False),
        ("val", "val", False),
    ],
)
def test_what_may_be_learnt_from(split, user_split, trains):
    assert a_pair(split=split, user_split=user_split).trains is trains


# Lone surrogates are no text that a file could hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
FILLED = TEXT.filter(str.strip)
ID = TEXT.map(read_id).filter(bool)
LABEL = st.none() | FILLED.map(str.strip)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
PAIRS = st.builds(
    PreferencePair,
    pair_id=ID,
    user_id=ID,
    context=st.tuples(
        st.builds(Message, st.sampled_from(("user", "assistant", "system")), TEXT),
        st.builds(Message, st.just("user"), TEXT),
    ),
    chosen=FILLED,
    rejected=FILLED,
    conversation_id=ID,
    chosen_score=st.none() | NUMBER,
    rejected_score=st.none() | NUMBER,
    turn=st.integers(-5, 1000),
    kind=LABEL,
    scenario=LABEL,
    split=st.sampled_from(("train", "val", "test")),
    user_split=FILLED.map(str.strip),
    cohort=LABEL,
    time=st.none() | NUMBER,
    position=st.none() | st.integers(0, 7),
    explicit=st.builds(
        ExplicitSignals,
        LABEL,
        LABEL,
        LABEL,
        st.dictionaries(TEXT, NUMBER, max_size=3).map(lambda d: tuple(d.items())),
        st.booleans(),
    ),
)


@settings(max_examples=100)
@given(PAIRS)
def test_every_pair_survives_its_row_as_json(pair):
    row = json.loads(json.dumps(pair_to_row(pair)))
    assert row_to_pair(row, Path("votes.jsonl"), 1) == pair


@settings(max_examples=25)
@given(st.lists(PAIRS, min_size=1, max_size=4))
def test_every_pair_survives_both_file_formats(pairs):
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "votes.parquet", [pair_to_row(p) for p in pairs])
        assert list(read_pairs(Path(folder) / "votes.parquet")) == pairs
        assert list(read_pairs(write_jsonl(Path(folder), *(pair_to_row(p) for p in pairs)))) == pairs
