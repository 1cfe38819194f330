"""Time of all metrics on a million predictions, against plain pandas for the same numbers.

    python benchmarks/speed/metrics_speed.py [--predictions 1000000] [--users 2000] [--draws 2000]
        [--baseline-draws 50]

`report` is `eval.metrics.accuracy.accuracy_report` (strict, all protocols, slices by kind, every interval
with --draws draws), `slices` and `calibration` are the additions of a report, `difference` is a paired
comparison of two such tables.

The baseline is the obvious first version: a groupby for each step, and a bootstrap that joins the drawn
users' rows and averages them.  It is timed on --baseline-draws draws of one interval and scaled up.  Both
must give the same accuracy and nearly the same interval, which are printed.  `--users` at its limit (one
pair per user) is the hardest case for a bootstrap over users.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from eval.metrics.accuracy import accuracy_report, paired_difference
from eval.metrics.calibration import calibration
from eval.metrics.slices import DIMENSIONS, slice_rows

SEEDS, SAMPLES = 5, 4


def predictions(n: int, users: int, seed: int) -> pd.DataFrame:
    """n rows of random scores: pairs × 2 orders × 5 seeds × 4 samples."""
    pairs = max(1, n // (2 * SEEDS * SAMPLES))
    grid = pd.MultiIndex.from_product([range(pairs), (0, 1), range(SEEDS), range(SAMPLES)])
    pair, order, evaluation_seed, sample = (grid.get_level_values(i).to_numpy() for i in range(4))
    scores = np.random.default_rng(seed).integers(1, 11, size=(len(grid), 2)).astype(float)
    return pd.DataFrame(
        {
            "pair_id": pd.Series(np.char.add("p", pair.astype(str))),
            "user_id": pd.Series(np.char.add("u", (pair % users).astype(str))),
            "order": order,
            "seed": evaluation_seed,
            "sample": sample,
            "score_chosen": scores[:, 0],
            "score_rejected": scores[:, 1],
            "failure": None,
            "kind": np.where(pair % 3 == 0, "hard", "easy"),
        }
    )


def labels(table: pd.DataFrame) -> pd.DataFrame:
    """Four labels in every dimension."""
    pairs = table[["pair_id", "user_id"]].drop_duplicates().reset_index(drop=True)
    return pairs.assign(
        **{name: (np.arange(len(pairs)) // (i + 1) % 4).astype(str) for i, name in enumerate(DIMENSIONS)}
    )


def plain_pandas(table: pd.DataFrame, draws: int, seed: int) -> tuple[float, list[float], float, float]:
    """Accuracy, 95 % interval, and seconds of the accuracy and of the bootstrap."""
    start = time.perf_counter()
    means = table.groupby(["user_id", "pair_id", "seed", "order"])[["score_chosen", "score_rejected"]].mean()
    hits = (
        (means["score_chosen"] > means["score_rejected"])
        .groupby(["user_id", "pair_id"])
        .mean()
        .reset_index(name="hit")
    )
    accuracy, counted = hits["hit"].mean(), time.perf_counter()
    rng, names = np.random.default_rng(seed), hits["user_id"].unique()
    drawn = [
        pd.DataFrame({"user_id": rng.choice(names, len(names))}).merge(hits, on="user_id")["hit"].mean()
        for _ in range(draws)
    ]
    return accuracy, list(np.percentile(drawn, [2.5, 97.5])), counted - start, time.perf_counter() - counted


def timed(what: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return what(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("predictions", 1_000_000),
        ("users", 2000),
        ("draws", 2000),
        ("baseline-draws", 50),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    a, b = (predictions(args.predictions, args.users, seed) for seed in (0, 1))
    print(
        f"{len(a)} predictions, {a['pair_id'].nunique()} pairs, {a['user_id'].nunique()} users, "
        f"{args.draws} draws"
    )
    settings: dict[str, Any] = {"draws": args.draws, "seed": 0}
    report, seconds = timed(lambda: accuracy_report(a, **settings))
    spent = {"report": seconds}
    spent["slices"] = timed(lambda: slice_rows(a, labels(a), protocol="strict", **settings))[1]
    spent["calibration"] = timed(lambda: calibration(a, **settings))[1]
    spent["difference"] = timed(lambda: paired_difference(a, b, **settings))[1]
    accuracy, interval, counting, drawing = plain_pandas(a, args.baseline_draws, 0)
    for name, value in spent.items():
        print(f"{name:12s} {value:7.2f} s")
    print(f"{'all':12s} {sum(spent.values()):7.2f} s")
    baseline = counting + drawing * args.draws / args.baseline_draws
    print(
        f"plain pandas {baseline:7.2f} s for one accuracy ({counting:.2f} s) and one interval "
        f"({args.baseline_draws} draws × {args.draws / args.baseline_draws:g})"
    )
    print(
        f"plain pandas ÷ report: {baseline / spent['report']:.1f}, with one interval against "
        f"{3 + 1 + len(report['slices'])}"
    )
    print(
        f"accuracy {report['accuracy']:.4f} and {accuracy:.4f}; "
        f"interval {_shown(report['ci95'])} and {_shown(interval)}"
    )


def _shown(interval: list[float]) -> str:
    return f"[{interval[0]:.4f}, {interval[1]:.4f}]"


if __name__ == "__main__":
    main()
