"""Accuracy by slice: labels derived from a pair's texts and user.

    scenario       the situation as named by the data
    history        number of the user's votes in the prompt
    length ratio   characters of the chosen response to those of the rejected one; a model that counts words
                   fails on one side
    language       from script and function words (`language`)
    conversation   whether earlier turns precede the query
    user           whether the user has votes that a model may train on
    prototype      the nearest user prototype, if the run has prototypes (METHOD §6)

`accuracy.accuracy_report` has the data's conversation type (`kind`) in its own `slices`.  Our choice; not in
the paper.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
import pandas as pd

from eval.ask.harness import readable_text
from eval.metrics.accuracy import Accuracy, protocol_values, slice_statistics
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
    (1.25, "similar (4/5–5/4)"),
    (2.0, "chosen 5/4–2 × rejected"),
    (float("inf"), "chosen above 2 × rejected"),
)


class SliceRow(Accuracy):
    """One label of one dimension, as a row of the report."""

    slice: str
    value: str
    users: int
    pairs: int


def slice_labels(
    pairs: Iterable[PreferencePair],
    histories: Mapping[str, Sequence[HistoryItem]],
    prototypes: Mapping[str, int] | None = None,
    known_users: Set[str] | None = None,
) -> pd.DataFrame:
    """One row per pair: pair_id, user_id and `DIMENSIONS`, each a text or None.

    prototypes: pair_id → index.  known_users: users with votes that a model may train on; None if unknown.
    """
    pairs = list(pairs)
    tongues = languages(
        [f"{pair.query[:READ]} {pair.chosen[:READ]} {pair.rejected[:READ]}" for pair in pairs]
    )
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
        for pair, tongue in zip(pairs, tongues, strict=True)
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
    """Count unusual pairs for the reader; all of them stay in the denominator."""
    return {
        "identical responses": sum(p.chosen == p.rejected for p in pairs),
        "empty history": sum(not histories[p.pair_id] for p in pairs),
        f"a text above {LONG:,} characters": sum(
            max(map(len, (p.query, p.chosen, p.rejected))) > LONG for p in pairs
        ),
    }


def first_analyses(predictions: pd.DataFrame) -> dict[str, str]:
    """pair_id → the analysis in the pair's first own chain, for readable chains."""
    if "text" not in predictions:  # the model writes no chains
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
    """Hash of a set of votes, by conversations and responses, in any order."""
    votes = sorted(
        repr((p.user_id, p.pair_id, [(m.role, m.content) for m in p.context], p.chosen, p.rejected))
        for p in pairs
    )
    return hashlib.sha256("\n".join(votes).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def slice_rows(
    predictions: pd.DataFrame, labels: pd.DataFrame, *, protocol: str, draws: int, seed: int
) -> list[SliceRow]:
    """One row per label, for each dimension with several labels."""
    grid = outcomes(predictions)
    values, users = protocol_values(grid, protocol, seed), grid.users
    labelled = grid.pairs.merge(
        labels.astype(dict.fromkeys(KEYS, str)), on=KEYS, how="left", validate="one_to_one"
    )
    rows: list[SliceRow] = []
    for name, column in several(labelled):
        for label in sorted(column.unique()):
            part = slice_statistics(values, users, (column == label).to_numpy(), draws, seed)
            rows.append(
                {
                    "slice": name,
                    "value": label,
                    "accuracy": part["accuracy"],
                    "ci95": part["ci95"],
                    "users": part["n_users"],
                    "pairs": part["n_pairs"],
                }
            )
    return rows


def several(labelled: pd.DataFrame, names: Iterable[str] = DIMENSIONS) -> Iterable[tuple[str, pd.Series]]:
    """(name, labels as texts) per column in which the pairs differ; a missing label is a label too."""
    for name in names:
        if name in labelled and labelled[name].nunique(dropna=False) > 1:
            yield name, labelled[name].astype(object).where(labelled[name].notna(), "(none)")


def prototype_macro(
    predictions: pd.DataFrame, labels: pd.DataFrame, *, protocol: str, seed: int
) -> float | None:
    """Mean over prototypes of the accuracy on their pairs (METHOD §8); None without prototypes."""
    grid = outcomes(predictions)
    prototypes = grid.pairs.merge(labels.astype(dict.fromkeys(KEYS, str)), on=KEYS, how="left")["prototype"]
    known = prototypes.notna().to_numpy()
    if not known.any():
        return None
    return macro(protocol_values(grid, protocol, seed)[known], np.asarray(pd.factorize(prototypes[known])[0]))
