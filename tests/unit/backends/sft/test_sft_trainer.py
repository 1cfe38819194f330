"""Epochs of transformers' Trainer over micro-batches of `StepOrder`: the layout changes no step."""

import random
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments

from pgenrm_train.backends.sft.attention import register_packed
from pgenrm_train.backends.sft.batches import (
    Batching,
    Chats,
    Encoded,
    Layout,
    StepOrder,
    collate,
    write_chats,
)
from pgenrm_train.backends.sft.loss import train_in_pieces
from pgenrm_train.backends.sft.trainer import SftTrainer
from pgenrm_train.config import PsiConfig


def losses(folder: Path, batching: Batching) -> list[float]:
    """Losses of two epochs of a fresh model; the last step of an epoch is short."""
    torch.manual_seed(0)
    packed = batching.layout is Layout.PACKED
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    kernel = register_packed() if packed else "sdpa"
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, attn_implementation=kernel))
    train_in_pieces(model)
    chats = Chats(folder / "chats.parquet")
    order = StepOrder(chats.lengths, batching, seed=0, epochs=2)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=order.accumulation,
        num_train_epochs=2,
        learning_rate=1e-2,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
    )
    trainer = SftTrainer(
        PsiConfig(),
        order=order,
        validate=None,
        metrics=folder / "metrics.jsonl",
        model=model,
        args=arguments,
        train_dataset=chats,
        data_collator=lambda micro_batches: collate(micro_batches[0], pad=0, packed=packed),
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_two_epochs_by_tokens_have_the_losses_of_two_by_sequences(tmp_path: Path) -> None:
    rng = random.Random(0)
    lengths = [rng.randint(6, 40) for _ in range(16)]
    write_chats(
        tmp_path / "chats.parquet",
        [Encoded(tuple(rng.randrange(1, 50) for _ in range(n)), rng.randint(1, 4), n) for n in lengths],
    )
    by_tokens = losses(tmp_path, Batching(Layout.PACKED, 6, 70))
    assert len(by_tokens) == 6 and by_tokens[0] != pytest.approx(by_tokens[-1], rel=1e-3)
    assert by_tokens == pytest.approx(losses(tmp_path, Batching(Layout.GROUPED, 6, 3)), rel=1e-5)
