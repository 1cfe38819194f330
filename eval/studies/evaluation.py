"""One evaluation: checkpoints, baselines and probes on the same pairs.

Every candidate gets the same questions.  `own` questions give the headline accuracy, `swapped` ones the
disagreement probe (see `probes`), `probe/…` ones the robustness probes (see `robustness`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import pandas as pd

from eval.ask.harness import (
    Histories,
    PredictionStore,
    Progress,
    Question,
    Write,
    ask,
    own_questions,
    verified,
)
from eval.ask.scored import Score, ScoreMany, ask_scores, one_by_one, scored
from eval.metrics.accuracy import AccuracyReport, Difference, Estimate, accuracy_report, paired_difference
from eval.studies.probes import Twins, disagreement_twins, swapped_histories
from eval.studies.robustness import ProbeRow, probe_questions, probe_rows, probe_slice
from eval.studies.scaling_study import (
    Ask,
    CellRow,
    FindSimilar,
    ReplayedRow,
    Study,
    cells,
    replayed,
    sample_pool,
)
from pgenrm_train.backends.protocols import Generator
from pgenrm_train.config import Config, masking_of
from pgenrm_train.files import fingerprint
from pgenrm_train.records.pairs import PreferencePair

# Settings that shape prompt and answer.
PROMPT = ("instructions", "max_prompt_tokens", "max_response_tokens", "max_text_tokens")


@dataclass(frozen=True)
class Candidate:
    """A model under test: a name for the table, an identity for the cache, and a way to start it."""

    name: str
    identity: str
    start: Callable[[], Generator]
    write: Callable[[], Write]
    close: Callable[[], None]
    seconds: float | None = None  # wall time of the stage that trained it
    cost: Callable[[], Mapping[str, object]] = dict  # of its answers, for a paid model


@dataclass(frozen=True)
class ScoredCandidate:
    """A model under test that returns scores and writes no chain (see `scored`)."""

    name: str
    identity: str
    start: Callable[[], ScoreMany]
    close: Callable[[], None]
    seconds: float | None = None


class SetAccuracy(Estimate):
    n_pairs: int
    ties: int


class HistoryProbe(TypedDict):
    """Accuracy on the twins with their own history and with the other twin's."""

    n_pairs: int
    own: SetAccuracy
    swapped: SetAccuracy
    difference: Difference


@dataclass(frozen=True)
class Tested:
    """Predictions and measurements of one candidate."""

    name: str
    predictions: pd.DataFrame
    report: AccuracyReport
    probe: HistoryProbe | None
    seconds: float | None
    robustness: Sequence[ProbeRow] = ()  # one row per kind of probe; final model only

    @property
    def own(self) -> pd.DataFrame:
        """Predictions with the user's own history."""
        return self.predictions[self.predictions["set"] == "own"]


@dataclass(frozen=True)
class Grid:
    """Every Ind-m/Pro-n cell of one study, from one pool of samples."""

    study: Study
    pool: pd.DataFrame
    rows: list[CellRow]
    adaptive: ReplayedRow | None = None  # the largest cell with adaptive stopping, replayed on the pool


def kept_answers(
    config: Config, candidate: Candidate | ScoredCandidate, folder: Path, name: str
) -> PredictionStore:
    """Store of a candidate's answers, keyed by model, prompt and sampling; in `eval.cache` if that is set."""
    prompt = [getattr(config.model, setting) for setting in PROMPT]
    identity = fingerprint(
        candidate.identity, config.eval.temperature, masking_of(config, "eval"), config.seed, prompt
    )
    return PredictionStore(Path(config.eval.cache or folder) / f"{name}-{identity}", identity)


