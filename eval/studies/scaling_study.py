"""Test-time user-based scaling of one model (METHOD §7): every Ind-m/Pro-n cell from one pool of samples.

Per pair and order, the pool holds m chains from the user's own history.  It also holds one chain from the
history of each of the n most similar training users.  The analysis of the user's first own chain selects the
similar users.  A pair without a readable analysis, or with fewer than n neighbours, has rows in the pool that
state the reason.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict

import numpy as np
import pandas as pd

from eval.ask.harness import Histories, Question, own_questions, readable_text
from eval.metrics.accuracy import accuracy_report, paired_difference
from pgenrm_train.chains.chain import ParseFailure, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.records.pairs import HistoryItem, PreferencePair
from pgenrm_train.scaling.combine import GROUP, grid
from pgenrm_train.scaling.stopping import looks, replay, settled

SETTLED = "settled"  # failure of a sample that adaptive stopping did not draw
REPLAYED_LEVEL = 0.1


@dataclass(frozen=True, slots=True)
class Similar:
    """A similar training user: name, and the history from which their own analysis was written."""

    user_id: str
    history: tuple[HistoryItem, ...]


Ask = Callable[[Sequence[Question]], pd.DataFrame]
# (analyses, their users, n) → similar users per analysis, the most similar first
FindSimilar = Callable[[Sequence[str], Sequence[str], int], list[list[Similar]]]

CellRow = TypedDict(
    "CellRow",
    {
        "ind": int,
        "pro": int,
        "accuracy": float | None,
        "ci95": list[float],
        "stderr": NotRequired[float | None],  # with several seeds
        "tie share": float,
        "pairs": int,
        "samples used": float,
        "saved share": NotRequired[float],  # with adaptive stopping
        "paired difference": NotRequired[float | None],  # to the first cell
        "paired difference ci95": NotRequired[list[float]],
    },
)
ControlRow = TypedDict(
    "ControlRow",
    {
        "ind": int,
        "pro": int,
        "similar users accuracy": float | None,
        "random users accuracy": float | None,
        "similar − random difference": float | None,
        "similar − random difference ci95": list[float],
        "own chains accuracy": NotRequired[float | None],  # of ind + pro own chains
        "similar − own difference": NotRequired[float | None],
        "similar − own difference ci95": NotRequired[list[float]],
    },
)
ReplayedRow = TypedDict(
    "ReplayedRow",
    {
        "ind": int,
        "pro": int,
        "error level": float,
        "saved share": float,
        "accuracy": float | None,
        "ci95": list[float],
        "paired difference": float | None,
        "paired difference ci95": list[float],
    },
)


@dataclass(frozen=True, slots=True)
class Study:
    """Cells to sample: `name` keys the questions, `ind` and `pro` list the cells.

    `weights` are those of `scaling.combine.scale`; each of the `seeds` has its own samples.
    """

    name: str
    ind: tuple[int, ...]
    pro: tuple[int, ...]
    weights: tuple[float, float] = (1.0, 1.0)
    seeds: int = 1

    @property
    def m(self) -> int:
        return max(self.ind)

    @property
    def n(self) -> int:
        return max(self.pro)


def sample_pool(
    study: Study,
    pairs: Sequence[PreferencePair],
    histories: Histories,
    ask: Ask,
    find: FindSimilar | None,
    *,
    adaptive: float | None = None,
    orders: Sequence[int] = (0, 1),
) -> pd.DataFrame:
    """Sample the largest m and n; returns the pool of `scaling.combine.grid`.

    `adaptive` is an error level: a pair's own samples stop once its verdict is settled (see `stopping`).
    Samples that are not drawn have a row with the failure `settled`.
    """
    m = max(1, study.m)
    questions = own_questions(
        pairs, histories, seeds=study.seeds, samples=m, set_name=f"{study.name}/own", orders=orders
    )
    own = ask([replace(q, samples=looks(m, adaptive)[0]) for q in questions] if adaptive else questions)
    similar = pd.DataFrame()
    if study.n:
        assert find is not None, "Pro-n needs prototypes"
        similar_questions, missing = _similar_questions(study, questions, own, find)
        similar = ask(similar_questions)
        similar["sample"] = similar["neighbour"].str.split("/", n=1).str[0].astype(int)
        similar = pd.concat([similar.assign(source="pro"), missing], ignore_index=True)
    undrawn = pd.DataFrame()
    if adaptive:
        own, undrawn = _draw_until_settled(questions, own, similar, ask, adaptive, study.weights)
    return pd.concat([own.assign(source="ind"), undrawn, similar], ignore_index=True)


def cells(pool: pd.DataFrame, study: Study, config: Config) -> list[CellRow]:
    """Accuracy of every cell with its interval, and the paired difference to the first cell.

    With several seeds, `stderr` is over seeds and disjoint subsets of a pool (M // m of them).
    """
    parts = list(grid(pool, study.ind, study.pro, study.weights).groupby(["ind", "pro"], sort=True))
    settings, seed = config.eval, config.seed
    undrawn = (pool["failure"] == SETTLED).sum()
    rows: list[CellRow] = []
    for (m, n), part in parts:
        report = accuracy_report(part, protocol=settings.protocol, draws=settings.draws, seed=seed)
        row: CellRow = {
            "ind": int(m),
            "pro": int(n),
            "accuracy": report["accuracy"],
            "ci95": report["ci95"],
            "tie share": report["ties"] / len(part),  # of all draws: a pool of M holds M // m of m samples
            "pairs": report["n_pairs"],
            "samples used": float((part["own_used"] + part["similar_used"]).mean()),
        }
        if study.seeds > 1:  # not for one pool: its cells share chains
            row["stderr"] = report["stderr"]
        if undrawn:
            row["saved share"] = float(undrawn / (pool["source"] == "ind").sum())
        if rows:
            difference = paired_difference(part, parts[0][1], draws=settings.draws, seed=seed)
            row["paired difference"] = difference["difference"]
            row["paired difference ci95"] = difference["ci95"]
        rows.append(row)
    return rows


def controlled(pool: pd.DataFrame, control: pd.DataFrame, study: Study, config: Config) -> list[ControlRow]:
    """What similar users add beyond any other users, and beyond as many own chains, per cell with pro > 0.

    `control` is a pool of the same study with the histories of random training users.  Differences are over
    the same pairs, own chains included.
    """
    draws, seed, protocol = config.eval.draws, config.seed, config.eval.protocol

    def by_cell(chains: pd.DataFrame) -> dict[tuple[int, int], pd.DataFrame]:
        parts = grid(chains, study.ind, study.pro, study.weights).groupby(["ind", "pro"])
        return {(int(m), int(n)): part for (m, n), part in parts}

    similar, others = by_cell(pool), by_cell(control)
    rows: list[ControlRow] = []
    for (m, n), part in similar.items():
        if not n:
            continue
        reports = [
            accuracy_report(p, protocol=protocol, draws=draws, seed=seed) for p in (part, others[m, n])
        ]
        gain = paired_difference(part, others[m, n], draws=draws, seed=seed)
        row: ControlRow = {
            "ind": m,
            "pro": n,
            "similar users accuracy": reports[0]["accuracy"],
            "random users accuracy": reports[1]["accuracy"],
            "similar − random difference": gain["difference"],
            "similar − random difference ci95": gain["ci95"],
        }
        if (own := similar.get((m + n, 0))) is not None:
            gain = paired_difference(part, own, draws=draws, seed=seed)
            row["own chains accuracy"] = accuracy_report(own, protocol=protocol, draws=draws, seed=seed)[
                "accuracy"
            ]
            row["similar − own difference"] = gain["difference"]
            row["similar − own difference ci95"] = gain["ci95"]
        rows.append(row)
    return rows


def replayed(
    pool: pd.DataFrame, study: Study, config: Config, alpha: float = REPLAYED_LEVEL
) -> ReplayedRow | None:
    """Savings and cost of adaptive stopping, replayed on a full pool; None below 4 samples."""
    if study.m < 4 or (pool["failure"] == SETTLED).any():
        return None
    similar = pool[pool["source"] == "pro"]
    own = pool[pool["source"] == "ind"].merge(_offsets(similar, study.weights), how="left", on=GROUP)
    own["margin"] = study.weights[0] * _margins(own) + own["offset"].fillna(0.0)
    wide = own.set_index([*GROUP, "sample"])["margin"].unstack()
    used = pd.Series(replay(wide.to_numpy(), alpha), index=wide.index, name="used")
    own = own.merge(used, left_on=GROUP, right_index=True)
    own["failure"] = own["failure"].astype(object).where(own["sample"] < own["used"], SETTLED)
    early = grid(pd.concat([own, similar], ignore_index=True), [study.m], [study.n], study.weights)
    full = grid(pool, [study.m], [study.n], study.weights)
    draws, seed = config.eval.draws, config.seed
    report = accuracy_report(early, protocol=config.eval.protocol, draws=draws, seed=seed)
    difference = paired_difference(early, full, draws=draws, seed=seed)
    return {
        "ind": study.m,
        "pro": study.n,
        "error level": alpha,
        "saved share": 1 - float(used.mean()) / study.m,
        "accuracy": report["accuracy"],
        "ci95": report["ci95"],
        "paired difference": difference["difference"],
        "paired difference ci95": difference["ci95"],
    }


def _draw_until_settled(
    questions: Sequence[Question],
    own: pd.DataFrame,
    similar: pd.DataFrame,
    ask: Ask,
    alpha: float,
    weights: tuple[float, float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sample all open pairs round by round; returns the drawn samples, and rows for those not drawn."""
    budget = questions[0].samples
    place = {q.key: i for i, q in enumerate(questions)}
    groups = pd.DataFrame([(q.pair.pair_id, q.order, q.seed) for q in questions], columns=GROUP)
    offset = groups.merge(_offsets(similar, weights), how="left", on=GROUP)["offset"].fillna(0.0).to_numpy()
    steps = looks(budget, alpha)
    drawn = np.full(len(questions), steps[0])
    for before, after in itertools.pairwise(steps):
        margins = np.full((len(questions), budget), np.nan)
        rows = own["key"].map(place)
        margins[rows, own["sample"]] = weights[0] * _margins(own) + offset[rows]
        drawn[(drawn == before) & ~settled(margins, before, alpha)] = after
        own = ask([replace(q, samples=int(n)) for q, n in zip(questions, drawn)])
    undrawn = [
        _missing(q, sample, SETTLED, "ind") for q, n in zip(questions, drawn) for sample in range(n, budget)
    ]
    return own, pd.DataFrame(undrawn)


def _margins(rows: pd.DataFrame) -> pd.Series:
    return (rows["score_chosen"] - rows["score_rejected"]).astype(float)


def _offsets(similar: pd.DataFrame, weights: tuple[float, float]) -> pd.DataFrame:
    """Weighted mean margin of the similar users per pair × order × seed; absent without readable chains."""
    if similar.empty:
        return pd.DataFrame(columns=[*GROUP, "offset"])
    margin = (weights[1] * _margins(similar)).rename("offset")
    return margin.groupby([similar[name] for name in GROUP]).mean().reset_index()


def _similar_questions(
    study: Study, questions: Sequence[Question], own: pd.DataFrame, find: FindSimilar
) -> tuple[list[Question], pd.DataFrame]:
    """One question per pair × order × similar user, ranked from 0; and rows for missing similar users."""
    first = own[own["sample"] == 0].set_index("key")
    chains = ((q, parse_chain(readable_text(first.loc[q.key]) or "")) for q in questions)
    analyses = {q: "" if isinstance(chain, ParseFailure) else chain.analysis for q, chain in chains}
    readable = {q: analysis for q, analysis in analyses.items() if analysis}
    users = [q.pair.user_id for q in readable]
    neighbours = dict(zip(readable, find(list(readable.values()), users, study.n)))
    similar_questions = [
        replace(
            question,
            history=similar.history,
            set=f"{study.name}/similar",
            samples=1,
            neighbour=f"{rank}/{similar.user_id}",
        )
        for question, ranked in neighbours.items()
        for rank, similar in enumerate(ranked[: study.n])
    ]
    missing = [
        _missing(q, rank, "no_neighbour" if q in neighbours else "no_analysis")
        for q in sorted(questions, key=neighbours.__contains__)  # those without an analysis first
        for rank in range(len(neighbours.get(q, ())), study.n)
    ]
    return similar_questions, pd.DataFrame(missing)


def _missing(question: Question, sample: int, reason: str, source: str = "pro") -> dict[str, object]:
    """Row of the pool for a sample or similar user that does not exist."""
    pair = question.pair
    return {
        "pair_id": pair.pair_id,
        "user_id": pair.user_id,
        "order": question.order,
        "seed": question.seed,
        "sample": sample,
        "source": source,
        "neighbour": None,
        "score_chosen": None,
        "score_rejected": None,
        "failure": reason,
        "kind": pair.kind,
    }
