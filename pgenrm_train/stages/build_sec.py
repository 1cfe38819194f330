"""build_sec: teacher chains filtered by rejection sampling (METHOD §3) → the SFT set of PSI.

Needs pairs and a teacher.  Makes `sec.parquet` (chat rows), `rejected.parquet` (each rejected chain with its
reason) and `yield.json`.  `rejection` defines what a chain must be.  Two more rules apply here.  No two kept
chains may repeat each other: `duplicate` is a text of the same user, `near_duplicate` almost an analysis of
the same user.  `boilerplate` is almost an analysis of another user, so it describes neither.  And the model
must be able to write the chain (`over_length`).  With `model.totals=code` a chain is kept without its totals,
or rejected if its rubric cannot be read back (`unverified`).  The teacher never sees the label; half of the
chains present the chosen response first.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from typing import TypedDict

from pgenrm_train.backends.protocols import Estimate, Teacher, estimate_sample, server_words
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
from pgenrm_train.chains.totals import UNVERIFIED, open_chain
from pgenrm_train.config import Config, SecConfig, StageName, Totals, masking_of
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_json, write_table
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import apply_masking, drop_history, present
from pgenrm_train.prompts.writer import PromptWriter, histories, pairs_of_split
from pgenrm_train.records.pairs import Example, PreferencePair
from pgenrm_train.run.concurrency import concurrently, progress
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.timeline import Part, mark

SEC = "sec.parquet"


@dataclass(frozen=True, slots=True)
class Kept:
    """A chain that passed, with the example it was written for."""

    example: Example
    order: int
    chain: Chain
    text: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A chain that did not pass, or a call without an answer: one row of `rejected.parquet`."""

    pair_id: str
    order: int
    attempt: int
    reason: str
    text: str | None


# Content of `yield.json`; `asked` counts the chains requested.
Yield = TypedDict(
    "Yield",
    {
        "chains": int,
        "users": int,
        "asked": int,
        "rejected": dict[str, int],
        "yield": float,
        "chosen_first": float,
        "kinds": dict[str, int],
        "trimmed": dict[str, int],
        "teacher": dict[str, object],
    },
)


def run(
    config: Config,
    folder: StageFolder,
    pairs: Sequence[PreferencePair],
    teacher: Teacher,
    writer_for: Callable[[Sequence[Kept]], PromptWriter],
) -> Yield:
    """Write chains, filter, render prompts; return the yield.  Raises DataError if no chain was kept."""
    if expected := _expected(config, pairs, teacher):
        folder.note(estimate=expected.for_manifest())
    kept, rejected = without_repetitions(
        config.sec, *sample_chains(config, pairs, teacher), by_rule=teacher.by_rule
    )
    if config.model.counted is Totals.CODE:
        rejected += [_rejected(item, UNVERIFIED) for item in kept if _opened(item) is None]
        kept = [opened for item in kept if (opened := _opened(item)) is not None]
    if kept:
        writer = writer_for(kept)
        fits = [writer.can_be_written(item.text) for item in kept]
        rejected += [_rejected(item, OVER_LENGTH) for item, fit in zip(kept, fits, strict=True) if not fit]
        kept = list(compress(kept, fits))
    reasons = Counter(row.reason for row in rejected)
    if not kept:
        words = server_words(teacher.spending())
        raise DataError(f"no chain passed rejection sampling; reasons: {dict(reasons)}{words}")
    rows = [_row(config, item, writer) for item in progress(kept, "prompts", len(kept))]
    empty = {"pair_id": None, "reason": None, "text": None}
    write_table(folder.path / "rejected.parquet", [asdict(row) for row in rejected] or [empty])
    write_table(folder.path / SEC, rows)
    facts = Yield(
        {
            "chains": len(kept),
            "users": len({item.example.user_id for item in kept}),
            "asked": len(kept) + len(rejected),
            "rejected": dict(reasons.most_common()),
            "yield": round(len(kept) / (len(kept) + len(rejected)), 4),
            "chosen_first": round(sum(item.order == 0 for item in kept) / len(kept), 4),
            "kinds": dict(Counter(item.example.kind or "(none)" for item in kept)),
            "trimmed": dict(writer.trimmed),
            "teacher": spending.for_manifest() if (spending := teacher.spending()) else {},
        }
    )
    write_json(folder.path / "yield.json", facts)
    print(yield_table(facts), flush=True)
    writer.log_trimmed("build_sec prompts")
    return facts


def yield_table(facts: Yield) -> str:
    """Table of the chains kept, and rejected by reason: count and share."""
    counts = {"kept": facts["chains"], **facts["rejected"]}
    return "\n".join(
        f"{count:>9,}  {count / facts['asked']:>6.1%}  {reason}" for reason, count in counts.items()
    )


