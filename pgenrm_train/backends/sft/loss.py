"""The loss of PSI, computed in pieces, so that a large vocabulary does not fill the memory.

    L = Σ_t w_t · −log p(x_t | x_<t) / Σ_t w_t        t over the step's assistant tokens

w_t is 1 in the analysis and `psi.score_weight` from `<JSON_START>` on.  A weight of 1 everywhere is METHOD
§3, another weight is *our choice*.  Only tokens that predict a trained one get logits.  If these are many,
they are computed piece by piece: the logits of a piece are dropped after the forward pass and computed again
in the backward pass.  The head then runs three times instead of twice, and the memory is that of one piece.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from pgenrm_train.cluster.sizes import PIECE


def weighted_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    vocabulary: int,
    piece: int,
) -> torch.Tensor:
    """Σ_t w_t · cross entropy of `head(hidden)`, exact for every `piece`.

    hidden (K, d), labels and weights (K,).
    """
    size = max(1, piece // vocabulary)
    if len(labels) <= size:
        return _piece(head, hidden, labels, weights)
    parts = zip(hidden.split(size), labels.split(size), weights.split(size), strict=True)
    return torch.stack([checkpoint(_piece, head, h, y, w, use_reentrant=False) for h, y, w in parts]).sum()


def _piece(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    return (cross_entropy(head(hidden).float(), labels, reduction="none") * weights).sum()


def train_in_pieces(model: Any) -> None:
    """Make a model that is called with a batch of `batches.collate` return its loss without logits.

    One call of the head computes all pieces.  ZeRO-3 gathers a module's weights at each call, on all
    processes together, and their micro-batches may have different numbers of pieces.  Without `predicts`, as
    in generation, the model answers as before.  `num_items_in_batch` is Σ w_t over the optimiser step; null:
    over this batch.
    """
    head, plain = model.get_output_embeddings(), model.forward
    logits = head.forward

    def loss_or_logits(
        hidden: torch.Tensor, labels: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        if labels is None or weights is None:
            return logits(hidden)
        return weighted_loss(logits, hidden, labels, weights, model.config.vocab_size, PIECE)

    @functools.wraps(plain)
    def forward(
        *args: Any,
        predicts: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if predicts is None or labels is None or weights is None:
            return plain(*args, **inputs)
        states = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[predicts]
        total = head(states, labels, weights)
        return CausalLMOutputWithPast(
            loss=total / (weights.sum() if num_items_in_batch is None else num_items_in_batch)
        )

    head.forward, model.forward = loss_or_logits, forward
