"""Ablation of the reward's weights, R = α·PR + β·OR (METHOD §4), on PersonaWorld.

One CRE per cell, all from one PSI checkpoint.  Cells (α, β): (.5, 1) is the paper's best, (.5, .5) halves
the outcome, (1, 0) is the judge alone, (0, 1) the outcome alone.  A complete cell is kept, so the
benchmark may be killed and started again, or run cell by cell; `--list` prints the open cells:

    python benchmarks/learning/reward_weights.py --run RUN --out runs/weights --seeds 0
    python benchmarks/learning/reward_weights.py --run RUN --out runs/weights --seeds 1 --methods outcome_only

The table gives accuracy (strict, one evaluation seed), differences from the paper's best on the same
pairs, and the paper's own accuracies.  It also has the last value of each reward part; all values are in
the cells' `cre/metrics.jsonl`.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_seeds import SLICES, Cells, arguments, report

CELLS = {
    "paper": (0.5, 1.0),
    "half_outcome": (0.5, 0.5),
    "process_only": (1.0, 0.0),
    "outcome_only": (0.0, 1.0),
}
PUBLISHED = {
    "paper": (71.07, 63.82),
    "half_outcome": (70.65, 63.33),
    "process_only": (69.05, 60.94),
    "outcome_only": (70.22, 62.70),
}
COMPARISONS = [("paper", "psi"), *((name, "paper") for name in CELLS if name != "paper")]
PARTS = ("outcome", "process", "total")


class Weights(Cells):
    """`Cells` with one pair of weights per method."""

    def make(self, method: str, seed: int) -> None:
        process, outcome = CELLS[method]
        folder = self.folder(method, seed)
        self.recipe(
            folder,
            "cre",
            self.psi,
            f"cre.seed={seed}",
            f"cre.process_weight={process}",
            f"cre.outcome_weight={outcome}",
        )
        self.evaluate(folder, folder / "cre" / "checkpoint")

    def last(self, method: str, seed: int) -> dict[str, Any]:
        """The metrics of the last training step."""
        lines = (self.folder(method, seed) / "cre" / "metrics.jsonl").read_text().splitlines()
        return [record for line in lines if "cre/reward/total" in (record := json.loads(line))][-1]


def print_rewards(cells: Weights, methods: Sequence[str], seeds: Sequence[int]) -> None:
    print(f"\n{'':<24}{'α, β':>10}{'paper: CA / PRISM':>22}" + "".join(f"{part:>12}" for part in PARTS))
    for method in methods:
        lines = [cells.last(method, seed) for seed in seeds if cells.predictions(method, seed) is not None]
        parts = [
            [line[f"cre/reward/{part}"] for line in lines if line[f"cre/reward/{part}"] is not None]
            for part in PARTS
        ]
        shown = "".join(f"{statistics.fmean(values):>12.3f}" if values else f"{'—':>12}" for values in parts)
        alpha, beta = CELLS[method]
        print(f"{method:<24}{f'{alpha:g}, {beta:g}':>10}{'{} / {}'.format(*PUBLISHED[method]):>22}{shown}")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], tuple(CELLS), (0,), Path("runs/weights"))
    parser.add_argument("--run", type=Path, required=True, help="run folder with a finished PSI")
    parser.add_argument("--list", action="store_true", help="list complete and open cells, start nothing")
    args = parser.parse_args()
    args.start = args.run / "psi" / "checkpoint"
    cells = Weights(args)
    if args.list:
        for seed in args.seeds:
            for method in args.methods:
                done = cells.predictions(method, seed) is not None
                print(
                    f"{'complete' if done else 'to do':<9} {cells.folder(method, seed)}  "
                    f"α, β = {CELLS[method]}"
                )
        return
    cells.evaluate(cells.folder("psi", None), cells.psi)
    for seed in args.seeds:
        for method in args.methods:
            cells.make(method, seed)
            report(cells, ("psi", *args.methods), args.seeds, COMPARISONS, SLICES)
            print_rewards(cells, args.methods, args.seeds)


if __name__ == "__main__":
    main()
