"""The leak report: what of the held-out part can be known from the training part, or from the form of a vote, measured on the
records as they were written.

    same pair           the same context and two texts on both sides of a split.  By one user: an error.  By several users: normal
                        in votes, reported (`data.split_by=pair` avoids it)
    same user           held-out users who also train; an error under `data.split_by=user_disjoint`
    same conversation   on both sides of a split
    near duplicates     texts of val and test whose word 3-grams nearly are those of a training text (MinHash, Broder 1997)
    length, position    how far the label follows from which text is longer, or was shown first; the intervals resample nobody:
                        they are those of a ratio estimator over users (Cochran 1977, §2.9), votes of one user being alike
    duplicates          the same vote twice; contradictory: the same user chose either way

Findings are sentences; a reader of an accuracy should know them.  Memory: hashes are on disk, near duplicates
take 0.5 kB a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.vote_index import TRAINS, VoteIndex

if TYPE_CHECKING:
    from data_builders.checks.near_duplicates import NearDuplicates

HELD_OUT = "split != 'train'"
_SPLITS_OF = "(SELECT COUNT(DISTINCT split) AS splits FROM votes GROUP BY {})"


class LeakReport:
    """Add every pair, then ask for the report: `for pair in pairs: leaks.add(pair)`; `leaks.report()`.

    `split_by`: the way of splitting that was asked for; `near_duplicates` switches the slow part.
    """

    def __init__(self, split_by: str = "source", near_duplicates: bool = True) -> None:
        self.split_by = split_by
        self.index = VoteIndex()
        self.near = _near_duplicates() if near_duplicates else None

    def add(self, pair: PreferencePair) -> None:
        self.index.add(pair)
        if self.near:
            self.near.add(pair)

    def report(self) -> dict[str, Any]:
        """What leaks.json holds.  `errors` and `findings` are sentences; errors mean that the data must not be used."""
        self.index.added()
        report: dict[str, Any] = {
            "votes": self.index.number("SELECT COUNT(*) FROM votes"),
            "held_out_votes": self.index.number(f"SELECT COUNT(*) FROM votes WHERE {HELD_OUT}"),
            "same_pair": self._same_pair(),
            "same_user": self._same_user(),
            "same_conversation": self._same_conversation(),
            "near_duplicates": self.near.report() if self.near else None,
            "longer_is_chosen": {split: self._share("longer", split) for split in ("train", "held_out")},
            "shown_first_is_chosen": {
                split: self._share("1 - 2 * position", split) for split in ("train", "held_out")
            },
            "duplicates": self._duplicates(),
        }
        self.index.close()
        return report | {"errors": list(_errors(report, self.split_by)), "findings": list(_findings(report))}

    def _same_pair(self) -> dict[str, Any]:
        of_user = self.index.db.execute(
            "SELECT user, MIN(name), MAX(name) FROM votes GROUP BY user, content HAVING COUNT(DISTINCT "
            "split) > 1"
        ).fetchall()
        seen = f"FROM votes held WHERE held.{HELD_OUT} AND EXISTS (SELECT 1 FROM trained WHERE trained.content = held.content"
        self.index.db.execute(
            "CREATE TEMP TABLE trained (content INTEGER, user TEXT, PRIMARY KEY (content, user))"
        )
        self.index.db.execute(f"INSERT OR IGNORE INTO trained SELECT content, user FROM votes WHERE {TRAINS}")
        return {
            "within_user": len(of_user),
            "example": list(of_user[0]) if of_user else None,
            "between_users": self.index.number(
                f"SELECT COUNT(DISTINCT content) {seen} AND trained.user != held.user)"
            ),
            "held_out_votes_between_users": self.index.number(
                f"SELECT COUNT(*) {seen} AND trained.user != held.user)"
            ),
        }

    def _same_user(self) -> dict[str, Any]:
        asked = f"SELECT DISTINCT user FROM votes WHERE {HELD_OUT}"
        trained = f"SELECT DISTINCT user FROM votes WHERE {TRAINS}"
        return {
            "asked_and_trained": self.index.number(
                f"SELECT COUNT(*) FROM ({asked}) WHERE user IN ({trained})"
            ),
            "asked_only": self.index.number(f"SELECT COUNT(*) FROM ({asked}) WHERE user NOT IN ({trained})"),
            "marked_both_ways": self.index.number(
                "SELECT COUNT(*) FROM (SELECT DISTINCT user FROM votes WHERE user_split IN ('val', "
                f"'test')) WHERE user IN ({trained})"
            ),
        }

    def _same_conversation(self) -> dict[str, Any]:
        return {
            "within_user": self.index.number(
                f"SELECT SUM(splits > 1) FROM {_SPLITS_OF.format('user, conversation')}"
            ),
            "conversations": self.index.number(
                f"SELECT SUM(splits > 1) FROM {_SPLITS_OF.format('conversation')}"
            ),
            "of": self.index.number("SELECT COUNT(DISTINCT conversation) FROM votes"),
        }

    def _share(self, sign: str, split: str) -> dict[str, Any]:
        """How often the sign is positive where it is not 0, with a 95 % interval over users."""
        rows = self.index.db.execute(
            f"SELECT SUM(sign > 0), COUNT(*) FROM (SELECT user, {sign} AS sign FROM votes WHERE "
            f"{_PARTS[split]}) "
            "WHERE sign != 0 GROUP BY user"
        )
        return clustered_share(rows)

    def _duplicates(self) -> dict[str, Any]:
        groups = "SELECT COUNT(*) AS votes, COUNT(DISTINCT chosen) AS ways FROM votes GROUP BY user, content HAVING votes > 1"
        return {
            "repeated_votes": self.index.number(
                "SELECT SUM(votes - 1) FROM (SELECT COUNT(*) AS votes FROM votes GROUP BY user, content, "
                "chosen)"
            ),
            "contradictory_pairs": self.index.number(f"SELECT SUM(ways > 1) FROM ({groups})"),
            "identical_responses": self.index.number("SELECT SUM(identical) FROM votes"),
        }


def _near_duplicates() -> NearDuplicates:
    from data_builders.checks.near_duplicates import NearDuplicates  # datasketch brings half of scipy

    return NearDuplicates()


_PARTS = {"train": TRAINS, "held_out": HELD_OUT}


def clustered_share(rows: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Pooled share of hits with a 95 % interval over users, from (hits, votes) of each user.

    p = Σ hits / Σ votes;  Var(p) ≈ U/(U−1) · Σ_u (hits_u − p·votes_u)² / (Σ votes)².  Null interval with
    fewer than two users.
    """
    users = hits = votes = hits_squared = votes_squared = products = 0
    for hit, vote in rows:
        users, hits, votes = users + 1, hits + hit, votes + vote
        hits_squared, votes_squared, products = (
            hits_squared + hit * hit,
            votes_squared + vote * vote,
            products + hit * vote,
        )
    if not votes:
        return {"share": None, "ci95": None, "votes": 0, "users": 0}
    share, interval = hits / votes, None
    if users > 1:
        spread = hits_squared - 2 * share * products + share * share * votes_squared
        half = 1.96 * (max(spread, 0.0) * users / (users - 1)) ** 0.5 / votes
        interval = [round(max(0.0, share - half), 4), round(min(1.0, share + half), 4)]
    return {"share": round(share, 4), "ci95": interval, "votes": votes, "users": users}


