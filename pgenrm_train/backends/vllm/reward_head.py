"""A reward model with a scalar head: a Bradley–Terry classifier with one logit over a conversation.

    s^i = head(conversation so far, response i)          P(y^i ≻ y^j) = σ(s^i − s^j)

Each response is scored by itself, with the model's own chat template.  The user's history is not shown,
because these models were not trained on one.  Equal pairs of conversation and response in a batch of
questions are scored once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pgenrm_train.config import ModelConfig
from pgenrm_train.errors import ArtifactError, BackendError, first_line
from pgenrm_train.prompts.messages import neutralise
from pgenrm_train.records.pairs import Example

TOKENS_PER_BATCH = 16_384  # padding included


class RewardHead:
    """`model(examples)` yields one float per response for each example.  `checkpoint`: a Hugging Face folder.

    Texts over `model.max_prompt_tokens + model.max_response_tokens` are cut at the left, so that the response
    stays; `cut` counts them.  Raises ArtifactError unless the folder holds a classifier with one logit: the
    folder of a language model would otherwise get a head of random weights.
    """

    def __init__(self, config: ModelConfig, device: str, checkpoint: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        _check_architecture(AutoConfig.from_pretrained(checkpoint), checkpoint)
        self.device = torch.device(device)
        dtype = torch.float32 if device == "cpu" else getattr(torch, config.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        try:
            self.model = (
                AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=dtype)
                .to(self.device)
                .eval()
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise BackendError(
                f"the reward model in {checkpoint} cannot be loaded: {first_line(error)}"
            ) from error
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # the model uses it to find the last token of each row
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.limit = config.max_prompt_tokens + config.max_response_tokens
        self.cut = 0

    def __call__(self, examples: Sequence[Example]) -> Iterator[tuple[float, ...]]:
        rows = [[self.text(example, response) for response in example.responses] for example in examples]
        scores = self._scores(list(dict.fromkeys(text for texts in rows for text in texts)))
        for texts in rows:
            yield tuple(scores[text] for text in texts)

    def close(self) -> None:
        if self.cut:
            print(f"reward head: {self.cut} texts were cut at the left to {self.limit} tokens", flush=True)

    def text(self, example: Example, response: str) -> str:
        """Render the conversation that ends with the response, in the format of the model's training."""
        reserved = tuple(self.tokenizer.all_special_tokens)
        turns = [{"role": m.role, "content": neutralise(m.content, reserved)} for m in example.context]
        turns.append({"role": "assistant", "content": neutralise(response, reserved)})
        if self.tokenizer.chat_template is None:
            return "\n\n".join(turn["content"] for turn in turns)
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False))

    def _scores(self, texts: Sequence[str]) -> dict[str, float]:
        import torch

        ids = [self._ids(text) for text in texts]
        scores: dict[str, float] = {}
        with torch.inference_mode():
            for batch in _batches(ids):
                padded = self.tokenizer.pad(
                    {"input_ids": [ids[i] for i in batch]}, padding_side="right", return_tensors="pt"
                )
                logits = self.model(**padded.to(self.device)).logits[:, 0].float().cpu()
                scores |= {texts[i]: float(score) for i, score in zip(batch, logits, strict=True)}
        return scores

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=self.tokenizer.chat_template is None)["input_ids"])
        self.cut += len(ids) > self.limit
        return ids[-self.limit :]


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield indices of texts of similar length, as many as fit `TOKENS_PER_BATCH` with their padding."""
    batch: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if batch and (len(batch) + 1) * len(ids[i]) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _check_architecture(shape: Any, checkpoint: Path) -> None:
    kinds = getattr(shape, "architectures", None) or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds) or shape.num_labels != 1:
        raise ArtifactError(
            f"{checkpoint} holds {', '.join(kinds) or 'an unknown model'} with {shape.num_labels} labels; "
            "model=reward_head needs a sequence classifier with one"
        )
