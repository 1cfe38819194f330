"""GRPO as a page of plain torch: the reference for the training on veRL.

Same rows, same reward, same loss: advantage (r − mean)/(std + 1e-6) over a prompt's group with std of
ddof 1, token-mean clipped loss at 0.2, temperature 1, end token inside the mask, AdamW betas .9/.999 and
weight decay .01, gradient norm 1, constant rate.  Left out: everything that makes it fast or distributed,
and the KL term.

    python benchmarks/learning/grpo_reference.py --start CHECKPOINT --rows ROWS.parquet --out FOLDER
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from pgenrm_train.curriculum.sampler import CurriculumSampler
from pgenrm_train.rewards.reward import RewardWeights, chain_reward


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, required=True, help="checkpoint in Hugging Face format")
    parser.add_argument(
        "--rows", type=Path, required=True, help="parquet of prompts, as the veRL stages read it"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for metrics.jsonl and checkpoint/")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=16, help="prompts per step")
    parser.add_argument("--group", type=int, default=8, help="chains per prompt")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--response-tokens", type=int, default=160)
    parser.add_argument("--process-weight", type=float, default=0.5)
    parser.add_argument("--judge", default=None, help="module:factory of a judge; none: no process reward")
    parser.add_argument("--judge-kwargs", type=json.loads, default={})
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_judge(name: str | None, kwargs: Mapping[str, Any]) -> Any:
    if name is None:
        return None
    import importlib

    module, _, factory = name.partition(":")
    return getattr(importlib.import_module(module), factory)(**kwargs)


def group_advantages(totals: Sequence[float], *, epsilon: float = 1e-6) -> list[float]:
    """GRPO's group-relative advantages, `(r − mean) / (std + ε)` with the sample standard deviation (ddof 1).

    A group of one, or of equal rewards, teaches nothing: zeros.
    """
    if len(totals) < 2 or max(totals) == min(totals):
        return [0.0] * len(totals)
    mean, deviation = statistics.fmean(totals), statistics.stdev(totals)
    return [(total - mean) / (deviation + epsilon) for total in totals]


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], group: int, limit: int
) -> list[list[int]]:
    """Sample `group` chains per prompt at temperature 1, up to the end token or `limit` tokens."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts for _ in range(group)])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts for _ in range(group)])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=limit,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [_until_end(row.tolist(), tokenizer.eos_token_id) for row in out[:, width:]]


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def reward(
    tokenizer: Any, tokens: list[int], row: Mapping[str, Any], judge: Any, weights: RewardWeights
) -> tuple[float, float]:
    """Total and outcome of one chain; a chain without an end is a format error."""
    extra = row["extra_info"]
    text = tokenizer.decode(tokens, skip_special_tokens=True) if tokens[-1] == tokenizer.eos_token_id else ""
    process = None if judge is None else (lambda _chain: judge(text, extra))
    result = chain_reward(
        text,
        int(row["reward_model"]["ground_truth"]),
        process=process,
        weights=weights,
        n_responses=extra["n_responses"],
    )
    return result.total, result.parts["outcome"]


def log_probs(
    model: Any, prompts: Sequence[list[int]], chains: Sequence[list[int]], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and the mask of chain tokens; both (chains, tokens)."""
    width = max(len(p) + len(c) for p, c in zip(prompts, chains, strict=True))
    ids = torch.tensor(
        [p + c + [pad] * (width - len(p) - len(c)) for p, c in zip(prompts, chains, strict=True)]
    )
    mask = torch.tensor(
        [
            [0] * (len(p) - 1) + [1] * len(c) + [0] * (width - len(p) - len(c))
            for p, c in zip(prompts, chains, strict=True)
        ]
    )
    logits = model(input_ids=ids).logits[:, :-1]
    return -cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"), mask


def update(
    model: Any,
    optimiser: Any,
    prompts: Sequence[list[int]],
    chains: Sequence[list[int]],
    advantages: Sequence[float],
    args: Any,
    pad: int,
) -> float:
    """Take one step; with one mini-batch per step the old policy is the current one, detached."""
    tokens = sum(map(len, chains))
    for first in range(0, len(chains), args.micro_batch):
        part = slice(first, first + args.micro_batch)
        new, mask = log_probs(model, prompts[part], chains[part], pad)
        advantage = torch.tensor(advantages[part])[:, None]
        ratio = (new - new.detach()).exp()
        clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
        loss = -(torch.minimum(ratio * advantage, clipped * advantage) * mask).sum() / tokens
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return float(norm)


def main() -> None:
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rows = pq.read_table(args.rows).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(args.start)
    model = AutoModelForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.999), weight_decay=args.weight_decay
    )
    judge, weights = load_judge(args.judge, args.judge_kwargs), RewardWeights(process=args.process_weight)
    sampler = CurriculumSampler(len(rows), prompts_per_step=args.prompts, steps=args.steps, seed=args.seed)
    with (args.out / "metrics.jsonl").open("w") as metrics:
        for step in range(1, args.steps + 1):
            began = time.monotonic()
            batch = [rows[i] for i in sampler.next_batch(step)]
            prompts = [
                list(
                    tokenizer.apply_chat_template(
                        r["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
                    )
                )
                for r in batch
            ]
            chains = sample(model, tokenizer, prompts, args.group, args.response_tokens)
            repeated = [(p, r) for p, r in zip(prompts, batch, strict=True) for _ in range(args.group)]
            rewards = [
                reward(tokenizer, c, r, judge, weights) for c, (_, r) in zip(chains, repeated, strict=True)
            ]
            totals = [total for total, _ in rewards]
            groups = [totals[i : i + args.group] for i in range(0, len(totals), args.group)]
            advantages = [a for group in groups for a in group_advantages(group)]
            norm = update(
                model, optimiser, [p for p, _ in repeated], chains, advantages, args, tokenizer.pad_token_id
            )
            line = {
                "step": step,
                "stage": "reference",
                "reference/reward/total": statistics.fmean(totals),
                "reference/reward/outcome": statistics.fmean(o for _, o in rewards),
                "reference/grad_norm": norm,
                "reference/response_length": statistics.fmean(map(len, chains)),
                "reference/time/step": time.monotonic() - began,
            }
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            print(line, flush=True)
    model.save_pretrained(args.out / "checkpoint")
    tokenizer.save_pretrained(args.out / "checkpoint")


if __name__ == "__main__":
    main()