def _errors(report: dict[str, Any], split_by: str) -> Iterable[str]:
    if count := report["same_pair"]["within_user"]:
        user, one, other = report["same_pair"]["example"]
        yield f"{count} pairs of one user are in two splits, e.g. {one} and {other} of user {user}"
    if split_by == "user_disjoint" and (count := report["same_user"]["asked_and_trained"]):
        yield f"{count} users who are asked about also train, though data.split_by=user_disjoint"
    elif count := report["same_user"]["marked_both_ways"]:
        yield f"{count} users are held out by some of their rows (user_split) and train by others"
    if split_by == "pair" and (count := report["same_pair"]["between_users"]):
        yield f"{count} pairs are in two splits, though data.split_by=pair"


def _findings(report: dict[str, Any]) -> Iterable[str]:
    held_out = report["held_out_votes"]
    if not held_out:
        yield "nothing is held out: no vote is in val or test (data.split_by=within_user makes a split)"
    if count := report["same_pair"]["held_out_votes_between_users"]:
        yield f"{_percent(count, held_out)} of the held-out votes are on pairs that other users judged in train"
    if count := report["same_conversation"]["within_user"]:
        yield f"{count} conversations of one user lie in two splits"
    if near := report["near_duplicates"]:
        for what in ("queries", "responses"):
            if count := near[what]["exact"] + near[what]["near"]:
                found = _percent(count, near[what]["held_out"])
                yield f"{found} of the held-out {what} stand in train, too ({near[what]['near']} of {count} nearly)"
    for key, words in (
        ("longer_is_chosen", ("longer", "shorter")),
        ("shown_first_is_chosen", ("first shown", "later shown")),
    ):
        for part, measured in report[key].items():
            yield from _predictable(words, part.replace("_", "-"), measured)
    if count := report["duplicates"]["repeated_votes"]:
        yield f"{count} votes repeat an earlier one of the same user"
    if count := report["duplicates"]["contradictory_pairs"]:
        yield f"on {count} pairs the same user chose either way"
    if count := report["duplicates"]["identical_responses"]:
        yield f"{count} votes are between two equal texts"


def _predictable(words: tuple[str, str], part: str, measured: dict[str, Any]) -> Iterable[str]:
    low, high = measured["ci95"] or (0.0, 1.0)
    if not low <= 0.5 <= high:
        share, word = (measured["share"], words[0]) if low > 0.5 else (1 - measured["share"], words[1])
        low, high = (low, high) if low > 0.5 else (1 - high, 1 - low)
        yield f"the {word} response is chosen in {share:.1%} [{low:.1%}, {high:.1%}] of the {part} votes, so the label can be guessed"


def _percent(count: int, of: int) -> str:
    return f"{count / of:.1%}"
