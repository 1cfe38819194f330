"""build_data: one id per vote, no vote on both sides of a split, limits in full users, and a correct card."""

import json
import subprocess
import sys
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders.sources import pairs as pairs_builder
from data_builders.sources import personaworld
from pgenrm_train.config import ROOT, Config, DataConfig
from pgenrm_train.errors import ArtifactError, ConfigError, DataError
from pgenrm_train.prompts.writer import load_pairs, pairs_of_split
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.raw_rows import SKIPPED, LeftOut
from pgenrm_train.records.rows import pair_to_row
from pgenrm_train.records.shards import digest, parts
from pgenrm_train.records.vote_index import VoteIndex
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages import build_data
from recipes.build_data import builder


def vote(pair_id="p", user="u", chosen="good", rejected="bad", query="q", **more) -> PreferencePair:
    return PreferencePair(str(pair_id), user, (Message("user", query),), chosen, rejected, **more)


def build(tmp_path, votes, **data) -> tuple[list[PreferencePair], dict]:
    """Run the stage on given votes; return the pairs, read back, and the card."""
    config = Config(data=DataConfig(**data))
    folder = StageFolder(tmp_path / "build_data", "build_data")
    card = build_data.run(config, folder, lambda _data, _seed, _left_out: iter(votes))
    assert json.loads((folder.path / "card.json").read_text()) == card
    return load_pairs(tmp_path), card


def indexed(votes) -> VoteIndex:
    index = VoteIndex()
    for pair in votes:
        index.add(pair)
    index.added()
    return index


def test_ids_that_name_a_question_become_ids_of_votes(tmp_path):
    votes = [vote("q1", "a"), vote("q1", "b"), vote("q2", "a"), vote("q1", "a", "left", "right")]
    made, _ = build(tmp_path, votes)
    assert [p.pair_id for p in made] == ["q1/a", "q1/b", "q2", "q1/a/2"]
    assert [(p.user_id, p.chosen) for p in made] == [(p.user_id, p.chosen) for p in votes]


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(("a", "a/u", "a/u/2", "a/u/3")), st.sampled_from(("u", "v", "u/2"))),
        max_size=8,
    )
)
def test_ids_are_unique_whatever_the_source_calls_its_votes(drawn):
    index = indexed([vote(pair_id, user) for pair_id, user in drawn])
    index.name_votes()
    assert len({name for name, *_ in index.decisions()}) == len(drawn)


def test_train_votes_that_return_in_test_are_dropped_and_counted(tmp_path):
    votes = [
        vote(1, "a", "x", "y"),
        vote(2, "a", "x", "y", split="test"),  # the same vote
        vote(3, "a", "y", "x", query="other"),  # the same texts after another question
        vote(4, "b", "x", "y"),  # another user
        vote(5, "c", "y", "x"),
        vote(6, "c", "x", "y", split="val"),  # the same texts, voted the other way
    ]
    made, card = build(tmp_path, votes, on_overlap="drop")
    assert [p.pair_id for p in made] == ["2", "3", "4", "6"]
    assert card["train_votes_dropped_as_repeated_in_val_or_test"] == 2


def test_a_vote_of_val_that_returns_in_test_goes_and_test_stays_whole():
    index = indexed(
        [
            vote(1, "a", split="test"),
            vote(2, "a", split="val"),
            vote(3, "a", split="test"),
            vote(4, "b", split="val"),
        ]
    )
    assert index.drop_overlap() == {"train": 0, "val": 1}
    assert [kept for *_, kept in index.decisions()] == [1, 0, 1, 1]


def test_overlap_within_a_user_fails_the_build(tmp_path):
    votes = [vote(1, "a"), vote(2, "a", split="test")]
    with pytest.raises(
        DataError,
        match=r"1 votes of the source are cast again .* e\.g\. 1 as 2 by user a.* data\.on_overlap=drop",
    ):
        build(tmp_path, votes)
    assert not (tmp_path / "build_data" / "pairs.parquet").exists()
    assert build(tmp_path, [vote(1, "a"), vote(2, "b", split="test")])[1]["pairs"] == 2


