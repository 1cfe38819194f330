"""Language models that a run queries, behind an API or served by vLLM."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.generator import EndpointGenerator
from pgenrm_train.backends.api.persona import PersonaGenerator
from pgenrm_train.backends.vllm.server import served
from pgenrm_train.chains.totals import STOP
from pgenrm_train.config import ApiConfig, Config, EndpointConfig, ModelConfig, Totals
from pgenrm_train.prompts.history import HistorySampler
from pgenrm_train.prompts.masking import FullView, MaskedView
from pgenrm_train.prompts.styles import styled_messages
from pgenrm_train.records.pairs import HistoryItem, PreferencePair
from pgenrm_train.records.personas import read_program


@contextmanager
def settings_of(config: Config, section: str, log: Path) -> Iterator[EndpointConfig]:
    """Settings of `teacher`, `judge` or `judge_gold` as an API; kind vllm starts and stops a server."""
    settings: EndpointConfig = getattr(config, section)
    if settings.kind != "vllm":
        yield settings
        return
    print(f"{section}: serving {settings.name} with vLLM, log in {log}", flush=True)
    with served(config, settings, log, with_training=section != "teacher") as endpoint:
        yield endpoint


def model_endpoint(config: Config) -> EndpointConfig:
    """The model under test of `model=endpoint`."""
    model = config.model
    shared = {field.name: getattr(model, field.name) for field in dataclasses.fields(ApiConfig)}
    return EndpointConfig(
        **shared,
        kind="endpoint",
        name=model.name,
        max_in_flight=config.eval.max_in_flight,
        max_tokens=model.max_response_tokens,
        temperature=config.eval.temperature,
    )


def plain_writer(config: Config) -> Callable[[MaskedView | FullView], list[dict[str, str]]]:
    """Writer of prompts for a model without a local tokenizer: nothing is cut."""
    model = config.model
    return functools.partial(
        styled_messages, model.prompt, instructions=model.instructions, totals=model.counted
    )


def api_generator(
    settings: EndpointConfig, model_config: ModelConfig, folder: Path | None
) -> EndpointGenerator:
    """Generator of `model=endpoint` in the style of its prompt; `folder` keeps costs and personas."""
    model = Endpoint(settings, folder and folder / "paid")  # answers are kept as predictions
    if model_config.prompt == "persona":
        program = model_config.persona_program
        written = read_program(Path(program)) if program else None
        return PersonaGenerator(model, Endpoint(settings, folder and folder / "personas"), written)
    return EndpointGenerator(model, STOP if model_config.counted is Totals.CODE else None)


def shown_histories(
    config: Config, sampler: HistorySampler, pairs: Sequence[PreferencePair], size: int | None = None
) -> Mapping[str, tuple[HistoryItem, ...]]:
    """pair_id → the history to show: one draw per pair, or per user for personas."""
    if config.model.prompt != "persona":
        return {p.pair_id: sampler(p, size) for p in pairs}
    of_user: dict[str, tuple[HistoryItem, ...]] = {}
    for pair in sorted(pairs, key=lambda p: p.pair_id):
        if pair.user_id not in of_user:
            of_user[pair.user_id] = sampler(pair, size)
    return {p.pair_id: of_user[p.user_id] for p in pairs}


@contextmanager
def endpoint(config: Config, section: str, folder: Path) -> Iterator[Endpoint]:
    """Endpoint of `teacher` or `judge`, with a cache of its answers in `folder`."""
    with ExitStack() as stack:
        settings = stack.enter_context(settings_of(config, section, folder / f"{section}_server.log"))
        model = Endpoint(settings, folder / f"{section}_cache")
        stack.callback(model.close)
        yield model
