"""What a prototype stands for, for a reader: its typical criteria, its size, who is nearest and who farthest, and a map of all.

Texts are a model's words about users: shown, never interpreted; the Markdown escapes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pgenrm_train.prototypes.clusters import Prototypes, chunks
from pgenrm_train.records.pairs import PreferencePair

TYPICAL = 5  # criteria on a card


class Row(Protocol):
    @property
    def pair(self) -> PreferencePair: ...
    @property
    def analysis(self) -> str: ...
    @property
    def criteria(self) -> tuple[tuple[str, float], ...]: ...


def cards(rows: Sequence[Row], refined: Prototypes) -> list[dict[str, Any]]:
    """One card a prototype, the largest first; `criteria` maps a name to its mean weight in percent over all members, and
    `typical` names those that weigh most above their mean over everyone."""
    everyone = _weights(rows)
    made = [_card(j, rows, refined, everyone) for j in range(len(refined.A))]
    return sorted(made, key=lambda card: (-card["analyses"], card["prototype"]))


def _card(j: int, rows: Sequence[Row], refined: Prototypes, everyone: Mapping[str, float]) -> dict[str, Any]:
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
        "nearest": _person(rows[members[distance.argmin()]]),
        "farthest": _person(rows[members[distance.argmax()]]),
    }


def cards_markdown(made: Sequence[Mapping[str, Any]]) -> str:
    parts = ["# Prototypes"]
    for card in made:
        parts.append(f"## Prototype {card['prototype']}: {_plain(', '.join(card['typical'])) or 'empty'}")
        parts.append(f"{card['analyses']} analyses of {card['users']} users.")
        if card["criteria"]:
            parts.append(
                "Mean weight: "
                + ", ".join(f"{_plain(name)} {weight:g} %" for name, weight in card["criteria"].items())
            )
            people = ((who, card[who]) for who in ("nearest", "farthest"))
            parts += [
                f"{who.capitalize()}, user {_plain(one['user_id'])}: {_plain(one['analysis'])}"
                for who, one in people
            ]
    return "\n\n".join(parts) + "\n"


def plane(X: np.ndarray) -> np.ndarray:
    """The rows of X (N, d) on their two principal axes, (N, 2); signs are fixed, so that the same rows give the same map."""
    mean = sum(chunk.sum(axis=0, dtype=np.float64) for chunk in chunks(X)) / len(X)
    scatter = sum((chunk - mean).T @ (chunk - mean) for chunk in chunks(X))
    axes = np.linalg.eigh(scatter)[1][:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    flat = np.concatenate([(chunk - mean) @ axes for chunk in chunks(X)])
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))


def _weights(rows: Sequence[Row]) -> dict[str, float]:
    """Mean weight in percent of every criterion; a chain that does not name it counts 0."""
    total: Counter[str] = Counter()
    for row in rows:
        for name, weight in row.criteria:
            total[name.strip().lower()] += weight  # type: ignore[assignment]
    return {name: weight / len(rows) for name, weight in total.items()}


def _person(row: Row) -> dict[str, str]:
    return {"user_id": row.pair.user_id, "analysis": row.analysis}


def _plain(text: str) -> str:
    """One line of Markdown that shows `text` literally."""
    return re.sub(r"([\\|<>\[\]*_`#])", r"\\\1", " ".join(str(text).split()))
