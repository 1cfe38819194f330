"""Draws from ten million pairs, against one `numpy.random.Generator.choice(p=…)` per draw.

    python benchmarks/speed/curriculum_sampler.py [--pairs 10000000] [--batch 512] [--steps 200]
        [--naive-draws 20] [--users 200000]

The naive sampler keeps one probability per pair and draws one pair at a time, for which numpy sums all of
them. Printed, from one run: set-up seconds, bytes per pair (of the arrays kept, by tracemalloc), draws
per second of processor time, the ratio of the two rates, and the size and time of a saved state.
"""

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from pgenrm_train.curriculum.sampler import CurriculumSampler, PairFacts, Schedule


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time, and the result of `work`."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def ours(
    args: argparse.Namespace,
    hard: np.ndarray,
    suspect: np.ndarray,
    users: np.ndarray | None,
    naive_rate: float,
) -> None:
    def build() -> CurriculumSampler:
        return CurriculumSampler(
            args.pairs,
            prompts_per_step=args.batch,
            steps=args.steps,
            seed=0,
            schedule=Schedule("self_paced"),
            facts=PairFacts(hard, suspect, users),
        )

    tracemalloc.start()
    seconds, sampler = timed(build)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    def train() -> None:
        for step in range(1, args.steps + 1):
            batch = sampler.next_batch(step)
            sampler.observe((pair, 2, 4) for pair in batch)

    spent, _ = timed(train)
    rate = args.steps * args.batch / spent
    saved, state = timed(lambda: json.dumps(sampler.state_dict()))
    print(
        f"{'user-balanced' if users is not None else 'plain':<14} set-up {seconds:6.1f} s, "
        f"{kept / args.pairs:5.1f} bytes per pair kept ({peak / args.pairs:.1f} at the peak), "
        f"{rate:9,.0f} draws/s with observations: {rate / naive_rate:,.0f} times as fast; "
        f"state of {args.steps} steps {len(state) / 1e6:.1f} MB in {saved:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--naive-draws", type=int, default=20)
    parser.add_argument("--users", type=int, default=200_000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rates = rng.integers(0, 5, args.pairs) / 4
    hard, suspect = (rates >= 0.25) & (rates <= 0.75), rates == 0
    weights = np.where(hard, 0.5 / hard.sum(), 0.5 / (~hard).sum())
    spent, _ = timed(lambda: [rng.choice(args.pairs, p=weights) for _ in range(args.naive_draws)])
    naive_rate = args.naive_draws / spent
    print(f"{args.pairs:,} pairs, {args.users:,} users, {args.steps} steps of {args.batch}")
    print(
        f"{'choice(p=…)':<14} {weights.nbytes / args.pairs:.1f} bytes per pair kept, "
        f"{naive_rate:9,.1f} draws/s"
    )
    ours(args, hard, suspect, None, naive_rate)
    ours(args, hard, suspect, rng.integers(0, args.users, args.pairs), naive_rate)


if __name__ == "__main__":
    main()
