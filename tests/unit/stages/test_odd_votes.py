"""Votes as other programs write them: each becomes the right pair, or is refused with file, row and field."""

import json
import os
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.feather import write_feather

from data_builders.sources import pairs as pairs_builder
from pgenrm_train.config import Config, DataConfig, StageName
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_table
from pgenrm_train.prompts.writer import load_pairs
from pgenrm_train.records.raw_rows import LeftOut
from pgenrm_train.records.rows import read_pairs
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages import build_data
from pgenrm_train.stages.registry import REGISTRY

SPLITS = ("train", "train", "test")


def a_vote(n=0, user="ann", **changes) -> dict:
    """A raw row; a user's votes 0 and 1 train, and 2 is a test vote."""
    row = {
        "user_id": user,
        "conversation_id": f"{user}-{n}",
        "context": [{"role": "user", "content": f"Question {n} of {user}?"}],
        "chosen": {"role": "assistant", "content": f"Yes, {n}."},
        "rejected": {"role": "assistant", "content": f"No, {n}."},
        "split": SPLITS[n % 3],
    }
    return {name: value for name, value in (row | changes).items() if value is not ...}


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(tmp_path, path, **data):
    """Build as recipe=build_data does; return the pairs, read back, and the card."""
    folder = StageFolder(tmp_path / "run" / "build_data", "build_data")
    config = Config(data=DataConfig(name="pairs", path=str(path), **data))
    card = build_data.run(config, folder, pairs_builder.build)
    return load_pairs(tmp_path / "run"), card


def splits(made):
    return [pair.split for pair in sorted(made, key=lambda pair: pair.conversation_id)]


# ---- users ----


def test_the_forms_of_a_number_are_one_user(tmp_path):
    rows = [
        a_vote(n, user) | {"conversation_id": f"c{n}"} for n, user in enumerate((7, 7.0, "7", "7.0", "07"))
    ]
    made, card = build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", rows))
    assert [p.user_id for p in made] == ["7", "7", "7", "7.0", "07"] and card["normalised"] == {}


def test_integers_and_the_floats_of_pandas_are_one_user(tmp_path):
    whole = pd.DataFrame([a_vote(n, user, split="train") for user in (1, 2) for n in range(2)])
    floats = pd.DataFrame([a_vote(2, user, split="test") for user in (1, 2)] + [a_vote(2, None)])
    assert floats["user_id"].dtype == "float64"
    (tmp_path / "votes").mkdir()
    whole.to_parquet(tmp_path / "votes" / "a.parquet")
    floats.to_parquet(tmp_path / "votes" / "b.parquet")
    _, card = build(tmp_path, tmp_path / "votes", on_bad_row="skip")
    assert card["users"] == 2 and card["left_out"] == {"rows that do not fit": 1}


def test_white_space_and_unicode_forms_are_one_user_and_counted(tmp_path, capsys):
    rows = [a_vote(n, user) for n, user in enumerate(("Zo\u00eb", "Zoe\u0308", " Zo\u00eb\u00a0"))]
    made, card = build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", rows))
    assert {p.user_id for p in made} == {"Zo\u00eb"} and card["normalised"] == {pairs_builder.USER_IDS: 2}
    assert f"pairs: normalised 2 {pairs_builder.USER_IDS}" in capsys.readouterr().out


def test_a_float_that_stands_for_several_users_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "votes.jsonl", [a_vote(0, float(2**53 + 1))])
    with pytest.raises(DataError, match=r"row 1, field 'user_id': expected .*below 2\^53 if it is a float"):
        build(tmp_path, path)


def test_held_out_votes_of_users_who_never_train_are_told(tmp_path, capsys):
    rows = [a_vote(n, user) for user in ("ann", "bob") for n in range(3)]
    rows[-1]["user_id"] = "Bob"
    build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", rows))
    assert "1 val and test votes have no history, because their users have no training vote, e.g. 'Bob'" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("nobody", ["nan", "None", "<NA>"])
