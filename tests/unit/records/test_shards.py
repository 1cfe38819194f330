"""Sharded tables are streamed and published completely or not at all; damage ends in one sentence."""

from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pytest

from pgenrm_train.errors import DataError
from pgenrm_train.files import sha256_file
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.rows import pair_schema, pair_tables, read_pairs
from pgenrm_train.records.shards import BATCH, ShardWriter, digest, parts, tables

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


def write(path, count, rows=BATCH):
    with ShardWriter(path, SCHEMA, rows) as writer:
        for start in range(0, count, BATCH):
            writer.table(table(range(start, min(start + BATCH, count)), "row"))
    return path


def table(numbers, word):
    return pa.table({"n": numbers, "text": [f"{word} {n}" for n in numbers]}, schema=SCHEMA)


def numbers(path):
    return [n for batch in tables(path) for n in batch.column("n").to_pylist()]


@pytest.mark.parametrize("count", [0, 1, BATCH, BATCH + 1, 3 * BATCH])
def test_what_is_written_is_read_back_in_order(tmp_path, count):
    path = write(tmp_path / "t.parquet", count)
    assert numbers(path) == list(range(count))
    shards = max(1, -(-count // BATCH))
    assert [p.name for p in parts(path)] == [f"part-{n:05d}-of-{shards:05d}.parquet" for n in range(shards)]
    assert pd.read_parquet(path)["n"].tolist() == list(range(count)), "as a file would be"


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = write(tmp_path / "t.parquet", 10)
    with pytest.raises(KeyboardInterrupt), ShardWriter(path, SCHEMA, BATCH) as writer:
        for _ in range(3):
            writer.table(table(range(BATCH), "new"))
        raise KeyboardInterrupt
    assert numbers(path) == list(range(10)) and [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_a_killed_write_is_invisible_and_does_not_hinder_the_next(tmp_path):
    writer = ShardWriter(tmp_path / "t.parquet", SCHEMA, BATCH).__enter__()
    for _ in range(2):
        writer.table(table(range(BATCH), "half"))
    del writer  # no __exit__, as after kill -9
    assert not (tmp_path / "t.parquet").exists()
    assert numbers(write(tmp_path / "t.parquet", 5)) == list(range(5))


def test_a_lost_shard_is_noticed(tmp_path):
    path = write(tmp_path / "t.parquet", 3 * BATCH)
    parts(path)[1].unlink()
    with pytest.raises(DataError, match=r"holds 2 of the 3 files part-\*-of-00003"):
        numbers(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_cut_off_shard_is_one_sentence(tmp_path, share):
    path = write(tmp_path / "t.parquet", 3 * BATCH)
    last = parts(path)[2]
    last.write_bytes(last.read_bytes()[: int(last.stat().st_size * share)])
    with pytest.raises(
        DataError, match=r"part-00002-of-00003.parquet cannot be read as parquet: it was cut off"
    ) as error:
        numbers(path)
    assert "\n" not in str(error.value) and error.value.__suppress_context__


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no parquet or JSONL file"):
        parts(tmp_path)


def test_the_digest_of_one_file_is_its_own_and_sees_every_byte(tmp_path):
    path = write(tmp_path / "t.parquet", 3 * BATCH)
    before = digest(path)
    assert digest(parts(path)[0]) == sha256_file(parts(path)[0])
    last = parts(path)[2]
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    assert digest(path) != before


def test_bad_rows_name_the_shard(tmp_path):
    good = PreferencePair("p", "u", (Message("user", "q"),), "a", "b")
    with ShardWriter(tmp_path / "pairs.parquet", pair_schema(), BATCH) as writer:
        for table in pair_tables([good] * (BATCH + 1) + [replace(good, split="dev")]):
            writer.table(table)
    with pytest.raises(DataError, match=r"part-00001-of-00002.parquet, row 2, field 'split'"):
        list(read_pairs(tmp_path / "pairs.parquet"))
