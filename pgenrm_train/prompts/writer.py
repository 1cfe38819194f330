"""The input that all stages share: built pairs, histories, and prompts within the model's token budget."""

import functools
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgenrm_train.config import Config, ModelConfig, StageName
from pgenrm_train.errors import ArtifactError, DataError
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import FullView, MaskedView, apply_masking
from pgenrm_train.prompts.messages import folded, prompt_ids, shorten, takes_system
from pgenrm_train.prompts.styles import styled_messages
from pgenrm_train.records.pairs import Example, HistoryItem, Message, PreferencePair
from pgenrm_train.records.rows import read_pairs

PAIRS = "pairs.parquet"
Messages = list[dict[str, str]]
Write = Callable[[MaskedView | FullView], Messages]


def load_pairs(run_dir: Path) -> list[PreferencePair]:
    """Read the pairs of this run's `build_data`."""
    path = run_dir / StageName.BUILD_DATA / PAIRS
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; run recipe=build_data with the same run_dir first")
    return list(read_pairs(path))


def histories(config: Config, pairs: Iterable[PreferencePair]) -> HistorySampler:
    """A sampler of histories with the settings of `data`."""
    data = config.data
    return HistorySampler(
        pairs, size=data.history_size, policy=data.history_policy, kind=data.history_kind, seed=config.seed
    )


def pairs_of_split(
    pairs: Iterable[PreferencePair], split: str, limit: int | None = None
) -> list[PreferencePair]:
    """Select the pairs of a split, about `limit` of them.

    `train` means the train part of training users; that of held-out users is history only.  A limit keeps all
    votes on the same conversation together and draws conversations by the hash of their ids.
    """
    selected = [p for p in pairs if (p.trains if split == "train" else p.split == split)]
    if limit is None or len(selected) <= limit:
        return selected
    sizes = Counter(p.conversation_id or p.pair_id for p in selected)
    kept, total = set(), 0
    for conversation in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= limit:
            break
        kept.add(conversation)
        total += sizes[conversation]
    return [p for p in selected if (p.conversation_id or p.pair_id) in kept]


def view_of(config: Config, example: Example) -> MaskedView | FullView:
    """The example with stated criteria shown: users who state them want them used."""
    policy = config.masking.policy or ("full" if example.explicit.criteria else "masked")
    rng = random.Random(config.seed)
    return apply_masking(example, policy, rng, show_probability=config.masking.show_probability)[0]


class PromptWriter:
    """View → chat messages within `model.max_prompt_tokens`.

    Over-long prompts are trimmed in this order:
    1. Each query and response is cut to `model.max_text_tokens`.
    2. The oldest history items are dropped.
    3. Queries and responses are cut to the greatest common length that fits.

    Where the chat template has no system role, the instructions come first in the user's message.

    A cut text ends in ` …(+N words)`, so that a reader can judge its length.  `trimmed` counts prompts, cut
    texts, dropped history items, prompts cut to fit, and prompts whose responses differ only in the parts cut
    off.
    """

    def __init__(self, config: ModelConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.reserved = tuple(tokenizer.all_special_tokens)
        self._takes_system = takes_system(tokenizer)
        self.trimmed: Counter[str] = Counter()
        # A vote appears in its own prompt and in the histories of others.
        self._cut = functools.lru_cache(2**16)(self._cut_text)

    def __call__(self, view: MaskedView | FullView) -> Messages:
        """Write a prompt.  Raises DataError if even texts of one token would not fit."""
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

    def log_trimmed(self, name: str) -> None:
        """Print one sentence on the trimmed prompts of `name`, if there are any."""
        counts = (+self.trimmed).items()
        listed = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts if kind != "prompts")
        if listed:
            print(
                f"[{name}] over-long, of {self.trimmed['prompts']} prompts "
                f"(oldest history first, then the longest texts): {listed}",
                flush=True,
            )

    def ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a prompt, ready for the model to continue."""
        return prompt_ids(self.tokenizer, messages)

    def can_be_written(self, response: str) -> bool:
        """Whether the model, with its end token, may write a text as long as `response`."""
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return len(ids) < self.config.max_response_tokens

    def _messages(self, view: MaskedView | FullView) -> Messages:
        messages = styled_messages(
            self.config.prompt,
            view,
            instructions=self.config.instructions,
            totals=self.config.counted,
            reserved=self.reserved,
        )
        if self._takes_system or messages[0]["role"] != "system":
            return messages
        _note_folding(self.tokenizer.name_or_path)
        return folded(messages)

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
        """Cut all texts to the greatest common number of tokens that fits, found by bisection."""
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
                f"a prompt cannot be cut to model.max_prompt_tokens={self.config.max_prompt_tokens}; raise it"
            )
        return best

    def _cut_text(self, text: str, limit: int) -> str:
        if len(text) * 4 <= limit:  # a character has at most 4 bytes of UTF-8, a token at least one
            return text
        head = text[: limit * 16]
        encoded = self.tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        # A character may have several tokens; it is kept with all of them or not at all.
        end = len(head) if len(offsets) <= limit else min(offsets[limit - 1][1], offsets[limit][0])
        return shorten(text, end)


@functools.cache
def _note_folding(model: str) -> None:
    """Log once per model that its prompts have no system message."""
    print(
        f"the chat template of {model} has no system role; the instructions are in the user's message",
        flush=True,
    )


def _texts(view: MaskedView) -> list[str]:
    return [
        *(m.content for m in view.context),
        *(text for i in view.history for text in (i.query, i.chosen, i.rejected)),
        *view.responses,
    ]
