"""Test-time user-based scaling of one model (METHOD §7): one pool of samples, every Ind-m/Pro-n cell from it.

The pool holds m chains a pair and order from the user's own history, and one chain from each of the n most similar training
users' histories.  Similar users are found by the analysis of the user's first own chain; a pair whose analysis cannot be read, or
that has fewer than n neighbours, keeps its place in the pool with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from eval.harness import Question, own_questions, readable_text
from eval.metrics import accuracy_report, paired_difference
from pgenrm_train.chains import ParseFailure, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.records import HistoryItem, PreferencePair
from pgenrm_train.scaling import grid

Histories = Mapping[str, tuple[HistoryItem, ...]]


@dataclass(frozen=True, slots=True)
class Similar:
    """A training user like the asked one: their name and the history that their own analysis was written from."""

    user_id: str
    history: tuple[HistoryItem, ...]


Ask = Callable[[Sequence[Question]], pd.DataFrame]
FindSimilar = Callable[[Sequence[str], Sequence[str], int], list[list[Similar]]]  # analyses, asked users, n → similar users each


@dataclass(frozen=True, slots=True)
class Study:
    """What to sample: `name` keys the questions, `ind` and `pro` list the cells."""

    name: str
    ind: tuple[int, ...]
    pro: tuple[int, ...]

    @property
    def m(self) -> int:
        return max(self.ind)

    @property
    def n(self) -> int:
        return max(self.pro)


def sample_pool(
    study: Study, pairs: Sequence[PreferencePair], histories: Histories, ask: Ask, find: FindSimilar | None
) -> pd.DataFrame:
    """Ask for the largest m and n; returns `scaling.grid`'s pool."""
    own_asked = own_questions(pairs, histories, samples=max(1, study.m), set_name=f"{study.name}/own")
    own = _answers(ask(own_asked), own_asked).assign(source="ind")
    if not study.n:
        return own
    assert find is not None, "Pro-n needs prototypes"
    questions, missing = _similar_questions(study, own_asked, own, find)
    similar = _answers(ask(questions), questions)
    similar["sample"] = similar["neighbour"].str.split("/", n=1).str[0].astype(int)
    return pd.concat([own, similar.assign(source="pro"), missing], ignore_index=True)


def cells(pool: pd.DataFrame, study: Study, config: Config) -> list[dict[str, Any]]:
    """Accuracy of every cell with its interval, and the paired difference to the first cell."""
    table = grid(pool, study.ind, study.pro)
    rows, first = [], None
    for (m, n), part in table.groupby(["ind", "pro"], sort=True):
        report = accuracy_report(
            part, protocol=config.eval.protocol, draws=config.eval.draws, seed=config.seed, extra={"ind": int(m), "pro": int(n)}
        )
        row = {"ind": int(m), "pro": int(n), "accuracy": report["accuracy"], "ci95": report["ci95"]}
        row |= {
            "ties": report["ties"],
            "pairs": report["n_pairs"],
            "samples used": float((part["own_used"] + part["similar_used"]).mean()),
        }
        if first is None:
            first = part
        else:
            difference = paired_difference(part, first, draws=config.eval.draws, seed=config.seed)
            row |= {"paired difference": difference["difference"], "paired difference ci95": difference["ci95"]}
        rows.append(row)
    return rows


def _answers(table: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    return table[table["key"].isin({q.key for q in questions})].copy()


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


def _missing(question: Question, rank: int, reason: str) -> dict[str, Any]:
    pair = question.pair
    return {
        "pair_id": pair.pair_id, "user_id": pair.user_id, "order": question.order, "seed": question.seed, "sample": rank,
        "source": "pro", "neighbour": None, "score_chosen": None, "score_rejected": None, "failure": reason, "kind": pair.kind,
    }  # fmt: skip
