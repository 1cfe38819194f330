"""Questions in style `persona` (SynthesizeMe): one persona per distinct history, then the judgement."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from pgenrm_train.backends.api.answers import PROMPT_REFUSED, Reply
from pgenrm_train.backends.api.endpoint import Endpoint, Messages
from pgenrm_train.backends.api.generator import ENGINE, EndpointGenerator
from pgenrm_train.backends.protocols import Generation, GenerationRequest, Spending
from pgenrm_train.errors import BackendError
from pgenrm_train.prompts.styles import persona_messages, with_persona
from pgenrm_train.records.personas import PersonaProgram
from pgenrm_train.run.concurrency import concurrently


class PersonaGenerator(EndpointGenerator):
    """A generator that writes personas first; see `protocols.Generator`.

    `personas` is an endpoint with a cache, so that a restart reuses them.  A question without its persona is
    a failed generation, `engine:persona_<kind>`, or `persona_prompt_refused`, which is final.  `program`:
    instructions and demonstrations in place of ours.
    """

    def __init__(self, endpoint: Endpoint, personas: Endpoint, program: PersonaProgram | None = None) -> None:
        super().__init__(endpoint)
        self.personas, self.program = personas, program

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        waiting = [(request, persona_messages(request.messages, self.program)) for request in requests]
        distinct = list({_history(messages): messages for _, messages in waiting if messages}.values())
        written = concurrently(self._write, distinct, self.personas.settings.max_in_flight)
        replies = {_history(distinct[index]): reply for index, reply in written}
        ready = []
        for request, messages in waiting:
            persona = replies[_history(messages)] if messages else None
            if persona is None:
                ready.append(request)
            elif persona.text is None:
                failure = f"persona_{persona.failure}"
                if persona.failure != PROMPT_REFUSED:
                    failure = ENGINE + failure
                for sample in range(request.samples):
                    yield Generation(request.key, sample, None, failure, words=persona.words)
            else:
                ready.append(replace(request, messages=tuple(with_persona(request.messages, persona.text))))
        yield from super().__call__(ready, temperature=temperature)

    def spending(self) -> Spending:
        """The cost of personas and judgements."""
        return super().spending() + self.personas.spending()

    def close(self) -> None:
        super().close()
        self.personas.close()

    def _write(self, messages: Messages) -> Reply:
        if stopped := self.personas.stopped:
            raise BackendError(f"model: {stopped}")
        return self.personas.complete(messages)


def _history(messages: Messages) -> str:
    return str(messages[-1]["content"])
