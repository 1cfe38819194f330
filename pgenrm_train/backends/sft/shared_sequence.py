"""Ulysses sequence parallelism: the processes of a group hold a part each of one sequence, and in attention a part each of its heads.

DeepSpeed's exchange stands around the attention that the model uses anyway.  Training only: in generation every process answers
prompts of its own.
"""

from __future__ import annotations

from typing import Any

import torch


def share_attention(shape: Any, attention: str, processes: int) -> None:
    """Replace `attention` in transformers' registry, so that `processes` neighbouring ranks attend to one sequence together.

    `shape` is the model's configuration.  The process group must have been started.
    """
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as groups
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
            return together(
                module, query, key, value, None, **kwargs
            )  # nothing is padded on the left, causality is enough
        module.num_key_value_groups = (
            query.shape[1] // key.shape[1]
        )  # the exchange counts those of a part of the heads
        return alone(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(attention, attend)


def share_of(batch: dict[str, torch.Tensor], part: int, parts: int, pad: int) -> dict[str, torch.Tensor]:
    """What process `part` of `parts` holds of a micro-batch (`sft_batches.collate`) of one sequence, which is padded to equal parts.

    The loss stays whole: each trained token is predicted in one part, and Σ w_t is gathered over all processes.
    """
    ids, predicts = batch["input_ids"], batch["predicts"]
    width = -(-ids.shape[1] // parts)
    first = part * width
    whole = torch.nn.functional.pad(ids, (0, width * parts - ids.shape[1]), value=pad)
    mine = (first <= predicts) & (predicts < first + width)
    return {
        "input_ids": whole[:, first : first + width],
        "position_ids": torch.arange(first, first + width)[None],
        "predicts": predicts[mine] - first,
        "labels": batch["labels"][mine],
        "weights": batch["weights"][mine],
    }
