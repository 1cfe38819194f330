"""Chats → token ids → micro-batches: which tokens bear loss, and how sequences are laid out.

A step's sequences are the next `psi.batch_size` of the epoch's permutation.  Its loss is the weighted mean
over the step's trained tokens under every layout:

    padded     micro-batches in the permutation's order, each row padded to the longest
    grouped    the step's sequences first sorted by length: a micro-batch holds similar lengths
    packed     the step's sequences dealt to unpadded rows of similar token counts, one per micro-batch; as
               few rows as `psi.micro_batch_tokens` allows

So the three give the same gradient, up to rounding: a layout changes the speed and never the result.  This is
*our choice*.  Grouping or packing across the epoch pads a little less, but makes the sequences of a step
similar.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pgenrm_train.config import ClusterConfig, PsiConfig
from pgenrm_train.config.setting import known
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_table
from pgenrm_train.prompts.messages import JSON_START

if TYPE_CHECKING:
    import torch

MicroBatch: TypeAlias = "dict[str, torch.Tensor | int | tuple[int, ...]]"


class Layout(StrEnum):
    PADDED = "padded"
    GROUPED = "grouped"
    PACKED = "packed"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one chat, with the index of the first that bears loss and of the first of the score part.

    `score_from` is `len(ids)` if the answer has no score part.
    """

    ids: Sequence[int] | np.ndarray
    loss_from: int
    score_from: int


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Encoded:
    """Encode a chat that ends with the assistant; loss starts where the generation prompt ends.

    Prompt and answer are tokenised apart, as in generation.  Raises DataError if the template's text before
    the answer is not a prefix of the text with the answer.  The score part starts at the token that holds the
    first character of the last `<JSON_START>`.
    """
    render: Callable[..., str] = tokenizer.apply_chat_template
    prompt = render(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
    text = render(list(messages), tokenize=False)
    if not text.startswith(prompt):
        raise DataError(
            "the chat template renders a prompt that is not a prefix of prompt and answer, so the place of "
            "the loss is unknown; use another tokenizer or mend chat_template.jinja"
        )
    answer = text[len(prompt) :]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    start = answer.rfind(JSON_START)
    ends = [end for _, end in encoded["offset_mapping"]]
    analysis = sum(end <= start for end in ends) if start >= 0 else len(ends)
    return Encoded((*prompt_ids, *encoded["input_ids"]), len(prompt_ids), len(prompt_ids) + analysis)


def pad_of(tokenizer: Any) -> int:
    """Id that pads rows: the tokenizer's, or its end token."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


class Chats:
    """Map-style dataset over the encoded chats of a parquet file; its items are micro-batches of `StepOrder`.

    The ids are one flat array that processes can share.
    """

    def __init__(self, path: Path) -> None:
        table = pq.read_table(path, memory_map=True).combine_chunks()
        ids = table["ids"].chunk(0)
        self._ids, self._offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
        self._loss_from, self._score_from = table["loss_from"].to_numpy(), table["score_from"].to_numpy()
        self.lengths = (self._offsets[1:] - self._offsets[:-1]).tolist()
        self.longest_answer = int((self._offsets[1:] - self._offsets[:-1] - self._loss_from).max())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, micro_batch: Sequence[int]) -> list[Encoded]:
        return [self._chat(index) for index in micro_batch]

    def _chat(self, index: int) -> Encoded:
        ids = self._ids[self._offsets[index] : self._offsets[index + 1]]
        return Encoded(ids, int(self._loss_from[index]), int(self._score_from[index]))


def write_chats(path: Path, chats: Sequence[Encoded]) -> None:
    """Write the file that `Chats` reads."""
    table = pa.table(
        {
            "ids": pa.array([chat.ids for chat in chats], pa.list_(pa.int32())),
            "loss_from": pa.array([chat.loss_from for chat in chats], pa.int32()),
            "score_from": pa.array([chat.score_from for chat in chats], pa.int32()),
        }
    )
    write_table(path, table)


def layout_of(psi: PsiConfig, device: str) -> Layout:
    """Packed rows by default on GPUs.

    On a CPU padding costs little if the lengths of a step are similar, as those of nano.
    """
    return Layout.PACKED if psi.packs(device) else Layout.GROUPED


@dataclass(frozen=True, slots=True)
class Batching:
    """How a step of `batch_size` sequences is cut.

    A micro-batch has `size` sequences or, packed, up to `size` tokens.  `copies` neighbouring processes of
    the `ranks` share each sequence.
    """

    layout: Layout
    batch_size: int
    size: int
    ranks: int = 1
    copies: int = 1

    @property
    def accumulation(self) -> int | None:
        """Micro-batches per process and step; None for packed rows, which depend on the lengths."""
        if self.layout is Layout.PACKED:
            return None
        return self.batch_size * self.copies // (self.size * self.ranks)


def batching_of(psi: PsiConfig, cluster: ClusterConfig) -> Batching:
    layout = layout_of(psi, cluster.device)
    size = psi.micro_batch_tokens if layout is Layout.PACKED else psi.micro_batch_size
    return Batching(layout, known(psi.batch_size), size, cluster.ranks, psi.sequence_parallel)


class StepOrder:
    """Sampler of an epoch's micro-batches, each a tuple of sequences; processes take them in turn.

    The permutation depends on seed and epoch only, so a resumed run continues in the same order.  Every step
    has `accumulation` micro-batches per process, as transformers' Trainer expects; packed, this is the number
    that the longest step of `epochs` needs.
    """

    def __init__(self, lengths: Sequence[int], batching: Batching, seed: int, epochs: float = 1.0) -> None:
        self.lengths, self.batching, self.seed, self.epoch = lengths, batching, seed, 0
        self.accumulation = batching.accumulation or self._longest_step(math.ceil(epochs))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def epoch_of(self, step: int) -> int:
        """The epoch that optimiser step `step` + 1 belongs to."""
        return step // -(-len(self.lengths) // self.batching.batch_size)

    def __len__(self) -> int:
        sequences, size = len(self.lengths), self.batching.batch_size
        steps = [size] * (sequences // size) + ([sequences % size] if sequences % size else [])
        return sum(self._micro_batches(step) for step in steps) * self.batching.copies

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        packed = self.batching.layout is Layout.PACKED
        for step in self._steps(self.epoch):
            number = self._micro_batches(len(step)) if packed else self.batching.size
            for micro_batch in cut([self.lengths[i] for i in step], self.batching.layout, number):
                yield from [tuple(step[i] for i in micro_batch)] * self.batching.copies

    def _longest_step(self, epochs: int) -> int:
        """The most rows that a process needs for a step."""
        size, ranks = self.batching.size, self.batching.ranks
        steps = (step for epoch in range(epochs) for step in self._steps(epoch))
        return max(rows_for([self.lengths[i] for i in step], size, ranks) for step in steps) // ranks

    def _steps(self, epoch: int) -> Iterator[list[int]]:
        import torch

        generator = torch.Generator().manual_seed(self.seed + epoch)
        permutation = torch.randperm(len(self.lengths), generator=generator).tolist()
        for first in range(0, len(permutation), self.batching.batch_size):
            yield permutation[first : first + self.batching.batch_size]

    def _micro_batches(self, sequences: int) -> int:
        """Micro-batches of a step, as many for every process; the last step of an epoch may be short."""
        ranks, packed = self.batching.ranks, self.batching.layout is Layout.PACKED
        if not packed:
            return -(-sequences // self.batching.size)
        return min(self.accumulation * ranks, max(sequences // ranks * ranks, min(sequences, ranks)))


def rows_for(lengths: Sequence[int], tokens: int, multiple: int) -> int:
    """The least number of rows of at most `tokens`, as `multiple` × n; a longer sequence has its own row."""
    tokens = max(tokens, *lengths)
    rows = multiple * -(-sum(lengths) // (tokens * multiple))
    while (
        rows < len(lengths)
        and max(sum(lengths[i] for i in row) for row in cut(lengths, Layout.PACKED, rows)) > tokens
    ):
        rows += multiple
    return rows


def cut(lengths: Sequence[int], layout: Layout, number: int) -> list[list[int]]:
    """Micro-batches of one step: chunks of `number` sequences or, packed, `number` rows.

    Micro-batches that processes work on at the same time are neighbours, and of similar size unless padded.
    """
    order = list(range(len(lengths)))
    if layout is not Layout.PADDED:
        order.sort(key=lambda i: -lengths[i])
    if layout is Layout.PACKED:
        return _deal(lengths, order, min(number, len(lengths)))
    return [order[first : first + number] for first in range(0, len(order), number)]


def _deal(lengths: Sequence[int], longest_first: Sequence[int], rows: int) -> list[list[int]]:
    """Deal each sequence to the row with the fewest tokens."""
    dealt: list[list[int]] = [[] for _ in range(rows)]
    fewest = [(0, number) for number in range(rows)]
    for index in longest_first:
        tokens, number = heapq.heappop(fewest)
        dealt[number].append(index)
        heapq.heappush(fewest, (tokens + lengths[index], number))
    return sorted(dealt, key=lambda row: -sum(lengths[i] for i in row))


def collate(batch: Sequence[Encoded], *, pad: int, packed: bool, score_weight: float = 1.0) -> MicroBatch:
    """Lay out one micro-batch of K trained tokens.

    `input_ids` (rows, width); `predicts` (K,): flat places whose hidden states predict the trained tokens;
    `labels` (K,): those tokens; `weights` (K,): 1 in the analysis and `score_weight` in the score part.  Rows
    are padded on the right, for which a causal model needs no mask.  A packed row also has `position_ids`
    that restart with each sequence, the boundaries for FlashAttention and the `lengths` for
    `attention.attend_packed`.  Any other attention makes a block-diagonal mask of the positions.
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
    laid_out: MicroBatch = {
        "input_ids": ids.view(-1, width),
        "predicts": places,
        "labels": ids[places + 1],
        "weights": torch.cat(weights),
    }
    if packed:
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        laid_out |= {
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "lengths": tuple(lengths),
        }
    return laid_out
