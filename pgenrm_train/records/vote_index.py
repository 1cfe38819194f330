"""An index of votes in SQLite, for rules over a full data set in memory that does not grow with it.

A builder streams its pairs.  Rules that concern all of them are applied here: one id per vote, splits,
limits, votes that are repeated in another split.  The index, a temporary file, has one row of hashes
and labels per vote.  Its decisions take effect when the pairs are written.
"""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby

from pgenrm_train.records.pairs import PreferencePair

HELDOUT_SHARES = (("test", 0.1), ("val", 0.05))  # of the users, under `user_disjoint`
SHARES = (("train", 0.7), ("val", 0.1), ("test", 0.2))
TRAINS = "split = 'train' AND user_split NOT IN ('val', 'test')"  # as PreferencePair.trains
_BATCH = 2000
_TABLES = """
CREATE TABLE votes (
    row INTEGER PRIMARY KEY, name TEXT, user TEXT, conversation TEXT,
    content INTEGER,   -- hash of context and the two texts, in no order
    chosen INTEGER,    -- hash of the chosen text
    split TEXT, user_split TEXT, kept INTEGER DEFAULT 1, kind TEXT,
    longer INTEGER,    -- 1: the chosen text is the longer one, -1: the shorter, 0: as long
    position INTEGER,  -- where the user saw the chosen text, or null
    criteria INTEGER, identical INTEGER,
    time REAL
);
CREATE TABLE places (
    user TEXT, conversation TEXT, split TEXT, user_split TEXT, PRIMARY KEY (user, conversation)
);
CREATE TABLE taken (name TEXT PRIMARY KEY, tries INTEGER DEFAULT 0);
"""


@lru_cache(maxsize=256)  # the votes on one question have the same texts
def text_hash(*texts: str) -> int:
    """A hash of 64 bits, as SQLite stores them; ("a", "bc") and ("ab", "c") differ by their lengths."""
    data = f"{[*map(len, texts)]}{''.join(texts)}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


