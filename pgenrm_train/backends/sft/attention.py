"""Attention of training: over packed rows without FlashAttention, and over sequences that processes share.

**Packed rows** use PyTorch's kernel, one sequence at a time.  With a block-diagonal mask the cost of a packed
row is the square of its length; here each sequence costs the square of its own.  `lengths` are known on the
host: borders read from a GPU would stop it in every layer.  Without lengths, as in generation, and in layers
with a sliding window, this is transformers' `sdpa` with its mask.

**Shared sequences** (Ulysses): each process of a group holds a part of one sequence, and during attention a
part of its heads.  DeepSpeed's exchange wraps the attention that the model uses anyway.  Training only: in
generation every process answers prompts of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pgenrm_train.backends.sft.batches import MicroBatch

PACKED = "sdpa_packed"


def register_packed() -> str:
    """Register attention over packed rows with transformers; return its `attn_implementation`."""
    AttentionInterface.register(PACKED, attend_packed)
    AttentionMaskInterface.register(PACKED, mask_packed)
    return PACKED


def attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, tokens, d), key and value (1, key heads, tokens, d) → (1, tokens, heads, d)."""
    if lengths is None or attention_mask is not None:
        out = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return out[0], None
    sequences = zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True)
    attended = [
        torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for q, k, v in sequences
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def mask_packed(
    *args: Any, attention_mask: torch.Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """Return None if borders or causality alone decide: without padding and without a window."""
    if attention_mask is None and local_size is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)


def share_heads(shape: Any, attention: str, processes: int) -> None:
    """Replace `attention` in transformers' registry: `processes` neighbouring ranks then share each sequence.

    `shape` is the model's configuration.  The process group must have been started.
    """
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as groups
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    groups.initialize_sequence_parallel(processes)
    alone, heads = ALL_ATTENTION_FUNCTIONS[attention], shape.num_attention_heads
    together = UlyssesSPAttentionHF(
        attn=alone,
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
        kv_head_count=getattr(shape, "num_key_value_heads", None) or heads,
        num_hidden_layers=shape.num_hidden_layers,
        process_group=groups.get_sequence_parallel_group(),
        seq_length_is_variable=True,
    )

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        if module.training:
            # nothing is padded on the left, so causality is enough
            return together(module, query, key, value, None, **kwargs)
        # the exchange sets this for its part of the heads
        module.num_key_value_groups = query.shape[1] // key.shape[1]
        return alone(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(attention, attend)


def part_of(batch: MicroBatch, part: int, parts: int, pad: int) -> MicroBatch:
    """Part `part` of `parts` of a micro-batch (`batches.collate`) of one sequence, padded to equal parts.

    The loss does not change: each trained token is predicted in one part, and Σ w_t is gathered over all
    processes.
    """
    names = ("input_ids", "predicts", "labels", "weights")
    ids, predicts, labels, weights = (torch.as_tensor(batch[name]) for name in names)
    width = -(-ids.shape[1] // parts)
    first = part * width
    padded = torch.nn.functional.pad(ids, (0, width * parts - ids.shape[1]), value=pad)
    inside = (first <= predicts) & (predicts < first + width)
    return {
        "input_ids": padded[:, first : first + width],
        "position_ids": torch.arange(first, first + width)[None],
        "predicts": predicts[inside] - first,
        "labels": labels[inside],
        "weights": weights[inside],
    }
