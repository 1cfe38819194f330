"""The checkpoint that a complete phase publishes, in Hugging Face format with its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from pgenrm_train.backends.grpo.phase import Phase
from pgenrm_train.backends.grpo.trainer import ChainTrainer
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import staged_folder

# Copied as they are: saving a loaded tokenizer again may change how it splits text.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)


def export(trainer: ChainTrainer, phase: Phase, start: Path, dtype: str) -> None:
    """Write `checkpoint.tmp`, load it as a check, and rename it to `<work_dir>/checkpoint`."""
    with staged_folder(phase.checkpoint) as draft:
        trainer.export(draft, dtype)
        for file in TOKENIZER_FILES:
            if (start / file).exists():
                shutil.copyfile(start / file, draft / file)
        _check_loads(draft)


def _check_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    _, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if broken := {kind: list(info[kind]) for kind in kinds if info[kind]}:
        raise ArtifactError(f"the exported checkpoint {folder} does not load as written: {broken}")
