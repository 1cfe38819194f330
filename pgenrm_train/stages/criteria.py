"""Synthetic criteria for the users who stated nothing (METHOD §4): supervision of CRE, kept apart from the data.

Needs `build_data/pairs.parquet` and somebody who infers.  Makes `criteria.parquet`: one row a user with `criteria`, or null and the
reason; `votes` is how many were read.  See `synthesis` for what is asked and where it may not go.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pgenrm_train.backends.protocols import CriteriaWriter
from pgenrm_train.config import Config
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import write_table
from pgenrm_train.records.pairs import ExplicitSignals, HistoryItem, PreferencePair
from pgenrm_train.records.raw_rows import read_rows
from pgenrm_train.rewards.judging import signals
from pgenrm_train.rewards.synthetic_criteria import read_criteria
from pgenrm_train.run.concurrency import concurrently
from pgenrm_train.run.folder import StageFolder

CRITERIA = "criteria.parquet"
VOTES = 12  # of a user, drawn at random

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


def run(
    config: Config,
    folder: StageFolder,
    pairs: Sequence[PreferencePair],
    writer: CriteriaWriter,
    progress: Progress,
) -> dict[str, Any]:
    """Infer and write; returns counts and cost.  Raises DataError when no user's criteria could be inferred."""
    users = votes_of_silent_users(pairs, config.seed)
    if expected := writer.expect([votes for _, votes in users], config.sec.samples_per_pair):
        folder.note(estimate=dict(expected))
    found = concurrently(
        lambda user: _infer(*user, writer, config.sec.samples_per_pair), users, writer.in_flight
    )
    rows = [
        row
        for _, row in sorted(
            progress(found, "synthetic criteria", len(users)), key=lambda numbered: numbered[0]
        )
    ]
    failures = Counter(row["failure"] for row in rows if row["failure"])
    if rows and len(rows) == failures.total():
        raise DataError(f"no user's criteria could be inferred; reasons: {dict(failures)}")
    write_table(
        folder.path / CRITERIA, rows or [{"user_id": None, "criteria": None, "failure": None, "votes": 0}]
    )
    return {
        "users": len(rows),
        "inferred": len(rows) - failures.total(),
        "failures": dict(failures),
        "teacher": dict(writer.facts()),
    }


def load(run_dir: Path) -> dict[str, ExplicitSignals]:
    """User → synthetic criteria.  Raises ArtifactError when the stage has not run."""
    path = run_dir / "criteria" / CRITERIA
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; run recipe=criteria with the same run_dir first")
    return {
        row["user_id"]: ExplicitSignals(criteria=row["criteria"], synthetic=True)
        for row in read_rows(path)
        if row["criteria"]
    }


def votes_of_silent_users(
    pairs: Sequence[PreferencePair], seed: int
) -> list[tuple[str, tuple[HistoryItem, ...]]]:
    """Users with a training vote for which nothing was stated, each with up to `VOTES` of their training votes, oldest first."""
    votes: dict[str, list[PreferencePair]] = defaultdict(list)
    silent: dict[str, None] = {}
    for pair in pairs:
        if pair.trains:
            votes[pair.user_id].append(pair)
            if not signals(pair.explicit):
                silent[pair.user_id] = None
    found = []
    for user in silent:
        count = len(votes[user])
        drawn = random.Random(f"{seed}/criteria/{user}").sample(range(count), min(count, VOTES))
        found.append((user, tuple(votes[user][i].as_history() for i in sorted(drawn))))
    return found


def _infer(user: str, votes: Sequence[HistoryItem], writer: CriteriaWriter, tries: int) -> dict[str, Any]:
    failure, read = None, None
    for attempt in range(tries):
        answer = writer.infer(user, votes, attempt)
        read = read_criteria(answer.text) if answer.text is not None else None
        if read is not None:
            break
        failure = f"teacher:{answer.failure}" if answer.text is None else "unreadable"
    criteria = read.criteria if read else None
    return {"user_id": user, "criteria": criteria, "failure": None if read else failure, "votes": len(votes)}
