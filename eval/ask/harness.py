"""Questions → one queue of generations → one prediction a sample, kept as they come and resumable.

A *question* is one pair in one presentation order with one history.  Every model that writes chains, every probe and every
neighbour's history goes through the same code; what differs is the question's `set`.  A generation that fails (no end within the
limit, unreadable chain, engine error) stays in the table with its reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pgenrm_train.backends.protocols import Generation, GenerationRequest, Generator
from pgenrm_train.chains.chain import ParseFailure, parse_chain
from pgenrm_train.errors import DataError
from pgenrm_train.files import atomic
from pgenrm_train.prompts.masking import FullView, MaskedView, apply_masking, present
from pgenrm_train.prompts.writer import PromptWriter
from pgenrm_train.records.pairs import HistoryItem, PreferencePair

Write = Callable[[MaskedView | FullView], list[dict[str, str]]]
ROWS_PER_SHARD = 512
SECONDS_PER_SHARD = 60.0  # what a slow model has said is on disk within a minute, however the process ends
STAMP = "identity.txt"
UNVERIFIED = "unverified"  # under `eval.scores=verified`: a chain whose own weights give no scores
ENGINE_FAILURE = "engine:"  # how a failure begins that is the engine's and not the model's


@dataclass(frozen=True, slots=True)
class Question:
    """`set` names why it is asked: `own` (the user's history), `swapped` (the twin's), `similar` (a neighbour's)."""

    pair: PreferencePair
    order: int
    history: tuple[HistoryItem, ...]
    set: str = "own"
    seed: int = 0
    samples: int = 1
    neighbour: str | None = None

    @property
    def key(self) -> str:
        """Names the question by what is asked, texts included: an answer to the same ids with other texts is none to it.

        The same for every number of samples: those that are known already count.
        """
        names = [self.set, self.pair.pair_id, self.pair.user_id, self.order, self.seed, self.neighbour]
        return json.dumps([*names, self._content])

    @property
    def _content(self) -> str:
        texts = (self.pair.context, self.pair.chosen, self.pair.rejected, self.pair.explicit, self.history)
        return hashlib.sha256(repr(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12]


class PredictionStore:
    """Predictions of one model in numbered parquet shards; a shard is written whole or not at all.

    `identity` names model, prompt and sampling settings: a store made with others is refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        stamp = folder / STAMP
        if stamp.exists() and stamp.read_text() != identity:
            raise DataError(
                f"{folder} holds predictions of another model or other settings; use another run_dir or delete it"
            )
        if not stamp.exists():
            with atomic(stamp) as temporary:
                temporary.write_text(identity)
        self._pending: list[dict[str, Any]] = []
        self._flushed = time.monotonic()

    def done(self) -> set[tuple[str, int]]:
        """(key, sample) of what is answered; where the engine failed, another start asks again."""
        frame = self.read()
        if frame.empty:
            return set()
        failed = frame["failure"].astype("string").str.startswith(ENGINE_FAILURE).fillna(False)
        return set(zip(frame.loc[~failed, "key"], frame.loc[~failed, "sample"]))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self._pending.extend(rows)
        if len(self._pending) >= ROWS_PER_SHARD or time.monotonic() - self._flushed >= SECONDS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        with (self.folder / STAMP).open() as lock:  # runs may share a store: no two take one number
            fcntl.flock(lock, fcntl.LOCK_EX)
            number = 1 + max(
                (int(path.stem.removeprefix("part-")) for path in self.folder.glob("part-*.parquet")),
                default=-1,
            )
            with atomic(self.folder / f"part-{number:06d}.parquet") as temporary:
                pd.DataFrame(self._pending).to_parquet(temporary)
        self._pending, self._flushed = [], time.monotonic()

    def read(self) -> pd.DataFrame:
        shards = sorted(self.folder.glob("part-*.parquet"))
        if not shards:
            return pd.DataFrame()
        frame = pd.concat([pd.read_parquet(s) for s in shards], ignore_index=True)
        return frame.drop_duplicates(
            ["key", "sample"], keep="last", ignore_index=True
        )  # the newest answer to a question


def ask(
    questions: Sequence[Question],
    generator: Callable[[], Generator],
    write: Write,
    store: PredictionStore,
    *,
    masking: str,
    temperature: float,
    progress: Callable[..., Iterable[Any]],
    what: str,
) -> pd.DataFrame:
    """Draw every sample of every question that the store does not hold yet; returns the rows of all samples asked for.

    The engine is started only if something is left to ask.
    """
    wanted = {q.key: q.samples for q in questions}
    if len(wanted) != len(questions):
        raise DataError("two questions are the same: pair ids must be unique for a user")
    runs = {run.key: run for run in _missing(questions, store.done())}
    if runs:
        answers = generator()(_requests(runs.values(), write, masking), temperature=temperature)
        total = answered = sum(run.samples for run in runs.values())
        try:
            running = Running()
            bar = iter(progress(range(total), what, total, running))
            for answer, _ in zip(answers, bar):
                run = runs[answer.key]
                row = prediction(run.question, replace(answer, sample=run.first + answer.sample))
                store.add([row])
                running.add(row)
                answered -= 1
            next(bar, None)
        finally:  # an engine that fails and Ctrl-C lose no answer
            store.flush()
        if isinstance(write, PromptWriter) and (told := write.told(what)):
            print(told, flush=True)
        if answered:
            raise DataError(f"the engine ended with {answered} of {total} samples unanswered")
    frame = store.read()
    return frame[frame["sample"] < frame["key"].map(wanted)].reset_index(drop=True)


class Running:
    """What the progress bar says: strict accuracy, over samples, of this start's answers with the user's own history."""

    def __init__(self) -> None:
        self.hits = self.asked = 0

    def add(self, row: Mapping[str, Any]) -> None:
        if row["set"].endswith("own"):
            self.asked += 1
            self.hits += row["failure"] is None and row["score_chosen"] > row["score_rejected"]

    def __str__(self) -> str:
        return f"accuracy {self.hits / self.asked:.3f}" if self.asked else ""


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive samples of one question, asked in one request."""

    question: Question
    first: int
    samples: int

    @property
    def key(self) -> str:
        return f"{self.question.key}#{self.first}" if self.first else self.question.key


def _missing(questions: Sequence[Question], done: Set[tuple[str, int]]) -> list[_Run]:
    """What is left to ask, prompts with the same beginning next to each other: a server encodes a shared prefix once."""
    runs = []
    for question in questions:
        key, start = question.key, None
        for sample in range(question.samples + 1):
            open_end = sample < question.samples and (key, sample) not in done
            if open_end and start is None:
                start = sample
            elif not open_end and start is not None:
                runs.append(_Run(question, start, sample - start))
                start = None
    return sorted(runs, key=lambda run: (_texts(run.question.history), run.question.pair.query))


def _texts(history: Iterable[HistoryItem]) -> tuple[str, ...]:
    return tuple(text for item in history for text in (item.query, item.chosen, item.rejected))


def prediction(question: Question, generation: Generation) -> dict[str, Any]:
    """One row: INTERFACES' columns plus the text, verified scores, issues and tokens."""
    chain = parse_chain(generation.text or "", 2) if generation.failure is None else None
    failure = (
        generation.failure
        if chain is None
        else f"parse:{chain.kind}"
        if isinstance(chain, ParseFailure)
        else None
    )
    row = answer_row(
        question, sample=generation.sample, failure=failure, tokens=generation.tokens, text=generation.text
    )
    if failure is None and chain is not None and not isinstance(chain, ParseFailure):
        row |= scores_of(question, chain.scores) | {"issues": ",".join(chain.issues)}
        if chain.verified_scores:
            row |= scores_of(question, chain.verified_scores, "verified")
    return row


def scores_of(question: Question, scores: Sequence[float], name: str = "score") -> dict[str, float]:
    """`scores` in presentation order → those of the chosen and of the rejected response.

    Two identical responses are one response, shown twice: it scores the mean of both, a tie.  What a model prefers between them is
    their place, and would count as a hit in one order.
    """
    chosen, rejected = scores[question.order], scores[1 - question.order]
    if question.pair.chosen == question.pair.rejected:
        chosen = rejected = chosen / 2 + rejected / 2
    return {f"{name}_chosen": chosen, f"{name}_rejected": rejected}


def answer_row(
    question: Question, *, sample: int, failure: str | None, tokens: int = 0, text: str | None = None
) -> dict[str, Any]:
    """The row of an answer before its scores are known; every kind of model fills the same columns."""
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


def readable_text(row: Mapping[str, Any]) -> str | None:
    """The chain of a prediction, or None where generation or parsing failed.  A missing value may be None or NaN: parquet decides."""
    readable = pd.isna(row["failure"]) or row["failure"] == UNVERIFIED
    return row["text"] if readable and isinstance(row["text"], str) else None


def verified(predictions: pd.DataFrame) -> pd.DataFrame:
    """The same predictions, scored by what each chain's own weights and scores add up to; where they do not, it fails."""
    scores = predictions[["verified_chosen", "verified_rejected"]].astype(float)
    failure = predictions["failure"].astype(object).where(predictions["failure"].notna(), None)
    failure[scores.isna().any(axis=1) & failure.isna()] = UNVERIFIED
    named = dict(zip(("score_chosen", "score_rejected"), (scores[name] for name in scores)))
    return predictions.assign(**named, failure=failure)


def own_questions(
    pairs: Iterable[PreferencePair],
    histories: Mapping[str, tuple[HistoryItem, ...]],
    *,
    seeds: int = 1,
    samples: int = 1,
    set_name: str = "own",
    orders: Sequence[int] = (0, 1),
) -> list[Question]:
    """Every pair in both `orders`, for every evaluation seed, with the given history."""
    return [
        Question(pair, order, histories[pair.pair_id], set_name, seed, samples)
        for pair in pairs
        for seed in range(seeds)
        for order in orders
    ]


def requests(questions: Sequence[Question], write: Write, masking: str) -> Iterator[GenerationRequest]:
    """What a generator is asked: each question's prompt under the masking policy, and a seed of its own."""
    yield from _requests(_missing(questions, set()), write, masking)


def _requests(runs: Iterable[_Run], write: Write, masking: str) -> Iterator[GenerationRequest]:
    for run in runs:
        q = run.question
        example = present(q.pair, q.history, q.order)
        view, _ = apply_masking(example, masking, random.Random(q.key))
        # engines seed sample i with seed + i: later samples are the same whether asked at once or afterwards
        yield GenerationRequest(run.key, tuple(write(view)), run.samples, _seed(q.key) + run.first)


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
