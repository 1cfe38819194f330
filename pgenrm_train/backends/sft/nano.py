"""From-scratch model of the CPU default: a tiny Qwen2 with a byte-level BPE tokenizer of the run's own texts.

`model.nano.family` chooses a Llama or a Qwen3 instead.

`AutoTokenizer` always loads `Qwen2Tokenizer` for model type `qwen2`, and that class brings its own
pre-tokeniser.  So the tokenizer is trained *through that class*, and SFT, veRL, vLLM and evaluation see the
same ids.  The vocabulary equals `len(tokenizer)`: veRL masks ids beyond it in vLLM but not in the actor.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pgenrm_train.config import NanoConfig

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
# Qwen2's pre-tokeniser would separate the space from the digit
DIGITS = tuple(f" {digit}" for digit in range(10))
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_nano(
    folder: Path, texts: Iterable[str], fixed: Iterable[str], config: NanoConfig, seed: int
) -> None:
    """Write a random-weight model and its tokenizer to `folder` in Hugging Face format.

    `texts` train the BPE merges; each of `fixed` (prompt tags, format strings of the chain) becomes one
    token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a tiny model's files are written at once
    tokenizer = train_tokenizer(texts, fixed, config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            config.family,
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.positions,
            **({} if config.family == "qwen2" else {"head_dim": config.hidden // config.heads}),
            tie_word_embeddings=config.family == "qwen2",
            initializer_range=0.04,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], fixed: Iterable[str], config: NanoConfig) -> Any:
    """Train the merges of a `Qwen2Tokenizer` on `texts`."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import AddedToken, Qwen2Tokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    bpe = Qwen2Tokenizer().backend_tokenizer
    fixed = [*fixed, *DIGITS]
    # The fixed strings are cut out first: merges must be learnt on the text that remains between them.
    cuts = re.compile("|".join(re.escape(text) for text in sorted(fixed, key=len, reverse=True)))
    bpe.train_from_iterator((piece for text in texts for piece in cuts.split(text) if piece), trainer=trainer)
    state = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in state["merges"]],
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=config.positions,
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in fixed])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
