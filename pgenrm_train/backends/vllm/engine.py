"""Generation by vLLM in this process, with one queue over all requests.

Each prompt is encoded once for all its samples.  The tokenizer is the same as in training, and vLLM gets the
prompts as ids, so that both sides see the same tokens.
"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.chains.totals import STOP
from pgenrm_train.config import Config, Totals
from pgenrm_train.prompts.messages import prompt_ids

IDLE_SECONDS = 0.01  # between two looks for a request while none is running


def vllm_variables(device: str) -> dict[str, str]:
    """Environment variables that must be set before vLLM is imported."""
    if device != "cpu":
        # FlashInfer's sampler is compiled at the first sampling step, which needs nvcc
        return {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives here: nothing to clean up after a kill
        "VLLM_LOGGING_LEVEL": "ERROR",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }


def engine_settings(config: Config) -> dict[str, object]:
    """Keyword arguments of `vllm.LLM`, without the model."""
    on_cpu = config.cluster.device == "cpu"
    longest = config.model.max_prompt_tokens + config.model.max_response_tokens
    return {
        "dtype": "float32" if on_cpu else config.model.dtype,
        "max_model_len": longest,
        "max_num_seqs": config.eval.max_in_flight,
        # without chunked prefill, vLLM refuses a limit below the longest sequence
        "max_num_batched_tokens": max(8192, longest) if on_cpu else 8192,
        "enforce_eager": on_cpu,
        "enable_prefix_caching": True,
        # on a CPU, a seeded request whose prompt is prefilled in pieces crashes the engine:
        # a CPU generator has no offset
        "enable_chunked_prefill": not on_cpu,
        "tensor_parallel_size": config.cluster.tensor_parallel,
        "seed": config.seed,
        "disable_log_stats": True,
    }


class VllmGenerator:
    """A `Generator` over a local checkpoint.

    Sampling is seeded per request, so results do not depend on the order of the queue.
    """

    def __init__(self, config: Config, checkpoint: Path | str) -> None:
        os.environ.update(vllm_variables(config.cluster.device) | os.environ)  # variables that are set stay
        from transformers import AutoTokenizer
        from vllm import LLM

        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._llm = LLM(model=str(checkpoint), tokenizer=str(checkpoint), **engine_settings(config))

    def __call__(
        self, requests: Iterable[GenerationRequest | None], *, temperature: float
    ) -> Iterator[Generation]:
        """Yield the samples of each request together, as requests finish.

        `requests` yields None while no request is there yet: running ones are continued in the meantime.
        """
        waiting = iter(requests)
        exhausted, in_flight = False, 0
        while in_flight or not exhausted:
            while not exhausted and in_flight < self.config.eval.max_in_flight:
                try:
                    request = next(waiting)
                except StopIteration:
                    exhausted = True
                    break
                if request is None:
                    break
                if refused := self.add(request, temperature):
                    yield from refused
                else:
                    in_flight += request.samples
            if not in_flight and not exhausted:
                time.sleep(IDLE_SECONDS)
            for generations in self.step() if in_flight else ():
                in_flight -= len(generations)
                yield from generations

    def add(self, request: GenerationRequest, temperature: float) -> list[Generation]:
        """Let a request join the running batch.  Returns its failures if its prompt is too long."""
        ids = prompt_ids(self.tokenizer, request.messages)
        if len(ids) > self.config.model.max_prompt_tokens:
            return [Generation(request.key, s, None, "prompt_too_long") for s in range(request.samples)]
        sampling = self._sampling(request, temperature)
        self._llm.llm_engine.add_request(request.key, {"prompt_token_ids": ids}, sampling)
        return []

    def step(self) -> Iterator[list[Generation]]:
        """Advance the batch by one step; yield the samples of each request that is finished."""
        for output in self._llm.llm_engine.step():
            if output.finished:
                yield self._generations(output)

    def abort(self, key: str) -> None:
        """Drop a request that joined."""
        self._llm.llm_engine.abort_request([key])

    def close(self) -> None:
        """Drop the engine and its KV cache."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _sampling(self, request: GenerationRequest, temperature: float) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        by_code = self.config.model.counted is Totals.CODE
        return SamplingParams(
            n=request.samples,
            temperature=temperature,
            seed=request.seed,
            max_tokens=self.config.model.max_response_tokens,
            stop=[STOP] if by_code else None,
            detokenize=by_code,  # needed for `stop`; else we decode once at the end, not token by token
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _generations(self, output: Any) -> list[Generation]:
        generations = []
        for sample in output.outputs:
            failure = None if sample.finish_reason == "stop" else f"{sample.finish_reason}"
            text = self.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            tokens = len(sample.token_ids)
            generations.append(Generation(output.request_id, sample.index, text, failure, tokens))
        return generations
