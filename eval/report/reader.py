"""What the chain reader of a report shows: some of the final model's answers, of every outcome and kind."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from eval.report.report import ChainView
from eval.studies.evaluation import Evaluation, Tested
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.prompts.masking import present
from pgenrm_train.records.pairs import PreferencePair


def chain_views(config: Config, evaluation: Evaluation, final: Tested) -> list[ChainView]:
    """`eval.chains_in_report` answers to questions with the user's own history; see `shown_rows` for which."""
    pairs = {p.pair_id: p for p in evaluation.pairs}
    rows = shown_rows(final.predictions, config.eval.chains_in_report)
    return [_view(row, pairs[row["pair_id"]], evaluation, final.name) for row in rows.to_dict("records")]


def shown_rows(predictions: pd.DataFrame, limit: int) -> pd.DataFrame:
    """First samples of the first seed: outcomes take turns, and within an outcome kinds do, so that rare ones are seen too.

    Drawn by a hash of the pair: the same pairs whatever the order of the table.  Not in proportion to how often they occur.
    """
    own = predictions[
        (predictions["set"] == "own") & (predictions["sample"] == 0) & (predictions["seed"] == 0)
    ]
    sign = np.sign((own["score_chosen"] - own["score_rejected"]).astype(float))
    draw = [
        hashlib.sha256(f"{key}".encode()).hexdigest()
        for key in zip(own["user_id"], own["pair_id"], own["order"])
    ]
    named = own.assign(outcome=sign.fillna(-2.0), kind=own["kind"].fillna(""), draw=draw).sort_values("draw")
    named["turn"] = named.groupby(["outcome", "kind"]).cumcount()
    named = named.sort_values(["turn", "kind"], kind="stable")
    named["turn"] = named.groupby("outcome").cumcount()
    return named.sort_values(["turn", "outcome"], ascending=[True, False], kind="stable").head(limit)


def _view(row: Mapping[str, Any], pair: PreferencePair, evaluation: Evaluation, name: str) -> ChainView:
    example = present(pair, evaluation.histories[pair.pair_id], row["order"])
    failure = row["failure"] if isinstance(row["failure"], str) else None
    return ChainView(
        pair_id=pair.pair_id,
        user_id=pair.user_id,
        query=pair.query,
        responses=example.responses,
        label=example.chosen_index,
        kind=pair.kind,
        stage=name,
        history=example.history,
        failure=failure,
        **_said(row, scored=failure is None),
    )


def _said(row: Mapping[str, Any], *, scored: bool) -> dict[str, Any]:
    """The chain's parts; of a model that writes none its scores alone."""
    text = row["text"] if isinstance(row["text"], str) else ""  # NaN where there is no text
    chain = parse_chain(text)
    if not isinstance(chain, Chain):
        given = (row["score_chosen"], row["score_rejected"])
        return {
            "text": text,
            "declared": given[:: -1 if row["order"] else 1] if scored and not text else None,
        }
    return {
        "text": text,
        "analysis": chain.analysis,
        "criteria": chain.criteria,
        "declared": chain.scores,
        "verified": chain.verified_scores,
        "issues": chain.issues,
        "criterion_scores": tuple(zip(*chain.criterion_scores)) if chain.criterion_scores else (),
    }
