"""The chain reader of a report: a choice of the final model's answers, of every outcome and kind."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import replace
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
    """`eval.chains_in_report` answers to questions with the user's own history, as chosen by `shown_rows`."""
    pairs = {p.pair_id: p for p in evaluation.pairs}
    rows = shown_rows(final.predictions, config.eval.chains_in_report)
    return [_view(row, pairs[row["pair_id"]], evaluation, final.name) for row in rows.to_dict("records")]


def shown_rows(predictions: pd.DataFrame, limit: int) -> pd.DataFrame:
    """First samples of the first seed; outcomes alternate, and kinds within an outcome, to show rare ones.

    Drawn by a hash of the pair, so independent of the order of the table.  Not in proportion to their
    frequency.
    """
    own = predictions[
        (predictions["set"] == "own") & (predictions["sample"] == 0) & (predictions["seed"] == 0)
    ]
    sign = np.sign((own["score_chosen"] - own["score_rejected"]).astype(float))
    draw = [
        hashlib.sha256(f"{key}".encode()).hexdigest()
        for key in zip(own["user_id"], own["pair_id"], own["order"])
    ]
    rows = own.assign(outcome=sign.fillna(-2.0), kind=own["kind"].fillna(""), draw=draw).sort_values("draw")
    rows["turn"] = rows.groupby(["outcome", "kind"]).cumcount()
    rows = rows.sort_values(["turn", "kind"], kind="stable")
    rows["turn"] = rows.groupby("outcome").cumcount()
    return rows.sort_values(["turn", "outcome"], ascending=[True, False], kind="stable").head(limit)


def _view(row: Mapping[Hashable, Any], pair: PreferencePair, evaluation: Evaluation, name: str) -> ChainView:
    """A view with the parts of the chain; of a model without chains, with its scores only."""
    example = present(pair, evaluation.histories[pair.pair_id], row["order"])
    view = ChainView(
        pair_id=pair.pair_id,
        user_id=pair.user_id,
        query=pair.query,
        responses=example.responses,
        label=example.chosen_index,
        text=row["text"] if isinstance(row["text"], str) else "",  # NaN without a text
        kind=pair.kind,
        stage=name,
        history=example.history,
        failure=row["failure"] if isinstance(row["failure"], str) else None,
    )
    chain = parse_chain(view.text)
    if isinstance(chain, Chain):
        return replace(
            view,
            analysis=chain.analysis,
            criteria=chain.criteria,
            declared=chain.scores,
            verified=chain.verified_scores,
            issues=chain.issues,
            criterion_scores=tuple(zip(*chain.criterion_scores)) if chain.criterion_scores else (),
        )
    if view.failure or view.text:
        return view
    scores = (row["score_chosen"], row["score_rejected"])
    return replace(view, declared=scores[::-1] if row["order"] else scores)
