"""User prototypes (METHOD §6): analyses of training users → clusters → refined prototypes.

Needs chains of training users, which the recipe supplies, and an embedder.  Makes `prototypes.safetensors`,
`members.parquet`, `prototypes.json`, `analyses.parquet` (with a 2-D map), `cards.json`, `cards.md`,
`singular_values.json` and, with chains of users that training has not seen, `cold_start.json`.  Only the
preference in the *analysis* of a chain is embedded, never its scores, both here and at test time
(`clusters.preference_text`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from pgenrm_train.chains.chain import ParseFailure, parse_chain
from pgenrm_train.config import Config, PrototypesConfig, StageName
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.files import fingerprint, write_json, write_table, write_text
from pgenrm_train.prototypes import clusters as core
from pgenrm_train.prototypes.cards import Analysed, cards, cards_markdown, plane
from pgenrm_train.prototypes.refinement import Lookup, RefinementBatch, RefinementSettings, cold_start, refine
from pgenrm_train.records.pairs import HistoryItem, PreferencePair
from pgenrm_train.run.folder import StageFolder, weights_digest

Embed = Callable[[Sequence[str]], np.ndarray]
Chains = Sequence[tuple[PreferencePair, str | None]]  # one text per pair, None where generation failed
Histories = Mapping[str, tuple[HistoryItem, ...]]
Refine = Callable[..., tuple[core.Prototypes, Mapping[str, object]]]  # as `refinement.refine`


@dataclass(frozen=True, slots=True)
class ChainSet:
    """Chains, and the histories by pair that they were written from."""

    chains: Chains
    histories: Histories


class Recovery(TypedDict):
    """Adjusted Rand index against the users' own descriptions, per analysis and per user."""

    recovery: float | None
    recovery_of_users: float | None


class PrototypeFacts(Recovery):
    """Facts of the stage, for its manifest."""

    k: int
    k_suggested_by_singular_values: int
    analyses: int
    users: int
    failures: dict[str, int]
    refinement: dict[str, object]
    cold_start: list[dict[str, object]]


