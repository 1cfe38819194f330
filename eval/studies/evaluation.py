"""One evaluation: checkpoints, baselines and probes on the same pairs.

Every candidate gets the same questions.  `own` questions give the headline accuracy, `swapped` ones the
disagreement probe (see `probes`), `probe/…` ones the robustness probes (see `robustness`).
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import pandas as pd

from eval.ask.harness import (
    Histories,
    PredictionStore,
    Progress,
    Question,
    answer_row,
    ask,
    own_questions,
    prediction,
    requests,
)
from eval.ask.scored import Score, ScoreMany, ask_scores, one_by_one, scored
from eval.metrics.accuracy import Accuracy, AccuracyReport, Difference, accuracy_report, paired_difference
from eval.studies.probes import Twins, disagreement_twins, swapped_histories
from eval.studies.robustness import ProbeRow, probe_questions, probe_rows, probe_slice
from eval.studies.scaling_study import (
    Ask,
    CellRow,
    ControlRow,
    FindSimilar,
    ReplayedRow,
    Study,
    cells,
    controlled,
    replayed,
    sample_pool,
)
from pgenrm_train.backends.protocols import TRUTH, ChainReader, Generator, Validated
from pgenrm_train.config import PERSONA_BASELINE, Config, Totals, masking_of
from pgenrm_train.files import fingerprint
from pgenrm_train.prompts.writer import Write
from pgenrm_train.records.pairs import ExplicitSignals, PreferencePair

OWN, GREEDY = "own", "greedy"  # sets of questions
NO_PERSONA = "no_persona"  # failure of a user for whom no persona was published
# Columns of the chains that a validation logs.
SHOWN = ("pair_id", "order", "score_chosen", "score_rejected", "failure", "issues", "tokens", "text")
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
    persona_write: Callable[[], Write] | None = None  # writer of prompts with a persona


@dataclass(frozen=True)
class ScoredCandidate:
    """A model under test that returns scores and writes no chain (see `scored`)."""

    name: str
    identity: str
    start: Callable[[], ScoreMany]
    close: Callable[[], None]
    seconds: float | None = None


class SetAccuracy(Accuracy):
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
    greedy: AccuracyReport | None = None  # by the likeliest chain of each question; local models only

    @property
    def own(self) -> pd.DataFrame:
        """Predictions with the user's own history."""
        return self.predictions[self.predictions["set"] == OWN]

    @property
    def likeliest(self) -> pd.DataFrame:
        """Predictions by greedy decoding, with the user's own history; empty without them."""
        return self.predictions[self.predictions["set"] == GREEDY]


@dataclass(frozen=True)
class Grid:
    """Every Ind-m/Pro-n cell of one study, from one pool of samples."""

    study: Study
    pool: pd.DataFrame
    rows: list[CellRow]
    adaptive: ReplayedRow | None = None  # the largest cell with adaptive stopping, replayed on the pool
    control: Sequence[ControlRow] = ()  # similar users against random ones


