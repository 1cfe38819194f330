"""Questions → one queue of generations → one prediction per sample, stored as they arrive and resumable.

A *question* is one pair in one presentation order with one history.  Models that write chains, probes and
similar users' histories share this code; only the question's `set` differs.  A failed generation (no end
within the limit, unreadable chain, engine error) stays in the table with its reason.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import pandas as pd

from pgenrm_train.backends.protocols import Generation, GenerationRequest, Generator
from pgenrm_train.chains.chain import ParseFailure
from pgenrm_train.chains.totals import UNVERIFIED, failure_of, read_chain
from pgenrm_train.config import Totals
from pgenrm_train.errors import DataError
from pgenrm_train.files import next_part, write_table, write_text
from pgenrm_train.prompts.masking import apply_masking, present
from pgenrm_train.prompts.writer import Write
from pgenrm_train.records.pairs import HistoryItem, PreferencePair

Progress = Callable[..., Iterable[Any]]
Histories = Mapping[str, tuple[HistoryItem, ...]]  # pair_id → the history in its prompt
ROWS_PER_SHARD = 512
SECONDS_PER_SHARD = 60.0  # however the process ends, answers older than a minute are on disk
STAMP = "identity.txt"
CHOICE = "choice"  # first word of sets whose pairs are candidates without a vote
ENGINE_FAILURE = "engine:"  # prefix of a failure of the engine, not of the model


@dataclass(frozen=True, slots=True)
class Question:
    """One pair, order and history; `set` is own (the user's history), swapped (the twin's) or similar."""

    pair: PreferencePair
    order: int
    history: tuple[HistoryItem, ...]
    set: str = "own"
    seed: int = 0
    samples: int = 1
    neighbour: str | None = None

    @property
    def key(self) -> str:
        """Identity of the question by content: other texts under the same ids need new answers.

        Independent of the number of samples: stored ones already count.
        """
        pair = self.pair
        texts = (pair.context, pair.chosen, pair.rejected, pair.explicit, self.history)
        content = hashlib.sha256(repr(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return json.dumps(
            [self.set, pair.pair_id, pair.user_id, self.order, self.seed, self.neighbour, content]
        )


class Prediction(TypedDict):
    """One row of a predictions table: a sample of a question."""

    key: str
    pair_id: str
    user_id: str
    order: int  # 0: the chosen response first
    seed: int
    sample: int
    score_chosen: float | None
    score_rejected: float | None
    verified_chosen: float | None  # recomputed from the chain's own weights and scores
    verified_rejected: float | None
    failure: str | None
    kind: str | None
    cohort: str | None
    set: str
    neighbour: str | None
    issues: str
    tokens: int
    text: str | None


class PredictionStore:
    """Predictions of one model in numbered parquet shards; each shard is written atomically.

    `identity` names model, prompt and sampling settings; a store of another identity raises DataError.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        stamp = folder / STAMP
        if stamp.exists() and stamp.read_text() != identity:
            raise DataError(
                f"{folder} holds predictions of another model or other settings; use another run_dir or "
                "delete it"
            )
        if not stamp.exists():
            write_text(stamp, identity)
        self._pending: list[Mapping[str, object]] = []
        self._flushed = time.monotonic()

    def done(self) -> set[tuple[str, int]]:
        """(key, sample) of stored answers, without engine failures: another start samples those again."""
        frame = self.read()
        failed = frame["failure"].astype("string").str.startswith(ENGINE_FAILURE).fillna(False)
        return set(zip(frame.loc[~failed, "key"], frame.loc[~failed, "sample"]))

    def add(self, row: Mapping[str, object]) -> None:
        self._pending.append(row)
        if len(self._pending) >= ROWS_PER_SHARD or time.monotonic() - self._flushed >= SECONDS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        with next_part(self.folder, self.folder / STAMP, ".parquet") as path:  # runs may share a store
            write_table(path, pd.DataFrame(self._pending))
        self._pending, self._flushed = [], time.monotonic()

    def read(self) -> pd.DataFrame:
        """All rows; the newest of a question's sample."""
        shards = sorted(self.folder.glob("part-*.parquet"))
        if not shards:
            return pd.DataFrame(columns=list(Prediction.__annotations__))
        frame = pd.concat([pd.read_parquet(s) for s in shards], ignore_index=True)
        return frame.drop_duplicates(["key", "sample"], keep="last", ignore_index=True)


