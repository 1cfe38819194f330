"""Accuracy while training, on a fixed slice of pairs and with the harness of the final evaluation.

One greedy chain per pair and order, so only the weights change between validations.  The slice is small: its
accuracy orders checkpoints and reveals trouble.  Report the number of `recipe=evaluate` instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from eval.ask.harness import Histories, Write, own_questions, prediction, requests
from eval.metrics.accuracy import AccuracyReport, accuracy_report
from pgenrm_train.backends.protocols import Generator, Validated
from pgenrm_train.config import Config, masking_of
from pgenrm_train.records.pairs import PreferencePair

SHOWN = ("pair_id", "order", "score_chosen", "score_rejected", "failure", "issues", "tokens", "text")


class Validation:
    """A `Validator` over `pairs` and the histories that go with them."""

    def __init__(
        self,
        config: Config,
        pairs: Sequence[PreferencePair],
        histories: Histories,
        write: Write,
    ) -> None:
        self.config = config
        questions = own_questions(pairs, histories)
        self.questions = {q.key: q for q in questions}
        self.requests = list(requests(questions, write, masking_of(config, "eval")))

    def __call__(self, generator: Generator) -> Validated:
        """Strict accuracy (a failed generation is a miss) as `headline` metrics, and the first chains."""
        answers = {answer.key: answer for answer in generator(self.requests, temperature=0.0)}
        rows = [prediction(question, answers[key]) for key, question in self.questions.items()]
        report = accuracy_report(
            pd.DataFrame(rows), protocol="strict", draws=self.config.eval.draws, seed=self.config.seed
        )
        shown = [
            {k: v for k, v in row.items() if k in SHOWN} for row in rows[: self.config.eval.chains_in_report]
        ]
        return Validated(headline(report), shown)


def headline(report: AccuracyReport) -> dict[str, float]:
    """Metrics of an accuracy report for W&B and metrics.jsonl, with the same keys in every stage."""
    metrics = {
        "eval/accuracy": report["accuracy"],
        "eval/macro_accuracy": report["macro_accuracy"],
        "eval/ties": report["ties"],
        "eval/format_failures": sum(report["failures"].values()),
        "eval/order_flip_rate": report["order_flip_rate"],
    }
    return {k: float(v) for k, v in metrics.items() if v is not None}
