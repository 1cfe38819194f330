"""Generation by the model in training, with transformers' own `generate`, for small validation slices.

The weights stay in place: there is no second engine.  This is slower than vLLM by an order of magnitude.
Under ZeRO-3 `complete_weights` gathers them once, if they fit; else every token gathers them again.
`recipe=evaluate` serves checkpoints with vLLM.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.backends.sft.batches import pad_of
from pgenrm_train.chains.totals import STOP
from pgenrm_train.config import ModelConfig, Totals
from pgenrm_train.prompts.messages import prompt_ids


class Prompt(NamedTuple):
    """One sample of a request, with the ids of its prompt."""

    request: GenerationRequest
    sample: int
    ids: list[int]


class TrainingGenerator:
    """A `Generator` that all processes of a training call with the same requests.

    Each process answers its share, and yields the answers of all.  `limit`: most tokens of an answer.
    """

    def __init__(
        self, config: ModelConfig, model: Any, tokenizer: Any, batch_size: int, limit: int | None = None
    ) -> None:
        self.config, self.model, self.tokenizer, self.batch_size = config, model, tokenizer, batch_size
        self.limit = limit or config.max_response_tokens

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        from torch import distributed

        prompts = [
            Prompt(request, sample, ids)
            for request in requests
            for ids in [prompt_ids(self.tokenizer, request.messages)]
            for sample in range(request.samples)
        ]
        limit = self.config.max_prompt_tokens
        yield from (
            Generation(p.request.key, p.sample, None, "prompt_too_long")
            for p in prompts
            if len(p.ids) > limit
        )
        fitting = sorted((p for p in prompts if len(p.ids) <= limit), key=lambda p: len(p.ids))
        ranks, rank = 1, 0
        if distributed.is_initialized():
            ranks, rank = distributed.get_world_size(), distributed.get_rank()
        answers: list[Generation] = []
        for first in range(0, len(fitting), self.batch_size * ranks):
            together = fitting[first : first + self.batch_size * ranks]
            share = together[rank::ranks]
            # ZeRO gathers in step: a process without a share answers one prompt and drops the answer
            answers += self._answer(share or together[:1], temperature)[: len(share)]
        if ranks == 1:
            yield from answers
            return
        gathered: list[list[Generation]] = [[] for _ in range(ranks)]
        distributed.all_gather_object(gathered, answers)
        for part in gathered:
            yield from part

    def close(self) -> None:
        """Nothing to end: the model belongs to training."""

    def _answer(self, batch: Sequence[Prompt], temperature: float) -> list[Generation]:
        """Answer one batch, padded on the left, without touching the random state of training."""
        import torch
        from transformers import GenerationConfig

        width, device, pad = max(len(p.ids) for p in batch), self.model.device, pad_of(self.tokenizer)
        model_ends = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(model_ends if isinstance(model_ends, list) else [model_ends])}
        ends -= {None}
        prompts = torch.tensor([[pad] * (width - len(p.ids)) + p.ids for p in batch], device=device)
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in batch], device=device)
        settings = GenerationConfig(
            max_new_tokens=self.limit,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_p=1.0,
            top_k=0,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            stop_strings=[STOP] if self.config.counted is Totals.CODE else None,
        )
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(batch[0].request.seed + batch[0].sample)
            output = self.model.generate(
                input_ids=prompts,
                attention_mask=mask,
                generation_config=settings,
                synced_gpus=is_sharded(self.model),
                tokenizer=self.tokenizer,
            )
        answers = []
        for prompt, row in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            stopped = end is not None or (settings.stop_strings is not None and STOP in text)
            # A row that ended at a stop string is padded after it.
            tokens = sum(token != pad for token in row) if end is None else end + 1
            failure = None if stopped else "length"
            answers.append(Generation(prompt.request.key, prompt.sample, text, failure, tokens))
        return answers


@contextmanager
def complete_weights(engine: Any) -> Iterator[None]:
    """Give each process of ZeRO-3 the complete weights while the block runs, if they fit."""
    if not is_sharded(engine) or not fits(engine):
        yield
        return
    from deepspeed.runtime.zero import unwrap_model_for_generation

    with unwrap_model_for_generation(engine):
        yield


def is_sharded(model: Any) -> bool:
    """Whether a process holds a part of a weight only, which ZeRO-3 gathers when a layer needs it."""
    return any(
        parameter.ds_status.name != "AVAILABLE"
        for parameter in model.parameters()
        if hasattr(parameter, "ds_status")
    )


def fits(engine: Any) -> bool:
    """Whether all processes can hold the complete weights, and half as much for keys and values."""
    import psutil
    import torch
    from torch import distributed

    if not is_sharded(engine):
        return True
    weights = sum(p.ds_numel * p.element_size() for p in engine.parameters() if hasattr(p, "ds_numel"))
    on_gpu = engine.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    room = torch.tensor(free - 1.5 * weights, dtype=torch.float64, device=engine.device)
    distributed.all_reduce(room, distributed.ReduceOp.MIN)
    return bool(room > 0)
