"""Questions in style `persona` (SynthesizeMe): first a persona for each distinct history, once, then the judgement with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pgenrm_train.backends.api.answers import Reply
from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.generator import ENGINE, EndpointGenerator
from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.errors import BackendError
from pgenrm_train.prompts.styles import persona_messages, with_persona
from pgenrm_train.run.concurrency import concurrently


class PersonaGenerator(EndpointGenerator):
    """See `base.Generator`.  `personas` is an endpoint with a cache, so that another start has them too.

    A question whose persona could not be had is a failed generation, `engine:persona_<kind>`.
    """

    def __init__(self, endpoint: Endpoint, personas: Endpoint) -> None:
        super().__init__(endpoint)
        self.personas = personas

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        asked = [(request, persona_messages(request.messages)) for request in requests]
        replies = self._written(messages for _, messages in asked if messages)
        ready = []
        for request, messages in asked:
            persona = replies[_history(messages)] if messages else None
            if persona is None:
                ready.append(request)
            elif persona.text is None:
                for sample in range(request.samples):
                    yield Generation(request.key, sample, None, f"{ENGINE}persona_{persona.failure}")
            else:
                ready.append(replace(request, messages=tuple(with_persona(request.messages, persona.text))))
        yield from super().__call__(ready, temperature=temperature)

    def facts(self) -> Mapping[str, Any]:
        """Personas and judgements together."""
        mine, theirs = super().facts(), self.personas.usage.facts(self.personas.settings)
        failures = Counter(mine["failures"]) + Counter(theirs["failures"])
        return {name: value + theirs[name] for name, value in mine.items() if name != "failures"} | {
            "failures": dict(failures)
        }

    def close(self) -> None:
        super().close()
        self.personas.close()

    def _written(self, wanted: Iterable[Sequence[Mapping[str, str]]]) -> dict[str, Reply]:
        distinct = list({_history(messages): messages for messages in wanted}.values())
        found = concurrently(self._write, distinct, self.personas.settings.max_in_flight)
        return {_history(distinct[index]): reply for index, reply in found}

    def _write(self, messages: Any) -> Reply:
        if stopped := self.personas.stopped:
            raise BackendError(f"model: {stopped}")
        return self.personas.ask(messages)


def _history(messages: Any) -> str:
    return str(messages[-1]["content"])
