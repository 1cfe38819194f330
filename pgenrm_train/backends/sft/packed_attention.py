"""Attention over packed rows where there is no FlashAttention: PyTorch's kernel, one sequence at a time.

A block-diagonal mask makes a packed row cost the square of its length; here each sequence costs the square of its own.  Borders are
given as FlashAttention takes them (`cu_seq_lens_q`).  Without them, as in generation, and in layers that see a window only, this is
transformers' `sdpa` with its mask.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "sdpa_packed"


def register() -> str:
    """Make `attn_implementation=NAME` known to transformers; returns NAME."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, tokens, d), key and value (1, key heads, tokens, d) → (1, tokens, heads, d)."""
    if cu_seq_lens_q is None or attention_mask is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )[0]
        return out, None
    lengths = cu_seq_lens_q.diff().tolist()
    sequences = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
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


def mask(
    *args: Any, attention_mask: torch.Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """None where the borders, or causality alone, say what is seen: nothing is padded, and no window is set."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and local_size is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)
