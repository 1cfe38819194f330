"""What every stage reads in the same way: the built pairs, the histories, and prompts that fit the model's token budget."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgenrm_train.config import Config
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import FullView, MaskedView
from pgenrm_train.prompts.messages import prompt_ids, shorten
from pgenrm_train.prompts.styles import styled_messages
from pgenrm_train.records.pairs import HistoryItem, Message, PreferencePair
from pgenrm_train.records.rows import read_pairs

PAIRS = "pairs.parquet"
Messages = list[dict[str, str]]


def load_pairs(run_dir: Path) -> list[PreferencePair]:
    """The pairs that `build_data` made in this run."""
    path = run_dir / "build_data" / PAIRS
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; run recipe=build_data with the same run_dir first")
    return list(read_pairs(path))


def histories(config: Config, pairs: Iterable[PreferencePair]) -> HistorySampler:
    data = config.data
    return HistorySampler(
        pairs, size=data.history_size, policy=data.history_policy, kind=data.history_kind, seed=config.seed
    )


def asked(pairs: Iterable[PreferencePair], split: str, limit: int | None = None) -> list[PreferencePair]:
    """Pairs of a split that a stage asks about.  `train` means training users' train part; the train part of held-out users
    is history only.  A limit keeps whole groups of votes on the same conversation, drawn by the hash of its id."""
    found = [p for p in pairs if (p.trains if split == "train" else p.split == split)]
    if limit is None or len(found) <= limit:
        return found
    sizes = Counter(p.conversation_id or p.pair_id for p in found)
    kept, total = set(), 0
    for conversation in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= limit:
            break
        kept.add(conversation)
        total += sizes[conversation]
    return [p for p in found if (p.conversation_id or p.pair_id) in kept]


class PromptWriter:
    """View → chat messages within `model.max_prompt_tokens`.

    Policy for what is too long, in this order: every query and response is cut to `model.max_text_tokens`; then the oldest history
    items go; then queries and responses are cut to the greatest common length that fits.  A cut text ends in ` …(+N words)`, so
    that its length can still be seen.  `trimmed` counts prompts, cut texts, dropped history items, prompts cut to fit, and prompts
    whose responses differ only in what was cut.
    """

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config, self.tokenizer = config.model, tokenizer
        self.reserved = tuple(tokenizer.all_special_tokens)
        self.trimmed: Counter[str] = Counter()
        self._cut = functools.lru_cache(2**16)(
            self._cut_anew
        )  # a vote is read in its own prompt and in the histories of others

    def __call__(self, view: MaskedView | FullView) -> Messages:
        """Raises DataError when even texts of one token would not fit."""
        fitted = self._cut_texts(view, self.config.max_text_tokens)
        fits = self._fits(fitted)
        while fitted.history and not fits:
            fitted = replace(fitted, history=fitted.history[1:])
            fits = self._fits(fitted)
            self.trimmed["history_items"] += 1
        view = replace(view, history=view.history[len(view.history) - len(fitted.history) :])
        if not fits:
            fitted = self._cut_to_fit(view)
            self.trimmed["prompts_cut_to_fit"] += 1
        self.trimmed["prompts"] += 1
        self.trimmed["texts"] += sum(a != b for a, b in zip(_texts(view), _texts(fitted), strict=True))
        self.trimmed["prompts_left_with_equal_responses"] += len(set(fitted.responses)) < len(
            set(view.responses)
        )
        return self._messages(fitted)

    def told(self, what: str) -> str:
        """One sentence on what was cut, empty when nothing was."""
        cut = {name.replace("_", " "): count for name, count in (+self.trimmed).items() if name != "prompts"}
        listed = ", ".join(f"{count} {name}" for name, count in cut.items())
        return (
            f"[{what}] over-long, of {self.trimmed['prompts']} prompts (oldest history first, then the longest texts): {listed}"
            if cut
            else ""
        )

    def ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a prompt, ready to be continued by the model."""
        return prompt_ids(self.tokenizer, messages)

    def can_be_written(self, response: str) -> bool:
        """Whether the model, with its end token, may write a text as long as `response`."""
        encoded = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return len(encoded) < self.config.max_response_tokens

    def _messages(self, view: MaskedView | FullView) -> Messages:
        return styled_messages(
            self.config.prompt, view, instructions=self.config.instructions, reserved=self.reserved
        )

    def _fits(self, view: MaskedView | FullView) -> bool:
        return len(self.ids(self._messages(view))) <= self.config.max_prompt_tokens

    def _cut_texts(self, view: MaskedView | FullView, limit: int | None) -> MaskedView | FullView:
        if limit is None:
            return view
        return replace(
            view,
            context=tuple(Message(m.role, self._cut(m.content, limit)) for m in view.context),
            history=tuple(
                HistoryItem(
                    self._cut(i.query, limit), self._cut(i.chosen, limit), self._cut(i.rejected, limit)
                )
                for i in view.history
            ),
            responses=tuple(self._cut(r, limit) for r in view.responses),
        )

    def _cut_to_fit(self, view: MaskedView | FullView) -> MaskedView | FullView:
        """All texts cut to the greatest common number of tokens with which the prompt fits, found by bisection."""
        low, high = 0, self.config.max_text_tokens or self.config.max_prompt_tokens
        best: MaskedView | FullView | None = None
        while low < high:
            middle = (low + high + 1) // 2
            cut = self._cut_texts(view, middle)
            if self._fits(cut):
                low, best = middle, cut
            else:
                high = middle - 1
        if best is None:
            raise DataError(
                f"a prompt cannot be brought under model.max_prompt_tokens={self.config.max_prompt_tokens}; raise it"
            )
        return best

    def _cut_anew(self, text: str, limit: int) -> str:
        if len(text) * 4 <= limit:  # UTF-8: a character has at most 4 bytes, and a token at least one
            return text
        head = text[: limit * 16]
        encoded = self.tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        # A character may be several tokens: only whole ones are kept.
        end = len(head) if len(offsets) <= limit else min(offsets[limit - 1][1], offsets[limit][0])
        return shorten(text, end)


def _texts(view: MaskedView) -> list[str]:
    return [
        *(m.content for m in view.context),
        *(text for i in view.history for text in (i.query, i.chosen, i.rejected)),
        *view.responses,
    ]
