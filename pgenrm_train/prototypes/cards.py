"""Cards that describe prototypes: typical criteria, size, nearest and farthest member, and a map of all rows.

The texts are a model's words about users: the Markdown escapes them, so that they are shown and never
interpreted.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from pgenrm_train.prototypes.clusters import Prototypes, chunks
from pgenrm_train.records.pairs import PreferencePair

TYPICAL = 5  # criteria on a card


class Analysed(NamedTuple):
    """A pair whose chain could be read."""

    pair: PreferencePair
    analysis: str
    criteria: tuple[tuple[str, float], ...]


class Member(TypedDict):
    user_id: str
    analysis: str


class PrototypeCard(TypedDict):
    """One prototype, as `cards.json` holds it.

    `criteria` maps a name to its mean weight in percent over all members.  `typical` names the criteria whose
    weight exceeds their mean over all users most.
    """

    prototype: int
    analyses: int
    users: int
    typical: list[str]
    criteria: dict[str, float]
    nearest: NotRequired[Member]
    farthest: NotRequired[Member]


def cards(rows: Sequence[Analysed], refined: Prototypes) -> list[PrototypeCard]:
    """One card per prototype, the largest first."""
    everyone = _weights(rows)
    return sorted(
        (_card(j, rows, refined, everyone) for j in range(len(refined.A))),
        key=lambda card: (-card["analyses"], card["prototype"]),
    )


def _card(
    j: int, rows: Sequence[Analysed], refined: Prototypes, everyone: Mapping[str, float]
) -> PrototypeCard:
    members = np.flatnonzero(refined.labels == j)
    if not len(members):
        return {"prototype": j, "analyses": 0, "users": 0, "typical": [], "criteria": {}}
    distance = np.linalg.norm(refined.embeddings[members] - refined.A[j], axis=1)
    weights = _weights([rows[i] for i in members])
    typical = sorted(weights, key=lambda name: (everyone[name] - weights[name], name))[:TYPICAL]
    return {
        "prototype": j,
        "analyses": len(members),
        "users": len({rows[i].pair.user_id for i in members}),
        "typical": [name for name in typical if weights[name] > everyone[name]] or typical[:1],
        "criteria": {
            name: round(weights[name], 1)
            for name in sorted(weights, key=lambda n: (-weights[n], n))[: 2 * TYPICAL]
        },
        "nearest": _member(rows[members[distance.argmin()]]),
        "farthest": _member(rows[members[distance.argmax()]]),
    }


def cards_markdown(cards: Sequence[PrototypeCard]) -> str:
    parts = ["# Prototypes"]
    for card in cards:
        parts.append(f"## Prototype {card['prototype']}: {_plain(', '.join(card['typical'])) or 'empty'}")
        parts.append(f"{card['analyses']} analyses of {card['users']} users.")
        if card["criteria"]:
            weights = (f"{_plain(name)} {weight:g} %" for name, weight in card["criteria"].items())
            parts.append(f"Mean weight: {', '.join(weights)}")
            parts += [
                f"{place}, user {_plain(member['user_id'])}: {_plain(member['analysis'])}"
                for place, member in (("Nearest", card["nearest"]), ("Farthest", card["farthest"]))
            ]
    return "\n\n".join(parts) + "\n"


def plane(X: np.ndarray) -> np.ndarray:
    """Project the rows of X (N, d) on their two principal axes, (N, 2).

    Signs are fixed, so that the same rows give the same map.
    """
    mean = sum(chunk.sum(axis=0, dtype=np.float64) for chunk in chunks(X)) / len(X)
    scatter = sum((chunk - mean).T @ (chunk - mean) for chunk in chunks(X))
    axes = np.linalg.eigh(scatter)[1][:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    flat = np.concatenate([(chunk - mean) @ axes for chunk in chunks(X)])
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))


def _weights(rows: Sequence[Analysed]) -> dict[str, float]:
    """Mean weight of every criterion in percent; a chain without it counts 0."""
    total: Counter[str] = Counter()
    for row in rows:
        for name, weight in row.criteria:
            total[name.strip().lower()] += weight  # type: ignore[assignment]
    return {name: weight / len(rows) for name, weight in total.items()}


def _member(row: Analysed) -> Member:
    return {"user_id": row.pair.user_id, "analysis": row.analysis}


def _plain(text: str) -> str:
    return re.sub(r"([\\|<>\[\]*_`#])", r"\\\1", " ".join(str(text).split()))
