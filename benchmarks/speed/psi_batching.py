"""Tokens/s and share of padding of PSI's three layouts, on the lengths of a real chain set.

    python -m benchmarks.speed.psi_batching RUN/build_sec [--steps 8] [--batch 32] [--micro 8] [--spread]

Every layout takes the same sequences in the same steps, so ratios compare equal work.  Layouts alternate
by step, so that a busy machine slows all equally.  Tokens are real ones, without padding; time is CPU
time of this process.  The packed layout runs PyTorch's kernel one sequence at a time.  `--spread` cuts
each chat to between a tenth and all of its length, for sets whose lengths vary more than PersonaWorld's.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from pgenrm_train.backends.sft.attention import register_packed
from pgenrm_train.backends.sft.batches import Batching, Encoded, Layout, StepOrder, collate, encode_chat
from pgenrm_train.backends.sft.loss import train_in_pieces


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="build_sec of a run: sec.parquet and base/")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--micro", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument(
        "--spread", action="store_true", help="cut each chat to between a tenth and all of its length"
    )
    parser.add_argument("--chats", type=int, default=2000, help="chats to use; build_sec has shuffled them")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def load(folder: Path, count: int, spread: bool) -> tuple[Any, list[Encoded], int]:
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, attn_implementation=register_packed()
    )
    train_in_pieces(model)
    rows = pq.read_table(folder / "sec.parquet", columns=["messages"])["messages"][:count].to_pylist()
    chats = [encode_chat(tokenizer, messages) for messages in rows]
    if spread:
        generator = torch.Generator().manual_seed(0)
        kept = (10 ** -torch.rand(len(chats), generator=generator)).tolist()
        chats = [
            _cut(chat, max(8, int(len(chat.ids) * share))) for chat, share in zip(chats, kept, strict=True)
        ]
    return model, chats, tokenizer.pad_token_id


def _cut(chat: Encoded, length: int) -> Encoded:
    return Encoded(chat.ids[:length], min(chat.loss_from, length // 2), length)


def _step(order: StepOrder, step: int) -> list[tuple[int, ...]]:
    return list(order)[step * order.accumulation : (step + 1) * order.accumulation]


def run_step(
    model: Any, chats: list[Encoded], chosen: list[tuple[int, ...]], layout: str, pad: int
) -> tuple[float, int, int]:
    """CPU seconds, real tokens, places in the rows."""
    began, tokens, places = time.process_time(), 0, 0
    for indices in chosen:
        batch = collate([chats[i] for i in indices], pad=pad, packed=layout == "packed")
        tokens += sum(len(chats[i].ids) for i in indices)
        places += batch["input_ids"].numel()
        model(**batch).loss.backward()
    model.zero_grad()
    return time.process_time() - began, tokens, places


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model, chats, pad = load(args.folder, args.chats, args.spread)
    lengths = [len(chat.ids) for chat in chats]
    sizes = {Layout.PACKED: args.micro * sum(lengths) // len(lengths)}  # tokens
    orders = {n: StepOrder(lengths, Batching(n, args.batch, sizes.get(n, args.micro)), 0) for n in Layout}
    totals = {layout: [0.0, 0, 0] for layout in Layout}
    for step in range(args.steps + 1):
        for layout in Layout:
            measured = run_step(model, chats, _step(orders[layout], step), layout, pad)
            if step:  # the first step warms up
                totals[layout] = [a + b for a, b in zip(totals[layout], measured, strict=True)]
    print(
        f"{len(chats)} chats, {min(lengths)} to {max(lengths)} tokens; {args.batch} sequences per step, "
        f"{args.micro} per micro-batch"
    )
    seconds, tokens, _ = totals["padded"]
    for layout, (spent, real, places) in totals.items():
        rate, ratio = real / spent, (real / spent) / (tokens / seconds)
        print(f"{layout:8} padding {1 - real / places:6.1%}   {rate:8.0f} tokens/s   {ratio:.2f} × padded")


if __name__ == "__main__":
    main()
