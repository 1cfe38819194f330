"""The leak report: facts about the held-out part that the training part, or the form of a vote, gives away.

Measured on the records as they were written.

    same pair           the same context and two texts on both sides of a split.  By one user: an error.
                        By several users: normal in votes, reported (`data.split_by=pair` avoids it)
    same user           held-out users who also train; an error under `data.split_by=user_disjoint`
    same conversation   on both sides of a split
    near duplicates     texts of val and test with nearly the word 3-grams of a training text
                        (MinHash, Broder 1997)
    length, position    dependence of the label on which text is longer, or was shown first
    duplicates          the same vote twice; contradictory: the same user chose both ways

The intervals of length and position are those of a ratio estimator over users (Cochran 1977, §2.9), without
resampling, because the votes of one user are similar.  Findings are sentences that a reader of an accuracy
should know.  Memory: hashes are on disk; near duplicates take 0.5 kB per text.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypedDict

from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.records.vote_index import TRAINS, VoteIndex

if TYPE_CHECKING:
    from data_builders.checks.shared_texts import NearReport

HELD_OUT = "split != 'train'"
_SPLITS_OF = "(SELECT COUNT(DISTINCT split) AS splits FROM votes GROUP BY {})"
_DUPLICATES = {
    "repeated_votes": "{} votes repeat an earlier one of the same user",
    "contradictory_pairs": "on {} pairs the same user chose both ways",
    "identical_responses": "{} votes are between two equal texts",
}


class Share(TypedDict):
    """Share of votes with a 95 % interval over users."""

    share: float | None
    ci95: list[float] | None
    votes: int
    users: int


class SamePair(TypedDict):
    """Pairs on both sides of a split; `example`: user and two pair ids of an overlap within one user."""

    within_user: int
    example: list[str] | None
    between_users: int
    held_out_votes_between_users: int
    left_out: int


class Measures(TypedDict):
    """Figures of leaks.json."""

    votes: int
    held_out_votes: int
    same_pair: SamePair
    same_user: dict[str, int]
    same_conversation: dict[str, int]
    near_duplicates: "NearReport | None"
    longer_is_chosen: dict[str, Share]
    shown_first_is_chosen: dict[str, Share]
    duplicates: dict[str, int]


class Leaks(Measures):
    """Content of leaks.json.  `errors` and `findings` are sentences; data with errors must not be used."""

    errors: list[str]
    findings: list[str]


class LeakReport:
    """Leak report of pairs: `for pair in pairs: leaks.add(pair)`; `leaks.report()`.

    `split_by`: the configured way of splitting; `near_duplicates` switches the slow part.
    """

    def __init__(self, split_by: str = "source", near_duplicates: bool = True) -> None:
        self.split_by = split_by
        self.index = VoteIndex()
        self.near = None
        if near_duplicates:
            # datasketch imports half of scipy
            from data_builders.checks.shared_texts import SharedTexts

            self.near = SharedTexts()

    def add(self, pair: PreferencePair) -> None:
        self.index.add(pair)
        if self.near:
            self.near.add(pair)

    def report(self, left_out: int = 0) -> Leaks:
        """Content of leaks.json.  `left_out`: repeated votes that the build has dropped."""
        self.index.added()
        number = self.index.number
        self.index.db.execute(
            f"CREATE TEMP TABLE users AS SELECT MAX({HELD_OUT}) AS asked, MAX({TRAINS}) AS trained, "
            "MAX(user_split IN ('val', 'test')) AS marked FROM votes GROUP BY user"
        )
        count = "SELECT COUNT(*) FROM users WHERE"
        votes = "SELECT COUNT(*) AS votes, COUNT(DISTINCT chosen) AS ways FROM votes GROUP BY user, content"
        measures: Measures = {
            "votes": number("SELECT COUNT(*) FROM votes"),
            "held_out_votes": number(f"SELECT COUNT(*) FROM votes WHERE {HELD_OUT}"),
            "same_pair": self._same_pair(left_out),
            "same_user": {
                "asked_and_trained": number(f"{count} asked AND trained"),
                "asked_only": number(f"{count} asked AND NOT trained"),
                "marked_both_ways": number(f"{count} marked AND trained"),
            },
            "same_conversation": {
                "within_user": number(
                    f"SELECT SUM(splits > 1) FROM {_SPLITS_OF.format('user, conversation')}"
                ),
                "conversations": number(f"SELECT SUM(splits > 1) FROM {_SPLITS_OF.format('conversation')}"),
                "of": number("SELECT COUNT(DISTINCT conversation) FROM votes"),
            },
            "near_duplicates": self.near.report() if self.near else None,
            "longer_is_chosen": self._shares("longer"),
            "shown_first_is_chosen": self._shares("1 - 2 * position"),
            "duplicates": {
                "repeated_votes": number(f"SELECT SUM(votes - 1) FROM ({votes}, chosen)"),
                "contradictory_pairs": number(f"SELECT SUM(ways > 1) FROM ({votes})"),
                "identical_responses": number("SELECT SUM(identical) FROM votes"),
            },
        }
        self.index.close()
        return {
            **measures,
            "errors": list(_errors(measures, self.split_by)),
            "findings": list(_findings(measures)),
        }

    def _same_pair(self, left_out: int) -> SamePair:
        of_user = self.index.db.execute(
            "SELECT user, MIN(name), MAX(name) FROM votes GROUP BY user, content HAVING COUNT(DISTINCT "
            "split) > 1"
        ).fetchall()
        between = (
            f"FROM votes held WHERE held.{HELD_OUT} AND EXISTS (SELECT 1 FROM trained "
            "WHERE trained.content = held.content AND trained.user != held.user)"
        )
        self.index.db.execute(
            "CREATE TEMP TABLE trained (content INTEGER, user TEXT, PRIMARY KEY (content, user))"
        )
        self.index.db.execute(f"INSERT OR IGNORE INTO trained SELECT content, user FROM votes WHERE {TRAINS}")
        return {
            "within_user": len(of_user),
            "example": list(of_user[0]) if of_user else None,
            "between_users": self.index.number(f"SELECT COUNT(DISTINCT content) {between}"),
            "held_out_votes_between_users": self.index.number(f"SELECT COUNT(*) {between}"),
            "left_out": left_out,
        }

    def _shares(self, sign: str) -> dict[str, Share]:
        """Share of positive signs among those that are not 0, per split."""
        query = (
            f"SELECT SUM(sign > 0), COUNT(*) FROM (SELECT user, {sign} AS sign FROM votes WHERE {{}}) "
            "WHERE sign != 0 GROUP BY user"
        )
        parts = {"train": TRAINS, "held_out": HELD_OUT}
        return {
            name: clustered_share(self.index.db.execute(query.format(part))) for name, part in parts.items()
        }


def clustered_share(rows: Iterable[tuple[int, int]]) -> Share:
    """Pooled share of hits with a 95 % interval over users, from (hits, votes) of each user.

    p = Σ hits / Σ votes;  Var(p) ≈ U/(U−1) · Σ_u (hits_u − p·votes_u)² / (Σ votes)².

    Null interval with fewer than two users.
    """
    counts = list(rows)
    users, hits, votes = len(counts), sum(hit for hit, _ in counts), sum(vote for _, vote in counts)
    if not votes:
        return {"share": None, "ci95": None, "votes": 0, "users": 0}
    share, interval = hits / votes, None
    if users > 1:
        spread = sum((hit - share * vote) ** 2 for hit, vote in counts)
        half = 1.96 * (spread * users / (users - 1)) ** 0.5 / votes
        interval = [round(max(0.0, share - half), 4), round(min(1.0, share + half), 4)]
    return {"share": round(share, 4), "ci95": interval, "votes": votes, "users": users}


def _errors(report: Measures, split_by: str) -> Iterable[str]:
    if count := report["same_pair"]["within_user"]:
        user, one, other = report["same_pair"]["example"] or ("?", "?", "?")
        yield f"{count} pairs of one user are in two splits, e.g. {one} and {other} of user {user}"
    if split_by == "user_disjoint" and (count := report["same_user"]["asked_and_trained"]):
        yield f"{count} held-out users also train, though data.split_by=user_disjoint"
    elif count := report["same_user"]["marked_both_ways"]:
        yield f"{count} users are held out by some of their rows (user_split) and train by others"
    if split_by == "pair" and (count := report["same_pair"]["between_users"]):
        yield f"{count} pairs are in two splits, though data.split_by=pair"


def _findings(report: Measures) -> Iterable[str]:
    if count := report["same_pair"]["left_out"]:
        yield f"{count} votes that their user casts again in a later split were left out"
    held_out = report["held_out_votes"]
    if not held_out:
        yield "nothing is held out: no vote is in val or test (data.split_by=within_user makes a split)"
    if count := report["same_pair"]["held_out_votes_between_users"]:
        yield f"{count / held_out:.1%} of the held-out votes are on pairs that other users judged in train"
    if count := report["same_conversation"]["within_user"]:
        yield f"{count} conversations of one user are in two splits"
    if near := report["near_duplicates"]:
        for name, texts in (("queries", near["queries"]), ("responses", near["responses"])):
            if count := texts["exact"] + texts["near"]:
                share = count / texts["held_out"]
                nearly = f"({texts['near']} of {count} nearly)"
                yield f"{share:.1%} of the held-out {name} are in train, too {nearly}"
    for shares, words in (
        (report["longer_is_chosen"], ("longer", "shorter")),
        (report["shown_first_is_chosen"], ("first shown", "later shown")),
    ):
        for part, measured in shares.items():
            yield from _predictable(words, part.replace("_", "-"), measured)
    for name, sentence in _DUPLICATES.items():
        if count := report["duplicates"][name]:
            yield sentence.format(count)


def _predictable(words: tuple[str, str], part: str, measured: Share) -> Iterable[str]:
    """A sentence if the interval excludes one half."""
    low, high = measured["ci95"] or (0.0, 1.0)
    if not low <= 0.5 <= high:
        share, word = measured["share"] or 0.0, words[0]
        if high < 0.5:
            share, low, high, word = 1 - share, 1 - high, 1 - low, words[1]
        yield (
            f"the {word} response is chosen in {share:.1%} [{low:.1%}, {high:.1%}] of the {part} votes, "
            "so the label can be guessed"
        )
