"""Totals of a chain: which ones count, and chains whose totals the program adds.

    declared   the totals that the chain declares, as in the paper
    verified   the totals recomputed from the chain's own rubric
    code       recomputed too: the model stops after its rubric, and the program adds them

Kinds other than `declared` are *our choice*.  Under them a chain without a readable rubric, or with weights
that sum to nothing, fails as `UNVERIFIED`.  An *open* chain ends after its last criterion score, inside the
JSON string `rationale`.  `open_chain` cuts a teacher's chain to it for training, and `close_chain` makes the
public format of it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from pgenrm_train.chains.chain import (
    DECODER,
    NO_MARKERS,
    OBJECT,
    OPEN,
    Chain,
    ParseFailure,
    escape,
    parse_chain,
    rationale_of,
)
from pgenrm_train.chains.reasoning import strip_reasoning
from pgenrm_train.chains.rubric import read_rubric, restate, verify
from pgenrm_train.chains.rubric_free_text import MENTION
from pgenrm_train.config import Totals
from pgenrm_train.prompts.messages import JSON_END, JSON_START

UNVERIFIED = "unverified"
STOP = '"better_response"'  # generation of an open chain ends before it
_TOTAL = re.compile(rf"(?<=[0-9])\s?=\s?[0-9]|\btotal(?:\sscore)?[\s:=*]{{1,4}}[0-9]|{STOP}", re.IGNORECASE)
_UNVERIFIED = ParseFailure(
    UNVERIFIED, "its rubric cannot be read, or its weights sum to nothing, and only recomputed totals count"
)
_UNREADABLE = re.compile(r"[,;%=\s]+")


class CountedChain(NamedTuple):
    """The text of a chain, and the chain whose `scores` are the totals that count."""

    text: str
    chain: Chain | ParseFailure


def read_chain(text: str, totals: Totals, n_responses: int = 2) -> CountedChain:
    """Read the text of a model whose checkpoint has this kind of totals.

    Never raises on a string.  A complete chain whose totals are not those of its rubric keeps the issue
    `declared_differs`, also where the recomputed ones count.
    """
    chain = parse_chain(text, n_responses)
    closed: Chain | ParseFailure | None = None
    if totals is Totals.DECLARED:
        return CountedChain(text, chain)
    if totals is Totals.CODE:
        started = JSON_START in strip_reasoning(text)
        text = close_chain(text, n_responses)
        closed = parse_chain(text, n_responses)
        # The last rubric counts: an earlier complete block is not the one that the text shows.
        if not _same_rubric(chain, closed):
            chain = closed
        if isinstance(chain, ParseFailure) and chain.kind == NO_MARKERS and started:
            return CountedChain(text, _UNVERIFIED)
    if isinstance(chain, ParseFailure):
        return CountedChain(text, chain)
    scores = chain.verified_scores
    # A block too damaged to close would show other totals than those that count.
    hidden = isinstance(closed, Chain) and closed.scores != scores
    return CountedChain(text, _UNVERIFIED if scores is None or hidden else replace(chain, scores=scores))


def _same_rubric(a: Chain | ParseFailure, b: Chain | ParseFailure) -> bool:
    return (
        isinstance(a, Chain)
        and isinstance(b, Chain)
        and (a.criteria, a.criterion_scores) == (b.criteria, b.criterion_scores)
    )


def failure_of(chain: ParseFailure) -> str:
    """The kind of a failure as predictions name it."""
    return chain.kind if chain.kind == UNVERIFIED else f"parse:{chain.kind}"


def close_chain(text: str, n_responses: int | None = None) -> str:
    """Add the totals of the last rubric in the public format; `parse_chain` then reads them as scores.

    Totals that the text declares are replaced.  A text without a readable rubric is returned as it is.
    `n_responses`: None for as many as the rubric scores.

    >>> text = '<JSON_START>{"rationale": "kind 100%. Response 1: kind 9. Response 2: kind 4.'
    >>> parse_chain(close_chain(text)).scores
    (9.0, 4.0)
    """
    answer = strip_reasoning(text)  # a rubric drafted in reasoning is none
    analysis, marker, block = answer.rpartition(JSON_START)
    data = _open_object(block) if marker else None
    if data is None:
        return text
    n = n_responses or _count_responses(data)
    rubric = criteria, rows = read_rubric(data, n)
    totals = verify(criteria, rows) if rows else None
    if totals is None:
        return text
    kept = {key: data[key] for key in ("rationale", "rubric") if key in data}
    if stated := restate(str(data.get("rationale")), totals):
        shown = {**kept, "rationale": stated}
        kept = shown if read_rubric(shown, n) == rubric else kept
    declared = {f"response_{i}": total for i, total in enumerate(totals, start=1)}
    closed = escape(json.dumps({**kept, "better_response": declared}, ensure_ascii=False))
    reasoning = text[: max(0, text.rfind(answer))]
    return f"{reasoning}{analysis}{JSON_START}{closed}{JSON_END}"


def open_chain(text: str, n_responses: int = 2) -> str | None:
    """The chain without any total, which ends after its rubric; None if that cannot be read back.

    A rubric in free text is written again in the grammar of `write_chain`, because only there it is certain
    which number is a total.
    """
    chain = parse_chain(text, n_responses)
    if isinstance(chain, ParseFailure) or chain.criterion_scores is None:
        return None
    block = _open_object(text.rpartition(JSON_START)[2]) or {}
    names = [_UNREADABLE.sub(" ", name).strip() for name, _ in chain.criteria]
    criteria = list(zip(names, (weight for _, weight in chain.criteria), strict=True))
    writers: Sequence[Callable[[], str | None]] = (
        lambda: restate(str(block.get("rationale")), [None] * n_responses),
        lambda: rationale_of(criteria, chain.criterion_scores or ()),
    )
    for write in writers:
        opened = f"{chain.analysis}\n{OPEN}{escape(json.dumps(write(), ensure_ascii=False)[1:-1])}"
        if first_total(opened) is not None:  # in a note
            continue
        again = parse_chain(close_chain(opened, n_responses), n_responses)
        if isinstance(again, Chain) and again.criterion_scores == chain.criterion_scores:
            return opened if again.scores == chain.verified_scores else None
    return None


def first_total(text: str) -> int | None:
    """Place of the first total that the last block of `text` states; None for an open chain."""
    start = text.rfind(JSON_START)
    total = _TOTAL.search(text, start) if start >= 0 else None
    return total and total.start()


def _open_object(block: str) -> Mapping[str, object] | None:
    """The JSON object at the start of a block, complete or cut after its rubric."""
    start = OBJECT.search(block)
    if start is None:
        return None
    cut = block[start.start() :].partition(STOP)[0].rstrip(" \t\r\n,")
    for candidate in (block[start.start() :], f'{cut}"}}', f"{cut}}}"):
        try:
            value, _ = DECODER.raw_decode(candidate)
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


def _count_responses(data: Mapping[str, object]) -> int:
    """Responses that the rubric scores: the longest series from 1 that it mentions."""
    rubric, rationale = data.get("rubric"), str(data.get("rationale"))
    table = rubric.get("scores") if isinstance(rubric, dict) else None
    mentioned = {int(m[1]) for m in MENTION.finditer(", ".join([rationale, *map(str, table or ())]))}
    return next(n for n in range(len(mentioned) + 1) if n + 1 not in mentioned)