class RunningAccuracy:
    """Strict accuracy over this start's samples with the user's own history, for the progress bar."""

    def __init__(self) -> None:
        self.hits = self.total = 0

    def add(self, row: Prediction) -> None:
        if row["set"].endswith("own") and not row["set"].startswith(CHOICE):
            self.total += 1
            chosen, rejected = row["score_chosen"], row["score_rejected"]
            self.hits += chosen is not None and rejected is not None and chosen > rejected

    def __str__(self) -> str:
        return f"accuracy {self.hits / self.total:.3f}" if self.total else ""


def keep(
    rows: Iterable[Prediction], total: int, store: PredictionStore, progress: Progress, what: str
) -> int:
    """Store rows as they arrive, with a progress bar; returns their number."""
    running = RunningAccuracy()
    bar = (step for step in progress(range(total), what, total, running))
    stored = 0
    try:
        for row in rows:
            store.add(row)
            running.add(row)
            stored += 1
            next(bar, None)
        next(bar, None)
    finally:  # an engine that fails and Ctrl-C lose no answer
        store.flush()
        bar.close()  # so that the message of an error begins a line
    return stored


@runtime_checkable
class TrimCounter(Protocol):
    """A prompt writer that counts the texts it cut."""

    def log_trimmed(self, name: str) -> None: ...


