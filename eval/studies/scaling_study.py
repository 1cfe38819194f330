"""Test-time user-based scaling of one model (METHOD §7): one pool of samples, every Ind-m/Pro-n cell from it.

The pool holds m chains a pair and order from the user's own history, and one chain from each of the n most similar training
users' histories.  Similar users are found by the analysis of the user's first own chain; a pair whose analysis cannot be read, or
that has fewer than n neighbours, keeps its place in the pool with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from eval.ask.harness import Question, own_questions, readable_text
from eval.metrics.accuracy import accuracy_report, paired_difference
from pgenrm_train.chains.chain import ParseFailure, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.records.pairs import HistoryItem, PreferencePair
from pgenrm_train.scaling.combine import GROUP, grid
from pgenrm_train.scaling.stopping import looks, replay, settled

Histories = Mapping[str, tuple[HistoryItem, ...]]
SETTLED = "settled"  # the reason of a sample that adaptive stopping did not draw
REPLAYED_LEVEL = 0.1


@dataclass(frozen=True, slots=True)
class Similar:
    """A training user like the asked one: their name and the history that their own analysis was written from."""

    user_id: str
    history: tuple[HistoryItem, ...]


Ask = Callable[[Sequence[Question]], pd.DataFrame]
FindSimilar = Callable[
    [Sequence[str], Sequence[str], int], list[list[Similar]]
]  # analyses, asked users, n → similar users each


@dataclass(frozen=True, slots=True)
class Study:
    """What to sample: `name` keys the questions, `ind` and `pro` list the cells; `weights` are those of `scaling.scale`; every
    one of `seeds` has samples of its own."""

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

    @property
    def cells(self) -> int:
        return len(self.ind) * len(self.pro)


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
    """Ask for the largest m and n; returns `scaling.grid`'s pool.

    With `adaptive`, an error level, a pair's own samples stop once its verdict is settled (see `stopping`); those that are not
    drawn have a row with the failure `settled`.
    """
    m = max(1, study.m)
    own_asked = own_questions(
        pairs, histories, seeds=study.seeds, samples=m, set_name=f"{study.name}/own", orders=orders
    )
    first_asked = [replace(q, samples=looks(m, adaptive)[0]) for q in own_asked] if adaptive else own_asked
    own = ask(first_asked)
    similar = pd.DataFrame()
    if study.n:
        assert find is not None, "Pro-n needs prototypes"
        questions, missing = _similar_questions(study, own_asked, own, find)
        similar = ask(questions)
        similar["sample"] = similar["neighbour"].str.split("/", n=1).str[0].astype(int)
        similar = pd.concat([similar.assign(source="pro"), missing], ignore_index=True)
    undrawn = pd.DataFrame()
    if adaptive:
        own, undrawn = _draw_until_settled(own_asked, own, similar, ask, adaptive, study.weights)
    return pd.concat([own.assign(source="ind"), undrawn, similar], ignore_index=True)


def cells(pool: pd.DataFrame, study: Study, config: Config) -> list[dict[str, Any]]:
    """Accuracy of every cell with its interval, and the paired difference to the first cell.

    With several seeds `stderr` is over them and the disjoint subsets of a pool (M // m of them).
    """
    table = grid(pool, study.ind, study.pro, study.weights)
    rows, first = [], None
    for (m, n), part in table.groupby(["ind", "pro"], sort=True):
        report = accuracy_report(
            part,
            protocol=config.eval.protocol,
            draws=config.eval.draws,
            seed=config.seed,
            extra={"ind": int(m), "pro": int(n)},
        )
        row = {"ind": int(m), "pro": int(n), "accuracy": report["accuracy"], "ci95": report["ci95"]}
        row |= {"stderr": report["stderr"]} if study.seeds > 1 else {}  # the cells of one pool share chains
        row |= {
            "tie share": report["ties"] / len(part),  # of all draws: a pool of M holds M // m of m samples
            "pairs": report["n_pairs"],
            "samples used": float((part["own_used"] + part["similar_used"]).mean()),
        }
        if (undrawn := (pool["failure"] == SETTLED).sum()) > 0:
            row["saved share"] = float(undrawn / (pool["source"] == "ind").sum())
        if first is None:
            first = part
        else:
            difference = paired_difference(part, first, draws=config.eval.draws, seed=config.seed)
            row |= {
                "paired difference": difference["difference"],
                "paired difference ci95": difference["ci95"],
            }
        rows.append(row)
    return rows


def replayed(
    pool: pd.DataFrame, study: Study, config: Config, alpha: float = REPLAYED_LEVEL
) -> dict[str, Any] | None:
    """What adaptive stopping would have saved on a full pool, and what it would have cost; None for pools of fewer than 4 samples."""
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
    cell = {"ind": study.m, "pro": study.n}
    report = accuracy_report(early, protocol=config.eval.protocol, draws=draws, seed=seed, extra=cell)
    difference = paired_difference(early, full, draws=draws, seed=seed)
    return {
        "ind": study.m, "pro": study.n, "error level": alpha, "saved share": 1 - float(used.mean()) / study.m,
        "accuracy": report["accuracy"], "ci95": report["ci95"],
        "paired difference": difference["difference"], "paired difference ci95": difference["ci95"],
    }  # fmt: skip


def _draw_until_settled(
    asked: Sequence[Question],
    own: pd.DataFrame,
    similar: pd.DataFrame,
    ask: Ask,
    alpha: float,
    weights: tuple[float, float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rounds over the one queue of all pairs that are still open; the samples drawn, and rows for those that were not."""
    budget = asked[0].samples
    place = {q.key: i for i, q in enumerate(asked)}
    groups = pd.DataFrame([(q.pair.pair_id, q.order, q.seed) for q in asked], columns=GROUP)
    offset = groups.merge(_offsets(similar, weights), how="left", on=GROUP)["offset"].fillna(0.0).to_numpy()
    steps = looks(budget, alpha)
    drawn = np.full(len(asked), steps[0])
    for before, after in itertools.pairwise(steps):
        margins = np.full((len(asked), budget), np.nan)
        rows = own["key"].map(place)
        margins[rows, own["sample"]] = weights[0] * _margins(own) + offset[rows]
        drawn[(drawn == before) & ~settled(margins, before, alpha)] = after
        own = ask([replace(q, samples=int(n)) for q, n in zip(asked, drawn)])
    left = [_missing(q, sample, SETTLED, "ind") for q, n in zip(asked, drawn) for sample in range(n, budget)]
    return own, pd.DataFrame(left)


def _margins(rows: pd.DataFrame) -> pd.Series:
    return (rows["score_chosen"] - rows["score_rejected"]).astype(float)


def _offsets(similar: pd.DataFrame, weights: tuple[float, float]) -> pd.DataFrame:
    """The similar users' weighted mean margin of each pair × order × seed; absent where none could be read."""
    if similar.empty:
        return pd.DataFrame(columns=[*GROUP, "offset"])
    margin = (weights[1] * _margins(similar)).rename("offset")
    return margin.groupby([similar[name] for name in GROUP]).mean().reset_index()


def _similar_questions(
    study: Study, own_asked: Sequence[Question], own: pd.DataFrame, find: FindSimilar
) -> tuple[list[Question], pd.DataFrame]:
    """One question a pair × order × similar user, ranked from 0; and rows for the similar users that could not be found."""
    first = own[own["sample"] == 0].set_index("key")
    readable: list[Question] = []
    lost: list[Question] = []
    for question in own_asked:
        chain = parse_chain(readable_text(first.loc[question.key]) or "")
        (lost if isinstance(chain, ParseFailure) or not chain.analysis else readable).append(question)
    analyses = [parse_chain(readable_text(first.loc[q.key]) or "").analysis for q in readable]  # type: ignore[union-attr]
    found = find(analyses, [q.pair.user_id for q in readable], study.n)
    questions, missing = [], [_missing(q, rank, "no_analysis") for q in lost for rank in range(study.n)]
    for question, similar in zip(readable, found):
        for rank in range(study.n):
            if rank < len(similar):
                one = similar[rank]
                questions.append(
                    Question(
                        question.pair,
                        question.order,
                        one.history,
                        f"{study.name}/similar",
                        question.seed,
                        1,
                        f"{rank}/{one.user_id}",
                    )
                )
            else:
                missing.append(_missing(question, rank, "no_neighbour"))
    return questions, pd.DataFrame(missing)


def _missing(question: Question, rank: int, reason: str, source: str = "pro") -> dict[str, Any]:
    pair = question.pair
    return {
        "pair_id": pair.pair_id, "user_id": pair.user_id, "order": question.order, "seed": question.seed, "sample": rank,
        "source": source, "neighbour": None, "score_chosen": None, "score_rejected": None, "failure": reason, "kind": pair.kind,
    }  # fmt: skip
