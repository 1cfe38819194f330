"""Chats → token ids → micro-batches: which tokens bear loss, and how sequences are laid out.

A step's sequences are the next `psi.batch_size` of the epoch's permutation.  Its loss is the weighted mean
over the step's trained tokens under every layout:

    padded     micro-batches in the permutation's order, each row padded to the longest
    grouped    the step's sequences first sorted by length: a micro-batch holds similar lengths
    packed     the step's sequences dealt to micro-batches of similar token counts, as one unpadded row

So the three give the same gradient, up to rounding: a layout changes the speed and never the result.  This is
*our choice*.  Grouping or packing across the epoch pads a little less, but makes the sequences of a step
similar.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pgenrm_train.config import PsiConfig
from pgenrm_train.errors import DataError
from pgenrm_train.files import write_table
from pgenrm_train.prompts.messages import JSON_START

if TYPE_CHECKING:
    import torch

MicroBatch: TypeAlias = "dict[str, torch.Tensor | int]"


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
    """Map-style dataset over the encoded chats of a parquet file.

    The ids are one flat array that processes can share.
    """

    def __init__(self, path: Path) -> None:
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
    """Layout by `psi.packing`, which is true by default on GPUs.

    On a CPU padding costs little if the lengths of a step are similar, as those of nano.  A sequence that
    processes share has a row of its own.
    """
    by_default = device == "cuda" and psi.sequence_parallel == 1
    packing = by_default if psi.packing is None else psi.packing
    return Layout.PACKED if packing else Layout.GROUPED


class StepOrder:
    """Sampler: the order in which an epoch's sequences are cut into micro-batches of `micro_batch_size`.

    The permutation depends on seed and epoch only, so a resumed run continues in the same order.  Processes
    take micro-batches in turn.  A sequence that `copies` neighbours share appears once for each.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        layout: Layout,
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


def arrange(lengths: Sequence[int], layout: Layout, size: int) -> list[int]:
    """Order of one step's sequences; its consecutive chunks of `size` are the micro-batches.

    Micro-batches that processes work on at the same time are neighbours, and of similar size unless padded.
    """
    if layout is Layout.PADDED or len(lengths) <= size:
        return list(range(len(lengths)))
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return longest_first if layout is Layout.GROUPED else _deal(lengths, longest_first, size)


def _deal(lengths: Sequence[int], longest_first: Sequence[int], size: int) -> list[int]:
    """Deal each sequence to the micro-batch with room and the fewest tokens; all but the last hold `size`."""
    bins: list[list[int]] = [[] for _ in range(-(-len(lengths) // size))]
    last_room = len(lengths) - size * (len(bins) - 1)
    fewest = [(0, number) for number in range(len(bins))]
    for index in longest_first:
        tokens, number = heapq.heappop(fewest)
        bins[number].append(index)
        if len(bins[number]) < (size if number < len(bins) - 1 else last_room):
            heapq.heappush(fewest, (tokens + lengths[index], number))
    return [index for one in bins for index in one]


def collate(batch: Sequence[Encoded], *, pad: int, packed: bool, score_weight: float = 1.0) -> MicroBatch:
    """Lay out one micro-batch of K trained tokens.

    `input_ids` (rows, width); `predicts` (K,): flat places whose hidden states predict the trained tokens;
    `labels` (K,): those tokens; `weights` (K,): 1 in the analysis and `score_weight` in the score part.  Rows
    are padded on the right, for which a causal model needs no mask.  A packed row also has `position_ids`
    that restart with each sequence, and the boundaries for FlashAttention and `attention.attend_packed`.  Any
    other attention makes a block-diagonal mask of the positions.
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
        }
    return laid_out