class Evaluation:
    """The pairs, histories and twins that every candidate is evaluated on."""

    def __init__(
        self,
        config: Config,
        pairs: Sequence[PreferencePair],
        histories: Histories,
        known_users: Set[str] | None = None,
    ) -> None:
        """`known_users`, for the report: users with votes that a model may train on; None if unknown."""
        self.config, self.pairs, self.histories, self.known_users = config, pairs, histories, known_users
        self.twins: Twins = disagreement_twins(pairs) if config.eval.probes else []
        self.twin_ids = {p.pair_id for twin in self.twins for p in twin}
        self.probe_pairs = probe_slice(pairs, config.eval.probe_pairs) if config.eval.probes else []

    def test(
        self, candidate: Candidate | ScoredCandidate, folder: Path, progress: Progress, *, final: bool = False
    ) -> Tested:
        """Put all questions to one candidate; to the `final` one also those of the robustness probes.

        Resumes from the answers in `folder`.
        """
        seeds = self.config.eval.seeds if isinstance(candidate, Candidate) else 1
        questions = self._questions(seeds, final)
        predictions = self.asker(candidate, folder, progress, "predictions")(questions)
        return self.judge(candidate.name, predictions, candidate.seconds, final=final)

    def asker(
        self, candidate: Candidate | ScoredCandidate, folder: Path, progress: Progress, store: str
    ) -> Ask:
        """A function that answers questions with the candidate and stores the answers by identity."""
        masking, temperature = masking_of(self.config, "eval"), self.config.eval.temperature

        def answer(questions: Sequence[Question]) -> pd.DataFrame:
            kept, what = kept_answers(self.config, candidate, folder, store), f"evaluate {candidate.name}"
            if isinstance(candidate, ScoredCandidate):
                return ask_scores(questions, candidate.start, kept, progress=progress, what=what)
            answers = ask(
                questions,
                candidate.start,
                candidate.write(),
                kept,
                masking=masking,
                temperature=temperature,
                progress=progress,
                what=what,
            )
            return verified(answers) if self.config.eval.scores == "verified" else answers

        return answer

    def study(
        self,
        study: Study,
        candidate: Candidate,
        histories: Histories,
        folder: Path,
        progress: Progress,
        find: FindSimilar | None,
    ) -> Grid:
        """Sample one pool and fill every cell of `study`; several samples need a temperature above 0."""
        pairs = self.pairs[: self.config.eval.grid_pairs]
        asker = self.asker(candidate, folder, progress, "samples")
        # A smaller cell would lack the samples that adaptive stopping saves in the largest one.
        adaptive = self.config.eval.adaptive if study.cells == 1 else None
        pool = sample_pool(study, pairs, histories, asker, find, adaptive=adaptive)
        return Grid(study, pool, cells(pool, study, self.config), replayed(pool, study, self.config))

    def judge(
        self, name: str, predictions: pd.DataFrame, seconds: float | None = None, *, final: bool = False
    ) -> Tested:
        """Measure accuracy on all pairs and the probe on the twins; for the `final` model also robustness."""
        report = self._accuracy(predictions[predictions["set"] == "own"])
        report["model"] = name
        settings, rows = self.config.eval, []
        if final:
            rows = probe_rows(
                predictions,
                settings.probe_kinds,
                self.probe_pairs,
                draws=settings.draws,
                seed=self.config.seed,
            )
        return Tested(name, predictions, report, self._probe(predictions), seconds, rows)

    def baseline(self, name: str, score: Score, *, final: bool = False) -> Tested:
        """The same questions for a function; an exception is that question's failure."""
        return self.judge(name, scored(self._questions(1, final), one_by_one(score)), final=final)

    def _questions(self, seeds: int, final: bool) -> list[Question]:
        """All pairs, the twins with swapped histories, and for the `final` model the robustness probes."""
        questions = own_questions(self.pairs, self.histories, seeds=seeds)
        if self.twins:
            twins = [p for twin in self.twins for p in twin]
            questions += own_questions(
                twins, swapped_histories(self.twins, self.histories), set_name="swapped"
            )
        if final:
            questions += probe_questions(self.config.eval.probe_kinds, self.probe_pairs, self.histories)
        return questions

    def _accuracy(self, predictions: pd.DataFrame) -> AccuracyReport:
        settings = self.config.eval
        return accuracy_report(
            predictions, protocol=settings.protocol, draws=settings.draws, seed=self.config.seed
        )

    def _probe(self, predictions: pd.DataFrame) -> HistoryProbe | None:
        if not self.twins:
            return None
        own = predictions[(predictions["set"] == "own") & predictions["pair_id"].isin(self.twin_ids)]
        swapped = predictions[predictions["set"] == "swapped"]
        draws, seed = self.config.eval.draws, self.config.seed
        return {
            "n_pairs": len(self.twin_ids),
            "own": _brief(self._accuracy(own)),
            "swapped": _brief(self._accuracy(swapped)),
            "difference": paired_difference(own, swapped, draws=draws, seed=seed),
        }


def _brief(report: AccuracyReport) -> SetAccuracy:
    return {
        "accuracy": report["accuracy"],
        "ci95": report["ci95"],
        "n_pairs": report["n_pairs"],
        "ties": report["ties"],
    }