def test_splits_made_here_do_without_what_overlaps(tmp_path):
    votes = [
        vote(n, "a", query=f"question {n // 2}") for n in range(40)
    ]  # each vote twice, in two conversations
    made, card = build(tmp_path, votes, split_by="within_user")
    assert (
        len(votes) - len(made)
        == card["train_votes_dropped_as_repeated_in_val_or_test"]
        + card["val_votes_dropped_as_repeated_in_test"]
        > 0
    )


def test_the_card_counts(tmp_path):
    votes = [
        vote(1, "a", "longer text", "short", kind="easy"),
        vote(2, "a", "same", "same"),
        vote(3, "b", "s", "much longer", split="test", user_split="test", kind="easy"),
    ]
    _, card = build(tmp_path, votes)
    assert (card["pairs"], card["users"], card["identical_responses"]) == (3, 2, 1)
    assert card["pairs_by_split"] == {"train": 2, "test": 1}
    assert card["users_by_user_split"] == {"train": 1, "test": 1}
    assert card["pairs_by_kind"] == {"easy": 2, "(none)": 1}
    assert card["with_stated_criteria"] == 0 and card["chosen_longer_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert card["sha256"] == digest(tmp_path / "build_data" / "pairs.parquet")


def test_a_word_that_may_have_meant_a_held_out_user_is_reported(tmp_path, capsys):
    build(tmp_path, [vote(1, "a"), vote(2, "b", user_split="dev"), vote(3, "c", user_split="heldout")])
    message = capsys.readouterr().out
    assert (
        "warning: 1 users train, since their user_split='heldout' is neither val nor test" in message
        and "'dev'" not in message
    )


def test_a_limit_keeps_whole_training_users_and_every_held_out_vote(tmp_path):
    votes = [vote(f"{user}{n}", user, f"good {n}") for user in "abcd" for n in range(3)]
    votes += [
        vote(f"t{n}", "t", f"good {n}", user_split="test", split=("train", "test")[n % 2]) for n in range(4)
    ]
    made, card = build(tmp_path, votes, max_train_pairs=4)
    assert Counter(p.user_id for p in made) == {"a": 3, "b": 3, "t": 4}
    assert card["pairs"] == 10


@pytest.mark.parametrize("votes", [[], [vote(1, split="test")], [vote(1, user_split="test")]])
def test_data_without_training_pairs_are_refused(tmp_path, votes):
    with pytest.raises(DataError, match="nothing to learn from"):
        build(tmp_path, votes)


def test_personaworld_goes_through_whole(tmp_path):
    votes = list(personaworld.build(DataConfig(users=20, heldout_users=8), 0))
    made, card = build(tmp_path, votes, on_overlap="drop")
    assert made == [p for p in votes if p in made] and card["with_stated_criteria"] == len(made)
    assert (
        len(votes) - len(made) == card["train_votes_dropped_as_repeated_in_val_or_test"] < 0.02 * len(votes)
    )


def test_pairs_are_asked_for_by_name_of_the_stage_that_makes_them(tmp_path):
    with pytest.raises(ArtifactError, match="recipe=build_data"):
        load_pairs(tmp_path)


# ---- pairs of a split ----


def test_asked_train_leaves_out_held_out_users():
    votes = [
        vote(1),
        vote(2, user_split="test"),
        vote(3, split="val"),
        vote(4, split="test", user_split="test"),
    ]
    assert [p.pair_id for p in pairs_of_split(votes, "train")] == ["1"]
    assert [p.pair_id for p in pairs_of_split(votes, "val")] == ["3"]
    assert [p.pair_id for p in pairs_of_split(votes, "test")] == ["4"]


def test_a_limit_on_what_is_asked_keeps_conversations_whole():
    votes = [vote(n, split="test", conversation_id=f"c{n % 5}") for n in range(15)]
    kept = pairs_of_split(votes, "test", 4)
    assert sorted(Counter(p.conversation_id for p in kept).values()) == [3, 3]
    assert (
        pairs_of_split(votes[::-1], "test", 4) == kept[::-1]
    )  # which ones does not depend on the order of the file
    assert pairs_of_split(votes, "test", 100) == votes and pairs_of_split(votes, "test") == votes


def test_a_limit_holds_for_votes_without_a_conversation():
    votes = [vote(n, split="test") for n in range(15)]
    assert len(pairs_of_split(votes, "test", 4)) == 4


# ---- data=pairs ----


def write_votes(tmp_path, rows):
    path = tmp_path / "votes.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return DataConfig(name="pairs", path=str(path))


def rows(count=4):
    return [
        pair_to_row(vote(n)) | {"shared_context": n % 2 == 0, "language": ("en", "de")[n % 2]}
        for n in range(count)
    ]


def test_only_keeps_the_rows_that_have_the_value(tmp_path):
    data = write_votes(tmp_path, rows())
    data.only = {"shared_context": "True"}
    assert [p.pair_id for p in pairs_builder.build(data, 0, LeftOut())] == ["0", "2"]
    data.only = {"language": "de"}
    assert [p.pair_id for p in pairs_builder.build(data, 0, LeftOut())] == ["1", "3"]
    data.only = {"shared_context": "True", "language": "de"}
    with pytest.raises(
        DataError, match=r"no row with data\.only\.shared_context=True and data\.only\.language=de"
    ):
        list(pairs_builder.build(data, 0, LeftOut()))


def test_only_names_a_column_that_the_file_lacks(tmp_path):
    data = write_votes(tmp_path, rows())
    data.only = {"tongue": "en"}
    with pytest.raises(DataError, match=r"votes\.jsonl, row 1: data\.only names the column 'tongue'"):
        list(pairs_builder.build(data, 0, LeftOut()))


def test_a_bad_row_ends_the_stage_or_is_skipped_and_printed(tmp_path, capsys):
    bad = rows()
    bad[1]["split"], bad[3]["chosen"] = "dev", None
    data = write_votes(tmp_path, bad)
    with pytest.raises(DataError, match="row 2, field 'split'"):
        list(pairs_builder.build(data, 0, LeftOut()))
    data.on_bad_row = "skip"
    assert [p.pair_id for p in pairs_builder.build(data, 0, LeftOut())] == ["0", "2"]
    message = capsys.readouterr().out
    assert (
        "row 2, field 'split'" in message
        and "row 4, field 'chosen'" in message
        and "skipped 2 rows" in message
    )


def test_every_skipped_row_is_named_in_a_file_that_goes_when_all_fit(tmp_path):
    halves = [row | {"chosen": "cut \ud83d"} for row in rows(60)]
    data = write_votes(
        tmp_path, [*rows(), *halves, {key: value for key, value in rows()[0].items() if key != "language"}]
    )
    data.on_bad_row, data.only = "skip", {"language": "en"}
    folder = StageFolder(tmp_path / "build_data", "build_data")
    card = build_data.run(Config(data=data), folder, pairs_builder.build)
    named = (folder.path / SKIPPED).read_text().splitlines()
    assert card["left_out"] == {"rows that do not fit": len(named)} == {"rows that do not fit": 31}
    assert "row 63, field 'chosen': expected text that UTF-8 can hold" in named[-2]
    assert "row 65: data.only names the column 'language', which the row does not have" in named[-1]
    data = write_votes(tmp_path, rows())
    build_data.run(Config(data=data), folder, pairs_builder.build)
    assert not (folder.path / SKIPPED).exists()


def test_skipping_everything_is_an_error(tmp_path):
    data = write_votes(tmp_path, [row | {"split": "dev"} for row in rows()])
    data.on_bad_row = "skip"
    with pytest.raises(DataError, match="no usable rows"):
        list(pairs_builder.build(data, 0, LeftOut()))


def test_parquet_of_pandas_is_read(tmp_path):
    pd.DataFrame(rows()).to_parquet(tmp_path / "votes.parquet")
    made = list(
        pairs_builder.build(DataConfig(name="pairs", path=str(tmp_path / "votes.parquet")), 0, LeftOut())
    )
    assert [p.pair_id for p in made] == ["0", "1", "2", "3"]


def test_every_data_name_has_its_builder_and_another_is_refused():
    assert builder(Config(data=DataConfig(name="pairs"))) is pairs_builder.build
    assert builder(Config(data=DataConfig(name="personaworld"))) is personaworld.build
    with pytest.raises(ConfigError, match=r"data\.name=foo is not one of pairs, personaworld"):
        builder(Config(data=DataConfig(name="foo")))


# ---- folders of files, and incomplete files ----


def write_shards(folder, count=6, shard=2):
    folder.mkdir()
    for n in range(0, count, shard):
        pd.DataFrame(rows(count)[n : n + shard]).to_parquet(
            folder / f"part-{n // shard:05d}-of-{count // shard:05d}.parquet"
        )
    return DataConfig(name="pairs", path=str(folder))


def ids(data):
    return [p.pair_id for p in pairs_builder.build(data, 0, LeftOut())]


def test_a_folder_of_shards_is_read_in_order(tmp_path):
    assert ids(write_shards(tmp_path / "votes")) == [str(n) for n in range(6)]


def test_a_shard_that_is_cut_off_lost_or_bad_is_named(tmp_path):
    data = write_shards(tmp_path / "votes")
    second = tmp_path / "votes" / "part-00001-of-00003.parquet"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"part-00001-of-00003\.parquet cannot be read as parquet: it was cut off"
    ):
        ids(data)
    second.unlink()
    with pytest.raises(DataError, match=r"votes holds 2 of the 3 files part-\*-of-00003"):
        ids(data)
    pd.DataFrame([rows()[0], rows()[1] | {"chosen": {"role": "assistant", "content": ""}}]).to_parquet(second)
    with pytest.raises(DataError, match=r"part-00001-of-00003\.parquet, row 2, field 'chosen'"):
        ids(data)


