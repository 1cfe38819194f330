"""PSI as a page of plain torch: the reference for the training on DeepSpeed.

Same chats, same loss (mean over the answer's tokens), gradient norm 1, warm-up and cosine, AdamW or Muon.
Left out: everything that makes it distributed or resumable.  Needs the folders build_data and build_sec of a
PersonaWorld run.

    python benchmarks/learning/sft_reference.py --run RUN_FOLDER --out FOLDER [--optimizer adamw --seed 1 …]

The last line of FOLDER/curve.jsonl holds, for validation users: cross entropy per answer token of the
teacher's chains; cross entropy in nats of their criteria, and that of the exact posterior; and for chains at
T 0.7 and 0 accuracy by declared and verified totals and the shares of `ChainTruth`.
"""

import argparse
import collections
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from data_builders.teachers.chain_truth import chain_truth
from data_builders.teachers.ideal import IdealReader
from data_builders.teachers.oracle import OracleTeacher, read_criteria
from pgenrm_train.backends.sft.batches import Encoded, encode_chat
from pgenrm_train.backends.sft.checks import encode_rows
from pgenrm_train.chains.chain import Chain, ParseFailure, parse_chain
from pgenrm_train.config import load
from pgenrm_train.prompts.masking import MaskedView, present
from pgenrm_train.prompts.messages import chat_messages, prompt_ids
from pgenrm_train.prompts.writer import histories, load_pairs
from pgenrm_train.records.pairs import Example


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder with build_data and build_sec")
    parser.add_argument("--out", type=Path, required=True, help="folder for curve.jsonl and checkpoint/")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="AdamW's peak")
    parser.add_argument("--muon-rate", type=float, default=0.007)
    parser.add_argument("--hidden", type=int, default=0, help="width; 0: that of the run's base model")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=450, help="validation pairs to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def batches(count: int, args: Any) -> Iterator[list[int]]:
    """Endless batches of indices, epoch after epoch."""
    rng = random.Random(args.seed)
    while True:
        order = rng.sample(range(count), count)
        cut = [order[i : i + args.batch] for i in range(0, count - args.batch + 1, args.batch)]
        rng.shuffle(cut)
        yield from cut


def losses(model: Any, chats: Sequence[Encoded], pad: int) -> tuple[torch.Tensor, list[int]]:
    """Cross entropy of every answer token, chat after chat, and the number of them per chat."""
    width = max(len(chat.ids) for chat in chats)
    ids = torch.full((len(chats), width), pad)
    places = []
    for row, chat in enumerate(chats):
        ids[row, : len(chat.ids)] = torch.as_tensor(np.asarray(chat.ids, dtype=np.int64))
        places.append(torch.arange(chat.loss_from - 1, len(chat.ids) - 1) + row * width)
    flat = torch.cat(places)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[flat]
    return cross_entropy(model.lm_head(hidden), ids.flatten()[flat + 1], reduction="none"), [
        len(p) for p in places
    ]


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Newton–Schulz iteration of Muon in fp32 over a batch of matrices; bf16 is slow on a CPU."""
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            by_shape: dict[Any, list[torch.Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for same in by_shape.values():
                updates = []
                for p in same:
                    state = self.state[p]
                    buffer = state.setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                turned = orthogonalise(torch.stack(updates))
                scale = max(1.0, same[0].shape[0] / same[0].shape[1]) ** 0.5
                for p, update in zip(same, turned, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


def optimisers(model: Any, args: Any) -> list[tuple[Any, float]]:
    """(optimiser, peak rate): Muon for the matrices of hidden layers, AdamW for the rest or for all."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    own = {id(p) for p in matrices} if args.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in own]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    made: list[tuple[Any, float]] = [(adamw, args.learning_rate)]
    return [*made, (Muon(matrices, args.muon_rate, weight_decay=0.01), args.muon_rate)] if own else made


