"""build_data: a raw source → preference pairs of one schema, with a card of counts and hashes.

Needs a builder.  Makes `pairs.parquet` (a folder of shards) and `card.json`.

The pairs pass through once, into raw shards and an index of hashes on disk.  Ids, splits and limits are
decided on the index and applied to the shards as Arrow columns.  So memory holds one batch, however many
pairs there are.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypedDict

from pgenrm_train.config import CHOOSING, Config, StageName
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_json
from pgenrm_train.prompts.writer import PAIRS
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.raw_rows import LeftOut
from pgenrm_train.records.rows import pair_schema, pair_tables
from pgenrm_train.records.shards import ShardWriter, digest, tables
from pgenrm_train.records.vote_index import TRAINS, VoteIndex
from pgenrm_train.records.vote_times import VoteTimes
from pgenrm_train.run.folder import StageFolder

USER_SPLITS = ("train", "dev", "val", "test")
# (data configuration, seed, `LeftOut` that counts omitted votes by reason) → pairs
Builder = Callable[..., Iterable[PreferencePair]]


class Counts(TypedDict):
    """Counts of the kept votes."""

    pairs: int
    users: int
    pairs_by_split: dict[str, int]
    users_by_user_split: dict[str, int]
    pairs_by_kind: dict[str, int]
    with_stated_criteria: int
    chosen_longer_share: float
    identical_responses: int


class Card(Counts):
    """Content of `card.json`."""

    train_votes_dropped_as_repeated_in_val_or_test: int
    val_votes_dropped_as_repeated_in_test: int
    left_out: dict[str, int]
    normalised: dict[str, int]
    val_and_test_votes_whose_times_leave_no_history: int
    sha256: str


def run(config: Config, folder: StageFolder, build: Builder) -> Card:
    """Build, check and write; return the card.

    Raises DataError if nothing is left to learn from, unless the data is for evaluation alone.
    """
    left_out = LeftOut()
    raw, index = folder.path / ".raw.parquet", VoteIndex()
    try:
        with ShardWriter(raw, pair_schema()) as writer:
            for table in pair_tables(index.following(build(config.data, config.seed, left_out))):
                writer.table(table)
        index.added()
        dropped = _decide(index, config)
        if config.recipe not in (StageName.EVALUATE, *CHOOSING) and not index.number(
            f"SELECT COUNT(*) FROM votes WHERE kept AND {TRAINS}"
        ):
            raise DataError(
                "the data holds no pair with split=train of a training user: there is nothing to learn from"
            )
        counts, times, (strangers, stranger) = _counts(index), VoteTimes.of(index), index.strangers()
        _write(raw, index, folder.path / PAIRS, times.scale)
    finally:
        left_out.write(folder.path)
        index.close()
        shutil.rmtree(raw, ignore_errors=True)
    for word, users in counts["users_by_user_split"].items():
        if word not in USER_SPLITS:  # it may have been meant to hold them out
            print(
                f"warning: {users} users train, since their user_split={word!r} is neither val nor test",
                flush=True,
            )
    for sentence in times.sentences():
        print(f"{config.data.name}: {sentence}", flush=True)
    if strangers:
        print(
            f"{config.data.name}: {strangers} val and test votes have no history, because their users have "
            f"no training vote, e.g. {stranger!r}",
            flush=True,
        )
    for what, count in (+left_out.normalised).items():
        print(f"{config.data.name}: normalised {count} {what}", flush=True)
    for reason, count in (+left_out).most_common():
        print(f"{config.data.name}: left out {count} {reason}", flush=True)
    card: Card = {
        **counts,
        "train_votes_dropped_as_repeated_in_val_or_test": dropped["train"],
        "val_votes_dropped_as_repeated_in_test": dropped["val"],
        "left_out": dict(+left_out),
        "normalised": dict(+left_out.normalised),
        "val_and_test_votes_whose_times_leave_no_history": times.emptied,
        "sha256": digest(folder.path / PAIRS),
    }
    write_json(folder.path / "card.json", card)
    return card


def _decide(index: VoteIndex, config: Config) -> Counter[str]:
    index.name_votes()
    index.split(config.data.split_by, config.seed)
    if config.data.val_share:
        if votes := index.number("SELECT COUNT(*) FROM votes WHERE split = 'val'"):
            raise DataError(
                f"data.val_share={config.data.val_share:g} makes a validation split, and the data has one of "
                f"{votes} votes; set data.val_share=0"
            )
        if not (users := index.hold_out_val(config.data.val_share)):
            raise DataError(
                f"data.val_share={config.data.val_share:g} needs two training users, one of them with votes "
                "in two conversations"
            )
        print(
            f"data.val_share={config.data.val_share:g}: {users} users are held out for validation", flush=True
        )
    index.limit_training(config.data.max_train_pairs)
    dropped = index.drop_overlap()
    # Splits made here simply leave the repeated votes out.
    made = config.data.split_by != "source" or config.data.val_share > 0
    fails = config.data.on_overlap == "fail" and not made
    if fails and (count := dropped.total()):
        earlier, later, user = index.overlap()
        raise DataError(
            f"{count} votes of the source are cast again by the same user, on the same texts, in a later "
            f"split, e.g. {earlier} as {later} by user {user}: a test would repeat what was learnt; correct "
            "the source, drop them with data.on_overlap=drop, or split again with data.split_by=within_user"
        )
    return dropped


def _write(raw: Path, index: VoteIndex, path: Path, time_scale: int) -> None:
    """The raw shards, with the index's ids and splits, times in seconds, and without what it left out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    decisions = index.decisions()
    with ShardWriter(path, pair_schema()) as writer:
        for batch in tables(raw, batch=8192):
            names, splits, user_splits, kept = zip(*islice(decisions, batch.num_rows), strict=True)
            table = pa.Table.from_batches([batch])
            decided = {"pair_id": names, "split": splits, "user_split": user_splits}
            columns = {name: pa.array(values, pa.string()) for name, values in decided.items()}
            columns["time"] = pc.divide(table["time"], float(time_scale))
            for name, column in columns.items():
                table = table.set_column(table.schema.get_field_index(name), name, column)
            writer.table(table.filter(pa.array(kept).cast(pa.bool_())))


def _counts(index: VoteIndex) -> Counts:
    pairs = index.number("SELECT COUNT(*) FROM votes WHERE kept")
    return {
        "pairs": pairs,
        "users": index.number("SELECT COUNT(DISTINCT user) FROM votes WHERE kept"),
        "pairs_by_split": index.counts("split"),
        "users_by_user_split": index.counts(
            "user_split", "(SELECT DISTINCT user, user_split, 0 AS rowid FROM votes WHERE kept)"
        ),
        "pairs_by_kind": index.counts("COALESCE(kind, '(none)')"),
        "with_stated_criteria": index.number("SELECT SUM(criteria) FROM votes WHERE kept"),
        "chosen_longer_share": round(index.number("SELECT SUM(longer > 0) FROM votes WHERE kept") / pairs, 4),
        "identical_responses": index.number("SELECT SUM(identical) FROM votes WHERE kept"),
    }