def test_a_build_that_fails_leaves_no_pairs_and_keeps_those_of_before(tmp_path):
    build(tmp_path, [vote(1)])
    before = load_pairs(tmp_path)

    def fails(_data, _seed, _left_out):
        yield vote(2)
        raise DataError("row 2 is bad")

    with pytest.raises(DataError, match="row 2 is bad"):
        build_data.run(Config(), StageFolder(tmp_path / "build_data", "build_data"), fails)
    assert load_pairs(tmp_path) == before
    assert sorted(p.name for p in (tmp_path / "build_data").iterdir()) == ["card.json", "pairs.parquet"]


KILLED = """
import os, sys
from pathlib import Path
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.config import ROOT, Config, DataConfig
from pgenrm_train.stages import build_data
from data_builders.sources import personaworld

def votes(data, seed, left_out):
    for number, pair in enumerate(personaworld.build(data, seed)):
        if number == 3000:
            os.kill(os.getpid(), 9)
        yield pair

folder = StageFolder(Path(sys.argv[1]) / "build_data", "build_data")
build_data.run(Config(data=DataConfig(users=400, heldout_users=8)), folder, votes)
"""


def test_a_killed_build_is_not_read_and_the_next_one_is_as_if_nothing_had_been(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9
    with pytest.raises(ArtifactError, match="recipe=build_data"):
        load_pairs(tmp_path)
    left = sorted(p.name for p in (tmp_path / "build_data").iterdir())
    build(tmp_path, [vote(1), vote(2)])
    assert len(load_pairs(tmp_path)) == 2 and left != []
    assert sorted(p.name for p in (tmp_path / "build_data").iterdir()) == ["card.json", "pairs.parquet"]


def test_rows_left_out_by_a_builder_are_in_the_card_and_printed(tmp_path, capsys):
    data = write_votes(tmp_path, [*rows(), {"user_id": "u"}])
    data.on_bad_row = "skip"
    card = build_data.run(
        Config(data=data), StageFolder(tmp_path / "build_data", "build_data"), pairs_builder.build
    )
    assert card["left_out"] == {"rows that do not fit": 1} and card["pairs"] == 4
    assert (
        (tmp_path / "build_data" / SKIPPED)
        .read_text()
        .startswith(f"{data.path}, row 5, field 'context': expected a value")
    )
    assert "left out 1 rows that do not fit" in capsys.readouterr().out


def test_many_shards_hold_what_the_builder_gave(tmp_path):
    votes = [
        vote(n, f"u{n % 7}", f"good {n}", f"bad {n}", split=("train", "test")[n % 2]) for n in range(40_000)
    ]
    card = build(tmp_path, votes)[1]
    assert len(parts(tmp_path / "build_data" / "pairs.parquet")) == 3 and card["pairs_by_split"] == {
        "train": 20_000,
        "test": 20_000,
    }
    assert load_pairs(tmp_path) == votes


# ---- splits ----


@pytest.mark.parametrize("by", ["within_user", "user_disjoint", "pair"])
def test_splits_depend_on_the_seed_and_not_on_the_order_of_rows(by):
    votes = [
        vote(f"{u}-{n}", f"u{u}", f"good {n}", conversation_id=f"c{u}-{n // 2}")
        for u in range(30)
        for n in range(12)
    ]

    def split(given, seed):
        index = indexed(given)
        index.split(by, seed)
        return {name: (of, user) for name, of, user, _ in index.decisions()}

    first = split(votes, 0)
    assert split(votes[::-1], 0) == first != split(votes, 1)
    assert {user for _, user in first.values()} <= {"train", "val", "test"}


@pytest.mark.parametrize(
    ("users", "held_out"), [(1, {}), (2, {"test": 1}), (9, {"test": 1}), (40, {"test": 4, "val": 2})]
)
def test_a_share_of_the_users_is_held_out_and_one_wherever_another_can_train(users, held_out):
    index = indexed(
        [
            vote(f"{u}-{n}", f"u{u}", f"good {n}", conversation_id=f"c{u}-{n}")
            for u in range(users)
            for n in range(4)
        ]
    )
    index.split("user_disjoint", 0)
    rows = Counter((split, of) for _, split, of, _ in index.decisions())
    expected = Counter({("train", "train"): 4 * (users - sum(held_out.values()))})
    for split, count in held_out.items():  # half of their votes are history
        expected |= Counter({("train", split): 2 * count, (split, split): 2 * count})
    assert rows == expected


def test_val_share_holds_out_users_with_half_of_their_conversations_as_history():
    votes = [
        vote(f"{u}-{n}", f"u{u}", f"good {n}", conversation_id=f"c{u}-{n}")
        for u in range(40)
        for n in range(4)
    ]
    index = indexed([*votes, vote("lone", "lone"), vote("test", "u0", "asked", split="test")])
    index.split("source", 0)
    assert index.hold_out_val(0.1) == 4
    rows = Counter((split, of) for _, split, of, _ in index.decisions())
    assert rows["val", "val"] == 8 == rows["train", "val"] and rows["train", "train"] == 36 * 4 + 1
    again = indexed(votes[::-1])
    again.split("source", 0)
    again.hold_out_val(0.1)
    assert sum(split == "val" for _, split, _, _ in again.decisions()) == 8


def test_val_share_is_refused_where_there_is_a_split_or_too_few_users(tmp_path):
    votes = [vote(f"{n}", "a", f"good {n}", conversation_id=f"c{n}") for n in range(4)]
    with pytest.raises(DataError, match="needs two training users"):
        build(tmp_path / "one", votes, val_share=0.1)
    others = [vote(f"v{n}", "b", f"good {n}", split="val") for n in range(2)]
    with pytest.raises(DataError, match="the data has one of 2 votes"):
        build(tmp_path / "split", votes + others, val_share=0.1)
    second = [vote(f"b{n}", "b", f"good {n}", conversation_id=f"d{n}") for n in range(4)]
    _, card = build(tmp_path / "made", votes + second, val_share=0.1)
    assert card["pairs_by_split"] == {"train": 6, "val": 2}


def test_users_of_few_conversations_have_their_share_of_val():
    votes = [vote(f"{u}-{n}", f"u{u:03d}", conversation_id=f"c{u}-{n}") for u in range(300) for n in range(4)]
    index = indexed(votes)
    index.split("within_user", 0)
    counts = index.counts("split")
    assert (
        0.6 < counts["train"] / 1200 < 0.8
        and 0.05 < counts["val"] / 1200 < 0.15
        and 0.1 < counts["test"] / 1200 < 0.3
    )
    with_history = {v.user_id for v, (_, split, *_) in zip(votes, index.decisions()) if split == "train"}
    assert len(with_history) == 300
