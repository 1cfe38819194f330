"""Memory and time per token of one PSI step as the sequence grows.

    python -m benchmarks.memory.psi_length [--hidden 256] [--layers 4]

Forward and backward, with gradient checkpointing as shipped for 8B.  A Qwen 2 of random weights reads one
sequence, a third of it trained.  Each length runs in a process of its own; its peak is the growth of the
resident set after a short first step.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pgenrm_train.backends.sft.batches import Encoded, collate
from pgenrm_train.backends.sft.loss import train_in_pieces

LENGTHS = (512, 1024, 2048, 4096, 8192)
VOCABULARY = 32_000


def make(hidden: int, layers: int) -> Qwen2ForCausalLM:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
    }
    heads = {
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": max(LENGTHS),
    }
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, attn_implementation="sdpa")).train()
    model.gradient_checkpointing_enable()
    train_in_pieces(model)
    return model


def step(model: Qwen2ForCausalLM, length: int) -> None:
    chat = Encoded(torch.randint(0, VOCABULARY, (length,)).tolist(), 2 * length // 3, length)
    model(**collate([chat], pad=0, packed=False)).loss.backward()


def measure(length: int, hidden: int, layers: int) -> tuple[float, float]:
    """Peak KiB and CPU milliseconds per token."""
    torch.set_num_threads(1)
    model = make(hidden, layers)
    step(model, 32)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    step(model, length)
    spent = time.process_time() - began
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / length, 1000 * spent / length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.length:
        print(*measure(args.length, args.hidden, args.layers))
        return
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory.psi_length",
        f"--hidden={args.hidden}",
        f"--layers={args.layers}",
    ]
    print(
        f"{args.layers} layers of width {args.hidden}, vocabulary {VOCABULARY}; a third of the tokens trained"
    )
    for length in LENGTHS:
        done = subprocess.run([*command, f"--length={length}"], capture_output=True, text=True, check=True)
        memory, milliseconds = map(float, done.stdout.split())
        print(f"{length:6} tokens   {memory:7.1f} KiB per token   {milliseconds:6.3f} ms per token")


if __name__ == "__main__":
    main()