def pairs_to_analyse(settings: PrototypesConfig, train: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The first `analyses_per_user` pairs of the first `max_users` users, spread over scenarios."""
    by_user: dict[str, list[PreferencePair]] = {}
    for pair in train:
        by_user.setdefault(pair.user_id, []).append(pair)
    chosen = []
    for rows in list(by_user.values())[: settings.max_users]:
        scenarios: Counter[str | None] = Counter()
        order = sorted(range(len(rows)), key=lambda i: (_count(scenarios, rows[i].scenario), i))
        chosen += [rows[i] for i in order[: settings.analyses_per_user]]
    return chosen


def run(
    config: Config,
    folder: StageFolder,
    training: ChainSet,
    newcomers: Sequence[ChainSet],
    embed: Embed,
    hashes: Mapping[str, str],
    refine: Refine = refine,
) -> PrototypeFacts:
    """Cluster and refine the analyses of training users; return the facts.

    `newcomers`: entry t holds chains of users that training has not seen, written from t history pairs.
    """
    rows, failures = _readable(training.chains)
    if not rows:
        raise DataError(
            f"none of {len(training.chains)} chains of training users could be read ({dict(failures)}); "
            "prototypes need analyses"
        )
    matrix = embed([core.preference_text(row.analysis) for row in rows])
    users = [row.pair.user_id for row in rows]
    suggested, curve = core.suggest_k(matrix, config.prototypes.retained_mass)
    wanted = suggested if config.prototypes.k == "auto" else config.prototypes.k
    centroids = core.cluster(matrix, core.count_distinct(matrix, enough=wanted), config.seed, users)
    samples = samples_of([row.pair for row in rows], training.histories, embed)
    settings = RefinementSettings.of(config.prototypes, config.seed)
    refined, metrics = refine(centroids, samples, settings, device=config.cluster.device)
    core.save(refined, folder.path, hashes)
    start = [_cold_start(settings, refined, written, embed) for written in newcomers]
    facts: PrototypeFacts = {
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
    table = cards(rows, refined)
    write_json(folder.path / "cards.json", table)
    write_text(folder.path / "cards.md", cards_markdown(table))
    retained = [round(float(share), 5) for share in curve]
    write_json(
        folder.path / "singular_values.json",
        {"retained_mass": retained, "k": len(refined.A), "suggested_k": suggested},
    )
    write_json(folder.path / "cold_start.json", start)
    for remark in remarks(config.prototypes, facts):
        print(f"[prototypes] {remark}", flush=True)
    return facts


def remarks(settings: PrototypesConfig, facts: PrototypeFacts) -> Iterator[str]:
    """Remarks that a reader of the console needs to judge the prototypes."""
    if settings.k != "auto" and facts["k"] < int(settings.k):
        yield (
            f"prototypes.k={settings.k}, but the {facts['analyses']} analyses hold only {facts['k']} "
            "distinct preferences"
        )
    if facts["recovery"] is not None:
        yield (
            f"adjusted Rand index against the users' own descriptions: {facts['recovery']:.2f} per analysis, "
            f"{facts['recovery_of_users']:.2f} per user and scenario"
        )


def read_hashes(config: Config, checkpoint: Path, embedder: str) -> dict[str, str]:
    """Hashes of model, embedder and data behind the prototypes; a reader with other hashes refuses them."""
    return {
        "model": fingerprint(weights_digest(checkpoint), config.model.name),
        "embedder": embedder,
        "data": StageFolder.read(Path(config.run_dir), StageName.BUILD_DATA).manifest.facts["sha256"],
    }


def reopen_damaged(folder: StageFolder) -> None:
    """Mark finished prototypes with damaged files as interrupted, so that they are rebuilt."""
    if not folder.complete:
        return
    try:
        core.load(folder.path)
    except ArtifactError:
        print(f"[prototypes] files in {folder.path} are missing or damaged; they are rebuilt", flush=True)
        folder.interrupted("damaged files")


def prototype_of_users(folder: Path) -> dict[str, int]:
    """User → the prototype of most of their analyses.

    Raises ArtifactError if `folder`, of `curriculum.prototypes`, holds no finished prototypes.
    """
    import pandas as pd

    if not StageFolder.read(folder.parent, folder.name).complete:
        raise ArtifactError(
            f"curriculum.prototypes={folder} holds no finished prototypes; give the folder RUN/prototypes"
        )
    table = pd.read_parquet(folder / "analyses.parquet", columns=["user_id", "prototype"])
    return {user: int(labels.mode().iloc[0]) for user, labels in table.groupby("user_id")["prototype"]}


def _count(scenarios: Counter[str | None], scenario: str | None) -> int:
    scenarios[scenario] += 1
    return scenarios[scenario]


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
    settings: RefinementSettings, refined: core.Prototypes, written: ChainSet, embed: Embed
) -> dict[str, object]:
    """One point of the cold-start curve; the mean of all prototypes replaces that of an unreadable chain."""
    rows, failures = _readable(written.chains)
    analyses = embed([core.preference_text(row.analysis) for row in rows]) if rows else refined.A[:0]
    label = dict(zip((row.pair.pair_id for row in rows), core.assign(refined.A, analyses)))
    pairs = [pair for pair, _ in written.chains]
    labels = np.array([label.get(pair.pair_id, -1) for pair in pairs])
    samples = samples_of(pairs, written.histories, embed)
    return {
        "history_pairs": max((len(history) for history in written.histories.values()), default=0),
        "failures": dict(failures),
        **cold_start(refined, samples, labels, settings),
    }


def samples_of(pairs: Sequence[PreferencePair], histories: Histories, embed: Embed) -> RefinementBatch:
    """Embeddings of queries and responses, and of padded histories; equal texts are embedded once."""
    items = [histories[p.pair_id] for p in pairs]
    longest = max(1, max(len(h) for h in items))
    texts = sorted(
        {t for p in pairs for t in (p.query, p.chosen, p.rejected)}
        | {t for h in items for i in h for t in (i.query, i.chosen, i.rejected)}
    )
    table, place = embed(texts), {text: i for i, text in enumerate(texts)}
    mask = np.array([[n < len(h) for n in range(longest)] for h in items])

    def padded(name: str) -> Lookup:
        index = [[place[getattr(h[n], name)] if n < len(h) else 0 for n in range(longest)] for h in items]
        return Lookup(table, np.array(index))

    def column(name: str) -> Lookup:
        return Lookup(table, np.array([place[getattr(p, name)] for p in pairs]))

    return RefinementBatch(
        query=column("query"),
        chosen=column("chosen"),
        rejected=column("rejected"),
        history_query=padded("query"),
        history_chosen=padded("chosen"),
        history_rejected=padded("rejected"),
        mask=mask,
        users=np.array([p.user_id for p in pairs]),
    )


def _table(rows: Sequence[Analysed], refined: core.Prototypes) -> list[dict[str, object]]:
    return [
        {
            "row": i,
            "pair_id": row.pair.pair_id,
            "user_id": row.pair.user_id,
            "prototype": int(refined.labels[i]),
            "analysis": row.analysis,
            "x": float(x),
            "y": float(y),
        }
        for i, (row, (x, y)) in enumerate(zip(rows, plane(refined.embeddings)))
    ]


def recovery(pairs: Sequence[PreferencePair], labels: np.ndarray) -> Recovery:
    """Adjusted Rand index against the users' self-descriptions, by scenario; None if any user has none.

    `recovery` counts every analysis.  `recovery_of_users` counts users per scenario, each with the prototype
    of most of their analyses there; the lowest wins a tie.
    """
    if any(p.explicit.self_description is None for p in pairs):
        return {"recovery": None, "recovery_of_users": None}
    import pandas as pd
    from sklearn.metrics import adjusted_rand_score

    groups = [f"{p.explicit.self_description}/{p.scenario}" for p in pairs]
    table = pd.DataFrame({"user": [p.user_id for p in pairs], "group": groups, "label": labels})
    users = table.groupby(["user", "group"])["label"].agg(lambda x: x.mode().iloc[0]).reset_index()
    return {
        "recovery": round(float(adjusted_rand_score(table["group"], table["label"])), 4),
        "recovery_of_users": round(float(adjusted_rand_score(users["group"], users["label"])), 4),
    }
