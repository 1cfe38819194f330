"""User prototypes (METHOD §6): the analyses that a model writes for training users → clusters → refined prototypes.

Needs chains of training users (handed in by the recipe) and an embedder.  Makes `prototypes.safetensors`, `members.parquet`,
`prototypes.json`, `analyses.parquet` and `cards.json`.  Only the *analysis* of a chain is embedded, never its scores, here and at
test time alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgenrm_train import prototypes as core
from pgenrm_train.artifacts import StageFolder, fingerprint, weights_digest, write_json, write_table
from pgenrm_train.chains import ParseFailure, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.errors import DataError
from pgenrm_train.records import HistoryItem, PreferencePair

READS = ("prototypes", "data", "seed", "masking", "model.kind", "model.name", "model.path", "model.instructions")
Embed = Callable[[Sequence[str]], np.ndarray]
Histories = Mapping[str, tuple[HistoryItem, ...]]


def pairs_to_analyse(config: Config, train: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The first `prototypes.analyses_per_user` pairs of the first `prototypes.max_users` users, spread over scenarios."""
    settings = config.prototypes
    by_user: dict[str, list[PreferencePair]] = {}
    for pair in train:
        by_user.setdefault(pair.user_id, []).append(pair)
    chosen = []
    for rows in list(by_user.values())[: settings.max_users]:
        seen: Counter[str | None] = Counter()
        order = sorted(range(len(rows)), key=lambda i: (_count(seen, rows[i].scenario), i))
        chosen += [rows[i] for i in order[: settings.analyses_per_user]]
    return chosen


def run(
    config: Config,
    folder: StageFolder,
    chains: Sequence[tuple[PreferencePair, str | None]],
    histories: Histories,
    embed: Embed,
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """Cluster and refine; `chains` holds one generated text a pair (None where generation failed).  Returns the facts."""
    rows, failures = _readable(chains)
    if not rows:
        raise DataError(
            f"none of {len(chains)} chains of training users could be read ({dict(failures)}); prototypes need analyses"
        )
    matrix = embed([analysis for _, analysis in rows])
    users = [pair.user_id for pair, _ in rows]
    k = min(config.prototypes.k, len(np.unique(matrix, axis=0)))
    centroids = core.cluster(matrix, k, config.seed, users)
    refined, metrics = core.refine(centroids, _samples([p for p, _ in rows], histories, embed), config.prototypes, config.seed)
    core.save(refined, folder.path, hashes)
    write_table(folder.path / "analyses.parquet", _table(rows, refined))
    suggested, curve = core.suggest_k(matrix)
    facts = {
        "k": k,
        "k_suggested_by_singular_values": suggested,
        "analyses": len(rows),
        "users": len(set(users)),
        "failures": dict(failures),
        "refinement": dict(metrics),
        "recovery": _recovery([p for p, _ in rows], refined.labels),
    }
    write_json(folder.path / "cards.json", _cards(rows, refined))
    write_json(folder.path / "singular_values.json", {"retained_mass": [round(float(x), 5) for x in curve]})
    return facts


def read_hashes(config: Config, checkpoint: Path, embedder: str, data: str) -> dict[str, str]:
    """What the prototypes were made from; a reader with other hashes refuses them."""
    return {"model": fingerprint(weights_digest(checkpoint), config.model.name), "embedder": embedder, "data": data}


def _count(seen: Counter[str | None], scenario: str | None) -> int:
    seen[scenario] += 1
    return seen[scenario]


def _readable(chains: Sequence[tuple[PreferencePair, str | None]]) -> tuple[list[tuple[PreferencePair, str]], Counter[str]]:
    rows, failures = [], Counter[str]()
    for pair, text in chains:
        chain = parse_chain(text or "")
        if isinstance(chain, ParseFailure):
            failures[f"parse:{chain.kind}" if text else "no_text"] += 1
        elif not chain.analysis:
            failures["no_analysis"] += 1
        else:
            rows.append((pair, chain.analysis))
    return rows, failures


def _samples(pairs: Sequence[PreferencePair], histories: Histories, embed: Embed) -> core.RefinementBatch:
    """Embeddings of queries and responses, and of padded histories; equal texts are embedded once."""
    items = [histories[p.pair_id] for p in pairs]
    longest = max(1, max(len(h) for h in items))
    texts = sorted(
        {t for p in pairs for t in (p.query, p.chosen, p.rejected)}
        | {t for h in items for i in h for t in (i.query, i.chosen, i.rejected)}
    )
    table, place = embed(texts), {text: i for i, text in enumerate(texts)}
    mask = np.array([[n < len(h) for n in range(longest)] for h in items])

    def padded(name: str) -> core.Rows:
        index = [[place[getattr(h[n], name)] if n < len(h) else 0 for n in range(longest)] for h in items]
        return core.Rows(table, np.array(index))

    def column(name: str) -> core.Rows:
        return core.Rows(table, np.array([place[getattr(p, name)] for p in pairs]))

    return core.RefinementBatch(
        column("query"), column("chosen"), column("rejected"), padded("query"), padded("chosen"), padded("rejected"),
        mask, np.array([p.user_id for p in pairs]),
    )  # fmt: skip


def _table(rows: Sequence[tuple[PreferencePair, str]], refined: core.Prototypes) -> list[dict[str, Any]]:
    return [
        {"row": i, "pair_id": pair.pair_id, "user_id": pair.user_id, "prototype": int(refined.labels[i]), "analysis": analysis}
        for i, (pair, analysis) in enumerate(rows)
    ]


def _recovery(pairs: Sequence[PreferencePair], labels: np.ndarray) -> float | None:
    """Adjusted Rand index against what users say of themselves, by scenario; None where nobody says anything."""
    truth = [f"{p.explicit.self_description}/{p.scenario}" for p in pairs]
    if any(p.explicit.self_description is None for p in pairs):
        return None
    from sklearn.metrics import adjusted_rand_score

    return round(float(adjusted_rand_score(truth, labels)), 4)


def _cards(rows: Sequence[tuple[PreferencePair, str]], refined: core.Prototypes) -> list[dict[str, Any]]:
    """One card a prototype: its size and the members nearest to and farthest from it."""
    cards: list[dict[str, Any]] = []
    for j in range(len(refined.A)):
        members = np.flatnonzero(refined.labels == j)
        if not len(members):
            cards.append({"prototype": j, "analyses": 0})
            continue
        distance = np.linalg.norm(refined.embeddings[members] - refined.A[j], axis=1)
        near, far = members[distance.argmin()], members[distance.argmax()]
        cards.append(
            {
                "prototype": j,
                "analyses": len(members),
                "users": len({rows[i][0].user_id for i in members}),
                "nearest": {"user_id": rows[near][0].user_id, "analysis": rows[near][1]},
                "farthest": {"user_id": rows[far][0].user_id, "analysis": rows[far][1]},
            }
        )
    return cards