def share_of_rate(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine down to 5 %."""
    warm = max(1, round(0.02 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(model: Any, chats: Sequence[Encoded], pad: int, args: Any) -> dict[str, float]:
    model.train()
    steps, made, feed = (
        round(args.epochs * len(chats) / args.batch),
        optimisers(model, args),
        batches(len(chats), args),
    )
    began, recent = time.thread_time(), collections.deque[float](maxlen=200)
    for step in range(steps):
        for optimiser, peak in made:
            for group in optimiser.param_groups:
                group["lr"] = peak * share_of_rate(step, steps)
        values, _ = losses(model, [chats[i] for i in next(feed)], pad)
        values.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, _ in made:
            optimiser.step()
            optimiser.zero_grad()
        recent.append(float(values.detach().mean()))
        if (step + 1) % 200 == 0:
            print(f"step {step + 1} of {steps}: loss {fmean(recent):.4f}", flush=True)
    return {"steps": steps, "cpu_seconds": time.thread_time() - began, "train_loss": fmean(recent)}


# ---- validation --------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model: Any, tokenizer: Any, examples: Sequence[Example], pad: int) -> dict[str, float]:
    model.eval()
    teacher, reader = OracleTeacher(1), IdealReader()
    asked = [
        chat_messages(MaskedView(e.context, e.history, e.responses), instructions=False) for e in examples
    ]
    answers = [
        encode_chat(tokenizer, [*chat, {"role": "assistant", "content": teacher.write(e)}])
        for chat, e in zip(asked, examples, strict=True)
    ]
    per_chat: list[torch.Tensor] = []
    for first in range(0, len(answers), 100):
        values, counts = losses(model, answers[first : first + 100], pad)
        per_chat += values.split(counts)
    exact = [_nats(reader, example) for example in examples]
    seen = [n for n, nats in enumerate(exact) if nats < UNSEEN]
    result = {
        "loss": float(torch.cat(per_chat).mean()),
        "criteria": fmean(float(per_chat[n][slice(*wish_of(tokenizer, answers[n]))].sum()) for n in seen),
        "criteria_exact": fmean(exact[n] for n in seen),
    }
    prompts = [prompt_ids(tokenizer, chat) for chat in asked]
    for temperature in (0.7, 0.0):
        texts = sample(model, tokenizer, prompts, temperature, pad)
        for name, value in shares(texts, examples, reader).items():
            result[f"{name} at T {temperature:g}"] = value
    return result


UNSEEN = 12.0  # from this many nats on, no training user has the criteria


def _nats(reader: IdealReader, example: Example) -> float:
    """Negative log posterior of the true criteria."""
    posterior, stated = reader.read(example), read_criteria(example.explicit)
    probability = dict(zip(posterior.criteria, posterior.probabilities, strict=True)).get(
        stated and stated[1], 0.0
    )
    return -math.log(max(1e-12, float(probability)))


def wish_of(tokenizer: Any, chat: Encoded) -> tuple[int, int]:
    """Places of the criteria's tokens in the answer: from ` wants ` to the full stop."""
    pieces = [tokenizer.decode([i]) for i in chat.ids[chat.loss_from :]]
    starts = list(itertools.accumulate(map(len, pieces), initial=0))
    text = "".join(pieces)
    first = text.index(" wants ") + len(" wants")
    inside = [n for n, start in enumerate(starts) if first <= start < text.index(".", first)]
    return inside[0], inside[-1] + 1


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], temperature: float, pad: int
) -> list[str]:
    torch.manual_seed(0)
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    for part in (order[i : i + 150] for i in range(0, len(order), 150)):
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in part])
        out = model.generate(
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            do_sample=bool(drawn),
            max_new_tokens=192,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            **drawn,
        )
        for i, row in zip(part, out[:, width:], strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def shares(texts: Sequence[str], examples: Sequence[Example], reader: IdealReader) -> dict[str, float]:
    """Accuracy by both totals, where a tie or an unreadable chain is a miss, and means of `ChainTruth`."""
    hits: dict[str, list[float]] = {"declared": [], "verified": []}
    stated: dict[str, list[float]] = collections.defaultdict(list)
    for text, example in zip(texts, examples, strict=True):
        chain = parse_chain(text)
        for name, own in hits.items():
            totals = (
                None
                if isinstance(chain, ParseFailure)
                else (chain.declared if name == "declared" else chain.verified_scores)
            )
            right = example.chosen_index
            own.append(float(bool(totals) and totals[right] - totals[1 - right] > 1e-9))
        if isinstance(chain, Chain):
            for name, share in asdict(chain_truth(chain, text, example, example.explicit, reader)).items():
                if share is not None:
                    stated[name].append(share)
                    if name == "scores":
                        stated["all_scores"].append(float(share == 1))
    return {name: fmean(values) for name, values in (hits | stated).items()}


def main() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    config = load("recipe=psi", f"run_dir={args.run}")
    start = args.run / "build_sec" / "base"
    tokenizer, shape = AutoTokenizer.from_pretrained(start), AutoConfig.from_pretrained(start)
    if args.hidden:
        shape.hidden_size, shape.intermediate_size = args.hidden, args.hidden * 8 // 3 // 32 * 32
        shape.num_attention_heads = shape.num_key_value_heads = args.hidden // 32
    shape.num_hidden_layers = args.layers or shape.num_hidden_layers
    shape.layer_types = None  # follows the number of layers
    shape = AutoConfig.for_model(**shape.to_dict())
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
    chats = encode_rows(tokenizer, args.run / "build_sec" / "sec.parquet", shape.max_position_embeddings)
    pairs = load_pairs(args.run)
    sampler = histories(config, pairs)
    asked = [pair for pair in pairs if pair.split == "val"][: args.pairs]
    examples = [present(pair, sampler(pair), order) for pair in asked for order in (0, 1)]
    result = {
        **{name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "parameters": model.num_parameters(),
        **train(model, chats, tokenizer.pad_token_id, args),
        **validate(model, tokenizer, examples, tokenizer.pad_token_id),
    }
    with (args.out / "curve.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1), flush=True)
    model.save_pretrained(args.out / "checkpoint")
    tokenizer.save_pretrained(args.out / "checkpoint")


if __name__ == "__main__":
    main()
