"""What every stage reads in the same way: the built pairs, the histories, and prompts that fit the model's token budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgenrm_train.config import Config
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.history import HistorySampler
from pgenrm_train.masking import FullView, MaskedView
from pgenrm_train.prompts import chat_messages
from pgenrm_train.records import HistoryItem, Message, PreferencePair, read_pairs

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
    return HistorySampler(pairs, size=data.history_size, policy=data.history_policy, kind=data.history_kind, seed=config.seed)


def asked(pairs: Iterable[PreferencePair], split: str, limit: int | None = None) -> list[PreferencePair]:
    """Pairs of a split that a stage asks about.  `train` means training users' train part; the train part of held-out users
    is history only.  A limit keeps whole groups of votes on the same conversation, in the order of the file."""
    found = [p for p in pairs if (p.trains if split == "train" else p.split == split)]
    if limit is None or len(found) <= limit:
        return found
    sizes = Counter(p.conversation_id or p.pair_id for p in found)  # in the order of the file
    kept, total = set(), 0
    for conversation, size in sizes.items():
        if total >= limit:
            break
        kept.add(conversation)
        total += size
    return [p for p in found if (p.conversation_id or p.pair_id) in kept]


class PromptWriter:
    """View → chat messages within `model.max_prompt_tokens`.

    Policy for what is too long, in this order, each counted in `trimmed`: every query and response is cut to
    `model.max_text_tokens`; then the oldest history items go; then the longest response is cut.  A cut text ends in
    ` …(+N words)`, so that its length can still be seen.
    """

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config, self.tokenizer = config.model, tokenizer
        self.reserved = tuple(tokenizer.all_special_tokens)
        self.trimmed: Counter[str] = Counter()

    def __call__(self, view: MaskedView | FullView) -> Messages:
        """Raises DataError when even empty texts would not fit."""
        self.trimmed["prompts"] += 1
        view = self._cut_texts(view)
        while (excess := self._excess(view)) > 0:
            view = self._shorten(view, excess)
        return self._messages(view)

    def ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a prompt, ready to be continued by the model."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _messages(self, view: MaskedView | FullView) -> Messages:
        return chat_messages(view, instructions=self.config.instructions, reserved=self.reserved)

    def _excess(self, view: MaskedView | FullView) -> int:
        return len(self.ids(self._messages(view))) - self.config.max_prompt_tokens

    def _cut_texts(self, view: MaskedView | FullView) -> MaskedView | FullView:
        limit = self.config.max_text_tokens
        if limit is None:
            return view
        return replace(
            view,
            context=tuple(Message(m.role, self._cut(m.content, limit)) for m in view.context),
            history=tuple(
                HistoryItem(self._cut(i.query, limit), self._cut(i.chosen, limit), self._cut(i.rejected, limit))
                for i in view.history
            ),
            responses=tuple(self._cut(r, limit) for r in view.responses),
        )

    def _cut(self, text: str, limit: int) -> str:
        if len(text) <= limit:  # a token is at least one character
            return text
        head = text[: limit * 16]
        ids = self.tokenizer(head, add_special_tokens=False)["input_ids"]
        if len(ids) <= limit and len(head) == len(text):
            return text
        kept = self.tokenizer.decode(ids[:limit], skip_special_tokens=False).rstrip("�")
        self.trimmed["texts"] += 1
        return f"{kept} …(+{len(text[len(kept) :].split())} words)"

    def _shorten(self, view: MaskedView | FullView, excess: int) -> MaskedView | FullView:
        if view.history:
            self.trimmed["history_items"] += 1
            return replace(view, history=view.history[1:])
        longest = max(range(len(view.responses)), key=lambda i: len(view.responses[i]))
        text = view.responses[longest]
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        keep = tokens - excess - 8
        if keep < 1:
            raise DataError(f"a prompt cannot be brought under model.max_prompt_tokens={self.config.max_prompt_tokens}; raise it")
        self.trimmed["responses"] += 1
        cut = self._cut(text, keep)
        return replace(view, responses=tuple(cut if i == longest else r for i, r in enumerate(view.responses)))
