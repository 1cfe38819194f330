"""Samples saved by adaptive stopping, and the cost in accuracy.

Replays the rule of `pgenrm_train.scaling.stopping` on full pools of chains.

    python benchmarks/learning/adaptive_stopping.py [--budget 16] [--pairs 4000]
        [--predictions runs/…/evaluate/predictions.parquet]

Simulated pools: a pair's true mean margin is normal, and a vote is right as often as the margin
implies. Chains scatter around the margin, are rounded to half points, and 3 % fail.  `agreement` is the
scatter in units of the spread of true margins: small where chains repeat each other.  `--predictions`
adds the pools of an evaluation.

Prints the share of own samples saved, the accuracy (strict, both orders) with all samples and with the
rule, and the share of verdicts that differ.  Seeds are fixed.
"""

import argparse

import numpy as np

from pgenrm_train.scaling.stopping import looks, replay


def simulated(pairs: int, budget: int, scatter: float, seed: int = 0) -> np.ndarray:
    """Margins (2 × pairs, budget) for the response that the user chose."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(rng.normal(0.6, 1.0, pairs), 2)
    bias = rng.normal(0, 0.3, 2 * pairs)  # of the presentation order
    margins = (
        np.round(2 * (truth + bias)[:, None] + 2 * scatter * rng.normal(size=(2 * pairs, budget)), 0) / 2
    )
    margins[rng.random(margins.shape) < 0.03] = np.nan
    return margins


def verdicts(margins: np.ndarray, used: np.ndarray) -> np.ndarray:
    drawn = np.where(np.arange(margins.shape[1]) < used[:, None], margins, np.nan)
    return np.sign(np.round(np.nansum(drawn, axis=1), 9))


def show(name: str, margins: np.ndarray, alphas: tuple[float, ...]) -> None:
    full = verdicts(margins, np.full(len(margins), margins.shape[1]))
    for alpha in alphas:
        used = replay(margins, alpha)
        early = verdicts(margins, used)
        print(
            f"{name:24} alpha {alpha:<4}: {1 - used.mean() / margins.shape[1]:5.1%} of samples saved, "
            f"accuracy {(full > 0).mean():.2%} → {(early > 0).mean():.2%} "
            f"({100 * ((early > 0).mean() - (full > 0).mean()):+.2f} points), "
            f"verdicts that differ {(full != early).mean():.2%}"
        )


def pools(path: str) -> dict[str, np.ndarray]:
    """Margins of every pool of own samples, by model and study."""
    import pandas as pd

    frame = pd.read_parquet(path)
    frame = frame[frame["source"] == "ind"]
    by_pool = {}
    for (model, study), part in frame.groupby(["model", "set"]):
        wide = part.assign(margin=(part["score_chosen"] - part["score_rejected"]).astype(float)).pivot_table(
            index=["pair_id", "user_id", "order", "seed"],
            columns="sample",
            values="margin",
            dropna=False,
            observed=True,
        )
        wide = wide.loc[
            wide.index.isin(pd.MultiIndex.from_frame(part[["pair_id", "user_id", "order", "seed"]]))
        ]
        by_pool[f"{model} {study}"] = wide.to_numpy()
    return by_pool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--predictions")
    args = parser.parse_args()
    alphas = (0.05, 0.1, 0.2)
    print(f"looks at {', '.join(f'{a}: {looks(args.budget, a)}' for a in alphas)} of {args.budget} samples")
    for scatter in (0.3, 0.7, 1.5):
        show(f"simulated, agreement {scatter}", simulated(args.pairs, args.budget, scatter), alphas)
    for name, margins in (pools(args.predictions) if args.predictions else {}).items():
        show(f"{name}, {margins.shape[1]}", margins, alphas)


if __name__ == "__main__":
    main()
