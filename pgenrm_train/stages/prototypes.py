"""User prototypes (METHOD §6): the analyses that a model writes for training users → clusters → refined prototypes.

Needs chains of training users (handed in by the recipe) and an embedder.  Makes `prototypes.safetensors`, `members.parquet`,
`prototypes.json`, `analyses.parquet` (with a 2-D map), `cards.json` and `cards.md`, `singular_values.json` and, with chains of users
that training has not seen, `cold_start.json`.  Only what the *analysis* of a chain says of a preference is embedded, never its
scores, here and at test time alike (`prototypes.preference_text`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgenrm_train.chains.chain import ParseFailure, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.errors import DataError
from pgenrm_train.files import fingerprint, write_json, write_table, write_text
from pgenrm_train.prototypes import clusters as core
from pgenrm_train.prototypes.cards import cards, cards_markdown, plane
from pgenrm_train.prototypes.refinement import RefinementBatch, Rows, cold_start, refine
from pgenrm_train.records.pairs import HistoryItem, PreferencePair
from pgenrm_train.run.folder import StageFolder, weights_digest

Embed = Callable[[Sequence[str]], np.ndarray]
Chains = Sequence[
    tuple[PreferencePair, str | None]
]  # one generated text a pair, None where generation failed
Histories = Mapping[str, tuple[HistoryItem, ...]]
Refine = Callable[..., tuple[core.Prototypes, dict[str, Any]]]  # as refinement.refine


class Analysed(NamedTuple):
    """A pair whose chain could be read."""

    pair: PreferencePair
    analysis: str
    criteria: tuple[tuple[str, float], ...]


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
    chains: Chains,
    histories: Histories,
    embed: Embed,
    hashes: Mapping[str, str],
    newcomers: Sequence[tuple[Chains, Histories]] = (),
    refine: Refine = refine,
) -> dict[str, Any]:
    """Cluster and refine, by several processes where the recipe hands in such a `refine`; returns the facts.

    `newcomers`: entry t holds chains of users that training has not seen, written from t history pairs, and those histories.
    """
    rows, failures = _readable(chains)
    if not rows:
        raise DataError(
            f"none of {len(chains)} chains of training users could be read ({dict(failures)}); prototypes need analyses"
        )
    matrix = embed([core.preference_text(row.analysis) for row in rows])
    users = [row.pair.user_id for row in rows]
    suggested, curve = core.suggest_k(matrix, config.prototypes.retained_mass)
    wanted = suggested if config.prototypes.k == "auto" else config.prototypes.k
    centroids = core.cluster(matrix, core.count_distinct(matrix, enough=wanted), config.seed, users)
    samples = _samples([row.pair for row in rows], histories, embed)
    refined, metrics = refine(
        centroids, samples, config.prototypes, config.seed, device=config.cluster.device
    )
    core.save(refined, folder.path, hashes)
    start = [_cold_start(config, refined, chains_t, shown, embed) for chains_t, shown in newcomers]
    facts = {
        "k": len(refined.A),
        "k_suggested_by_singular_values": suggested,
        "analyses": len(rows),
        "users": len(set(users)),
        "failures": dict(failures),
        "refinement": dict(metrics),
        **recovery([row.pair for row in rows], refined.labels),
        "cold_start": start,
    }
    write_table(folder.path / "analyses.parquet", _table(rows, refined))
    write_json(folder.path / "cards.json", made := cards(rows, refined))
    write_text(folder.path / "cards.md", cards_markdown(made))
    curve_facts = {
        "retained_mass": [round(float(x), 5) for x in curve],
        "k": len(refined.A),
        "suggested_k": suggested,
    }
    write_json(folder.path / "singular_values.json", curve_facts)
    write_json(folder.path / "cold_start.json", start)
    return facts


def read_hashes(config: Config, checkpoint: Path, embedder: str, data: str) -> dict[str, str]:
    """What the prototypes were made from; a reader with other hashes refuses them."""
    return {
        "model": fingerprint(weights_digest(checkpoint), config.model.name),
        "embedder": embedder,
        "data": data,
    }


def _count(seen: Counter[str | None], scenario: str | None) -> int:
    seen[scenario] += 1
    return seen[scenario]


def _readable(chains: Chains) -> tuple[list[Analysed], Counter[str]]:
    rows, failures = [], Counter[str]()
    for pair, text in chains:
        chain = parse_chain(text or "")
        if isinstance(chain, ParseFailure):
            failures[f"parse:{chain.kind}" if text else "no_text"] += 1
        elif not chain.analysis:
            failures["no_analysis"] += 1
        else:
            rows.append(Analysed(pair, chain.analysis, chain.criteria))
    return rows, failures


def _cold_start(
    config: Config, refined: core.Prototypes, chains: Chains, shown: Histories, embed: Embed
) -> dict[str, Any]:
    """One point of the cold-start curve.  A chain that cannot be read gives no prototype: the mean of all stands in."""
    rows, failures = _readable(chains)
    analyses = embed([core.preference_text(row.analysis) for row in rows]) if rows else refined.A[:0]
    label = dict(zip((row.pair.pair_id for row in rows), core.assign(refined.A, analyses)))
    pairs = [pair for pair, _ in chains]
    samples = _samples(pairs, shown, embed)
    labels = np.array([label.get(p.pair_id, -1) for p in pairs])
    found = cold_start(refined, samples, labels, config.prototypes, config.seed)
    return {
        "history_pairs": max((len(h) for h in shown.values()), default=0),
        "failures": dict(failures),
        **found,
    }


def _samples(pairs: Sequence[PreferencePair], histories: Histories, embed: Embed) -> RefinementBatch:
    """Embeddings of queries and responses, and of padded histories; equal texts are embedded once."""
    items = [histories[p.pair_id] for p in pairs]
    longest = max(1, max(len(h) for h in items))
    texts = sorted(
        {t for p in pairs for t in (p.query, p.chosen, p.rejected)}
        | {t for h in items for i in h for t in (i.query, i.chosen, i.rejected)}
    )
    table, place = embed(texts), {text: i for i, text in enumerate(texts)}
    mask = np.array([[n < len(h) for n in range(longest)] for h in items])

    def padded(name: str) -> Rows:
        index = [[place[getattr(h[n], name)] if n < len(h) else 0 for n in range(longest)] for h in items]
        return Rows(table, np.array(index))

    def column(name: str) -> Rows:
        return Rows(table, np.array([place[getattr(p, name)] for p in pairs]))

    return RefinementBatch(
        column("query"), column("chosen"), column("rejected"), padded("query"), padded("chosen"), padded("rejected"),
        mask, np.array([p.user_id for p in pairs]),
    )  # fmt: skip


def _table(rows: Sequence[Analysed], refined: core.Prototypes) -> list[dict[str, Any]]:
    return [
        {
            "row": i, "pair_id": row.pair.pair_id, "user_id": row.pair.user_id, "prototype": int(refined.labels[i]),
            "analysis": row.analysis, "x": float(x), "y": float(y),
        }
        for i, (row, (x, y)) in enumerate(zip(rows, plane(refined.embeddings)))
    ]  # fmt: skip


def recovery(pairs: Sequence[PreferencePair], labels: np.ndarray) -> dict[str, float | None]:
    """Adjusted Rand index against what users say of themselves, by scenario: of every analysis, and of users in a scenario, who have
    the prototype of most of their analyses there (the lowest wins a tie).  None where some say nothing."""
    if any(p.explicit.self_description is None for p in pairs):
        return {"recovery": None, "recovery_of_users": None}
    import pandas as pd
    from sklearn.metrics import adjusted_rand_score

    said = [f"{p.explicit.self_description}/{p.scenario}" for p in pairs]
    table = pd.DataFrame({"user": [p.user_id for p in pairs], "said": said, "label": labels})
    users = table.groupby(["user", "said"])["label"].agg(lambda x: x.mode().iloc[0]).reset_index()
    return {
        "recovery": round(float(adjusted_rand_score(table["said"], table["label"])), 4),
        "recovery_of_users": round(float(adjusted_rand_score(users["said"], users["label"])), 4),
    }
