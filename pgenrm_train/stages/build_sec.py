"""build_sec: teacher chains filtered by rejection sampling (METHOD §3) → the SFT set of PSI.

Needs pairs and a teacher.  Makes `sec.parquet` (chat rows), `rejected.parquet` (each rejected chain with its reason) and
`yield.json`.  A chain is kept when it parses, ranks the chosen response strictly above every other, its rubric can be recomputed
and agrees (our additions), and no other kept chain of the user has the same text.  The teacher never sees the label; half of the
chains present the chosen response first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pgenrm_train.artifacts import StageFolder, write_json, write_table
from pgenrm_train.backends.base import Teacher
from pgenrm_train.chains import Chain, ParseFailure, parse_chain
from pgenrm_train.concurrency import concurrently
from pgenrm_train.config import ANSWER_KEYS, Config, masking_of
from pgenrm_train.errors import DataError
from pgenrm_train.masking import FullView, MaskedView, apply_masking, drop_history, present
from pgenrm_train.records import Example, PreferencePair
from pgenrm_train.stages.inputs import asked, histories

READS = (
    "data",
    "seed",
    *(f"teacher.{key}" for key in ANSWER_KEYS),
    "sec",
    "masking",
    "psi.masking",
    "psi.nano_start",
    "model.kind",
    "model.name",
    "model.path",
    "model.nano",
    "model.instructions",
    "model.max_prompt_tokens",
    "model.max_text_tokens",
)
SEC = "sec.parquet"
LABEL_WORDS = ("chosen response", "rejected response", "ground truth", "the label")  # a teacher that talks of labels leaks them


@dataclass(frozen=True, slots=True)
class Kept:
    """A chain that passed, with the example it was written for."""

    example: Example
    order: int
    chain: Chain
    text: str
    attempt: int


def run(
    config: Config,
    folder: StageFolder,
    pairs: Sequence[PreferencePair],
    teacher: Teacher,
    writer_for: Callable[[Sequence[Kept]], Callable[[MaskedView | FullView], list[dict[str, str]]]],
    progress: Callable[[Iterable[Any], str, int], Iterable[Any]],
) -> dict[str, Any]:
    """Write chains, filter, render prompts; returns the yield.  Raises DataError when nothing was kept."""
    kept, rejected = sample_chains(config, pairs, teacher, progress)
    if not kept:
        raise DataError(f"no chain passed rejection sampling; reasons: {dict(Counter(r['reason'] for r in rejected))}")
    writer = writer_for(kept)
    rows = [_row(config, item, writer) for item in progress(kept, "prompts", len(kept))]
    write_table(folder.path / "rejected.parquet", rejected or [{"pair_id": None, "reason": None, "text": None}])
    write_table(folder.path / SEC, rows)
    facts = _facts(kept, rejected) | {"trimmed": dict(getattr(writer, "trimmed", {})), "teacher": dict(teacher.facts())}
    write_json(folder.path / "yield.json", facts)
    return facts


def sample_chains(
    config: Config,
    pairs: Sequence[PreferencePair],
    teacher: Teacher,
    progress: Callable[[Iterable[Any], str, int], Iterable[Any]],
) -> tuple[list[Kept], list[dict[str, Any]]]:
    """Ask for up to `sec.samples_per_pair` chains a pair and order until one passes; every rejected chain is recorded.

    Questions are asked side by side in one queue, `teacher.in_flight` at a time.  The result is in the order of the questions,
    whatever the order of the answers; of equal texts for one user the first is kept.
    """
    questions = _questions(config, pairs)
    history = histories(config, pairs)

    def ask(question: tuple[PreferencePair, int]) -> tuple[Kept | None, list[dict[str, Any]]]:
        pair, order = question
        return _ask(_shown(config, present(pair, history(pair), order), order), order, teacher, config.sec.samples_per_pair)

    answers = concurrently(ask, questions, teacher.in_flight)
    in_order = sorted(progress(answers, "teacher chains", len(questions)), key=lambda numbered: numbered[0])
    kept: list[Kept] = []
    rejected: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for _, (item, refused) in in_order:
        rejected += refused
        if item is None:
            continue
        if (item.example.user_id, item.text) in seen:
            rejected.append(_rejected(item.example, item.order, item.attempt, "duplicate", item.text))
            continue
        seen.add((item.example.user_id, item.text))
        kept.append(item)
    return kept, rejected


def _shown(config: Config, example: Example, order: int) -> Example:
    """What the teacher reads: no more history than the prompt will show, or its chain would speak of votes that are not there."""
    if masking_of(config, "psi") != "history_dropout":
        return example
    rng = random.Random(f"{config.seed}/history/{example.pair_id}/{order}")
    return replace(example, history=drop_history(example.history, rng, config.masking.show_probability))


def _ask(example: Example, order: int, teacher: Teacher, samples: int) -> tuple[Kept | None, list[dict[str, Any]]]:
    """One question until a chain passes.  A second chance is told what was wrong with the *form* only: to be told that the
    ranking was wrong would be to be told the label."""
    rejected: list[dict[str, Any]] = []
    complaint = None
    for attempt in range(samples):
        answer = teacher.write(example, attempt, complaint)
        if answer.text is None:
            rejected.append(_rejected(example, order, attempt, f"teacher:{answer.failure}", None))
            continue
        chain = parse_chain(answer.text, len(example.responses))
        reason = reason_to_reject(chain, example, answer.text)
        if reason is None:
            return Kept(example, order, chain, answer.text, attempt), rejected  # type: ignore[arg-type]
        rejected.append(_rejected(example, order, attempt, reason, answer.text))
        complaint = reason if reason.startswith(("parse:", "issue:")) else None
    return None, rejected


def _rejected(example: Example, order: int, attempt: int, reason: str, text: str | None) -> dict[str, Any]:
    return {"pair_id": example.pair_id, "order": order, "attempt": attempt, "reason": reason, "text": text}


def reason_to_reject(chain: Chain | ParseFailure, example: Example, text: str) -> str | None:
    """Why a chain must not be learnt from, or None."""
    if isinstance(chain, ParseFailure):
        return f"parse:{chain.kind}"
    chosen = chain.scores[example.chosen_index]
    others = [s for i, s in enumerate(chain.scores) if i != example.chosen_index]
    if chosen <= max(others):
        return "tie" if chosen == max(others) else "wrong_ranking"
    if chain.issues:
        return f"issue:{chain.issues[0]}"
    if any(words in text.lower() for words in LABEL_WORDS):
        return "label_leak"
    return None


def _questions(config: Config, pairs: Sequence[PreferencePair]) -> list[tuple[PreferencePair, int]]:
    """Shuffled (pair, order); with one order a pair, orders alternate so that both are equally frequent."""
    train = asked(pairs, "train")
    random.Random(config.seed).shuffle(train)
    if config.sec.orders_per_pair == 1:
        questions = [(pair, n % 2) for n, pair in enumerate(train)]
    else:
        questions = [(pair, order) for pair in train for order in (0, 1)]
    return questions[: config.sec.max_chains]


def _row(config: Config, item: Kept, writer: Callable[[MaskedView | FullView], list[dict[str, str]]]) -> dict[str, Any]:
    rng = random.Random(f"{config.seed}/mask/{item.example.pair_id}/{item.order}")
    policy = masking_of(config, "psi").replace("history_dropout", "masked")  # what was dropped, the teacher did not see either
    view, _ = apply_masking(item.example, policy, rng, show_probability=config.masking.show_probability)
    return {
        "pair_id": item.example.pair_id,
        "user_id": item.example.user_id,
        "order": item.order,
        "kind": item.example.kind,
        "attempt": item.attempt,
        "analysis": item.chain.analysis,
        "messages": [*writer(view), {"role": "assistant", "content": item.text}],
    }


def _facts(kept: Sequence[Kept], rejected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reasons = Counter(r["reason"] for r in rejected)
    return {
        "chains": len(kept),
        "users": len({item.example.user_id for item in kept}),
        "asked": len(kept) + len(rejected),
        "rejected": dict(reasons.most_common()),
        "yield": round(len(kept) / (len(kept) + len(rejected)), 4),
        "chosen_first": round(sum(item.order == 0 for item in kept) / len(kept), 4),
        "kinds": dict(Counter(item.example.kind or "(none)" for item in kept)),
    }
