"""One evaluation: checkpoints, baselines and probes on the same pairs → results, predictions, report.

The report compares every stage's checkpoint on the same questions; `own` questions give the headline accuracy, `swapped` ones
the disagreement probe (see `probes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from eval.ask.baselines import Scorer
from eval.ask.harness import PredictionStore, Question, Write, ask, own_questions, verified
from eval.ask.scored import ScoreMany, ask_scores, one_by_one, scored
from eval.metrics.accuracy import accuracy_report, paired_difference
from eval.studies.probes import Twins, disagreement_twins, swapped_histories
from eval.studies.robustness import probe_questions, probe_rows, probe_slice
from eval.studies.scaling_study import Ask, FindSimilar, Study, cells, replayed, sample_pool
from pgenrm_train.backends.protocols import Generator
from pgenrm_train.config import Config, masking_of
from pgenrm_train.files import fingerprint
from pgenrm_train.records.pairs import HistoryItem, PreferencePair

PROMPT = (
    "instructions",
    "max_prompt_tokens",
    "max_response_tokens",
    "max_text_tokens",
)  # settings that shape prompt and answer
Progress = Callable[..., Iterable[Any]]
Histories = Mapping[str, tuple[HistoryItem, ...]]


@dataclass(frozen=True)
class Candidate:
    """A model under test: a name for the table, an identity for the cache, and how to start it."""

    name: str
    identity: str
    start: Callable[[], Generator]
    write: Callable[[], Write]
    close: Callable[[], None]
    seconds: float | None = None  # wall time of the stage that made it
    cost: Callable[[], Mapping[str, Any]] = dict  # what its answers cost, for a model that is paid for


@dataclass(frozen=True)
class ScoredCandidate:
    """A model under test that gives scores and writes no chain (see `scored`)."""

    name: str
    identity: str
    start: Callable[[], ScoreMany]
    close: Callable[[], None]
    seconds: float | None = None


@dataclass(frozen=True)
class Tested:
    """What the table says of one candidate."""

    name: str
    predictions: pd.DataFrame
    report: dict[str, Any]
    probe: dict[str, Any] | None
    seconds: float | None
    robustness: Sequence[dict[str, Any]] = ()  # a row a kind of probe; of the final model alone


@dataclass(frozen=True)
class Grid:
    """Every Ind-m/Pro-n cell of one study, from one pool of samples."""

    study: Study
    pool: pd.DataFrame
    rows: list[dict[str, Any]]
    adaptive: dict[str, Any] | None = (
        None  # the largest cell with adaptive stopping, replayed on the same pool
    )


def kept_answers(
    config: Config, candidate: Candidate | ScoredCandidate, folder: Path, name: str
) -> PredictionStore:
    """A candidate's answers, by what makes them: the model and the settings of prompt and sampling; in `eval.cache` where it is set."""
    prompt = [getattr(config.model, setting) for setting in PROMPT]
    identity = fingerprint(
        candidate.identity, config.eval.temperature, masking_of(config, "eval"), config.seed, prompt
    )
    return PredictionStore(Path(config.eval.cache or folder) / f"{name}-{identity}", identity)


