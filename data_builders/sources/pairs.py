"""data=pairs, chatbot_arena, prism_personalized and rm_as_user: votes in PersonalRewardBench's schema.

Source of `pairs`: the parquet or JSONL file of `data.path`, or a folder of them; a row may hold several rated
or ranked responses (`several_responses`).  `chatbot_arena` and `prism_personalized` are the two parts of
PersonalRewardBench (SynthesizeMe, Ryan et al. 2025), for which `data.path` may name a copy on disk.
Users appear in every split; the `split` column counts, not the hub's split.  Columns with verdicts of other
judges are ignored.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_builders.sources import hub, rm_as_user
from data_builders.sources.several_responses import name_of, ordered, votes_of
from pgenrm_train.config import DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.records.file_columns import file_columns, missing_columns
from pgenrm_train.records.ids import read_id
from pgenrm_train.records.json_texts import JsonTexts
from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.raw_rows import SKIPPED, LeftOut, check_texts
from pgenrm_train.records.rows import row_to_pair

HUB = {
    "chatbot_arena": "MichaelR207/chatbot_arena_personalized_0125",
    "prism_personalized": "MichaelR207/prism_personalized_0125",
    "rm_as_user": rm_as_user.HUB,
}
LISTED = 20  # skipped rows, or values of a column, that a message names
# What programs write as text for a user who is missing.
NOBODY = ("nan", "NaN", "None", "null", "NULL", "<NA>", "N/A")
USER_IDS = "user ids with white space at an end, or in another Unicode form than NFC"


def build(data: DataConfig, seed: int, left_out: LeftOut) -> Iterator[PreferencePair]:
    """Stream the pairs.  DataError names file, row, field and expectation, or reports that no row is left."""
    source = data.path or HUB[data.name]
    bad, only, texts, named = BadRows(data.on_bad_row, left_out), Only(data.only), JsonTexts(), NamedColumns()
    nobody: Counter[str] = Counter()
    kept, wide = 0, data.name == "rm_as_user"
    for table, rows in rm_as_user.tables(source) if wide else hub.tables(source):
        path = Path(table)
        named.open(path, Path(source))
        for number, raw in enumerate(rows, start=1):
            where = f"{table}, row {number}"
            try:
                row = named.add(raw)
                if not only.keeps(row, where):
                    continue
                row = texts.read(row, where)
                votes = (_votes_of_raters if wide else _votes)(row, path, number, data.pairs_of, left_out)
            except DataError as error:
                bad.take(error)
                continue
            kept += len(votes)
            for user, pair in votes:
                if pair.user_id in NOBODY:
                    nobody[pair.user_id] += 1
                if isinstance(user, str) and user != pair.user_id:
                    left_out.normalised[USER_IDS] += 1
                yield pair
    bad.report(source)
    named.report(data.name)
    for user, count in (+nobody).items():
        print(
            f"warning: {count} votes are of one user {user!r}, which many programs write for a missing user",
            flush=True,
        )
    if not kept:
        raise DataError(
            only.mismatch(source) or f"{source} holds no usable rows; expected at least one preference pair"
        )


_AFTER_SCORES = [field.name for field in fields(PreferencePair)][8:]
_user_id = lru_cache(maxsize=1024)(read_id)
Votes = list[tuple[object, PreferencePair]]  # of one raw row, each with the user's id as it was written


def _votes(row: hub.Row, path: Path, number: int, rule: str, left_out: LeftOut) -> Votes:
    votes = votes_of(row, f"{path}, row {number}", rule, f"{path.stem}-{number}", left_out)
    return [(vote.get("user_id"), row_to_pair(vote, path, number)) for vote in votes]


def _votes_of_raters(row: hub.Row, path: Path, number: int, rule: str, left_out: LeftOut) -> Votes:
    """The votes of all reward models on one row.

    They differ in user, order and scores of the responses alone.  So the texts are checked once, and the
    first vote in full.
    """
    where, votes = f"{path}, row {number}", Votes()
    rated = rm_as_user.rated(row, where)
    texts, name = rated.texts, name_of(rated.row, f"{path.stem}-{number}")
    check_texts({"responses": [*texts], "user_id": [*rated.scores]}, where)
    context: tuple[Message, ...] | None = None
    rest: tuple[Any, ...] = ()
    for rater, scores in rated.scores.items():
        user = _user_id(rater) or ""
        for better, worse in ordered(texts, scores, rule, left_out):
            if context is None:
                first = {"user_id": user, "chosen": texts[better], "rejected": texts[worse]}
                checked = row_to_pair({**rated.row, **first}, path, number)
                context, rest = checked.context, tuple(getattr(checked, field) for field in _AFTER_SCORES)
            ends = (texts[better], texts[worse], name, scores[better], scores[worse])
            pair = PreferencePair(f"{name}/{better}-{worse}", user, context, *ends, *rest)
            votes.append((rater, pair))
    return votes


class BadRows:
    """Handling of bad rows: the first one ends the build, or all are skipped, counted and listed."""

    def __init__(self, policy: str, left_out: LeftOut) -> None:
        self.policy, self.left_out = policy, left_out

    def take(self, error: DataError) -> None:
        """Raise the error, or note it if the policy is `skip`."""
        if self.policy == "fail":
            raise error
        self.left_out["rows that do not fit"] += 1
        self.left_out.rows.append(str(error))

    def report(self, source: str) -> None:
        for sentence in self.left_out.rows[:LISTED]:
            print(f"skipped: {sentence}", flush=True)
        if count := len(self.left_out.rows):
            print(f"skipped {count} rows of {source} in all; {SKIPPED} of the build lists them", flush=True)


class Only:
    """The filter of `data.only`: rows whose columns have the given values."""

    def __init__(self, wanted: Mapping[str, object]) -> None:
        self.wanted = {column: _spelled(value) for column, value in wanted.items()}
        self.matched = 0
        self.values: dict[str, Counter[str]] = {column: Counter() for column in wanted}

    def keeps(self, row: hub.Row, where: str) -> bool:
        """Whether the row has all values.  DataError names a column that it lacks."""
        if missing := [column for column in self.wanted if column not in row]:
            raise DataError(
                f"{where}: data.only names the column '{missing[0]}', which the row does not have"
            )
        spelled = {column: _spelled(row[column]) for column in self.wanted}
        for column, value in spelled.items():
            if value in self.values[column] or len(self.values[column]) < LISTED:
                self.values[column][value] += 1
        self.matched += spelled == self.wanted
        return spelled == self.wanted

    def mismatch(self, source: str) -> str | None:
        """A sentence with the values that exist, if no row had those wanted."""
        if self.matched or not any(self.values.values()):
            return None
        wanted = " and ".join(f"data.only.{column}={value}" for column, value in self.wanted.items())
        held = "; ".join(
            f"'{column}' holds {', '.join(value[:40] for value in values)}{', …' * (len(values) == LISTED)}"
            for column, values in self.values.items()
        )
        return f"{source} holds no row with {wanted}; the column {held}"


class NamedColumns:
    """Columns that the names of files and folders give to the rows in them."""

    def __init__(self) -> None:
        self.columns: dict[str, object] = {}
        self.values: dict[str, Counter[object]] = defaultdict(Counter)
        self.example: dict[str, Path] = {}

    def open(self, file: Path, source: Path) -> None:
        """Begin a file of the source."""
        self.file, self.columns = file, file_columns(file, source)

    def add(self, row: hub.Row) -> hub.Row:
        """The row with the columns that it lacks."""
        added = missing_columns(row, self.columns)
        for column, value in added.items():
            self.values[column][value] += 1
            self.example[column] = self.file
        return {**row, **added} if added else row

    def report(self, name: str) -> None:
        for column, values in self.values.items():
            counts = ", ".join(f"{count} {value}" for value, count in values.most_common(4))
            more = ", …" * (len(values) > 4)
            print(
                f"{name}: {values.total()} rows take the column {column} from the name of their file or "
                f"folder ({counts}{more}), e.g. {self.example[column]}",
                flush=True,
            )


def _spelled(value: object) -> str:
    """A value for comparisons: 3, 3.0 and "3" are one."""
    if value is None or value != value:  # NaN is what pandas writes for null
        return "null"
    return str(value) if (text := read_id(value)) is None else text
