"""Checks of an SFT run before a weight is loaded or a GPU is touched; each failure is one sentence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pgenrm_train.backends.sft.batches import Encoded, encode_chat
from pgenrm_train.config import Config, LoraConfig, PsiConfig
from pgenrm_train.errors import ArtifactError, ConfigError, DataError, first_line
from pgenrm_train.files import fingerprint

HEADS = {"lm_head", "embed_out"}
# settings of models that change the logits after the head, which our loss does not
CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Start:
    """A model that can be trained."""

    tokenizer: Any
    limit: int  # tokens of the longest chat
    identity: str  # hash of the names and shapes of its weights


def check_libraries(psi: PsiConfig) -> None:
    """Raise ConfigError if optional kernels are set but not installed."""
    if psi.liger:
        from transformers.utils import is_liger_kernel_available

        if not is_liger_kernel_available():
            raise ConfigError(
                "psi.liger=true needs the package liger-kernel, which is not installed; "
                "pip install liger-kernel, or set psi.liger=false"
            )


def inspect_start(config: Config, start: Path | str) -> Start:
    """Check the configuration, tokenizer and module names of `start`, without its weights."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        shape = AutoConfig.from_pretrained(start)
        tokenizer = AutoTokenizer.from_pretrained(start)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{start} is not a model that PSI can start from: {first_line(error)}") from None
    check_template(tokenizer, start)
    _check_place_of_answer(tokenizer, start)
    if changes := [name for name in CHANGES_LOGITS if getattr(shape, name, None) not in (None, 1, 1.0)]:
        raise ConfigError(
            f"{start} changes its logits after the head ({changes[0]}), which the loss of PSI does not do; "
            "use another model"
        )
    _check_heads(config.psi.sequence_parallel, shape)
    wanted = config.model.max_prompt_tokens + config.model.max_response_tokens
    limit = min(wanted, getattr(shape, "max_position_embeddings", None) or wanted)
    return Start(tokenizer, limit, _identity(config.model.lora, shape))


def check_template(tokenizer: Any, model: Path | str) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {model} has no chat template; start from an instruct model or add "
            "chat_template.jinja"
        )


def _check_place_of_answer(tokenizer: Any, model: Path | str) -> None:
    """Raise DataError for a tokenizer without an end, or a chat template without a place for the answer."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {model} has no eos_token, which ends an answer; set it in its files"
        )
    try:
        encode_chat(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    except DataError as error:
        raise DataError(f"the tokenizer of {model}: {error}") from None


def _check_heads(parts: int, shape: Any) -> None:
    """Raise ConfigError unless `parts` processes can share a sequence and divide its heads."""
    if parts == 1:
        return
    heads = shape.num_attention_heads
    keys = getattr(shape, "num_key_value_heads", None) or heads
    if heads % parts or (keys % parts and parts % keys):
        raise ConfigError(
            f"psi.sequence_parallel={parts} does not divide the model's {heads} heads and {keys} key heads"
        )
    if "sliding_attention" in (getattr(shape, "layer_types", None) or ()):
        raise ConfigError(
            f"psi.sequence_parallel={parts} needs full attention in every layer, and this model has sliding "
            "windows; set psi.sequence_parallel=1"
        )


def _identity(lora: LoraConfig, shape: Any) -> str:
    """Hash names and shapes of all weights.  Raises ConfigError if a LoRA target names no module."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(shape)
    if lora.rank:
        _check_targets(lora.target_modules, skeleton)
    weights = {name: list(weight.shape) for name, weight in skeleton.named_parameters()}
    return fingerprint(weights, [lora.rank, lora.alpha, sorted(lora.target_modules)] if lora.rank else None)


def _check_targets(targets: Sequence[str], model: Any) -> None:
    """Match targets as peft does: by a module's full name, or by its end after a dot."""
    from torch.nn import Linear

    names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if unknown or not targets:
        layers = sorted({name.rsplit(".", 1)[-1] for name in names} - HEADS)
        raise ConfigError(
            f"model.lora.target_modules={','.join(unknown) or '[]'} names no linear layer of the model; "
            f"it has {', '.join(layers)}"
        )
    if set(targets) & HEADS:
        raise ConfigError(
            "model.lora.target_modules must not name the output head: the loss of PSI is computed inside it"
        )


def encode_rows(tokenizer: Any, rows: Path, limit: int) -> list[Encoded]:
    """Encode all chats of a parquet file.  Raises DataError that names the first unusable row."""
    chats = []
    for number, messages in enumerate(pq.read_table(rows, columns=["messages"])["messages"].to_pylist()):
        try:
            chat = encode_chat(tokenizer, messages)
        except DataError as error:
            raise DataError(f"{rows}, row {number}: {error}") from None
        # a tuple takes ten times the memory
        chats.append(replace(chat, ids=np.array(chat.ids, dtype=np.int32)))
    if not chats:
        raise DataError(f"{rows} holds no chains to train on")
    if long := [number for number, chat in enumerate(chats) if len(chat.ids) > limit]:
        raise DataError(
            f"{rows}: {len(long)} of {len(chats)} chats are longer than the model's limit of {limit} tokens, "
            f"the first in row {long[0]} with {len(chats[long[0]].ids)}; lower model.max_prompt_tokens and "
            "build again, or raise model.max_response_tokens if the two add up to less than the model's "
            "positions"
        )
    return chats
