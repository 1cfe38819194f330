"""The models under test of a configuration; each is loaded on its first question."""

import functools
import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.ask.scored import Score, one_by_one
from eval.studies.evaluation import Candidate, ScoredCandidate
from pgenrm_train.backends.protocols import Generator
from pgenrm_train.backends.vllm.reward_head import RewardHead
from pgenrm_train.config import FIELD_KEYS, Config, ModelConfig, StageName
from pgenrm_train.errors import ConfigError, PreflightError, first_line
from pgenrm_train.files import fingerprint
from pgenrm_train.prompts.writer import PromptWriter
from pgenrm_train.records.personas import read_program
from pgenrm_train.run.folder import StageFolder, check_checkpoint, weights_digest
from recipes.wiring.llm import api_generator, model_endpoint, plain_writer
from recipes.wiring.models import load_tokenizer

Load = Callable[[Path], Generator]


def candidates(
    config: Config, made: Sequence[StageName], folder: Path, load: Load
) -> list[Candidate | ScoredCandidate]:
    """Models under test in the order of the table.

    `made` are the complete training stages of the run, `folder` is the evaluation's, `load` starts a local
    checkpoint.
    """
    model = config.model
    if model.kind == "baseline":
        return []
    if model.kind == "endpoint":
        return [_endpoint(config, folder)]
    if model.kind == "callable":
        return [_callable(config)]
    if model.kind == "reward_head":
        return [_reward_head(config)]
    if model.path:
        return [_local(config, model.label, Path(model.path), None, load)]
    run_dir = Path(config.run_dir)
    return [
        _local(
            config,
            stage.value,
            run_dir / stage / "checkpoint",
            StageFolder.read(run_dir, stage).manifest.wall_seconds,
            load,
        )
        for stage in made
    ]


def _local(config: Config, name: str, checkpoint: Path, seconds: float | None, load: Load) -> Candidate:
    start, close = once(lambda: load(checkpoint))
    identity = fingerprint(weights_digest(check_checkpoint(checkpoint)), config.model.prompt)
    tokenizer = functools.cache(lambda: load_tokenizer(checkpoint))
    return Candidate(
        name,
        identity,
        start,
        lambda: PromptWriter(config.model, tokenizer()),
        close,
        seconds,
        persona_write=lambda: PromptWriter(_with_persona(config.model), tokenizer()),
    )


def _endpoint(config: Config, folder: Path) -> Candidate:
    settings, prompt = model_endpoint(config), config.model.prompt
    # Fields that change answers; a run of an older version has none.
    fields = {key: value for key in FIELD_KEYS if (value := getattr(settings, key))}
    identity = f"{settings.base_url}|{settings.name}|{prompt}" + (f"|{fields}" if fields else "")
    if config.model.persona_program:
        identity += f"|{fingerprint(str(read_program(Path(config.model.persona_program))))}"
    start, close = once(lambda: api_generator(settings, config.model, folder))
    return Candidate(
        config.model.label,
        identity,
        start,
        lambda: plain_writer(config),
        close,
        cost=lambda: start().spending().for_manifest(),
        persona_write=lambda: plain_writer(replace(config, model=_with_persona(config.model))),
    )


def _with_persona(model: ModelConfig) -> ModelConfig:
    """The style that names the persona: a judge's instructions must explain it, P-GenRM's do."""
    return model if model.prompt == "p_genrm" else replace(model, prompt="persona")


def _callable(config: Config) -> ScoredCandidate:
    """Identified by its name and its module's source: an edited file is another model."""
    name = config.model.name
    function, digest = _imported(name)
    return ScoredCandidate(
        config.model.label, fingerprint(name, digest), lambda: one_by_one(function), lambda: None
    )


def _reward_head(config: Config) -> ScoredCandidate:
    checkpoint = Path(config.model.path) if config.model.path else _from_hub(config.model.name)
    digest = weights_digest(check_checkpoint(checkpoint))
    start, close = once(lambda: RewardHead(config.model, config.cluster.device, checkpoint))
    return ScoredCandidate(config.model.label, digest, start, close)


def once(make: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], None]]:
    """(start, close): `start` makes the engine on first use; `close` closes a made one."""
    start = functools.cache(make)

    def close() -> None:
        if start.cache_info().currsize:
            start().close()
            start.cache_clear()

    return start, close


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    # The hub client raises a dozen unrelated types: bad name, offline, gated, no such repository.
    except Exception as error:
        raise PreflightError(
            f"model.name={name} cannot be downloaded from the Hugging Face hub ({first_line(error)}); give "
            "model.path=FOLDER"
        ) from None


def _imported(name: str) -> tuple[Score, str]:
    """The function of `module:function`, and the hash of its file."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # user code may raise any type
        raise ConfigError(
            f"model.name={name}: the module cannot be imported ({type(error).__name__}: {error})"
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"model.name={name}: {module_name} has no function {attribute}")
    file = getattr(module, "__file__", None)
    return function, hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
