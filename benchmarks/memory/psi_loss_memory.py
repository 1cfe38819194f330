"""Peak memory and time of cross entropy in pieces against the whole, at a vocabulary of 128k.

    python -m benchmarks.memory.psi_loss_memory [--tokens 2048] [--hidden 64]

Forward and backward of head and loss alone.  Each way runs in a process of its own; its peak is the
growth of the resident set.  The hidden size is small, so that logits dominate.  Ratios are to the whole.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

from pgenrm_train.backends.sft.loss import PIECE, weighted_loss

VOCABULARY = 128_256  # Llama 3.1


def measure(piece: int, tokens: int, size: int) -> tuple[float, float, float]:
    """Peak MiB, CPU seconds and loss of one forward and backward pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = torch.nn.Linear(size, VOCABULARY, bias=False)
    hidden = torch.randn(tokens, size, requires_grad=True)
    labels, weights = torch.randint(0, VOCABULARY, (tokens,)), torch.ones(tokens)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    loss = weighted_loss(head, hidden, labels, weights, VOCABULARY, piece)
    loss.backward()
    spent = time.process_time() - began
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, spent, loss.item() / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--piece", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.piece:
        print(*measure(args.piece, args.tokens, args.hidden))
        return
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory.psi_loss_memory",
        f"--tokens={args.tokens}",
        f"--hidden={args.hidden}",
    ]
    print(f"{args.tokens} trained tokens, vocabulary {VOCABULARY}, hidden size {args.hidden}")
    first: list[float] = []
    for name, piece in (
        ("whole", args.tokens * VOCABULARY),
        ("in pieces", PIECE),
        ("quarter pieces", PIECE // 4),
    ):
        done = subprocess.run([*command, f"--piece={piece}"], capture_output=True, text=True, check=True)
        memory, seconds, loss = map(float, done.stdout.split())
        first = first or [memory, seconds]
        print(
            f"{name:15} peak {memory:7.0f} MiB ({memory / first[0]:.2f} ×)   "
            f"{seconds:6.2f} s ({seconds / first[1]:.2f} ×)   loss {loss:.6f}"
        )


if __name__ == "__main__":
    main()