def test_a_missing_user_that_became_a_text_is_told(tmp_path, capsys, nobody):
    rows = [a_vote(n) for n in range(3)] + [a_vote(n, nobody) for n in range(2)]
    _, card = build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", rows))
    assert card["users"] == 2
    assert f"warning: 2 votes are of one user '{nobody}', which many programs" in capsys.readouterr().out


# ---- times ----


@pytest.mark.parametrize(("unit", "scale"), [("milli", 10**3), ("micro", 10**6), ("nano", 10**9)])
def test_times_of_another_unit_are_read_where_all_are_plausible_in_it_alone(tmp_path, capsys, unit, scale):
    rows = [a_vote(n, time=(1_700_000_000 + n) * scale) for n in range(3)]
    made, _ = build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", rows))
    assert [p.time for p in made] == [1_700_000_000, 1_700_000_001, 1_700_000_002]
    assert f"pairs: times are read as {unit}seconds since 1970" in capsys.readouterr().out


@pytest.mark.parametrize(
    "times", [(0, 1, 2), (10**11, 10**14, 10**17), (0, 1_700_000_000_000, 1_700_000_000_001)]
)
def test_other_numbers_keep_their_order(tmp_path, capsys, times):
    rows = [a_vote(n, time=time) for n, time in enumerate(times)]
    made, _ = build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", rows))
    assert [p.time for p in made] == list(times) and "times" not in capsys.readouterr().out


def test_mixed_units_are_told_with_the_histories_that_they_empty(tmp_path, capsys):
    times = (1_700_000_000_000, 1_700_000_001_000, 1_700_000_002)  # train in milliseconds, test in seconds
    rows = [a_vote(n, user, time=times[n]) for user in ("ann", "bob") for n in range(3)]
    made, card = build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", rows))
    assert [p.time for p in made] == [*times, *times]
    assert card["val_and_test_votes_whose_times_leave_no_history"] == 2
    said = capsys.readouterr().out
    assert (
        "mixed units (2 in seconds, 4 in milliseconds); times leave the history of 2 of 2 val and test votes"
        in said
    )


@pytest.mark.parametrize(("timed", "emptied"), [("test", 1), ("train", 0)])
def test_times_of_one_split_alone_are_told(tmp_path, capsys, timed, emptied):
    rows = [a_vote(n, **({"time": 100 + n} if SPLITS[n] == timed else {})) for n in range(3)]
    _, card = build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", rows))
    other = {"test": "train", "train": "test"}[timed]
    said = capsys.readouterr().out
    assert (
        f"votes of {timed} have times, those of {other} have none; times leave the history of {emptied} of 1"
        in said
    )
    assert card["val_and_test_votes_whose_times_leave_no_history"] == emptied


def test_times_in_order_say_nothing(tmp_path, capsys):
    build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", [a_vote(n, time=n) for n in range(3)]))
    assert capsys.readouterr().out == ""


# ---- columns that the place of a file names ----


def test_a_partition_is_a_column(tmp_path, capsys):
    rows = [a_vote(n, user, turn=n) for user in ("ann", "b/ob", "07") for n in range(3)]
    pd.DataFrame(rows).to_parquet(tmp_path / "votes", partition_cols=["split", "user_id", "turn"])
    made, _ = build(tmp_path, tmp_path / "votes")
    assert sorted((p.user_id, p.turn, p.split) for p in made) == sorted(
        (row["user_id"], row["turn"], row["split"]) for row in rows
    )
    said = capsys.readouterr().out
    assert (
        "pairs: 9 rows take the column split from the name of their file or folder (6 train, 3 test)" in said
    )
    (test,) = (tmp_path / "votes" / "split=test" / "user_id=07" / "turn=2").iterdir()
    assert [p.split for p in read_pairs(test)] == ["test"], "a single file of it, too"


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("data/votes_train.jsonl", "data/votes_test.jsonl"),
        ("Train/0.jsonl", "TEST/0.jsonl"),
        ("default/train/part-0.jsonl", "default/test/part-0.jsonl"),
        ("training.1.jsonl", "evaluation.1.jsonl"),
        ("others.jsonl", "test.jsonl"),
    ],
)
def test_files_that_are_named_as_splits_are_splits(tmp_path, capsys, names):
    for name, part in zip(names, ((0, 1), (2,)), strict=True):
        write_jsonl(tmp_path / "votes" / name, [a_vote(n, split=...) for n in part])
    made, _ = build(tmp_path, tmp_path / "votes")
    assert splits(made) == list(SPLITS)
    assert "take the column split from the name of their file" in capsys.readouterr().out
    assert splits(read_pairs(tmp_path / "votes")) == list(SPLITS)


