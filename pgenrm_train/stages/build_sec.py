"""build_sec: teacher chains filtered by rejection sampling (METHOD §3) → the SFT set of PSI.

Needs pairs and a teacher.  Makes `sec.parquet` (chat rows), `rejected.parquet` (each rejected chain with its reason) and
`yield.json`.  What a chain must be is said in `rejection`; beyond that no two kept chains may say the same (`duplicate`: a text of
this user; `near_duplicate`: almost an analysis of this user; `boilerplate`: almost an analysis of another user, so it is about
nobody), and the model must be able to write it (`over_length`).  The teacher never sees the label; half of the chains present the
chosen response first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Protocol

from pgenrm_train.backends.protocols import Teacher
from pgenrm_train.chains.chain import Chain, parse_chain
from pgenrm_train.chains.near_duplicates import NearDuplicates, signature
from pgenrm_train.chains.rejection import (
    BOILERPLATE,
    DUPLICATE,
    NEAR_DUPLICATE,
    OVER_LENGTH,
    complaint,
    form_problem,
    reason_to_reject,
)
from pgenrm_train.config import Config, masking_of
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_json, write_table
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import FullView, MaskedView, apply_masking, drop_history, present
from pgenrm_train.prompts.writer import asked, histories
from pgenrm_train.records.pairs import Example, PreferencePair
from pgenrm_train.run.concurrency import concurrently
from pgenrm_train.run.folder import StageFolder

SEC = "sec.parquet"
MEASURED = 200  # questions whose prompts tell what all will cost


@dataclass(frozen=True, slots=True)
class Kept:
    """A chain that passed, with the example it was written for."""

    example: Example
    order: int
    chain: Chain
    text: str
    attempt: int


class ChatWriter(Protocol):
    """View → chat messages that fit the model; `inputs.PromptWriter` is one."""

    trimmed: Counter[str]

    def __call__(self, view: MaskedView | FullView) -> list[dict[str, str]]: ...

    def can_be_written(self, response: str) -> bool: ...


Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
Rejected = dict[str, Any]


def run(
    config: Config,
    folder: StageFolder,
    pairs: Sequence[PreferencePair],
    teacher: Teacher,
    writer_for: Callable[[Sequence[Kept]], ChatWriter],
    progress: Progress,
) -> dict[str, Any]:
    """Write chains, filter, render prompts; returns the yield.  Raises DataError when nothing was kept."""
    if expected := _expected(config, pairs, teacher):
        folder.note(estimate=expected)
    kept, rejected = without_repetitions(
        config, *sample_chains(config, pairs, teacher, progress), by_rule=teacher.by_rule
    )
    if kept:
        writer = writer_for(kept)
        fits = [writer.can_be_written(item.text) for item in kept]
        rejected += [_rejected(item, OVER_LENGTH) for item, fit in zip(kept, fits, strict=True) if not fit]
        kept = list(compress(kept, fits))
    if not kept:
        raise DataError(
            f"no chain passed rejection sampling; reasons: {dict(Counter(r['reason'] for r in rejected))}"
        )
    rows = [_row(config, item, writer) for item in progress(kept, "prompts", len(kept))]
    write_table(
        folder.path / "rejected.parquet", rejected or [{"pair_id": None, "reason": None, "text": None}]
    )
    write_table(folder.path / SEC, rows)
    facts = _facts(kept, rejected) | {"trimmed": dict(writer.trimmed), "teacher": dict(teacher.facts())}
    write_json(folder.path / "yield.json", facts)
    return facts


def _expected(config: Config, pairs: Sequence[PreferencePair], teacher: Teacher) -> dict[str, Any]:
    """What the teacher will cost, from the prompts of some questions."""
    asking, history = questions(config, pairs), histories(config, pairs)
    some = [
        shown(config, pair, order, history)
        for pair, order in asking[:: max(1, len(asking) // MEASURED)][:MEASURED]
    ]
    return dict(teacher.expect(some, len(asking), config.sec.samples_per_pair))


def sample_chains(
    config: Config, pairs: Sequence[PreferencePair], teacher: Teacher, progress: Progress
) -> tuple[list[Kept], list[Rejected]]:
    """Ask for up to `sec.samples_per_pair` chains a pair and order until one passes; every rejected chain is recorded.

    Questions are asked side by side in one queue, `teacher.in_flight` at a time.  The result is in the order of the questions,
    whatever the order of the answers.
    """
    asking = questions(config, pairs)
    history = histories(config, pairs)

    def ask(question: tuple[PreferencePair, int]) -> tuple[Kept | None, list[Rejected]]:
        return _ask(config, shown(config, *question, history), question[1], teacher)

    answers = concurrently(ask, asking, teacher.in_flight)
    in_order = sorted(progress(answers, "teacher chains", len(asking)), key=lambda numbered: numbered[0])
    kept = [item for _, (item, _) in in_order if item is not None]
    return kept, [row for _, (_, refused) in in_order for row in refused]


def shown(config: Config, pair: PreferencePair, order: int, history: HistorySampler) -> Example:
    """What the teacher reads: no more history than the prompt will show, or its chain would speak of votes that are not there."""
    example = present(pair, history(pair), order)
    if masking_of(config, "psi") != "history_dropout":
        return example
    rng = random.Random(f"{config.seed}/history/{example.pair_id}/{order}")
    return replace(example, history=drop_history(example.history, rng, config.masking.show_probability))


def _ask(
    config: Config, example: Example, order: int, teacher: Teacher
) -> tuple[Kept | None, list[Rejected]]:
    """One question until a chain passes.  With `sec.second_chance` the teacher is told what was wrong with its last answer."""
    rejected: list[Rejected] = []
    told = None
    for attempt in range(config.sec.samples_per_pair):
        answer = teacher.write(example, attempt, told)
        if answer.text is None:
            rejected.append(_refused(example, order, attempt, f"teacher:{answer.failure}", None))
            continue
        chain = parse_chain(answer.text, len(example.responses))
        reason = reason_to_reject(chain, example.chosen_index, answer.text)
        if reason is None:
            return Kept(example, order, chain, answer.text, attempt), rejected  # type: ignore[arg-type]
        rejected.append(_refused(example, order, attempt, reason, answer.text))
        problem = form_problem(chain, answer.text)
        told = complaint(problem, chain) if problem and config.sec.second_chance else None
    return None, rejected


def without_repetitions(
    config: Config, kept: Sequence[Kept], rejected: list[Rejected], *, by_rule: bool
) -> tuple[list[Kept], list[Rejected]]:
    """Of chains that say the same, the first stays.

    A rule writes by template: only its exact repetitions count.  The two orders of one pair may share their analysis: what they
    teach is that the scores follow the responses.
    """
    texts: set[tuple[str, str]] = set()
    near = None if by_rule else NearDuplicates(config.sec.near_duplicate)
    unique: list[Kept] = []
    for item in kept:
        reason = DUPLICATE if (item.example.user_id, item.text) in texts else None
        if near and not reason:
            said = signature(item.chain.analysis)
            reason = _repeats(item, [unique[i] for i in near.find(said)])
        if reason:
            rejected.append(_rejected(item, reason))
            continue
        if near:
            near.add(said)
        texts.add((item.example.user_id, item.text))
        unique.append(item)
    return unique, rejected


def _repeats(item: Kept, similar: Sequence[Kept]) -> str | None:
    others = [
        other.example
        for other in similar
        if other.example.pair_id != item.example.pair_id or other.order == item.order
    ]
    if any(other.user_id == item.example.user_id for other in others):
        return NEAR_DUPLICATE
    return BOILERPLATE if others else None


def _rejected(item: Kept, reason: str) -> Rejected:
    return _refused(item.example, item.order, item.attempt, reason, item.text)


def _refused(example: Example, order: int, attempt: int, reason: str, text: str | None) -> Rejected:
    return {"pair_id": example.pair_id, "order": order, "attempt": attempt, "reason": reason, "text": text}


def questions(config: Config, pairs: Sequence[PreferencePair]) -> list[tuple[PreferencePair, int]]:
    """Shuffled (pair, order); with one order a pair, orders alternate so that both are equally frequent."""
    train = asked(pairs, "train")
    random.Random(config.seed).shuffle(train)
    if config.sec.orders_per_pair == 1:
        asking = [(pair, n % 2) for n, pair in enumerate(train)]
    else:
        asking = [(pair, order) for pair in train for order in (0, 1)]
    return asking[: config.sec.max_chains]


def _row(config: Config, item: Kept, writer: ChatWriter) -> dict[str, Any]:
    rng = random.Random(f"{config.seed}/mask/{item.example.pair_id}/{item.order}")
    policy = masking_of(config, "psi").replace(
        "history_dropout", "masked"
    )  # what was dropped, the teacher did not see either
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


def _facts(kept: Sequence[Kept], rejected: Sequence[Rejected]) -> dict[str, Any]:
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
