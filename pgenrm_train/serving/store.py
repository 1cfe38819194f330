"""Users' votes and the cached answers about them, in SQLite or PostgreSQL.

    votes           one row per vote
    answers         the generations of one prompt, by the hash of model, prompt and sampling
    answer_owners   the users whose votes that prompt showed
    deleted_users   hashes of the ids of deleted users, until they have votes again

Only answers about stored users are kept.  Deleting a user deletes the votes and every answer whose prompt
showed them, also as those of a similar user.  A deleted user is neither imported again nor a similar user.
SQLite overwrites deleted rows, and its log is emptied.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    exc,
    insert,
    make_url,
    select,
    text,
)

from pgenrm_train.errors import ConfigError, first_line
from pgenrm_train.records.pairs import Message, PreferencePair

_TABLES = MetaData()
_VOTES = Table(
    "votes",
    _TABLES,
    Column("id", Integer, primary_key=True),
    Column("user_id", String, nullable=False, index=True),
    Column("context", Text, nullable=False),
    Column("chosen", Text, nullable=False),
    Column("rejected", Text, nullable=False),
    Column("time", Float),
)
_ANSWERS = Table(
    "answers", _TABLES, Column("key", String, primary_key=True), Column("value", Text, nullable=False)
)
_OWNERS = Table(
    "answer_owners",
    _TABLES,
    Column("key", String, ForeignKey("answers.key", ondelete="CASCADE"), primary_key=True),
    Column("user_id", String, primary_key=True, index=True),
)
_DELETED = Table("deleted_users", _TABLES, Column("digest", String, primary_key=True))
EMPTY_TRIES = 200
AT_ONCE = 10_000  # parameters of a query, below the limits of both databases


class UserStore:
    """The database at an SQLAlchemy URL, for any thread.  Raises ConfigError if it cannot be opened."""

    def __init__(self, url: str) -> None:
        try:
            place = make_url(url)
            self._engine = create_engine(place, pool_pre_ping=True)
            self._sqlite = place.get_backend_name() == "sqlite"
            if self._sqlite:
                event.listen(self._engine, "connect", _set_up_sqlite)
            _TABLES.create_all(self._engine)
        except (exc.SQLAlchemyError, ModuleNotFoundError) as error:
            shown = make_url(url).render_as_string() if "://" in url else "(not a URL)"
            raise ConfigError(f"serve.store={shown} cannot be opened ({first_line(error)})") from None

    def votes(self, user_id: str) -> list[PreferencePair]:
        """The user's votes, oldest first; none for an unknown user."""
        query = select(_VOTES).where(_VOTES.c.user_id == user_id)
        query = query.order_by(_VOTES.c.time.nulls_first(), _VOTES.c.id)
        with self._engine.connect() as connection:
            return [_as_pair(row) for row in connection.execute(query).mappings()]

    def add(self, votes: Sequence[PreferencePair], *, replace: bool = False) -> None:
        """Append votes; with `replace`, earlier votes and cached answers of their users are deleted first."""
        rows = [_as_row(vote) for vote in votes]
        with self._engine.begin() as connection:
            for user in dict.fromkeys(vote.user_id for vote in votes):
                if replace:
                    _delete(connection, user)
                connection.execute(delete(_DELETED).where(_DELETED.c.digest == _digest(user)))
            connection.execute(insert(_VOTES), rows)
        if replace:
            self._empty_log()

    def delete(self, user_id: str) -> int:
        """Delete everything of a user, and remember that; returns the number of votes."""
        with self._engine.begin() as connection:
            votes = _delete(connection, user_id)
            connection.execute(delete(_DELETED).where(_DELETED.c.digest == _digest(user_id)))
            connection.execute(insert(_DELETED), {"digest": _digest(user_id)})
        self._empty_log()
        return votes

    def deleted(self, users: Iterable[str]) -> set[str]:
        """Those of the users that were deleted and have no votes since."""
        names = {_digest(user): user for user in users}
        digests, found = list(names), set()
        with self._engine.connect() as connection:
            for start in range(0, len(digests), AT_ONCE):
                among = _DELETED.c.digest.in_(digests[start : start + AT_ONCE])
                found |= set(connection.scalars(select(_DELETED.c.digest).where(among)))
        return {names[digest] for digest in found}

    def answers(self, keys: Iterable[str]) -> dict[str, str]:
        """The cached answers among `keys`."""
        query = select(_ANSWERS.c.key, _ANSWERS.c.value).where(_ANSWERS.c.key.in_(list(keys)))
        with self._engine.connect() as connection:
            return {row.key: row.value for row in connection.execute(query)}

    def keep(self, answers: Mapping[str, tuple[str, Set[str]]]) -> None:
        """Keep answers (key → value, users shown), unless one of the users was deleted in the meantime."""
        values = [{"key": key, "value": value} for key, (value, _) in answers.items()]
        owners = [
            {"key": key, "user_id": user} for key, (_, users) in answers.items() for user in sorted(users)
        ]
        digests = {_digest(owner["user_id"]) for owner in owners}
        # Another replica may have kept the same answer.
        with suppress(exc.IntegrityError), self._engine.connect() as connection:
            connection.execute(insert(_ANSWERS), values)
            connection.execute(insert(_OWNERS), owners)
            # After a write to the answers no deletion can come in between (`_delete`).
            deleted = select(_DELETED.c.digest).where(_DELETED.c.digest.in_(digests)).limit(1)
            if connection.scalar(deleted) is None:
                connection.commit()

    def check(self) -> None:
        """Raise SQLAlchemyError if the database does not answer."""
        with self._engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        self._engine.dispose()

    def _empty_log(self) -> None:
        if not self._sqlite:
            return
        for _ in range(EMPTY_TRIES):
            with self._engine.connect() as connection:
                busy, _, _ = connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)")).one()
            if not busy:
                return
            time.sleep(0.05)  # SQLite itself does not wait for another checkpoint
        raise exc.TimeoutError("the log is in use and cannot be emptied")


def local_place(url: str) -> str:
    """The URL with an absolute path, if it is that of an SQLite file."""
    place = make_url(url)
    if place.get_backend_name() != "sqlite" or not place.database:
        return url
    return place.set(database=str(Path(place.database).absolute())).render_as_string(hide_password=False)


def _set_up_sqlite(connection: Any, _: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("PRAGMA foreign_keys=ON")


def _digest(user_id: str) -> str:
    return hashlib.sha256(user_id.encode()).hexdigest()


def _delete(connection: Connection, user_id: str) -> int:
    if connection.dialect.name == "postgresql":  # SQLite has one writer at a time
        connection.execute(text("LOCK TABLE answers IN SHARE ROW EXCLUSIVE MODE"))
    votes = connection.execute(delete(_VOTES).where(_VOTES.c.user_id == user_id)).rowcount
    shown = select(_OWNERS.c.key).where(_OWNERS.c.user_id == user_id)
    connection.execute(delete(_ANSWERS).where(_ANSWERS.c.key.in_(shown)))
    return votes


def _as_row(vote: PreferencePair) -> dict[str, object]:
    return {
        "user_id": vote.user_id,
        "context": json.dumps([[m.role, m.content] for m in vote.context], ensure_ascii=False),
        "chosen": vote.chosen,
        "rejected": vote.rejected,
        "time": vote.time,
    }


def _as_pair(row: RowMapping) -> PreferencePair:
    context = tuple(Message(role, content) for role, content in json.loads(row["context"]))
    return PreferencePair(
        str(row["id"]), row["user_id"], context, row["chosen"], row["rejected"], time=row["time"]
    )