@pytest.mark.parametrize("name", ["validation-00000-of-00001", "val", "valid", "dev"])
def test_validation_is_val(tmp_path, name):
    path = write_jsonl(tmp_path / f"{name}.jsonl", [a_vote(split=...)])
    assert [p.split for p in read_pairs(path)] == ["val"]


def test_the_rows_split_comes_first_and_names_of_no_split_are_none(tmp_path):
    path = write_jsonl(
        tmp_path / "votes" / "test.jsonl", [a_vote(0), a_vote(1, split=None), a_vote(2, split=float("nan"))]
    )
    assert [p.split for p in read_pairs(path)] == ["train", "test", "test"]
    for name in ("contest", "latest", "train_test", "trained"):
        assert [
            p.split for p in read_pairs(write_jsonl(tmp_path / f"{name}.jsonl", [a_vote(split=...)]))
        ] == ["train"]


def test_a_file_under_another_name_is_other_data_if_the_name_counts(tmp_path):
    def fingerprint(name, **changes):
        path = write_jsonl(tmp_path / name, [a_vote(**changes)])
        return REGISTRY[StageName.BUILD_DATA].settings(Config(data=DataConfig(name="pairs", path=str(path))))

    assert fingerprint("train.jsonl", split=...) != fingerprint("test.jsonl", split=...)
    assert fingerprint("train.jsonl") == fingerprint("test.jsonl"), "the rows have their splits"
    assert fingerprint("a.jsonl", split=...) == fingerprint("b.jsonl", split=...)


# ---- data sets of the hub ----


def test_metadata_of_the_hub_is_no_vote(tmp_path):
    write_jsonl(tmp_path / "votes" / "data" / "votes.jsonl", [a_vote(n) for n in range(3)])
    for name in ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"):
        (tmp_path / "votes" / name).write_text('{"default": {"features": {}}}')
    assert len(build(tmp_path, tmp_path / "votes")[0]) == 3


def test_what_datasets_saved_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {"train": Dataset.from_list([a_vote(n, split=...) for n in (0, 1)])}
    parts["test"] = Dataset.from_list([a_vote(2, split=...)])
    DatasetDict(parts).save_to_disk(tmp_path / "all", num_shards={"train": 2, "test": 1})
    assert splits(build(tmp_path, tmp_path / "all")[0]) == list(SPLITS)
    (tmp_path / "all" / "train" / "cache-1234.arrow").write_bytes(b"a result of Dataset.map")
    assert len(list(read_pairs(tmp_path / "all"))) == 3
    one = Dataset.from_list([a_vote(2, split=...)], split="test")
    one.save_to_disk(tmp_path / "one")
    assert [p.split for p in read_pairs(tmp_path / "one")] == ["test"]
    (shard,) = (tmp_path / "one").glob("*.arrow")
    assert [p.split for p in read_pairs(shard)] == ["test"]
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(DataError, match="cannot be read as arrow: it was cut off"):
        list(read_pairs(tmp_path / "one"))


def test_a_relative_path_with_a_colon_is_no_url(tmp_path, monkeypatch):
    parquet(tmp_path, [a_vote(n) for n in range(3)]).rename(tmp_path / "exp:1.parquet")
    monkeypatch.chdir(tmp_path)
    assert len(build(tmp_path, "exp:1.parquet")[0]) == 3


def test_a_feather_file_is_read(tmp_path):
    write_feather(pa.Table.from_pylist([a_vote(n) for n in range(3)]), str(tmp_path / "votes.arrow"))
    assert len(list(read_pairs(tmp_path / "votes.arrow"))) == 3


