"""Base model of PSI, tokenizers, validation while PSI trains, and the embedder of prototypes."""

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.studies.evaluation import Validation
from pgenrm_train.backends.embedding.embedder import EmbedderWorkers, SentenceEmbedder
from pgenrm_train.backends.embedding.refine_processes import refine_in_processes
from pgenrm_train.backends.protocols import Validator
from pgenrm_train.backends.sft.checks import check_libraries, check_template, inspect_start
from pgenrm_train.backends.sft.nano import make_nano
from pgenrm_train.chains.chain import FORMAT_STRINGS
from pgenrm_train.cluster.preflight.checks import still_to_do
from pgenrm_train.config import ROOT, Config, StageName, masking_of
from pgenrm_train.errors import DataError
from pgenrm_train.prompts.masking import apply_masking
from pgenrm_train.prompts.messages import TAGS, chat_messages
from pgenrm_train.prompts.writer import PromptWriter, histories, load_pairs, pairs_of_split
from pgenrm_train.prototypes.refinement import refine
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.stages.build_sec import Kept
from pgenrm_train.stages.prototypes import Refine
from recipes.wiring.ceilings import validation_truth

NO_VAL = "no pair has split=val; data.val_share=0.1 in another run_dir= holds out a tenth of the users"
LARGE = 20_000  # analyses or texts from which several processes are worth it
TOKENIZER_SAMPLE = 1500  # chains that train nano's tokenizer


def base_model(config: Config) -> Path | str:
    """Start of PSI: `model.path`, a hub name, a shipped nano, or build_sec's nano."""
    if config.model.path:
        return Path(config.model.path)
    if config.model.kind != "nano":
        return config.model.name
    if config.psi.nano_start:
        return ROOT / config.psi.nano_start
    return Path(config.run_dir) / StageName.BUILD_SEC / "base"


def make_base(config: Config, kept: Sequence[Kept]) -> Path | str:
    """`base_model`, made from the kept chains if it is a nano from random weights."""
    base = base_model(config)
    if base == Path(config.run_dir) / StageName.BUILD_SEC / "base":
        chains = [_as_text(config, item) for item in kept[:TOKENIZER_SAMPLE]]
        reserved = [*TAGS, *(text.rstrip() for text in FORMAT_STRINGS)]
        make_nano(base, chains, reserved, config.model.nano, config.seed)
    return base


def load_tokenizer(model: Path | str) -> Any:
    """Tokenizer of a checkpoint or hub model.  Raises DataError if it cannot write chats."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    check_template(tokenizer, model)
    return tokenizer


def check_base(config: Config) -> None:
    """Check the model that PSI starts from before chains are sampled and paid for."""
    # A nano may be made from the chains.
    if (config.model.kind == "hf" or config.model.path) and still_to_do(config, [StageName.PSI]):
        check_libraries(config.psi)
        inspect_start(config, base_model(config))


def validation(config: Config) -> Validator:
    """Validation while PSI trains: a fixed slice of the validation split, in the shared harness."""
    sampler, pairs = histories(config, load_pairs(Path(config.run_dir))), validation_pairs(config)
    writer = PromptWriter(config.model, load_tokenizer(base_model(config)))
    truth = validation_truth(config) if config.data.name == "personaworld" else None
    return Validation(config, pairs, {p.pair_id: sampler(p) for p in pairs}, writer, truth)


def validation_pairs(config: Config) -> list[PreferencePair]:
    """Pairs of the validation split.  Raises DataError if `psi.evaluate_every` finds none."""
    pairs = pairs_of_split(load_pairs(Path(config.run_dir)), "val", config.psi.evaluate_pairs)
    if not pairs and config.psi.evaluate_every:
        raise DataError(f"psi.evaluate_every={config.psi.evaluate_every} needs a validation split: {NO_VAL}")
    return pairs


def _as_text(config: Config, item: Kept) -> str:
    """Prompt and chain as plain text, which the tokenizer of a nano learns from."""
    view, _ = apply_masking(item.example, masking_of(config, StageName.PSI), random.Random(0))
    messages = chat_messages(view, instructions=config.model.instructions, totals=config.model.counted)
    prompt = "\n".join(m["content"] for m in messages)
    return f"{prompt}\n{item.text}"


def make_embedder(config: Config, name: str | None = None, workers: int = 1) -> SentenceEmbedder:
    """The embedder `name`, by default that of the prototypes.

    `workers` above 1: Ray actors share large sets; nothing else may hold the devices then.
    """
    return SentenceEmbedder(
        name or config.prototypes.embedder,
        device=config.cluster.device,
        cache_dir=Path(config.run_dir) / "embeddings",
        shared=EmbedderWorkers(config, workers, LARGE) if workers > 1 else None,
    )


def refiner(config: Config, analyses: int) -> Refine:
    """`refine`, for large sets on all processes of this node."""
    if analyses < LARGE or config.cluster.processes_per_node == 1:
        return refine
    return functools.partial(refine_in_processes, processes=config.cluster.processes_per_node)
