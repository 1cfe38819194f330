"""Questions → one queue of generations → one prediction a sample, kept as they come and resumable.

A *question* is one pair in one presentation order with one history.  Every model that writes chains, every probe and every
neighbour's history goes through the same code; what differs is the question's `set`.  A generation that fails (no end within the
limit, unreadable chain, engine error) stays in the table with its reason.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pgenrm_train.artifacts import atomic
from pgenrm_train.backends.base import Generation, GenerationRequest, Generator
from pgenrm_train.chains import ParseFailure, parse_chain
from pgenrm_train.errors import DataError
from pgenrm_train.masking import FullView, MaskedView, apply_masking, present
from pgenrm_train.records import HistoryItem, PreferencePair

Write = Callable[[MaskedView | FullView], list[dict[str, str]]]
ROWS_PER_SHARD = 512
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
        return json.dumps([self.set, self.pair.pair_id, self.pair.user_id, self.order, self.seed, self.neighbour, self.samples])


class PredictionStore:
    """Predictions of one model in numbered parquet shards; a shard is written whole or not at all.

    `identity` names model, prompt and sampling settings: a store made with others is refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        stamp = folder / "identity.txt"
        if stamp.exists() and stamp.read_text() != identity:
            raise DataError(f"{folder} holds predictions of another model or other settings; use another run_dir or delete it")
        with atomic(stamp) as temporary:
            temporary.write_text(identity)
        self._pending: list[dict[str, Any]] = []

    def done(self) -> set[str]:
        """Keys of the questions that are answered in full; where the engine failed, another start asks again."""
        frame = self.read()
        if frame.empty:
            return set()
        failed = frame["failure"].astype("string").str.startswith(ENGINE_FAILURE).fillna(False)
        return set(frame["key"]) - set(frame.loc[failed, "key"])

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self._pending.extend(rows)
        if len(self._pending) >= ROWS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            number = 1 + max((int(path.stem.removeprefix("part-")) for path in self.folder.glob("part-*.parquet")), default=-1)
            with atomic(self.folder / f"part-{number:06d}.parquet") as temporary:
                pd.DataFrame(self._pending).to_parquet(temporary)
            self._pending = []

    def read(self) -> pd.DataFrame:
        shards = sorted(self.folder.glob("part-*.parquet"))
        if not shards:
            return pd.DataFrame()
        frame = pd.concat([pd.read_parquet(s) for s in shards], ignore_index=True)
        return frame.drop_duplicates(["key", "sample"], keep="last", ignore_index=True)  # the newest answer to a question


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
    """Answer every question that the store does not hold yet; returns the whole table.

    The engine is started only if something is left to ask.
    """
    done = store.done()
    by_key = {q.key: q for q in questions}
    if len(by_key) != len(questions):
        raise DataError("two questions are the same: pair ids must be unique for a user")
    todo = [q for q in questions if q.key not in done]
    if todo:
        answers = generator()(_requests(todo, write, masking), temperature=temperature)
        bar = iter(progress(range(len(todo)), what, len(todo)))
        try:
            for group in _grouped(answers, by_key):
                question = by_key[group[0].key]
                store.add([prediction(question, generation) for generation in group])
                next(bar, None)
            next(bar, None)
        finally:  # an engine that fails and Ctrl-C lose no answer
            store.flush()
    return store.read()


def prediction(question: Question, generation: Generation) -> dict[str, Any]:
    """One row: INTERFACES' columns plus the text, verified scores, issues and tokens."""
    pair, chosen = question.pair, question.order
    chain = parse_chain(generation.text or "", 2) if generation.failure is None else None
    failure = generation.failure if chain is None else f"parse:{chain.kind}" if isinstance(chain, ParseFailure) else None
    row: dict[str, Any] = {
        "key": question.key,
        "pair_id": pair.pair_id,
        "user_id": pair.user_id,
        "order": question.order,
        "seed": question.seed,
        "sample": generation.sample,
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
        "tokens": generation.tokens,
        "text": generation.text,
    }
    if failure is None and chain is not None and not isinstance(chain, ParseFailure):
        row |= {
            "score_chosen": chain.scores[chosen],
            "score_rejected": chain.scores[1 - chosen],
            "issues": ",".join(chain.issues),
        }
        if chain.verified_scores:
            row |= {"verified_chosen": chain.verified_scores[chosen], "verified_rejected": chain.verified_scores[1 - chosen]}
    return row


def readable_text(row: Mapping[str, Any]) -> str | None:
    """The chain of a prediction, or None where generation or parsing failed.  A missing value may be None or NaN: parquet decides."""
    return row["text"] if pd.isna(row["failure"]) and isinstance(row["text"], str) else None


def own_questions(
    pairs: Iterable[PreferencePair],
    histories: Mapping[str, tuple[HistoryItem, ...]],
    *,
    seeds: int = 1,
    samples: int = 1,
    set_name: str = "own",
) -> list[Question]:
    """Every pair in both orders, for every evaluation seed, with the given history."""
    return [
        Question(pair, order, histories[pair.pair_id], set_name, seed, samples)
        for pair in pairs
        for seed in range(seeds)
        for order in (0, 1)
    ]


def _requests(questions: Iterable[Question], write: Write, masking: str) -> Iterator[GenerationRequest]:
    for q in questions:
        example = present(q.pair, q.history, q.order)
        view, _ = apply_masking(example, masking, random.Random(q.key))
        yield GenerationRequest(q.key, tuple(write(view)), q.samples, _seed(q.key))


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def _grouped(answers: Iterable[Generation], by_key: Mapping[str, Question]) -> Iterator[list[Generation]]:
    """Collect a question's samples; a question is stored only with all of them."""
    open_groups: dict[str, list[Generation]] = {}
    for answer in answers:
        group = open_groups.setdefault(answer.key, [])
        group.append(answer)
        if len(group) == by_key[answer.key].samples:
            yield open_groups.pop(answer.key)
    if open_groups:
        raise DataError(f"the engine ended with {len(open_groups)} questions answered in part")
