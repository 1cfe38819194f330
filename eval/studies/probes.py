"""The disagreement probe: does a model depend on *whose* history it reads?

Among the votes on one content (same conversation, same two responses), match opposite votes of two users.  On
these *twins* the probe is balanced by construction.  A rule that ignores the user prefers the same response
for both, is right for exactly one, and scores exactly 50 % (less if it ties).  A personal model scores above
50 with each user's own history.  With the twin's history instead, it should fall below by about as much.  Our
choice; not in the paper.

Use: predict the pairs of `disagreement_twins(test_pairs)` once with their own histories and once with
`swapped_histories(twins, histories)`.  Pass both tables to `accuracy_report` and `paired_difference`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from pgenrm_train.errors import DataError
from pgenrm_train.records.pairs import ContentKey, HistoryItem, PreferencePair, content_key

Twins = list[tuple[PreferencePair, PreferencePair]]


def disagreement_twins(pairs: Iterable[PreferencePair]) -> Twins:
    """Match opposite votes of different users on the same content; each vote is used at most once.

    Returns as many twins as the votes allow, independent of the order of `pairs`.  Users cannot disagree
    about two equal responses, so those are left out.  An empty list: no disagreement, the probe does not
    apply.
    """
    groups: dict[ContentKey, list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        if pair.chosen != pair.rejected:
            groups[content_key(pair.context, (pair.chosen, pair.rejected))].append(pair)
    twins = [twin for votes in groups.values() for twin in _match(votes)]
    return sorted(twins, key=lambda twin: [_identity(pair) for pair in twin])


def swapped_histories(
    twins: Twins, histories: Mapping[str, Sequence[HistoryItem]]
) -> dict[str, tuple[HistoryItem, ...]]:
    """pair_id → the history of the pair's twin, for every pair of `twins`.

    Raises DataError if a history is missing, or if two votes share a `pair_id`: the swap would be ambiguous.
    """
    swapped: dict[str, tuple[HistoryItem, ...]] = {}
    for first, second in twins:
        for pair, twin in ((first, second), (second, first)):
            if pair.pair_id in swapped:
                raise DataError(
                    f"pair_id {pair.pair_id!r} names several votes; expected one pair_id per vote for the "
                    "probe"
                )
            if twin.pair_id not in histories:
                raise DataError(
                    f"pair_id {twin.pair_id!r} of user {twin.user_id!r} has no history; expected an entry"
                )
            swapped[pair.pair_id] = tuple(histories[twin.pair_id])
    return swapped


def _match(votes: Sequence[PreferencePair]) -> Twins:
    """The largest matching within one content group.

    Only users with votes either way can meet themselves: theirs, and as many votes of others as they may
    need, are assigned at cost 1 for a user with themselves.  The rest meet in order, so that the cost does
    not grow with the square of the votes.
    """
    favourite = min(votes[0].chosen, votes[0].rejected)
    ordered = sorted(votes, key=_identity)
    one_way = [vote for vote in ordered if vote.chosen == favourite]
    other_way = [vote for vote in ordered if vote.chosen != favourite]
    if not one_way or not other_way:
        return []
    both = {vote.user_id for vote in one_way} & {vote.user_id for vote in other_way}
    (mixed, plain), (other_mixed, other_plain) = (
        [[vote for vote in side if (vote.user_id in both) is either] for either in (True, False)]
        for side in (one_way, other_way)
    )
    some, others = mixed + plain[: len(other_mixed)], other_mixed + other_plain[: len(mixed)]
    same_user = np.array([[a.user_id == b.user_id for b in others] for a in some], dtype=float)
    assigned = zip(*linear_sum_assignment(same_user), strict=True) if both else ()
    twins = [(some[i], others[j]) for i, j in assigned if not same_user[i, j]]
    return twins + list(zip(plain[len(other_mixed) :], other_plain[len(mixed) :], strict=False))


def _identity(pair: PreferencePair) -> tuple[str, str]:
    return pair.user_id, pair.pair_id