class VoteIndex:
    """One row per vote, in the order of `add`; `kept` is 0 for votes that are left out."""

    def __init__(self) -> None:
        self.db = sqlite3.connect("")  # a temporary file, removed with the connection
        self.db.executescript(
            f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536; {_TABLES}"
        )
        self._waiting: list[tuple[object, ...]] = []

    def following(self, pairs: Iterable[PreferencePair]) -> Iterator[PreferencePair]:
        """Pass the pairs on, and add each."""
        for pair in pairs:
            self.add(pair)
            yield pair

    def add(self, pair: PreferencePair) -> None:
        texts = sorted((pair.chosen, pair.rejected))
        longer = len(pair.chosen) - len(pair.rejected)
        self._waiting.append(
            (
                pair.pair_id,
                pair.user_id,
                pair.conversation_id or pair.pair_id,
                text_hash(*(m.content for m in pair.context), *texts),
                text_hash(pair.chosen),
                pair.split,
                pair.user_split,
                pair.kind,
                (longer > 0) - (longer < 0),
                pair.position,
                int(pair.explicit.criteria is not None),  # sqlite3 is slow with booleans
                int(pair.chosen == pair.rejected),
                pair.time,
            )
        )
        if len(self._waiting) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        self.db.executemany(
            "INSERT INTO votes (name, user, conversation, content, chosen, split, user_split, kind, longer, "
            "position, criteria, identical, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            self._waiting,
        )
        self._waiting.clear()

    def close(self) -> None:
        self.db.close()

    def added(self) -> None:
        """Finish adding; call once, after the last vote."""
        self._flush()
        self.db.execute("CREATE INDEX by_name ON votes (name)")
        self.db.execute("CREATE INDEX by_user ON votes (user, content, split, chosen)")

    def number(self, sql: str) -> int:
        """The single number of a query, 0 for null."""
        return int(self.db.execute(sql).fetchone()[0] or 0)

    def counts(self, expression: str, table: str = "votes WHERE kept") -> dict[str, int]:
        """Counts of rows by the value of an expression, in the order of first appearance."""
        return dict(
            self.db.execute(
                f"SELECT {expression} AS what, COUNT(*) FROM {table} GROUP BY what ORDER BY MIN(rowid)"
            )
        )

    # ---- one id per vote ----

    def name_votes(self) -> None:
        """Make ids unique: many sources name the *question*, on which several users voted."""
        several = "SELECT name FROM votes GROUP BY name HAVING COUNT(*) > 1"
        self.db.execute(f"INSERT INTO taken (name) SELECT name FROM votes WHERE name NOT IN ({several})")
        self.db.executescript(
            f"""CREATE TEMP TABLE wanted AS
                SELECT row, name || '/' || user AS name FROM votes WHERE name IN ({several});
            CREATE TEMP TABLE clashing AS SELECT row, name FROM wanted WHERE name IN
                (SELECT name FROM wanted GROUP BY name HAVING COUNT(*) > 1
                 OR name IN (SELECT name FROM taken));
            DELETE FROM wanted WHERE row IN (SELECT row FROM clashing);
            UPDATE votes SET name = wanted.name FROM wanted WHERE wanted.row = votes.row;"""
        )
        if clashing := self.db.execute("SELECT name, row FROM clashing ORDER BY row").fetchall():
            self.db.execute("INSERT INTO taken (name) SELECT name FROM wanted")
            renamed = [(self._free(name), row) for name, row in clashing]
            self.db.executemany("UPDATE votes SET name = ? WHERE row = ?", renamed)

    def _free(self, base: str) -> str:
        """`base`, with the first free number if it is taken."""
        row = self.db.execute("SELECT tries FROM taken WHERE name = ?", (base,)).fetchone()
        tries, name, taken = (row[0] if row else 0), base, True
        while taken:
            tries += 1
            name = base if tries == 1 else f"{base}/{tries}"
            taken = not self.db.execute("INSERT OR IGNORE INTO taken (name) VALUES (?)", (name,)).rowcount
        self.db.execute("UPDATE taken SET tries = ? WHERE name = ?", (tries, base))
        return name

    # ---- splits ----

    def split(self, by: str, seed: int) -> None:
        """Assign splits; `source` keeps those of the records.

        `within_user` gives each user's conversations to train, val and test (70/10/20 % in expectation, the
        first is always train), so that no turn of one is in two splits.  `user_disjoint` holds out a tenth of
        the users for test and a twentieth for val, half of whose conversations are history and half are
        questions; the others train.  `pair` gives all votes on the same context and texts, whoever cast them,
        to one split.
        """
        self.db.create_function(
            "draw", -1, lambda *of: text_hash(str(seed), *map(str, of)), deterministic=True
        )
        if by == "pair":
            self.db.create_function("share", 1, lambda of: _within(_fraction(seed, of)), deterministic=True)
            self.db.execute("UPDATE votes SET split = share(content), user_split = 'train'")
        elif by != "source":
            self.db.executemany(
                "INSERT INTO places VALUES (?, ?, ?, ?)", self._places(by == "user_disjoint", seed)
            )
            self.db.execute(
                "UPDATE votes SET (split, user_split) = (SELECT p.split, p.user_split FROM places p"
                " WHERE p.user = votes.user AND p.conversation = votes.conversation)"
            )

    def hold_out_val(self, share: float) -> int:
        """Move a share of the training users to val: half of their conversations are history, half questions.

        Users with a single conversation stay in train.  Returns the number of users; at least one if another
        remains to train.
        """
        drawn = self.db.execute(
            f"SELECT user, COUNT(DISTINCT conversation) > 1 FROM votes WHERE {TRAINS} GROUP BY user"
            " ORDER BY draw('val', user)"
        ).fetchall()
        count = max(round(share * len(drawn)), int(len(drawn) > 1))
        users = [user for user, several in drawn if several][:count]
        for user in users:
            conversations = self.db.execute(
                f"SELECT DISTINCT conversation FROM votes WHERE user = ? AND {TRAINS}"
                " ORDER BY draw(user, conversation)",
                (user,),
            ).fetchall()
            asked = [(user, name) for (name,) in conversations[(len(conversations) + 1) // 2 :]]
            self.db.executemany(
                f"UPDATE votes SET split = 'val' WHERE user = ? AND conversation = ? AND {TRAINS}", asked
            )
            self.db.execute("UPDATE votes SET user_split = 'val' WHERE user = ?", (user,))
        return len(users)

    def _places(self, user_disjoint: bool, seed: int) -> Iterator[tuple[str, str, str, str]]:
        held_out = self._held_out() if user_disjoint else {}
        units = self.db.execute(
            "SELECT user, conversation FROM votes GROUP BY user, conversation"
            " ORDER BY user, draw(user, conversation)"
        )
        for user, rows in groupby(units, key=lambda row: row[0]):
            names = [name for _, name in rows]
            # The offset gives users with few conversations their share of val.
            start = _fraction(seed, "user", user)
            for i, name in enumerate(names):
                if split := held_out.get(user):
                    yield user, name, "train" if i < (len(names) + 1) // 2 else split, split
                elif user_disjoint or i == 0:
                    yield user, name, "train", "train"
                else:
                    yield user, name, _within((i + start) / len(names)), "train"

    def _held_out(self) -> dict[str, str]:
        """User → test or val; at least one user is in test if another can train."""
        users = self.db.execute("SELECT user FROM votes GROUP BY user ORDER BY draw('users', user)")
        drawn = [user for (user,) in users]
        counts = {split: round(share * len(drawn)) for split, share in HELDOUT_SHARES}
        counts["test"] = max(counts["test"], int(len(drawn) > 1))
        return dict(
            zip(drawn, (split for split, count in counts.items() for _ in range(count)), strict=False)
        )

    # ---- votes that are left out ----

    def limit_training(self, limit: int | None) -> None:
        """Keep about `limit` training votes, all votes of the source's first users."""
        if limit is None:
            return
        total, last = 0, -1
        for votes, first in self.db.execute(
            f"SELECT COUNT(*), MIN(row) FROM votes WHERE {TRAINS} GROUP BY user ORDER BY MIN(row)"
        ):
            if total >= limit:
                break
            total, last = total + votes, first
        late = f"SELECT user FROM votes WHERE {TRAINS} GROUP BY user HAVING MIN(row) > {last}"
        self.db.execute(f"UPDATE votes SET kept = 0 WHERE {TRAINS} AND user IN ({late})")

    def drop_overlap(self) -> Counter[str]:
        """Leave out votes that the same user repeats in a later split of train → val → test.

        A repetition has the same context and two texts, whichever was chosen.  The same comparison by *other*
        users is normal and stays.  Returns counts by split.
        """
        dropped: Counter[str] = Counter()
        for split, later in (("train", "'val', 'test'"), ("val", "'test'")):
            dropped[split] = self.db.execute(
                f"""UPDATE votes SET kept = 0 WHERE kept AND split = '{split}' AND EXISTS (
                SELECT 1 FROM votes other WHERE other.user = votes.user AND other.content = votes.content
                AND other.kept AND other.split IN ({later}))"""
            ).rowcount
        return dropped

    def overlap(self) -> tuple[str, str, str]:
        """(earlier vote, later vote, user) of one vote that `drop_overlap` left out."""
        row = self.db.execute(
            """SELECT votes.name, other.name, votes.user FROM votes JOIN votes other USING (user, content)
            WHERE NOT votes.kept AND other.kept AND votes.split != other.split ORDER BY votes.row LIMIT 1"""
        ).fetchone()
        return row[0], row[1], row[2]

    def strangers(self) -> tuple[int, str]:
        """Number of val and test votes of users without a training vote, and one such user."""
        row = self.db.execute(
            """SELECT COUNT(*), MIN(user) FROM votes WHERE kept AND split != 'train'
            AND user NOT IN (SELECT user FROM votes WHERE kept AND split = 'train')"""
        ).fetchone()
        return row[0], row[1] or ""

    def decisions(self) -> Iterator[tuple[str, str, str, int]]:
        """(pair_id, split, user_split, kept) per vote, in the order of `add`."""
        yield from self.db.execute("SELECT name, split, user_split, kept FROM votes ORDER BY row")


def _fraction(seed: int, *of: object) -> float:
    """A draw in [0, 1) that depends only on the arguments."""
    return (text_hash(str(seed), *map(str, of)) + 2**63) / 2**64


def _within(position: float) -> str:
    """The split at a position in [0, 1)."""
    end = 0.0
    for split, share in SHARES:
        end += share
        if position < end - 1e-9:
            return split
    return SHARES[-1][0]
