"""Synthetic criteria for users who stated nothing (METHOD §4): supervision of CRE, kept apart from the data.

Needs `build_data/pairs.parquet` and a writer that infers.  Makes `criteria.parquet`: one row per user with
`criteria`, or null and the reason; `votes` counts the votes read.  `rewards.synthetic_criteria` defines
prompt and limits.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pgenrm_train.backends.protocols import CriteriaWriter, server_words
from pgenrm_train.config import Config, StageName
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import write_table
from pgenrm_train.records.pairs import ExplicitSignals, HistoryItem, PreferencePair
from pgenrm_train.records.raw_rows import read_rows
from pgenrm_train.rewards.judging import signals
from pgenrm_train.rewards.synthetic_criteria import read_criteria
from pgenrm_train.run.concurrency import concurrently, progress
from pgenrm_train.run.folder import StageFolder

CRITERIA = "criteria.parquet"
VOTES = 12  # of a user, drawn at random


@dataclass(frozen=True, slots=True)
class Inferred:
    """One user's criteria, or the reason why there are none: one row of `criteria.parquet`."""

    user_id: str | None
    criteria: str | None
    failure: str | None
    votes: int


def run(
    config: Config, folder: StageFolder, pairs: Sequence[PreferencePair], writer: CriteriaWriter
) -> dict[str, object]:
    """Infer and write; return counts and cost.  Raises DataError if no user's criteria could be inferred."""
    users, tries = votes_of_silent_users(pairs, config.seed), config.sec.samples_per_pair
    if expected := writer.expect([votes for _, votes in users], tries):
        folder.note(estimate=expected.for_manifest())
    answers = concurrently(lambda user: _infer(*user, writer, tries), users, writer.in_flight)
    results = dict(progress(answers, "synthetic criteria", len(users)))
    rows = [results[index] for index in range(len(users))]
    failures = Counter(row.failure for row in rows if row.failure)
    if rows and len(rows) == failures.total():
        words = server_words(writer.spending())
        raise DataError(f"no user's criteria could be inferred; reasons: {dict(failures)}{words}")
    write_table(
        folder.path / CRITERIA, [asdict(row) for row in rows or [Inferred(None, None, None, votes=0)]]
    )
    return {
        "users": len(rows),
        "inferred": len(rows) - failures.total(),
        "failures": dict(failures),
        "teacher": spending.for_manifest() if (spending := writer.spending()) else {},
    }


def load(run_dir: Path) -> dict[str, ExplicitSignals]:
    """User → synthetic criteria.  Raises ArtifactError if the stage has not run."""
    path = run_dir / StageName.CRITERIA / CRITERIA
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; run recipe=criteria with the same run_dir first")
    return {
        str(row["user_id"]): ExplicitSignals(criteria=str(row["criteria"]), synthetic=True)
        for row in read_rows(path)
        if row["criteria"]
    }


def votes_of_silent_users(
    pairs: Sequence[PreferencePair], seed: int
) -> list[tuple[str, tuple[HistoryItem, ...]]]:
    """Training users who stated nothing, each with up to `VOTES` training votes, oldest first."""
    votes: dict[str, list[PreferencePair]] = defaultdict(list)
    training = [pair for pair in pairs if pair.trains]
    for pair in training:
        votes[pair.user_id].append(pair)
    users = []
    for user in dict.fromkeys(pair.user_id for pair in training if not signals(pair.explicit)):
        count = len(votes[user])
        drawn = random.Random(f"{seed}/criteria/{user}").sample(range(count), min(count, VOTES))
        users.append((user, tuple(votes[user][i].as_history() for i in sorted(drawn))))
    return users


def _infer(user: str, votes: Sequence[HistoryItem], writer: CriteriaWriter, tries: int) -> Inferred:
    failure = None
    for attempt in range(tries):
        answer = writer.infer(user, votes, attempt)
        if answer.text is None:
            failure = f"teacher:{answer.failure}"
        elif stated := read_criteria(answer.text):
            return Inferred(user, stated.criteria, None, len(votes))
        else:
            failure = "unreadable"
    return Inferred(user, None, failure, len(votes))