def _expected(config: Config, pairs: Sequence[PreferencePair], teacher: Teacher) -> Estimate | None:
    all_questions, history = questions(config, pairs), histories(config, pairs)
    examples = [shown(config, *question, history) for question in estimate_sample(all_questions)]
    return teacher.expect(examples, len(all_questions), config.sec.samples_per_pair)


def sample_chains(
    config: Config, pairs: Sequence[PreferencePair], teacher: Teacher
) -> tuple[list[Kept], list[Rejected]]:
    """Sample chains per pair and order until one passes, at most `sec.samples_per_pair`.

    Every rejected chain is recorded.  `teacher.in_flight` questions are open at a time.  The result is in the
    order of the questions, whatever the order of the answers.
    """
    all_questions, history = questions(config, pairs), histories(config, pairs)

    def sample(question: tuple[PreferencePair, int]) -> tuple[Kept | None, list[Rejected]]:
        return _sample(config.sec, shown(config, *question, history), question[1], teacher)

    mark(Part.GENERATION)
    answers = concurrently(sample, all_questions, teacher.in_flight)
    in_order = sorted(
        progress(answers, "teacher chains", len(all_questions)), key=lambda numbered: numbered[0]
    )
    mark(Part.DATA)
    kept = [item for _, (item, _) in in_order if item is not None]
    return kept, [row for _, (_, rejected) in in_order for row in rejected]


def shown(config: Config, pair: PreferencePair, order: int, history: HistorySampler) -> Example:
    """The example that the teacher reads.

    It has no more history than the prompt shows, or the chain would cite votes that are not there.
    """
    example = present(pair, history(pair), order)
    if masking_of(config, StageName.PSI) != "history_dropout":
        return example
    rng = random.Random(f"{config.seed}/history/{example.pair_id}/{order}")
    return replace(example, history=drop_history(example.history, rng, config.masking.show_probability))


def _sample(
    settings: SecConfig, example: Example, order: int, teacher: Teacher
) -> tuple[Kept | None, list[Rejected]]:
    """Sample one question until a chain passes.

    With `sec.second_chance` the teacher reads what was wrong with the form of its last answer.
    """
    rejected: list[Rejected] = []
    correction = None
    for attempt in range(settings.samples_per_pair):
        answer = teacher.write(example, attempt, correction)
        if answer.text is None:
            rejected.append(Rejected(example.pair_id, order, attempt, f"teacher:{answer.failure}", None))
            continue
        chain = parse_chain(answer.text, len(example.responses))
        reason = reason_to_reject(chain, example.chosen_index, answer.text)
        if reason is None:
            return Kept(example, order, chain, answer.text, attempt), rejected  # type: ignore[arg-type]
        rejected.append(Rejected(example.pair_id, order, attempt, reason, answer.text))
        problem = form_problem(chain, answer.text)
        correction = complaint(problem, chain) if problem and settings.second_chance else None
    return None, rejected


def without_repetitions(
    settings: SecConfig, kept: Sequence[Kept], rejected: list[Rejected], *, by_rule: bool
) -> tuple[list[Kept], list[Rejected]]:
    """Keep the first of chains that repeat each other.

    A rule writes by template: only its exact repetitions count.  The two orders of one pair may share their
    analysis: they teach that the scores follow the responses.
    """
    texts: set[tuple[str, str]] = set()
    near = None if by_rule else NearDuplicates(settings.near_duplicate)
    unique: list[Kept] = []
    for item in kept:
        reason = DUPLICATE if (item.example.user_id, item.text) in texts else None
        if near and not reason:
            analysis = signature(item.chain.analysis)
            reason = _repeats(item, [unique[i] for i in near.find(analysis)])
        if reason:
            rejected.append(_rejected(item, reason))
            continue
        if near:
            near.add(analysis)
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


def _opened(item: Kept) -> Kept | None:
    """The chain as a model of totals=code writes it; None if its rubric cannot be written so."""
    text = open_chain(item.text, len(item.example.responses))
    return None if text is None else replace(item, text=text)


def _rejected(item: Kept, reason: str) -> Rejected:
    return Rejected(item.example.pair_id, item.order, item.attempt, reason, item.text)


def questions(config: Config, pairs: Sequence[PreferencePair]) -> list[tuple[PreferencePair, int]]:
    """Shuffled (pair, order); with one order per pair, orders alternate so that both are equally frequent."""
    train = pairs_of_split(pairs, "train")
    random.Random(config.seed).shuffle(train)
    one = config.sec.orders_per_pair == 1
    in_order = [(pair, order) for n, pair in enumerate(train) for order in ((n % 2,) if one else (0, 1))]
    return in_order[: config.sec.max_chains]


def _row(config: Config, item: Kept, writer: PromptWriter) -> dict[str, object]:
    rng = random.Random(f"{config.seed}/mask/{item.example.pair_id}/{item.order}")
    # History that was dropped is not in the teacher's prompt either.
    policy = masking_of(config, StageName.PSI).replace("history_dropout", "masked")
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
