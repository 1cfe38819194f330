"""Chats → token ids → micro-batches: which tokens bear loss, which sequences lie together, and how they are laid out.

A step's sequences are the next `psi.batch_size` of the epoch's permutation, and its loss is the weighted mean over the step's
trained tokens, whatever the layout:

    padded     micro-batches in the permutation's order, each row padded to the longest
    grouped    the step's sequences sorted by length first, so that a micro-batch holds sequences of like length
    packed     the step's sequences dealt to micro-batches of like token counts, each laid out as one row without padding

So the three give the same gradient (up to rounding): a layout is a matter of speed and never of what is learnt.  This is *our
choice*; grouping or packing across the whole epoch pads a little less, but makes the sequences of a step alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgenrm_train.config import Config
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.messages import JSON_START

LAYOUTS = ("padded", "grouped", "packed")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one chat; the first that bears loss; the first of the score part (`len(ids)` when the answer has none)."""

    ids: Sequence[int] | np.ndarray
    loss_from: int
    score_from: int


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Encoded:
    """Ids of a chat whose last message is the assistant's; loss starts where the generation prompt ends.

    The same ids result from tokenising prompt and answer apart, which is what generation sees: the template's text before the
    answer must be a prefix of the whole, or DataError is raised.  The score part starts at the token that holds the first
    character of the last `<JSON_START>`.
    """
    render: Callable[..., str] = tokenizer.apply_chat_template
    prompt = render(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
    whole = render(list(messages), tokenize=False)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders a prompt that is not a prefix of prompt and answer; loss could not be placed"
        )
    answer = whole[len(prompt) :]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    start = answer.rfind(JSON_START)
    analysis = (
        sum(end <= start for _, end in encoded["offset_mapping"]) if start >= 0 else len(encoded["input_ids"])
    )
    return Encoded((*prompt_ids, *encoded["input_ids"]), len(prompt_ids), len(prompt_ids) + analysis)


class Chats:
    """A map-style dataset over the encoded chats of a parquet file: one flat array of ids, which processes can share."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(path, memory_map=True).combine_chunks()
        ids = table["ids"].chunk(0)
        self._ids, self._offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
        self._loss_from, self._score_from = table["loss_from"].to_numpy(), table["score_from"].to_numpy()
        self.lengths = (self._offsets[1:] - self._offsets[:-1]).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        ids = self._ids[self._offsets[index] : self._offsets[index + 1]]
        return Encoded(ids, int(self._loss_from[index]), int(self._score_from[index]))


def write_chats(path: Path, chats: Sequence[Encoded]) -> None:
    """The file that `Chats` reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pgenrm_train.files import atomic

    table = pa.table(
        {
            "ids": pa.array([chat.ids for chat in chats], pa.list_(pa.int32())),
            "loss_from": pa.array([chat.loss_from for chat in chats], pa.int32()),
            "score_from": pa.array([chat.score_from for chat in chats], pa.int32()),
        }
    )
    with atomic(path) as temporary:
        pq.write_table(table, temporary)


def layout_of(config: Config) -> str:
    """`psi.packing`, by default true on GPUs; on a CPU padding costs little where a step's lengths are alike, as nano's are.

    A sequence that processes share has a row of its own.
    """
    by_default = config.cluster.device == "cuda" and config.psi.sequence_parallel == 1
    packing = by_default if config.psi.packing is None else config.psi.packing
    return "packed" if packing else "grouped"


class StepOrder:
    """A sampler: the order in which an epoch's sequences are cut into micro-batches of `micro_batch_size`.

    The permutation depends on seed and epoch only, so that a resumed run goes on in the same order.  Micro-batches go to the
    processes in turn; a sequence that `copies` neighbours share comes once for each.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        layout: str,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        copies: int = 1,
    ) -> None:
        self.lengths, self.layout, self.seed, self.epoch = lengths, layout, seed, 0
        self.batch_size, self.micro_batch_size, self.copies = batch_size, micro_batch_size, copies

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def epoch_of(self, step: int) -> int:
        """The epoch that optimiser step `step` + 1 belongs to."""
        return step // -(-len(self.lengths) // self.batch_size)

    def __len__(self) -> int:
        return len(self.lengths) * self.copies

    def __iter__(self) -> Iterator[int]:
        import torch

        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        permutation = torch.randperm(len(self.lengths), generator=generator).tolist()
        for first in range(0, len(permutation), self.batch_size):
            step = permutation[first : first + self.batch_size]
            for index in arrange([self.lengths[i] for i in step], self.layout, self.micro_batch_size):
                yield from [step[index]] * self.copies


def arrange(lengths: Sequence[int], layout: str, size: int) -> list[int]:
    """The order of one step's sequences whose consecutive chunks of `size` are its micro-batches.

    Micro-batches that different processes work on at a time stand side by side, and are of like size under both layouts.
    """
    if layout == "padded" or len(lengths) <= size:
        return list(range(len(lengths)))
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return longest_first if layout == "grouped" else _deal(lengths, longest_first, size)


def _deal(lengths: Sequence[int], longest_first: Sequence[int], size: int) -> list[int]:
    """Each sequence goes to the micro-batch that has the fewest tokens and still room; all but the last hold `size`."""
    bins: list[list[int]] = [[] for _ in range(-(-len(lengths) // size))]
    last_room = len(lengths) - size * (len(bins) - 1)
    fewest = [(0, number) for number in range(len(bins))]
    for index in longest_first:
        tokens, number = heapq.heappop(fewest)
        bins[number].append(index)
        if len(bins[number]) < (size if number < len(bins) - 1 else last_room):
            heapq.heappush(fewest, (tokens + lengths[index], number))
    return [index for chosen in bins for index in chosen]


def collate(batch: Sequence[Encoded], *, pad: int, packed: bool, score_weight: float = 1.0) -> dict[str, Any]:
    """One micro-batch; K is the number of trained tokens.

    `input_ids` (rows, width); `predicts` (K,) the flat places whose hidden states predict the trained tokens, `labels` (K,) those
    tokens, `weights` (K,) 1 in the analysis and `score_weight` in the score part.  Rows are padded on the right, which a causal
    model needs no mask for.  A packed row has `position_ids` that start anew with each sequence, and the boundaries that FlashAttention and
    `packed_attention` take; another attention makes a block-diagonal mask of the positions.
    """
    import torch

    lengths = [len(chat.ids) for chat in batch]
    width = sum(lengths) if packed else max(lengths)
    starts = [sum(lengths[:n]) if packed else n * width for n in range(len(batch))]
    ids = torch.full((width if packed else width * len(batch),), pad)
    predicts, weights = [], []
    for chat, start, length in zip(batch, starts, lengths, strict=True):
        ids[start : start + length] = torch.tensor(chat.ids)
        predicts.append(torch.arange(start + chat.loss_from - 1, start + length - 1))
        weight = torch.ones(length - chat.loss_from)
        weight[chat.score_from - chat.loss_from :] = score_weight
        weights.append(weight)
    places = torch.cat(predicts)
    found = {
        "input_ids": ids.view(-1, width),
        "predicts": places,
        "labels": ids[places + 1],
        "weights": torch.cat(weights),
    }
    return found | (_boundaries(lengths) if packed else {})


def _boundaries(lengths: Sequence[int]) -> dict[str, Any]:
    import torch

    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return {
        "position_ids": positions,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