def test_a_split_of_a_saved_folder_and_a_damaged_state(tmp_path):
    from datasets import Dataset

    Dataset.from_list([a_vote(split=...)]).save_to_disk(tmp_path / "all" / "test")
    assert [p.split for p in read_pairs(tmp_path / "all" / "test")] == ["test"]
    for damaged in ("[1]", "{cut"):
        (tmp_path / "all" / "test" / "state.json").write_text(damaged)
        assert len(list(read_pairs(tmp_path / "all" / "test"))) == 1


def test_files_of_other_formats_are_told_and_suffixes_have_no_case(tmp_path, capsys):
    write_jsonl(tmp_path / "votes" / "A.JSONL", [a_vote(0)])
    parquet(tmp_path / "votes", [a_vote(1), a_vote(2)]).rename(tmp_path / "votes" / "B.PARQUET")
    (tmp_path / "votes" / "test.csv").write_text("user_id\nann\n")
    assert len(build(tmp_path, tmp_path / "votes")[0]) == 3
    assert "skipped 1 files of other formats" in capsys.readouterr().out


# ---- JSON texts ----


def as_text(row, write=json.dumps):
    return row | {name: write(row[name]) for name in ("context", "chosen", "rejected")}


@pytest.mark.parametrize(
    "write", [json.dumps, lambda value: json.dumps(json.dumps(value)), lambda v: f" {json.dumps(v)}\n"]
)
def test_json_text_is_what_it_spells(tmp_path, write):
    rows = [a_vote(n) for n in range(3)]
    path = write_jsonl(tmp_path / "votes.jsonl", [as_text(row, write) for row in rows])
    assert build(tmp_path, path)[0] == list(read_pairs(write_jsonl(tmp_path / "same" / "votes.jsonl", rows)))


def test_texts_that_are_json_but_no_messages_remain_texts(tmp_path):
    texts = [
        '{"answer": 42}',
        "[1, 2]",
        '"quoted"',
        '{"messages": [{"role": "user", "content": "hi"}]}',
        "{role: user",
    ]
    rows = [a_vote(n, context=text, chosen=text, rejected=f"{text} ") for n, text in enumerate(texts)]
    made = list(read_pairs(write_jsonl(tmp_path / "votes.jsonl", rows)))
    assert [p.query for p in made] == texts == [p.chosen for p in made]


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("column", ["context", "chosen", "rejected"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (json.dumps(MESSAGES[0]), "plain", "JSON text, as in the rows before"),
        ("plain", json.dumps(MESSAGES[0]), "plain text, as in the rows before"),
        ("plain", str(MESSAGES[0]), "messages as json.dumps writes them"),
        ("plain", f"array({MESSAGES}, dtype=object)", "messages as json.dumps writes them"),
        (
            "plain",
            "[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'user'}]",
            "messages as json.dumps",
        ),
        ("plain", '[{"role": "user", "content": "cut"}', "messages as json.dumps"),
    ],
)
def test_a_column_of_two_kinds_and_pythons_notation_are_refused(tmp_path, column, first, second, expected):
    rows = [{column: first}, {column: second}]
    if column == "context" and first.startswith("{"):
        rows = [{column: json.dumps(MESSAGES)}, {column: second}]
    path = write_jsonl(tmp_path / "votes.jsonl", [a_vote(n, **row) for n, row in enumerate(rows)])
    with pytest.raises(DataError, match=rf"votes\.jsonl, row 2, field '{column}': expected .*{expected}"):
        list(read_pairs(path))
    assert [
        p.turn
        for p in pairs_builder.build(
            DataConfig(name="pairs", path=str(path), on_bad_row="skip"), 0, LeftOut()
        )
    ] == [0]


# ---- types of Arrow ----


def parquet(folder, rows, **columns) -> Path:
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.append_column(name, values)
    pq.write_table(table, folder / "votes.parquet")
    return folder / "votes.parquet"


