"""Speed and memory of PSI's forward and backward pass on an 8B shape, or on as many of its layers as fit.

    python -m benchmarks.speed.psi_step            # 1 layer of Llama 3.1 8B, fp32, on a CPU
    python -m benchmarks.speed.psi_step --layers 32 --tokens 16384  # all layers, bf16, on one GPU

Our loss, packed attention and batching with gradient checkpointing, random weights, sequences of between a
quarter and all of `--length`.  Tokens/s count each token once.  MFU counts the model's FLOPs without
recomputation (PaLM, appendix B) against the card's peak of `plan.cards`; the second share is against the rate
of a large matrix product in the same run.  Memory is that of weights, gradients and activations, next to
`recipe=plan`'s parts.  DeepSpeed's optimizer states are not in it: `benchmarks/memory/plan_memory.py`
compares those.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pgenrm_train.backends.sft.attention import register_packed
from pgenrm_train.backends.sft.batches import Encoded, collate
from pgenrm_train.backends.sft.loss import train_in_pieces
from pgenrm_train.cluster.planning.geometry import KNOWN, Geometry
from pgenrm_train.cluster.planning.memory import card_of, psi_phases
from pgenrm_train.config import Config, load

TRAINED = 3  # one in three tokens bears loss
NOT_MEASURED = ("optimizer", "buckets", "Python and libraries", "CUDA context")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("llama31_8b", "qwen3_8b"), default="llama31_8b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="longest sequence")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    config = configuration(args)
    whole = KNOWN[config.model.name]
    geometry = replace(whole, layers=args.layers)
    base = used(args.device)
    model = make(geometry, args.device, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == geometry.parameters, "the plan counts other parameters"
    batches = [
        list(sequences(args.tokens, args.length, geometry.vocabulary, seed)) for seed in range(args.steps)
    ]
    step(model, batches[0], args.device)  # gradients are there from now on
    reset_peak(args.device)
    began = time.perf_counter()
    for batch in batches:
        step(model, batch, args.device)
    seconds = time.perf_counter() - began
    lengths = [len(chat.ids) for batch in batches for chat in batch]
    flops = sum(3 * geometry.forward_flops(length) * length for length in lengths) / seconds
    reached = matmul_rate(args.device, dtype, geometry)
    print(
        f"{args.model}, {args.layers} of {whole.layers} layers, {parameters / 1e9:.2f} billion "
        f"parameters, {str(dtype).removeprefix('torch.')} on {name_of(args.device)}; "
        f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens"
    )
    print(
        f"{sum(lengths) / seconds:.0f} tokens/s, {flops / 1e12:.3f} TFLOP/s: MFU "
        f"{flops / (card_of(config).tflops * 1e12):.1%} of the card's peak, {flops / reached:.1%} of a "
        f"matrix product's {reached / 1e12:.3f} TFLOP/s"
    )
    measured, planned = (peak(args.device) - base) / 2**30, predicted(config, geometry)
    print(
        f"peak memory {measured:.2f} GiB, planned {sum(planned.values()):.2f} GiB "
        f"({sum(planned.values()) / measured - 1:+.0%}): "
        + ", ".join(f"{part} {gib:.2f}" for part, gib in planned.items())
    )


def configuration(args: argparse.Namespace) -> Config:
    cluster = ("cluster=gpu1", "cluster.zero_stage=0", "cluster.offload_optimizer=false")
    return load(
        "recipe=psi",
        f"model={args.model}",
        *(cluster if args.device == "cuda" else ("cluster=cpu",)),
        "psi.gradient_checkpointing=true",
        f"psi.micro_batch_tokens={args.tokens}",
        f"psi.micro_batch_size={-(-args.tokens // args.length)}",  # a CPU's plan counts sequences
        f"model.max_prompt_tokens={args.length - args.length // TRAINED}",
        f"model.max_response_tokens={args.length // TRAINED}",
    )


def make(geometry: Geometry, device: str, dtype: torch.dtype) -> Any:
    config = AutoConfig.for_model(
        "qwen3" if geometry.qk_norm else "llama",
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        tie_word_embeddings=geometry.tied,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=register_packed()
        ).train()
    model.gradient_checkpointing_enable()
    train_in_pieces(model)
    return model


def sequences(tokens: int, length: int, vocabulary: int, seed: int) -> Iterator[Encoded]:
    """Chats of random ids with `tokens` in all; the last third of each bears loss."""
    generator = torch.Generator().manual_seed(seed)
    while tokens > 0:
        size = min(tokens, int(torch.randint(length // 4, length + 1, (), generator=generator)))
        ids = torch.randint(0, vocabulary, (size,), generator=generator).tolist()
        yield Encoded(ids, size - max(1, size // TRAINED), size)
        tokens -= size


def step(model: Any, batch: list[Encoded], device: str) -> None:
    rows = collate(batch, pad=0, packed=True)
    rows = {name: value.to(device) if torch.is_tensor(value) else value for name, value in rows.items()}
    model(**rows).loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()


def predicted(config: Config, geometry: Geometry) -> dict[str, float]:
    """Parts of the plan's fullest moment that are measured here, GiB."""
    phase = max(psi_phases(config, geometry), key=lambda phase: phase.total)
    return {part: gib for part, gib in phase.parts.items() if part not in NOT_MEASURED}


def matmul_rate(device: str, dtype: torch.dtype, geometry: Geometry) -> float:
    """FLOP/s of the MLP's product, the largest of a layer."""
    a = torch.randn(1024, geometry.hidden, device=device, dtype=dtype)
    b = torch.randn(geometry.hidden, geometry.intermediate, device=device, dtype=dtype)
    repeats = 200 if device == "cuda" else 3
    for count in (1, repeats):
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
    return repeats * 2 * a.numel() * geometry.intermediate / (time.perf_counter() - began)


def used(device: str) -> float:
    """Bytes in use before the model is made."""
    return float(torch.cuda.memory_allocated()) if device == "cuda" else peak(device)


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
