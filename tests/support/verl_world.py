"""A world small enough to learn in seconds: which of two responses names the trait that the user likes?

Used by the veRL tests and by hand for timing: `python tests/support/verl_world.py FOLDER` writes a checkpoint
and rows.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRAITS = ("brief", "warm", "exact", "funny", "formal", "vivid", "plain", "bold")
BATCH = 16
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def example(number: int, seed: int = 0) -> dict[str, Any]:
    """A row in the schema that veRL stages read."""
    draw = random.Random(seed * 1_000_003 + number)
    liked, other = draw.sample(TRAITS, 2)
    chosen, order = draw.randrange(2), draw.randrange(2)
    texts = [liked, other] if chosen == 0 else [other, liked]
    prompt = f"user likes {liked} .\nresponse_1 is {texts[0]} .\nresponse_2 is {texts[1]} ."
    extra = {
        "index": number,
        "pair_id": f"p{number}",
        "user_id": f"u{number % 7}",
        "order": order,
        "kind": "easy",
        "n_responses": 2,
        "criteria": json.dumps({"trait": liked}),
        "explicit": json.dumps({"criteria": f"likes {liked}"}),
    }
    return {
        "data_source": "verl_world",
        "prompt": [{"role": "user", "content": prompt}],
        "reward_model": {"style": "rule", "ground_truth": str(chosen)},
        "extra_info": extra,
    }


def chain(trait: str, scores: tuple[int, int]) -> str:
    body = {
        "rationale": f"likes {trait}",
        "better_response": {"response_1": scores[0], "response_2": scores[1]},
    }
    return f"user likes {trait} . <JSON_START>{json.dumps(body)}<JSON_END>"


def unreliable_judge() -> Any:
    """A judge: 1 if the chain names the withheld trait, else 0; null for every sixth pair."""

    def judge(chain_text: str, example: Mapping[str, Any]) -> float | None:
        if example["index"] % 6 == 0:
            return None
        return float(json.loads(example["criteria"])["trait"] in chain_text)

    return judge


def strict_judge() -> Any:
    """A second judge, never pleased by more than a quarter; it must not see a training chain."""

    def judge(chain_text: str, example: Mapping[str, Any]) -> float | None:
        return 0.25 if chain_text else None

    return judge


def dead_judge() -> Any:
    """A judge that never gives a verdict."""
    return lambda chain_text, example: None


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    """The same pair in the other order."""
    text, extra = row["prompt"][0]["content"], row["extra_info"]
    first, second = (line.split(" is ")[1] for line in text.splitlines()[1:])
    other = f"{text.splitlines()[0]}\nresponse_1 is {second}\nresponse_2 is {first}"
    return row | {
        "prompt": [{"role": "user", "content": other}],
        "reward_model": {"style": "rule", "ground_truth": str(1 - int(row["reward_model"]["ground_truth"]))},
        "extra_info": extra | {"order": 1 - extra["order"]},
    }


def misled(row: dict[str, Any]) -> dict[str, Any]:
    """The same question with another user's taste in the prompt, as a probe of the validation slice."""
    prompt, extra = row["prompt"][0]["content"], row["extra_info"]
    other = next(trait for trait in TRAITS if trait not in prompt)
    text = prompt.replace(f"user likes {json.loads(extra['criteria'])['trait']} ", f"user likes {other} ", 1)
    return row | {
        "prompt": [{"role": "user", "content": text}],
        "extra_info": extra | {"probe": "swapped_history", "explicit": "{}"},
    }


def write_rows(
    path: Path, count: int, seed: int = 0, both_orders: bool = False, turned: bool = False
) -> Path:
    """Write rows; `turned`: in the other order; `both_orders`: in both, and each once more as a probe."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [swapped(row) if turned else row for row in (example(i, seed) for i in range(count))]
    if both_orders:
        rows += [swapped(row) for row in rows]
        rows += [misled(row) for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_checkpoint(
    folder: Path,
    *,
    sft_steps: int = 150,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    shape: str = "qwen2",
) -> Path:
    """A model that has learnt the format of a chain and little else: its scores are nearly random.

    `shape`: qwen2 ties its embeddings, llama and qwen3 do not.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # matrices this small lose more to waiting threads than they gain
    _write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        shape,
        head_dim=32,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=shape == "qwen2",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _teach(model, tokenizer, sft_steps, seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [example(i)["prompt"][0]["content"] for i in range(200)]
    texts += [chain(trait, (a, b)) for trait in TRAITS for a in range(1, 10) for b in range(1, 10)]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def _teach(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    import torch

    draw = random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        sequences = []
        for _ in range(BATCH):
            row = example(draw.randrange(10**6), seed=7)
            trait = (
                json.loads(row["extra_info"]["criteria"])["trait"]
                if draw.random() < 0.7
                else draw.choice(TRAITS)
            )
            scores = (draw.randint(1, 9), draw.randint(1, 9))
            prompt = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            sequences.append((prompt, tokenizer(chain(trait, scores) + "<|im_end|>")["input_ids"]))
        width = max(len(p) + len(c) for p, c in sequences)
        ids = torch.full((BATCH, width), tokenizer.pad_token_id)
        labels = torch.full((BATCH, width), -100)
        for i, (prompt, answer) in enumerate(sequences):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps) + 1e-4
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def merged_by_verl(checkpoint: Path, out: Path) -> Any:
    """The model that veRL's own merger makes of an FSDP checkpoint; with LoRA, unmerged under peft."""
    import torch
    from transformers import AutoModelForCausalLM

    command = [
        "verl.model_merger",
        "merge",
        "--backend",
        "fsdp",
        "--local_dir",
        str(checkpoint / "actor"),
        "--target_dir",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    if not (out / "lora_adapter").exists():
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, out / "lora_adapter", torch_dtype=torch.float32)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_checkpoint(target / "start")
    write_rows(target / "rows.parquet", 256)