def test_decimals_are_numbers(tmp_path):
    path = parquet(
        tmp_path,
        [a_vote()],
        chosen_score=pa.array([Decimal("7.50")]),
        turn=pa.array([Decimal("2.0")], pa.decimal256(40, 1)),
        position=pa.array([Decimal(1)]),
        n_other_agree=pa.array([Decimal(3)]),
        n_other_disagree=pa.array([Decimal("0.00")]),
        time=pa.array([Decimal("12.5")]),
        attributes=pa.array([{"wit": Decimal("0.5"), "tact": None}]),
    )
    (pair,) = read_pairs(path)
    assert (pair.chosen_score, pair.turn, pair.position, pair.others, pair.time) == (7.5, 2, 1, (3, 0), 12.5)
    assert pair.explicit.attributes == (("wit", 0.5),)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([date(2024, 1, 2)]),
        pa.array([date(2024, 1, 2)], pa.date64()),
        pa.array([datetime(2024, 1, 2)], pa.timestamp("ns")),
        pa.array([datetime(2024, 1, 2, tzinfo=UTC)], pa.timestamp("s", "Asia/Tokyo")),
        pa.array(["2024-01-02"]).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_dates_are_times(tmp_path, values):
    (pair,) = read_pairs(parquet(tmp_path, [a_vote()], time=values))
    assert pair.time == datetime(2024, 1, 2, tzinfo=UTC).timestamp()


def test_maps_are_mappings(tmp_path):
    texts = pa.map_(pa.string(), pa.string())
    row = {"user_id": "ann", "split": "train"}
    path = parquet(
        tmp_path,
        [row],
        context=pa.array([[[("role", "user"), ("content", "hi")]]], pa.list_(texts)),
        chosen=pa.array([[("role", "assistant"), ("content", "yes")]], texts),
        rejected=pa.array([[("role", "assistant"), ("content", "no")]], texts),
        attributes=pa.array([[("wit", 3)]], pa.map_(pa.string(), pa.int8())),
    )
    (pair,) = read_pairs(path)
    assert (pair.query, pair.chosen, pair.rejected, pair.explicit.attributes) == (
        "hi",
        "yes",
        "no",
        (("wit", 3.0),),
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            pa.array([2**60], pa.timestamp("ms")),
            r"rows 1 to 1, field 'x': a value of type timestamp\[ms\] cannot be read",
        ),
        (pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int8())), "field 'x': .*duplicate keys"),
    ],
    ids=["a far year", "a key twice"],
)
def test_values_that_python_cannot_hold_are_named(tmp_path, values, sentence):
    with pytest.raises(DataError, match=sentence):
        list(read_pairs(parquet(tmp_path, [a_vote()], x=values)))


def test_ids_that_a_short_float_cannot_tell_apart_are_refused(tmp_path):
    rows = [{name: value for name, value in a_vote(n).items() if name != "user_id"} for n in range(2)]
    path = parquet(tmp_path, rows, user_id=pa.array([5.0, 2.0**24], pa.float32()))
    with pytest.raises(DataError, match="field 'user_id': expected numbers below 16777216"):
        list(read_pairs(path))


def test_texts_of_another_layout_of_messages_are_refused_as_such(tmp_path):
    path = write_jsonl(tmp_path / "votes.jsonl", [a_vote(context='[{"from": "human", "value": "hi"}]')])
    with pytest.raises(DataError, match=r"row 1, field 'context\[0\]': expected \{role, content\}"):
        list(read_pairs(path))


def test_a_column_twice_is_refused(tmp_path):
    path = parquet(tmp_path, [a_vote()], user_id=pa.array(["bob"]))
    with pytest.raises(DataError, match="has the column 'user_id' twice"):
        list(read_pairs(path))


# ---- data.only ----


def test_only_without_a_match_names_the_values_that_exist(tmp_path):
    rows = [a_vote(n, language=("en", "de", None)[n], level=(1, 2.0, "3")[n]) for n in range(3)]
    path = write_jsonl(tmp_path / "votes.jsonl", rows)
    with pytest.raises(
        DataError, match=r"no row with data\.only\.language=fr; the column 'language' holds en, de, null"
    ):
        build(tmp_path, path, only={"language": "fr"})
    with pytest.raises(DataError, match="'language' holds en, de, null; 'level' holds 1, 2, 3"):
        build(tmp_path, path, only={"language": "en", "level": 2})
    assert len(build(tmp_path, path, only={"level": 2})[0]) == 1
    many = write_jsonl(tmp_path / "many.jsonl", [a_vote(n, language=f"l{n}") for n in range(500)])
    with pytest.raises(DataError, match=r"l0, .*l19, …$"):
        build(tmp_path, many, only={"language": "fr"})


