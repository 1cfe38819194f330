"""Times of all votes of a build: their unit, and the histories that they leave empty.

Times are seconds since 1970.  Milli-, micro- and nanoseconds are recognised if every time is from 1990 to
2100 in that unit; the ranges of the units do not overlap.  Other numbers, such as the steps of a session,
remain: a history needs their order only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pgenrm_train.records.vote_index import VoteIndex

_FROM, _TO = 631_152_000, 4_102_444_800  # 1990 and 2100, in seconds since 1970
_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


@dataclass(frozen=True)
class VoteTimes:
    """Facts on the times of the kept votes; *evaluated* votes are those of val and test."""

    units: dict[str, int]  # unit → votes whose time is plausible in it
    timed: dict[str, int]  # split → votes with a time
    votes: dict[str, int]  # split → votes
    evaluated: int  # evaluated votes of users with training votes
    emptied: int  # of these, votes whose times leave no training vote of their user

    @classmethod
    def of(cls, index: VoteIndex) -> "VoteTimes":
        """Measure; splits and limits must be decided before."""
        kept = "votes WHERE kept AND time IS NOT NULL"
        counts = {
            unit: index.number(f"SELECT COUNT(*) FROM {kept} AND time BETWEEN {_FROM * n} AND {_TO * n}")
            for unit, n in _UNITS.items()
        }
        evaluated = """
            FROM votes JOIN (SELECT user, MIN(time) AS first FROM votes
                             WHERE kept AND split = 'train' GROUP BY user) AS history USING (user)
            WHERE kept AND split != 'train'"""
        emptied = f"{evaluated} AND time IS NOT NULL AND (first IS NULL OR first >= time)"
        timed = index.counts("split", kept)
        return cls(
            {unit: count for unit, count in counts.items() if count},
            timed,
            index.counts("split"),
            *(index.number(f"SELECT COUNT(*) {query}") if timed else 0 for query in (evaluated, emptied)),
        )

    @property
    def scale(self) -> int:
        """Units of the times per second."""
        total = sum(self.timed.values())
        return next((_UNITS[unit] for unit, count in self.units.items() if count == total), 1)

    def sentences(self) -> Iterator[str]:
        """Messages for the user of the build: the unit of the times, and problems of histories."""
        if self.scale > 1:
            (unit,) = self.units
            yield f"times are read as {unit} since 1970"
        untimed = [split for split in self.votes if split not in self.timed]
        reasons = []
        if len(self.units) > 1:
            counts = ", ".join(f"{count} in {unit}" for unit, count in self.units.items())
            reasons.append(f"times are in mixed units ({counts})")
        if self.timed and untimed:
            timed, others = " and ".join(self.timed), " and ".join(untimed)
            reasons.append(f"votes of {timed} have times, those of {others} have none")
        if not reasons and self.emptied:
            reasons.append("some votes have no earlier training vote of their user")
        if reasons:
            yield (
                f"warning: {'; '.join(reasons)}; times leave the history of {self.emptied} of "
                f"{self.evaluated} val and test votes empty"
            )