def ask(
    questions: Sequence[Question],
    generator: Callable[[], Generator],
    write: Write,
    store: PredictionStore,
    *,
    masking: str,
    temperature: float,
    progress: Progress,
    what: str,
    totals: Totals = Totals.DECLARED,
) -> pd.DataFrame:
    """Sample what the store lacks and return the rows of all samples of all questions.

    The engine starts only if a sample is missing.
    """
    samples = {q.key: q.samples for q in questions}
    if len(samples) != len(questions):
        raise DataError("two questions are the same: pair ids must be unique per user")
    runs = {run.key: run for run in _missing(questions, store.done())}
    if runs:
        answers = generator()(_requests(runs.values(), write, masking), temperature=temperature)
        total = sum(run.samples for run in runs.values())
        rows = (
            prediction(run.question, replace(answer, sample=run.first + answer.sample), totals)
            for answer in answers
            for run in [runs[answer.key]]
        )
        answered = keep(rows, total, store, progress, what)
        if isinstance(write, TrimCounter):
            write.log_trimmed(what)
        if answered < total:
            raise DataError(f"the engine ended with {total - answered} of {total} samples unanswered")
    frame = store.read()
    return frame[frame["sample"] < frame["key"].map(samples)].reset_index(drop=True)


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive samples of one question, in one request."""

    question: Question
    first: int
    samples: int

    @property
    def key(self) -> str:
        return f"{self.question.key}#{self.first}" if self.first else self.question.key


def _missing(questions: Sequence[Question], done: Set[tuple[str, int]]) -> list[_Run]:
    """Missing samples, prompts with a common beginning next to each other: a server encodes a prefix once."""
    runs = []
    for question in questions:
        key, start = question.key, None
        for sample in range(question.samples + 1):
            missing = sample < question.samples and (key, sample) not in done
            if missing and start is None:
                start = sample
            elif not missing and start is not None:
                runs.append(_Run(question, start, sample - start))
                start = None
    return sorted(
        runs,
        key=lambda run: (
            [(item.query, item.chosen, item.rejected) for item in run.question.history],
            run.question.pair.query,
        ),
    )


def prediction(question: Question, generation: Generation, totals: Totals = Totals.DECLARED) -> Prediction:
    """Row of a generation: scores, verified scores, issues, text and tokens, or the failure."""
    text, chain, failure = generation.text, None, generation.failure
    if failure is None:
        text, chain = read_chain(text or "", totals)
    if isinstance(chain, ParseFailure):
        failure = failure_of(chain)
    row = answer_row(question, sample=generation.sample, failure=failure, tokens=generation.tokens, text=text)
    if chain is not None and not isinstance(chain, ParseFailure):
        row["score_chosen"], row["score_rejected"] = by_choice(question, chain.scores)
        row["issues"] = ",".join(chain.issues)
        if chain.verified_scores:
            row["verified_chosen"], row["verified_rejected"] = by_choice(question, chain.verified_scores)
    return row


def by_choice(question: Question, scores: Sequence[float]) -> tuple[float, float]:
    """Scores in presentation order → (score of the chosen response, score of the rejected one).

    Two identical responses both score the mean, a tie.  A preference between them is one of place, and would
    count as a hit in one order.
    """
    chosen, rejected = scores[question.order], scores[1 - question.order]
    if question.pair.chosen == question.pair.rejected:
        chosen = rejected = chosen / 2 + rejected / 2
    return chosen, rejected


def answer_row(
    question: Question, *, sample: int, failure: str | None, tokens: int = 0, text: str | None = None
) -> Prediction:
    """Row of an answer without its scores; every kind of model fills the same columns."""
    pair = question.pair
    return {
        "key": question.key,
        "pair_id": pair.pair_id,
        "user_id": pair.user_id,
        "order": question.order,
        "seed": question.seed,
        "sample": sample,
        "score_chosen": None,
        "score_rejected": None,
        "verified_chosen": None,
        "verified_rejected": None,
        "failure": failure,
        "kind": pair.kind,
        "cohort": pair.cohort,
        "set": question.set,
        "neighbour": question.neighbour,
        "issues": "",
        "tokens": tokens,
        "text": text,
    }


def readable_text(row: Any) -> str | None:
    """Chain of a prediction (a mapping), None if generation or parsing failed.

    After a parquet round trip a missing value may be None or NaN.
    """
    readable = pd.isna(row["failure"]) or row["failure"] == UNVERIFIED
    return row["text"] if readable and isinstance(row["text"], str) else None


def verified(predictions: pd.DataFrame) -> pd.DataFrame:
    """The predictions with verified scores instead of declared ones; a row without them fails."""
    scores = predictions[["verified_chosen", "verified_rejected"]].astype(float)
    failure = predictions["failure"].astype(object).where(predictions["failure"].notna(), None)
    failure[scores.isna().any(axis=1) & failure.isna()] = UNVERIFIED
    columns = dict(zip(("score_chosen", "score_rejected"), (scores[name] for name in scores)))
    return predictions.assign(**columns, failure=failure)


def own_questions(
    pairs: Iterable[PreferencePair],
    histories: Histories,
    *,
    seeds: int = 1,
    samples: int = 1,
    set_name: str = "own",
    orders: Sequence[int] = (0, 1),
) -> list[Question]:
    """Every pair in all `orders` and evaluation seeds, with the given history."""
    return [
        Question(pair, order, histories[pair.pair_id], set_name, seed, samples)
        for pair in pairs
        for seed in range(seeds)
        for order in orders
    ]


def requests(questions: Sequence[Question], write: Write, masking: str) -> Iterator[GenerationRequest]:
    """Requests for a generator: each question's prompt under the masking policy, with its own seed."""
    return _requests(_missing(questions, set()), write, masking)


def _requests(runs: Iterable[_Run], write: Write, masking: str) -> Iterator[GenerationRequest]:
    for run in runs:
        q = run.question
        view, _ = apply_masking(present(q.pair, q.history, q.order), masking, random.Random(q.key))
        seed = int.from_bytes(hashlib.sha256(q.key.encode()).digest()[:4], "big")
        # Engines seed sample i with seed + i, so later samples do not depend on the first request.
        yield GenerationRequest(run.key, tuple(write(view)), run.samples, seed + run.first)