def test_a_null_user_of_a_hub_file_is_still_a_bad_row(tmp_path):
    write_table(tmp_path / "votes.parquet", [a_vote(0), a_vote(1, user=None)])
    with pytest.raises(DataError, match="row 2, field 'user_id': expected a value"):
        build(tmp_path, tmp_path / "votes.parquet")


# ---- what would be lost in silence ----


def test_a_link_that_leads_to_no_file_is_refused(tmp_path):
    votes = write_jsonl(tmp_path / "votes" / "a.jsonl", [a_vote(n) for n in range(3)]).parent
    (votes / "linked.jsonl").symlink_to(write_jsonl(tmp_path / "elsewhere" / "b.jsonl", [a_vote(3)]))
    assert len(build(tmp_path, votes)[0]) == 4
    (votes / "README.md").symlink_to("gone.md")
    (votes / ".hidden.jsonl").symlink_to("gone.jsonl")
    for name, target in (("c.jsonl", "gone.jsonl"), ("part=1", "gone"), ("more", tmp_path / "elsewhere")):
        (votes / name).symlink_to(target)
        with pytest.raises(DataError, match=f"votes/{name} is a link to "):
            build(tmp_path, votes)
        (votes / name).unlink()


@pytest.mark.parametrize("name", ["Split", "SPLIT", "sp_lit", "Time", "userSplit", "pair id", " cohort"])
def test_a_column_whose_name_nearly_fits_is_refused(tmp_path, name):
    path = write_jsonl(tmp_path / "votes.jsonl", [a_vote(split=..., **{name: "test"})])
    with pytest.raises(DataError, match=f"row 1: rename the column '{name}' to '[a-z_]+'"):
        build(tmp_path, path)


def test_another_column_and_one_next_to_the_right_one_are_no_matter(tmp_path):
    rows = [a_vote(n, Split="x", model="m", splits="test", Zeit=1) for n in range(3)]
    assert len(build(tmp_path, write_jsonl(tmp_path / "votes.jsonl", rows))[0]) == 3


@pytest.mark.parametrize("column", ["context", "chosen", "rejected"])
@pytest.mark.parametrize("write", [json.dumps, str])
def test_messages_that_were_cut_off_are_no_plain_text(tmp_path, column, write):
    text = write([{"role": "user", "content": 'it\'s "so" [b] {c'}])
    for end in range(12, len(text)):
        path = write_jsonl(tmp_path / "votes.jsonl", [a_vote(**{column: text[:end]}), a_vote(1)])
        with pytest.raises(DataError, match=f"row 1, field '{column}': expected plain text, or complete"):
            list(read_pairs(path))


@pytest.mark.parametrize("text", ['{"role": "user"} is what I\'d send', "[role: user", '{"a": [', "[{'role"])
def test_a_text_about_messages_is_a_text(tmp_path, text):
    (made,) = read_pairs(write_jsonl(tmp_path / "votes.jsonl", [a_vote(chosen=text)]))
    assert made.chosen == text


def test_a_folders_name_that_is_no_utf8_is_refused(tmp_path):
    for name in ("user_id=%FF", "user_id=%FE"):
        write_jsonl(tmp_path / "votes" / name / "a.jsonl", [a_vote(user_id=...)])
    with pytest.raises(DataError, match="folder user_id=%FE: expected column=value with percent escapes"):
        build(tmp_path, tmp_path / "votes")


@pytest.mark.parametrize("form", ["{}", "[{}]"])
def test_a_key_twice_is_refused(tmp_path, form):
    row = json.dumps(a_vote())
    (tmp_path / "votes.jsonl").write_text(form.replace("{}", row[:-1] + ', "user_id": "bob"}'))
    with pytest.raises(DataError, match="the key 'user_id' twice"):
        build(tmp_path, tmp_path / "votes.jsonl")


