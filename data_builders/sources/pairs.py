"""data=pairs, chatbot_arena and prism_personalized: votes in PersonalRewardBench's schema.

Source of `pairs`: the parquet or JSONL file of `data.path`, or a folder of them.  The others are the two
parts of PersonalRewardBench (SynthesizeMe, Ryan et al. 2025), for which `data.path` may name a copy on disk.
Users appear in every split; the `split` column counts, not the hub's split.  Columns with verdicts of other
judges are ignored.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_builders.sources import hub
from pgenrm_train.config import DataConfig
from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.raw_rows import SKIPPED, LeftOut
from pgenrm_train.records.rows import row_to_pair

HUB = {
    "chatbot_arena": "MichaelR207/chatbot_arena_personalized_0125",
    "prism_personalized": "MichaelR207/prism_personalized_0125",
}
LISTED = 20  # skipped rows that are printed


def build(data: DataConfig, seed: int, left_out: LeftOut) -> Iterator[PreferencePair]:
    """Stream the pairs.  DataError names file, row, field and expectation, or reports that no row is left."""
    source = data.path or HUB[data.name]
    bad, kept = BadRows(data.on_bad_row, left_out), 0
    for table, rows in hub.tables(source):
        for number, row in enumerate(rows, start=1):
            try:
                if not _wanted(row, data.only, f"{table}, row {number}"):
                    continue
                pair = row_to_pair(row, Path(table), number)
            except DataError as error:
                bad.take(error)
                continue
            kept += 1
            yield pair
    bad.report(source)
    if not kept:
        raise DataError(f"{source} holds no usable rows; expected at least one preference pair")


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


def _wanted(row: hub.Row, only: Mapping[str, object], where: str) -> bool:
    if missing := [column for column in only if column not in row]:
        raise DataError(f"{where}: data.only names the column '{missing[0]}', which the row does not have")
    return all(str(row[column]) == str(value) for column, value in only.items())