class Evaluation:
    """The pairs, histories and twins that every candidate is asked about."""

    def __init__(
        self,
        config: Config,
        pairs: Sequence[PreferencePair],
        histories: Histories,
        known_users: Set[str] | None = None,
    ) -> None:
        """`known_users`: those with votes that a model may train on, None where that is not known; for the report."""
        self.config, self.pairs, self.histories, self.known_users = config, pairs, histories, known_users
        self.twins: Twins = disagreement_twins(pairs) if config.eval.probes else []
        self.twin_ids = {p.pair_id for twin in self.twins for p in twin}
        self.probe_pairs = probe_slice(pairs, config.eval.probe_pairs) if config.eval.probes else []

    def test(
        self, candidate: Candidate | ScoredCandidate, folder: Path, progress: Progress, *, final: bool = False
    ) -> Tested:
        """Ask all questions of one candidate, those of the robustness probes too if it is the `final` one.

        Resumes from what `folder` holds.
        """
        seeds = self.config.eval.seeds if isinstance(candidate, Candidate) else 1
        questions = self._questions(seeds, final)
        predictions = self.asker(candidate, folder, progress, "predictions")(questions)
        return self.judge(candidate.name, predictions, candidate.seconds, final=final)

    def asker(
        self, candidate: Candidate | ScoredCandidate, folder: Path, progress: Progress, store: str
    ) -> Ask:
        """A function that answers questions with the candidate, keeping the answers in a folder of their own identity."""
        masking, temperature = masking_of(self.config, "eval"), self.config.eval.temperature

        def answer(questions: Sequence[Question]) -> pd.DataFrame:
            kept, what = kept_answers(self.config, candidate, folder, store), f"evaluate {candidate.name}"
            if isinstance(candidate, ScoredCandidate):
                return ask_scores(questions, candidate.start, kept, progress=progress, what=what)
            answered = ask(
                questions,
                candidate.start,
                candidate.write(),
                kept,
                masking=masking,
                temperature=temperature,
                progress=progress,
                what=what,
            )
            return verified(answered) if self.config.eval.scores == "verified" else answered

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
        # a smaller cell would lack the samples that the largest one can do without
        adaptive = self.config.eval.adaptive if study.cells == 1 else None
        pool = sample_pool(study, pairs, histories, asker, find, adaptive=adaptive)
        return Grid(study, pool, cells(pool, study, self.config), replayed(pool, study, self.config))

    def judge(
        self, name: str, predictions: pd.DataFrame, seconds: float | None = None, *, final: bool = False
    ) -> Tested:
        """Accuracy on all pairs, the probe on the twins, and of the `final` model the robustness probes."""
        own = predictions[predictions["set"] == "own"]
        report = self._accuracy(own) | {"model": name}
        rows = self._robustness(predictions) if final else []
        return Tested(name, predictions, report, self._probe(predictions), seconds, rows)

    def baseline(self, name: str, scorer: Scorer, *, final: bool = False) -> Tested:
        """The same questions for a scorer that writes no chains; what it raises is that question's failure."""
        return self.judge(name, scored(self._questions(1, final), one_by_one(scorer.score)), final=final)

    def _questions(self, seeds: int, final: bool) -> list[Question]:
        """All pairs, the twins with swapped histories, and of the `final` model the robustness probes."""
        questions = own_questions(self.pairs, self.histories, seeds=seeds)
        if self.twins:
            twins = [p for twin in self.twins for p in twin]
            questions += own_questions(
                twins, swapped_histories(self.twins, self.histories), set_name="swapped"
            )
        if final:
            questions += probe_questions(self.config.eval.probe_kinds, self.probe_pairs, self.histories)
        return questions

    def _robustness(self, predictions: pd.DataFrame) -> list[dict[str, Any]]:
        settings = self.config.eval
        return probe_rows(
            predictions, settings.probe_kinds, self.probe_pairs, draws=settings.draws, seed=self.config.seed
        )

    def _accuracy(self, predictions: pd.DataFrame) -> dict[str, Any]:
        protocol = self.config.eval.protocol
        return accuracy_report(
            predictions, protocol=protocol, draws=self.config.eval.draws, seed=self.config.seed
        )

    def _probe(self, predictions: pd.DataFrame) -> dict[str, Any] | None:
        """Accuracy on the twins with one's own and with the other's history."""
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


def stage_row(tested: Tested) -> dict[str, Any]:
    """One row of the headline table."""
    report, slices = tested.report, tested.report["slices"]
    hard = slices.get("hard")
    row: dict[str, Any] = {
        "stage": tested.name,
        "accuracy": report["accuracy"],
        "ci95": report["ci95"],
        "stderr": report["stderr"],
    }
    if hard:
        row |= {"hard accuracy": hard["accuracy"], "hard accuracy ci95": hard["ci95"]}
    if rival := slices.get("rival"):
        row |= {"rival accuracy": rival["accuracy"], "rival accuracy ci95": rival["ci95"]}
    if tested.probe:
        row |= {
            "swapped history accuracy": tested.probe["swapped"]["accuracy"],
            "swapped history accuracy ci95": tested.probe["swapped"]["ci95"],
        }
    failures = sum(report["failures"].values())
    return row | {"format failures": failures, "ties": report["ties"], "seconds": tested.seconds}


def cohort_rows(tested: Tested, config: Config) -> list[dict[str, Any]]:
    """Accuracy by cohort of users, where the data tells cohorts apart."""
    own = tested.predictions[tested.predictions["set"] == "own"]
    if "cohort" not in own or own["cohort"].isna().all():
        return []
    rows = []
    for cohort, part in own.groupby("cohort"):
        report = accuracy_report(
            part, protocol=config.eval.protocol, draws=config.eval.draws, seed=config.seed
        )
        rows.append(
            {
                "model": tested.name,
                "users": cohort,
                "accuracy": report["accuracy"],
                "ci95": report["ci95"],
                "pairs": report["n_pairs"],
            }
        )
    return rows


def gain_rows(tested: Sequence[Tested], config: Config) -> list[dict[str, Any]]:
    """What each stage adds to the one before, and the last to the first: strict accuracy on the same pairs, paired.

    A column for all pairs and, where there are several kinds, one for each.  Raises DataError when the stages were asked other pairs.
    """
    steps = list(itertools.pairwise(tested))
    if len(tested) > 2:
        steps.append((tested[0], tested[-1]))
    return [
        {"from": before.name, "to": after.name, **_gains(before, after, config)} for before, after in steps
    ]


def _gains(before: Tested, after: Tested, config: Config) -> dict[str, Any]:
    a, b = (t.predictions[t.predictions["set"] == "own"] for t in (after, before))
    kinds = sorted(a["kind"].dropna().unique())
    parts = {"all": (a, b)}
    if len(kinds) > 1:
        parts |= {kind: (a[a["kind"] == kind], b[b["kind"] == kind]) for kind in kinds}
    row: dict[str, Any] = {}
    for name, (new, old) in parts.items():
        found = paired_difference(new, old, draws=config.eval.draws, seed=config.seed)
        row |= {f"{name} difference": found["difference"], f"{name} difference ci95": found["ci95"]}
    return row


def _brief(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("accuracy", "ci95", "n_pairs", "ties")}