def kept_answers(
    config: Config, candidate: Candidate | ScoredCandidate, folder: Path, name: str, temperature: float
) -> PredictionStore:
    """Store of a candidate's answers, keyed by model, prompt and sampling; in `eval.cache` if that is set."""
    prompt = [getattr(config.model, setting) for setting in PROMPT]
    if config.model.counted is not Totals.DECLARED:
        prompt.append(config.model.counted)
    identity = fingerprint(candidate.identity, temperature, masking_of(config, "eval"), config.seed, prompt)
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
        self.probe_pairs = probe_slice(pairs, config.eval.probe_pairs) if config.eval.probes else []

    def test(
        self, candidate: Candidate | ScoredCandidate, folder: Path, progress: Progress, *, final: bool = False
    ) -> Tested:
        """Put all questions to one candidate; to the `final` one also those of the robustness probes.

        Resumes from the answers in `folder`.
        """
        seeds = self.config.eval.seeds if isinstance(candidate, Candidate) else 1
        predictions = self.asker(candidate, folder, progress, "predictions")(self._questions(seeds, final))
        return self.judge(candidate.name, predictions, candidate.seconds, final=final)

    def asker(
        self,
        candidate: Candidate | ScoredCandidate,
        folder: Path,
        progress: Progress,
        store: str,
        what: str = "evaluate",
        temperature: float | None = None,
    ) -> Ask:
        """A function that answers questions with the candidate and stores the answers by identity.

        `what` names the work on the progress bar; `temperature` is by default that of the evaluation.
        """
        sampled_at = self.config.eval.temperature if temperature is None else temperature

        def answer(questions: Sequence[Question]) -> pd.DataFrame:
            kept = kept_answers(self.config, candidate, folder, store, sampled_at)
            shown = f"{what} {candidate.name}"
            if isinstance(candidate, ScoredCandidate):
                return ask_scores(questions, candidate.start, kept, progress=progress, what=shown)
            return ask(
                questions,
                candidate.start,
                candidate.write(),
                kept,
                masking=masking_of(self.config, "eval"),
                temperature=sampled_at,
                progress=progress,
                what=shown,
                totals=self.config.model.counted,
            )

        return answer

    def with_greedy(self, tested: Tested, candidate: Candidate, folder: Path, progress: Progress) -> Tested:
        """Add one greedy chain per question to `tested`, with its accuracy."""
        asker = self.asker(candidate, folder, progress, GREEDY, "greedy chains of", temperature=0.0)
        answers = asker(own_questions(self.pairs, self.histories, set_name=GREEDY))
        every = pd.concat([tested.predictions, answers], ignore_index=True)
        return replace(tested, predictions=every, greedy=self._accuracy(answers))

    def with_personas(
        self, candidate: Candidate, personas: Mapping[str, str], folder: Path, progress: Progress
    ) -> Tested:
        """The same model with each user's persona as their self-description, and no probes.

        A user without a persona fails as `no_persona` and costs no answer.
        """
        assert candidate.persona_write is not None, "config.checks"
        every = own_questions(self.pairs, self.histories, seeds=self.config.eval.seeds)
        lacking = [q for q in every if q.pair.user_id not in personas]
        answers = ask(
            [_introduced(q, personas[q.pair.user_id]) for q in every if q.pair.user_id in personas],
            candidate.start,
            candidate.persona_write(),
            kept_answers(self.config, candidate, folder, PERSONA_BASELINE, self.config.eval.temperature),
            masking="full",
            temperature=self.config.eval.temperature,
            progress=progress,
            what=f"evaluate {candidate.name} with personas",
            totals=self.config.model.counted,
        )
        if lacking:
            failed = pd.DataFrame([answer_row(q, sample=0, failure=NO_PERSONA) for q in lacking])
            answers = pd.concat([answers.astype(object), failed.astype(object)], ignore_index=True)
        report = self._accuracy(answers)
        report["model"] = PERSONA_BASELINE
        return Tested(PERSONA_BASELINE, answers, report, None, None)

    def study(
        self,
        study: Study,
        candidate: Candidate,
        histories: Histories,
        folder: Path,
        progress: Progress,
        find: FindSimilar | None,
        control: FindSimilar | None = None,
    ) -> Grid:
        """Sample one pool and fill every cell of `study`; several samples need a temperature above 0.

        `control` finds random users: a second pool with their histories and the same own chains.
        """
        pairs = self.pairs[: self.config.eval.grid_pairs]
        asker = self.asker(candidate, folder, progress, "samples")
        # A smaller cell would lack the samples that adaptive stopping saves in the largest one.
        adaptive = self.config.eval.adaptive if len(study.ind) == len(study.pro) == 1 else None
        pool = sample_pool(study, pairs, histories, asker, find, adaptive=adaptive)
        against: list[ControlRow] = []
        if control and adaptive is None:
            others = sample_pool(study, pairs, histories, asker, control)
            against = controlled(pool, others, study, self.config)
        stopped = replayed(pool, study, self.config)
        return Grid(study, pool, cells(pool, study, self.config), stopped, against)

    def judge(
        self, name: str, predictions: pd.DataFrame, seconds: float | None = None, *, final: bool = False
    ) -> Tested:
        """Measure accuracy on all pairs and the probe on the twins; for the `final` model also robustness."""
        report = self._accuracy(predictions[predictions["set"] == OWN])
        report["model"] = name
        kinds, draws = self.config.eval.probe_kinds, self.config.eval.draws
        probe_pairs = self.probe_pairs if final else []
        rows = probe_rows(predictions, kinds, probe_pairs, draws=draws, seed=self.config.seed)
        return Tested(name, predictions, report, self._probe(predictions), seconds, rows)

    def baseline(self, name: str, score: Score, *, final: bool = False) -> Tested:
        """The same questions for a function; an exception is that question's failure."""
        return self.judge(name, scored(self._questions(1, final), one_by_one(score)), final=final)

    def _questions(self, seeds: int, final: bool) -> list[Question]:
        """All pairs, the twins with swapped histories, and for the `final` model the robustness probes."""
        twins = [p for twin in self.twins for p in twin]
        swapped = swapped_histories(self.twins, self.histories)
        probe_pairs = self.probe_pairs if final else []
        return [
            *own_questions(self.pairs, self.histories, seeds=seeds),
            *own_questions(twins, swapped, set_name="swapped"),
            *probe_questions(self.config.eval.probe_kinds, probe_pairs, self.histories),
        ]

    def _accuracy(self, predictions: pd.DataFrame) -> AccuracyReport:
        protocol, draws = self.config.eval.protocol, self.config.eval.draws
        return accuracy_report(predictions, protocol=protocol, draws=draws, seed=self.config.seed)

    def _probe(self, predictions: pd.DataFrame) -> HistoryProbe | None:
        if not self.twins:
            return None
        twin_ids = {p.pair_id for twin in self.twins for p in twin}
        own = predictions[(predictions["set"] == OWN) & predictions["pair_id"].isin(twin_ids)]
        swapped = predictions[predictions["set"] == "swapped"]
        difference = paired_difference(own, swapped, draws=self.config.eval.draws, seed=self.config.seed)
        return {
            "n_pairs": len(twin_ids),
            "own": _brief(self._accuracy(own)),
            "swapped": _brief(self._accuracy(swapped)),
            "difference": difference,
        }


