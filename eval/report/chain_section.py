"""Report sections on ceilings and on where chains err."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eval.ask.harness import verified
from eval.metrics.accuracy import accuracy_report
from eval.metrics.chain_errors import chain_errors
from eval.report.report import Row, Section
from eval.studies.evaluation import Tested
from pgenrm_train.config import Config

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
    written = [t for t in tested if t.own["text"].notna().any()]
    return [_error_row(t, config) for t in written]


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
