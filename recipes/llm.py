"""The language models that a run asks: behind an API, or served here by vLLM for as long as a stage runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pgenrm_train.backends.endpoint import Endpoint
from pgenrm_train.config import Config, EndpointConfig
from pgenrm_train.masking import FullView, MaskedView
from pgenrm_train.prompts import chat_messages


@contextmanager
def settings_of(config: Config, section: str, log: Path) -> Iterator[EndpointConfig]:
    """The settings of `teacher` or `judge` as an API that answers; with kind vllm, a server is started and stopped."""
    settings: EndpointConfig = getattr(config, section)
    if settings.kind != "vllm":
        yield settings
        return
    from pgenrm_train.backends.vllm_server import served

    print(f"{section}: serving {settings.name} with vLLM, log in {log}", flush=True)
    with served(config, settings, log) as endpoint:
        yield endpoint


def model_endpoint(config: Config) -> EndpointConfig:
    """The model under test of `model=endpoint`."""
    model = config.model
    return EndpointConfig(
        "endpoint", model.base_url, model.name, model.api_key_env, max_in_flight=config.eval.max_in_flight,
        max_tokens=model.max_response_tokens, temperature=config.eval.temperature,
    )  # fmt: skip


def plain_writer(config: Config) -> Callable[[MaskedView | FullView], list[dict[str, str]]]:
    """Prompts for a model whose tokenizer is not at hand: nothing is cut."""
    return functools.partial(chat_messages, instructions=config.model.instructions)


@contextmanager
def endpoint(config: Config, section: str, folder: Path) -> Iterator[Endpoint]:
    """The endpoint of `teacher` or `judge`, with a cache of its answers in `folder`."""
    with ExitStack() as stack:
        settings = stack.enter_context(settings_of(config, section, folder / f"{section}_server.log"))
        found = Endpoint(settings, folder / f"{section}_cache")
        stack.callback(found.close)
        yield found