def _introduced(question: Question, persona: str) -> Question:
    """The question of a user who stated the persona and nothing else."""
    explicit = ExplicitSignals(self_description=persona)
    return replace(question, pair=replace(question.pair, explicit=explicit))


def _brief(report: AccuracyReport) -> SetAccuracy:
    return {
        "accuracy": report["accuracy"],
        "ci95": report["ci95"],
        "n_pairs": report["n_pairs"],
        "ties": report["ties"],
    }


class Validation:
    """A `Validator`: accuracy while training, on a fixed slice of pairs with the harness of the evaluation.

    One greedy chain per pair and order, so only the weights change between validations.  The slice is small:
    its accuracy orders checkpoints and reveals trouble.  Report the number of `recipe=evaluate` instead.
    """

    def __init__(
        self,
        config: Config,
        pairs: Sequence[PreferencePair],
        histories: Histories,
        write: Write,
        truth: ChainReader | None = None,
    ) -> None:
        self.config, self.truth = config, truth
        questions = own_questions(pairs, histories)
        self.questions = {q.key: q for q in questions}
        self.requests = list(requests(questions, write, masking_of(config, "eval")))

    def __call__(self, generator: Generator) -> Validated:
        """Strict accuracy (a failed generation is a miss) as `headline` metrics, and the first chains."""
        answers = {answer.key: answer for answer in generator(self.requests, temperature=0.0)}
        totals = self.config.model.counted
        rows = [prediction(question, answers[key], totals) for key, question in self.questions.items()]
        report = accuracy_report(
            pd.DataFrame(rows), protocol="strict", draws=self.config.eval.draws, seed=self.config.seed
        )
        shown = [
            {k: v for k, v in row.items() if k in SHOWN} for row in rows[: self.config.tracking.sample_chains]
        ]
        metrics = headline(report)
        if self.truth:
            chains = ((row["pair_id"], row["order"], row["text"]) for row in rows)
            metrics |= {f"{TRUTH}{name}": share for name, share in self.truth(chains).items()}
        return Validated(metrics, shown)


def headline(report: AccuracyReport) -> dict[str, float]:
    """Metrics of an accuracy report for W&B and metrics.jsonl, with the same keys in every stage."""
    metrics = {
        "eval/accuracy": report["accuracy"],
        "eval/accuracy_low": report["ci95"][0],
        "eval/accuracy_high": report["ci95"][1],
        "eval/macro_accuracy": report["macro_accuracy"],
        "eval/ties": report["ties"],
        "eval/format_failures": sum(report["failures"].values()),
        "eval/order_flip_rate": report["order_flip_rate"],
    }
    return {k: float(v) for k, v in metrics.items() if v is not None}


def greedy_headline(tested: Tested) -> dict[str, float]:
    """Metrics of the greedy chains; empty without them."""
    if tested.greedy is None:
        return {}
    low, high = tested.greedy["ci95"]
    values = {"": tested.greedy["accuracy"], "_low": low, "_high": high}
    return {f"eval/greedy_accuracy{end}": float(value) for end, value in values.items() if value is not None}
