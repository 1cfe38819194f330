"""Small tables of predictions for tests."""

import pandas as pd


def row(pair, user, order, chosen, rejected, failure=None, sample=0, seed=0, kind=None):
    return {
        "pair_id": pair,
        "user_id": user,
        "order": order,
        "seed": seed,
        "sample": sample,
        "score_chosen": chosen,
        "score_rejected": rejected,
        "failure": failure,
        "kind": kind,
    }


def consistent(hits, users=None, score=(2, 1)):
    """Equal rows for both orders: pair i of user i is a hit where hits[i]."""
    users = users or [f"u{i}" for i in range(len(hits))]
    high, low = score
    return pd.DataFrame(
        [
            row(f"p{i}", user, order, high if hit else low, low if hit else high)
            for i, (hit, user) in enumerate(zip(hits, users, strict=True))
            for order in (0, 1)
        ]
    )
