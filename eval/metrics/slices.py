"""Which pairs is a model right about?  Labels of a pair that are read off its texts, and accuracy by label.

    scenario       the data's own word for the situation
    history        votes of the user in sight
    length ratio   characters of the chosen response to those of the rejected one: a model that counts words fails on one side
    language       as far as script and little words tell it (`language`)
    conversation   whether earlier turns stand before the query
    user           whether the user has votes that a model may train on
    prototype      the nearest user prototype, where the run has prototypes (METHOD §6)

The data's conversation type (`kind`) is a slice of its own in `metrics`.  Our choice; not in the paper.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import pandas as pd

from eval.ask.harness import readable_text
from eval.metrics.accuracy import protocol_values, slice_statistics
from eval.metrics.intervals import macro
from eval.metrics.language import languages
from eval.metrics.outcomes import outcomes
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.records.pairs import HistoryItem, PreferencePair

DIMENSIONS = ("scenario", "history", "length ratio", "language", "conversation", "user", "prototype")
KEYS = ["pair_id", "user_id"]
READ = 2000  # characters of a text that decide its language
LONG = 20_000

_RATIOS = (
    (0.5, "chosen below 1/2 of rejected"),
    (0.8, "chosen 1/2–4/5 of rejected"),
    (1.25, "alike (4/5–5/4)"),
    (2.0, "chosen 5/4–2 × rejected"),
    (float("inf"), "chosen above 2 × rejected"),
)


def slice_labels(
    pairs: Iterable[PreferencePair],
    histories: Mapping[str, Sequence[HistoryItem]],
    prototypes: Mapping[str, int] | None = None,
    known_users: Set[str] | None = None,
) -> pd.DataFrame:
    """One row a pair: pair_id, user_id and `DIMENSIONS`, each a text or None.

    prototypes: pair_id → index.  known_users: those with votes that a model may train on; None where that is not known.
    """
    pairs = list(pairs)
    spoken = languages([f"{pair.query[:READ]} {pair.chosen[:READ]} {pair.rejected[:READ]}" for pair in pairs])
    rows = [
        {
            "pair_id": pair.pair_id,
            "user_id": pair.user_id,
            "scenario": pair.scenario,
            "history": history_label(len(histories[pair.pair_id])),
            "length ratio": length_label(pair.chosen, pair.rejected),
            "language": tongue,
            "conversation": "several turns" if len(pair.context) > 1 else "one turn",
            "user": None
            if known_users is None
            else "votes in train"
            if pair.user_id in known_users
            else "none in train",
            "prototype": None
            if prototypes is None or pair.pair_id not in prototypes
            else f"{prototypes[pair.pair_id]:03d}",
        }
        for pair, tongue in zip(pairs, spoken, strict=True)
    ]
    return pd.DataFrame(rows, columns=[*KEYS, *DIMENSIONS], dtype=object)


def history_label(n: int) -> str:
    if n < 4:
        return f"{n} vote{'' if n == 1 else 's'}"
    return "4–7 votes" if n < 8 else "8 votes or more"


def length_label(chosen: str, rejected: str) -> str:
    ratio = (len(chosen) or 1) / (len(rejected) or 1)
    return next(label for limit, label in _RATIOS if ratio <= limit)


def odd_inputs(
    pairs: Sequence[PreferencePair], histories: Mapping[str, Sequence[HistoryItem]]
) -> dict[str, int]:
    """Counts of pairs that a reader should know of; all of them are asked and stay in the denominator."""
    return {
        "identical responses": sum(p.chosen == p.rejected for p in pairs),
        "empty history": sum(not histories[p.pair_id] for p in pairs),
        f"a text above {LONG:,} characters": sum(
            max(map(len, (p.query, p.chosen, p.rejected))) > LONG for p in pairs
        ),
    }


def first_analyses(predictions: pd.DataFrame) -> dict[str, str]:
    """pair_id → the analysis in the first own chain of each pair, where there is a chain and it can be read."""
    if "text" not in predictions:  # of a model that writes none
        return {}
    first = predictions[
        (predictions["set"] == "own") & (predictions["order"] == 0) & (predictions["sample"] == 0)
    ]
    first = first[first["seed"] == first["seed"].min()]
    chains = {row["pair_id"]: parse_chain(readable_text(row) or "") for row in first.to_dict("records")}
    return {
        pair: chain.analysis for pair, chain in chains.items() if isinstance(chain, Chain) and chain.analysis
    }


def data_digest(pairs: Iterable[PreferencePair]) -> str:
    """Tells one set of votes from another by what was asked and chosen, in any order."""
    votes = sorted(
        repr((p.user_id, p.pair_id, [(m.role, m.content) for m in p.context], p.chosen, p.rejected))
        for p in pairs
    )
    return hashlib.sha256("\n".join(votes).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def slice_rows(
    predictions: pd.DataFrame, labels: pd.DataFrame, *, protocol: str, draws: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each label of each dimension that has several: slice, value, accuracy, ci95, users, pairs."""
    found = outcomes(predictions)
    values, users = protocol_values(found, protocol, seed), found.users
    labelled = found.pairs.merge(
        labels.astype(dict.fromkeys(KEYS, str)), on=KEYS, how="left", validate="one_to_one"
    )
    rows = []
    for name, column in several(labelled):
        for label in sorted(column.unique()):
            part = slice_statistics(values, users, (column == label).to_numpy(), draws, seed)
            rows.append({"slice": name, "value": label, "accuracy": part["accuracy"], "ci95": part["ci95"],
                         "users": part["n_users"], "pairs": part["n_pairs"]})  # fmt: skip
    return rows


def several(labelled: pd.DataFrame, names: Iterable[str] = DIMENSIONS) -> Iterable[tuple[str, pd.Series]]:
    """(name, its labels as texts) of every column in which the pairs differ; a missing label is a label of its own."""
    for name in names:
        if name in labelled and labelled[name].nunique(dropna=False) > 1:
            yield name, labelled[name].astype(object).where(labelled[name].notna(), "(none)")


def prototype_macro(
    predictions: pd.DataFrame, labels: pd.DataFrame, *, protocol: str, seed: int
) -> float | None:
    """Mean over prototypes of the accuracy on their pairs (METHOD §8); None where no pair has a prototype."""
    found = outcomes(predictions)
    prototypes = found.pairs.merge(labels.astype(dict.fromkeys(KEYS, str)), on=KEYS, how="left")["prototype"]
    known = prototypes.notna().to_numpy()
    if not known.any():
        return None
    return macro(
        protocol_values(found, protocol, seed)[known], np.asarray(pd.factorize(prototypes[known])[0])
    )
