"""Generation by the model that is being trained, with transformers' own `generate`: for the small slices of validation.

The weights stay where training has them: no second engine, no copy.  It is slower than vLLM by an order of magnitude, and under
ZeRO-3 every token gathers the weights again; `recipe=evaluate` serves checkpoints with vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pgenrm_train.backends.protocols import Generation, GenerationRequest
from pgenrm_train.config import Config

Asked = tuple[GenerationRequest, int, list[int]]  # request, sample, ids of the prompt


class TrainingGenerator:
    """A `Generator` that all processes of a training call with the same requests; each answers its share and yields all answers."""

    def __init__(self, config: Config, model: Any, tokenizer: Any) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.batch_size = 8 * config.psi.micro_batch_size  # no gradients and no optimiser's activations

    def __call__(self, requests: Iterable[GenerationRequest], *, temperature: float) -> Iterator[Generation]:
        from torch import distributed

        asked = [
            (request, sample, self._ids(request)) for request in requests for sample in range(request.samples)
        ]
        limit = self.config.model.max_prompt_tokens
        yield from (Generation(r.key, s, None, "prompt_too_long") for r, s, ids in asked if len(ids) > limit)
        fits = sorted((a for a in asked if len(a[2]) <= limit), key=lambda a: len(a[2]))
        ranks, rank = (
            (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
        )
        answers: list[Generation] = []
        for first in range(0, len(fits), self.batch_size * ranks):
            together = fits[first : first + self.batch_size * ranks]
            mine = together[rank::ranks]
            # ZeRO gathers in step: a process without a share of its own answers one that it throws away.
            answers += self._answer(mine or together[:1], temperature)[: len(mine)]
        if ranks == 1:
            yield from answers
            return
        everyone: list[list[Generation]] = [[] for _ in range(ranks)]
        distributed.all_gather_object(everyone, answers)
        for share in everyone:
            yield from share

    def close(self) -> None:
        """Nothing to end: the model belongs to training."""

    def _ids(self, request: GenerationRequest) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            list(request.messages), tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _answer(self, asked: Sequence[Asked], temperature: float) -> list[Generation]:
        """One batch, padded on the left.  The random state of training is left as it was."""
        import torch
        from transformers import GenerationConfig

        width, device = max(len(ids) for _, _, ids in asked), self.model.device
        pad = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )
        prompts = torch.tensor([[pad] * (width - len(ids)) + ids for _, _, ids in asked], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, _, ids in asked], device=device)
        settings = GenerationConfig(
            max_new_tokens=self.config.model.max_response_tokens,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_p=1.0,
            top_k=0,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(self._ends()),
        )
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(asked[0][0].seed + asked[0][1])
            made = self.model.generate(input_ids=prompts, attention_mask=mask, generation_config=settings)
        rows = made[:, width:].tolist()
        return [
            self._generation(request, sample, row)
            for (request, sample, _), row in zip(asked, rows, strict=True)
        ]

    def _generation(self, request: GenerationRequest, sample: int, row: list[int]) -> Generation:
        ends = self._ends()
        end = next((place for place, token in enumerate(row) if token in ends), None)
        kept = row if end is None else row[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(
            request.key, sample, text, "length" if end is None else None, len(kept) + (end is not None)
        )

    def _ends(self) -> set[int]:
        own = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
