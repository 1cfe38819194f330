"""Accuracy while training: a fixed slice of pairs, asked by the same harness as the final evaluation.

One greedy chain a pair and order, so that nothing but the weights changes from one validation to the next.  The slice is small: its
accuracy orders checkpoints and shows trouble; the number to report is `recipe=evaluate`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from eval.ask.harness import Write, own_questions, prediction, requests
from eval.metrics.accuracy import accuracy_report
from pgenrm_train.backends.protocols import Generator, Validated
from pgenrm_train.config import Config, masking_of
from pgenrm_train.records.pairs import HistoryItem, PreferencePair

SHOWN = ("pair_id", "order", "score_chosen", "score_rejected", "failure", "issues", "tokens", "text")


class Validation:
    """A `Validator` over `pairs` and the histories that go with them."""

    def __init__(
        self,
        config: Config,
        pairs: Sequence[PreferencePair],
        histories: Mapping[str, tuple[HistoryItem, ...]],
        write: Write,
    ) -> None:
        self.config = config
        questions = own_questions(pairs, histories)
        self.questions = {q.key: q for q in questions}
        self.requests = list(requests(questions, write, masking_of(config, "eval")))

    def __call__(self, generator: Generator) -> Validated:
        """Every pair counts, a failed generation as a miss (`strict`); metrics as `headline`, the first chains as samples."""
        answers = {answer.key: answer for answer in generator(self.requests, temperature=0.0)}
        rows = [prediction(question, answers[key]) for key, question in self.questions.items()]
        report = accuracy_report(
            pd.DataFrame(rows), protocol="strict", draws=self.config.eval.draws, seed=self.config.seed
        )
        shown = [{name: row[name] for name in SHOWN} for row in rows[: self.config.eval.chains_in_report]]
        return Validated(headline(report), shown)


def headline(report: Mapping[str, Any]) -> dict[str, float]:
    """What W&B and metrics.jsonl get of an accuracy report, under the same keys in every stage."""
    found = {
        "eval/accuracy": report["accuracy"],
        "eval/macro_accuracy": report["macro_accuracy"],
        "eval/ties": report["ties"],
        "eval/format_failures": sum(report["failures"].values()),
        "eval/order_flip_rate": report["order_flip_rate"],
    }
    return {k: float(v) for k, v in found.items() if v is not None}
