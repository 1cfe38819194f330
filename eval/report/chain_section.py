"""Report sections on ceilings and on where chains err, and the chain reader.

The reader shows a choice of the final model's answers, of every outcome and kind.
"""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from eval.ask.harness import verified
from eval.metrics.accuracy import accuracy_report
from eval.metrics.chain_errors import chain_errors
from eval.report.report import ChainView, Row, Section
from eval.studies.evaluation import Evaluation, Tested
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.config import Config
from pgenrm_train.prompts.masking import present
from pgenrm_train.records.pairs import HistoryItem, PreferencePair

CHANCE = 0.5
CEILINGS = (
    "Exact readers of the same prompts. ideal: the posterior probability that a response was chosen; no "
    "reader of the prompt does better. ideal_chain: the likeliest criteria with the true weights; the best "
    "single chain. imitator: criteria drawn from the posterior, weights drawn as the teacher draws them; a "
    "perfect imitator of the teacher. Personas: those of training users, which is all that training can "
    "teach, or all of the world."
)
ERRORS = (
    "Of chains with the user's own history. Verifiable: the totals can be recomputed from the chain's own "
    "weights and criterion scores. Faithful: of these, the declared totals are the recomputed ones. "
    "Verified accuracy: by recomputed totals; a chain without them is a miss. Criteria stability: "
    "similarity (Jaccard) of the criteria of two samples of one question. Heaviest decides: verdicts that "
    "change without the heaviest criterion."
)
TRUTH = (
    "Each step of the chains against the truth of PersonaWorld. Votes: earlier votes restated right. "
    "Criteria recalled: the user's criteria that are named. Criteria allowed: the named criteria have a "
    "posterior above 0.0001 given the votes, under the personas of training users. Responses: described "
    "right. Scores: fit criterion and response."
)


@dataclass(frozen=True)
class Ceilings:
    """Accuracies that exact readers reach: per stage, and as rows by reader, prior and known votes."""

    by_stage: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[Row] = ()

    def cells(self, stage: str, accuracy: float | None) -> Row:
        """Ceiling of a stage, and the share of the way from chance to it."""
        ceiling = self.by_stage.get(stage)
        if ceiling is None or accuracy is None or ceiling <= CHANCE:
            return {}
        share = (accuracy - CHANCE) / (ceiling - CHANCE)
        return {"ceiling accuracy": ceiling, "of ceiling share": share}


def error_rows(tested: Sequence[Tested], config: Config) -> list[Row]:
    """Where the chains of each model err; empty for models without chains."""
    return [_error_row(t, config) for t in tested if t.own["text"].notna().any()]


def _error_row(tested: Tested, config: Config) -> Row:
    errors = chain_errors(tested.own)
    settings = config.eval
    by_rubric = accuracy_report(
        verified(tested.own), protocol=settings.protocol, draws=settings.draws, seed=config.seed
    )
    return {
        "model": tested.name,
        "chains": errors.chains,
        "readable share": errors.readable,
        "verifiable share": errors.verifiable,
        "faithful share": errors.faithful,
        "accuracy": tested.report["accuracy"],
        "ci95": tested.report["ci95"],
        "verified accuracy": by_rubric["accuracy"],
        "verified accuracy ci95": by_rubric["ci95"],
        "order flip rate": tested.report["order_flip_rate"],
        "criteria stability share": errors.criteria_stability,
        "heaviest decides share": errors.heaviest_decides,
    }


def chain_sections(ceilings: Ceilings, errors: Sequence[Row], truth: Sequence[Row]) -> list[Section]:
    """The tables that have rows."""
    tables = (
        Section("Ceilings", CEILINGS, ceilings.rows),
        Section("Where chains err", ERRORS, errors),
        Section("Where chains err, step by step", TRUTH, truth),
    )
    return [table for table in tables if len(table.table)]


def chain_views(config: Config, evaluation: Evaluation, final: Tested) -> list[ChainView]:
    """`eval.chains_in_report` answers to questions with the user's own history, as chosen by `shown_rows`."""
    pairs = {p.pair_id: p for p in evaluation.pairs}
    rows = shown_rows(final.predictions, config.eval.chains_in_report)
    return [
        chain_view(row, pair, evaluation.histories[pair.pair_id], final.name)
        for row in rows.to_dict("records")
        for pair in [pairs[row["pair_id"]]]
    ]


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


def chain_view(
    row: Mapping[Hashable, Any], pair: PreferencePair, history: tuple[HistoryItem, ...], name: str
) -> ChainView:
    """A view with the parts of the chain; of a model without chains, with its scores only."""
    example = present(pair, history, row["order"])
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