@pytest.mark.parametrize("name", ["_change_data", "__MACOSX", ".ipynb_checkpoints", "a/_temporary/0"])
def test_folders_of_other_programs_hold_no_votes(tmp_path, name):
    votes = write_jsonl(tmp_path / "votes" / "a.jsonl", [a_vote(n) for n in range(3)]).parent
    write_jsonl(votes / name / "a.json", [{"commitInfo": {}}])
    assert len(build(tmp_path, votes)[0]) == 3


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        ("_delta_log/00000000000000000001.json", "Delta"),
        (".hoodie/hoodie.properties", "Hudi"),
        ("metadata/v1.metadata.json", "Iceberg"),
    ],
)
def test_a_table_that_keeps_deleted_rows_is_refused(tmp_path, log, kind):
    part = write_jsonl(tmp_path / "votes" / "data" / "a.jsonl", [a_vote(n) for n in range(3)]).parent
    write_jsonl(part.parent / log, [{"remove": {"path": "data/a.jsonl"}}])
    for folder in (part, part.parent, tmp_path):
        with pytest.raises(DataError, match=f"votes is a table of {kind}, which keeps files of deleted rows"):
            build(tmp_path, folder)
    (part.parent / log).rename(tmp_path / "elsewhere")
    assert kind != "Iceberg" or len(build(tmp_path, part.parent)[0]) == 3, "metadata of another program"


# ---- places and columns that are no votes ----


def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "votes.jsonl")
    for path in (tmp_path / "votes.jsonl", Path("/dev/null")):
        with pytest.raises(DataError, match="is a pipe or a device, and data are read more than once"):
            REGISTRY[StageName.BUILD_DATA].settings(Config(data=DataConfig(name="pairs", path=str(path))))


def test_a_run_among_the_votes_is_named(tmp_path):
    """As with data.path=. and the default run_dir."""
    folder = tmp_path / "votes"
    write_jsonl(folder / "votes.jsonl", [a_vote(n) for n in range(3)])
    assert len(build(tmp_path / "first", folder / "votes.jsonl")[0]) == 3
    stage = StageFolder(folder / "runs" / "a" / "build_data", "build_data")
    stage.path.mkdir(parents=True)
    for name in ("manifest.json", "config.yaml"):
        (stage.path / name).write_text("{}")
    with pytest.raises(DataError, match=r"runs/a/build_data is of a run, not of votes"):
        build(tmp_path / "second", folder)
    (stage.path / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"manifest\.json, row 1"):
        build(tmp_path / "third", folder)


@pytest.mark.parametrize(
    ("missing", "other"), [("context", "prompt"), ("chosen", "chosen.content"), ("rejected", "winner")]
)
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, missing, other):
    path = write_jsonl(tmp_path / "votes.jsonl", [a_vote(0, **{missing: ..., other: "a"})])
    message = rf"field '{missing}': expected a value .the row has only .*'{other}'"
    with pytest.raises(DataError, match=message):
        build(tmp_path, path)


# ---- texts that stay as they are ----


def test_odd_texts_are_kept_as_they_are(tmp_path):
    users = ("ann|\0\t<b>", "../../etc/passwd", "a" * 3000, "\u202eann", "😀", "-1", "0x10")
    texts = ("\0nul\0", "\u200b", "\u202eright to left", "<script>alert(1)</script>", "a\u2028b\x85c\r\n")
    rows = [
        a_vote(n, user, chosen=texts[i % len(texts)], type="a|b\n<script>", conversation_id=f"{i}-{n}")
        for i, user in enumerate(users)
        for n in range(3)
    ]
    path = tmp_path / "votes.jsonl"
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    made, card = build(tmp_path, path)
    assert {p.user_id for p in made} == set(users) and {p.chosen for p in made} == set(texts)
    assert {p.kind for p in made} == {"a|b\n<script>"} and card["users"] == len(users)
