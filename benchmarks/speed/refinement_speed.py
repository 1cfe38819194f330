"""Batched refinement of prototypes against loops over samples, on the same samples and threads.

    python benchmarks/speed/refinement_speed.py [--samples 20000] [--dimensions 1024] [--history 3]
        [--loop-samples 200]

Two loops run METHOD §6's equations sample by sample.  `gathered` adds up gradients over a mini-batch and
makes the same updates as the batched pass; `stepwise` makes one optimiser step per sample.  Both are
timed on `--loop-samples` samples, the batched pass on all of them.  Compared are samples per CPU second
on one thread, so that a busy machine matters little.  With more threads the loops fall further behind,
since their products are too small to share.

Prints the rates, the ratios, and the difference of the losses of one step on the same samples.
"""

import argparse
import math
import time

import numpy as np
import torch

from pgenrm_train.config import PrototypesConfig
from pgenrm_train.prototypes.clusters import Prototypes
from pgenrm_train.prototypes.refinement import Refinement, RefinementBatch, RefinementSettings


def random_world(n: int, d: int, h: int, k: int) -> tuple[Prototypes, RefinementBatch]:
    rng = np.random.default_rng(0)

    def unit(*shape: int) -> np.ndarray:
        x = rng.standard_normal((*shape, d), dtype=np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    users = np.char.add("u", (np.arange(n) // 4).astype(str))
    mask = np.arange(h) < rng.integers(1, h + 1, size=(n, 1))
    samples = RefinementBatch(unit(n), unit(n), unit(n), unit(n, h), unit(n, h), unit(n, h), mask, users)
    return Prototypes(unit(k), rng.integers(0, k, n), unit(n), users), samples


def loop_step(state: Refinement, samples: RefinementBatch, rows: np.ndarray) -> float:
    """One mini-batch, sample by sample."""
    c, maps = state.settings, state.maps
    state.map_optimiser.zero_grad()
    state.row_optimiser.zero_grad()
    total = 0.0
    for i in rows:
        label = torch.tensor(state.labels[i])
        a = torch.nn.functional.embedding(label[None], state.A, sparse=True)[0]
        q, chosen, rejected = (
            torch.from_numpy(x[i]) for x in (samples.query, samples.chosen, samples.rejected)
        )
        kept = samples.mask[i]
        past = samples.history_chosen[i][kept] - samples.history_rejected[i][kept]
        items = torch.from_numpy(np.concatenate([samples.history_query[i][kept], past], axis=1))
        o = torch.sigmoid(items @ maps["W"].T)
        alpha = torch.softmax((o @ q + c.rho * (o @ a)) / math.sqrt(len(q)), dim=0)
        z = a + c.lambda_query * (maps["W_q"] @ q) + c.lambda_summary * (maps["W_s"] @ (alpha @ o))
        penalty = c.lambda_centre * (a - state.mean[label]).square().sum()
        penalty = penalty + c.lambda_trajectory * (a - state.previous[label]).square().sum()
        loss = (penalty - torch.nn.functional.logsigmoid(z @ chosen - z @ rejected)) / len(rows)
        loss.backward()
        total += loss.item()
    state.map_optimiser.step()
    state.row_optimiser.step()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--history", type=int, default=3)
    parser.add_argument("--prototypes", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--loop-samples", type=int, default=200)
    args = parser.parse_args()

    torch.set_num_threads(1)
    prototypes, samples = random_world(args.samples, args.dimensions, args.history, args.prototypes)
    settings = RefinementSettings.of(PrototypesConfig(), seed=0)
    shared = np.arange(min(args.loop_samples, args.samples))
    loop, batched = (Refinement(prototypes, settings) for _ in range(2))
    loop_step(loop, samples, shared[:4])
    batched.step(batched.batch(samples, shared[:4]))  # both warm, both one step further

    start = time.process_time()
    losses = [loop_step(loop, samples, shared)]
    loop_rate = len(shared) / (time.process_time() - start)
    losses.append(batched.step(batched.batch(samples, shared)))
    start = time.process_time()
    for row in shared:
        loop_step(loop, samples, np.array([row]))
    stepwise_rate = len(shared) / (time.process_time() - start)

    order = np.random.default_rng(0).permutation(args.samples)
    start = time.process_time()
    batched.epoch(samples, [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)])
    batched_rate = args.samples / (time.process_time() - start)

    print(
        f"samples {args.samples}, d {args.dimensions}, h {args.history}, k {args.prototypes}; "
        "samples per CPU second"
    )
    for name, rate in (("gathered", loop_rate), ("stepwise", stepwise_rate)):
        print(
            f"{name} loop {rate:8.0f} ({len(shared)} samples): "
            f"batched is {batched_rate / rate:.1f} times as fast"
        )
    print(
        f"batched       {batched_rate:8.0f} ({args.samples} samples, one epoch in batches of "
        f"{args.batch_size})"
    )
    print(f"losses of the shared step differ by {abs(losses[0] - losses[1]):.1e}")


if __name__ == "__main__":
    main()
