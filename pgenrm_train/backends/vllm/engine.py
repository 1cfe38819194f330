"""Generation by vLLM in this process: one global queue over all requests, prompts encoded once for all of their samples.

The ids of a prompt come from the same tokenizer object as in training and go to vLLM as ids, so that both sides see the same
tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.config import Config


def vllm_variables(config: Config) -> dict[str, str]:
    """What must be set before vLLM is imported."""
    if config.cluster.device != "cpu":
        return {"VLLM_NO_USAGE_STATS": "1"}
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives here: nothing to clean up after a kill
        "VLLM_LOGGING_LEVEL": "ERROR",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }


def engine_settings(config: Config) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` beside the model."""
    on_cpu = config.cluster.device == "cpu"
    return {
        "dtype": "float32" if on_cpu else config.model.dtype,
        "max_model_len": config.model.max_prompt_tokens + config.model.max_response_tokens,
        "max_num_seqs": config.eval.max_in_flight,
        "max_num_batched_tokens": 8192,
        "enforce_eager": on_cpu,
        "enable_prefix_caching": True,
        # On a CPU a seeded request whose prompt is prefilled in pieces ends the engine (a CPU generator has no offset).
        "enable_chunked_prefill": not on_cpu,
        "tensor_parallel_size": config.cluster.tensor_parallel,
        "seed": config.seed,
        "disable_log_stats": True,
    }


class VllmGenerator:
    """A `Generator` over a local checkpoint.  Seeded per request, so results do not depend on the order of the queue."""

    def __init__(self, config: Config, checkpoint: Path | str) -> None:
        os.environ.update({k: v for k, v in vllm_variables(config).items() if k not in os.environ})
        from transformers import AutoTokenizer
        from vllm import LLM

        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._llm = LLM(model=str(checkpoint), tokenizer=str(checkpoint), **engine_settings(config))

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        """Yield every sample of every request, a request's samples together, as requests finish."""
        engine, waiting = self._llm.llm_engine, iter(requests)
        live: dict[str, GenerationRequest] = {}
        exhausted, in_flight = False, 0
        while live or not exhausted:
            while not exhausted and in_flight < self.config.eval.max_in_flight:
                request = next(waiting, None)
                if request is None:
                    exhausted = True
                    break
                ids = self._ids(request)
                if len(ids) > self.config.model.max_prompt_tokens:
                    yield from (
                        Generation(request.key, s, None, "prompt_too_long") for s in range(request.samples)
                    )
                    continue
                engine.add_request(
                    request.key, {"prompt_token_ids": ids}, self._sampling(request, temperature)
                )
                live[request.key] = request
                in_flight += request.samples
            for output in engine.step() if live else ():
                if output.finished:
                    request = live.pop(output.request_id)
                    in_flight -= request.samples
                    yield from self._generations(request, output)

    def close(self) -> None:
        """Drop the engine and its KV cache."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _ids(self, request: GenerationRequest) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            list(request.messages), tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _sampling(self, request: GenerationRequest, temperature: float) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=request.samples,
            temperature=temperature,
            seed=request.seed,
            max_tokens=self.config.model.max_response_tokens,
            detokenize=False,  # once at its end, not token by token
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _generations(self, request: GenerationRequest, output: Any) -> Iterator[Generation]:
        for sample in output.outputs:
            failure = None if sample.finish_reason == "stop" else f"{sample.finish_reason}"
            text = self.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            yield Generation(request.key, sample.index, text, failure, len(sample.token_ids))
