"""What is the hard-negative curriculum worth?  Schedules against controls from the same CRE checkpoints, at an equal budget of chains.

For each seed CRE is trained from one run's PSI checkpoint, and from it one curriculum an arm:

    without process reward   uniform · linear · anti · self_paced
    with process reward      uniform_process · linear_process

Equal budget: a schedule spends K chains a pair to measure hardness before it trains, so the uniform arms, which measure nothing,
train as many steps longer as those chains are worth.  All arms of a seed draw from the same rows, and the measurement is made once
and handed on.  Every checkpoint answers the same test pairs (strict, both orders).  A cell that is complete is kept, so the benchmark
may be killed and started again, or run piece by piece; `--list` says what there is to do and starts nothing:

    python benchmarks/curriculum_proof.py --run runs/personaworld-nano-demo --out runs/proof --list
    python benchmarks/curriculum_proof.py --run runs/personaworld-nano-demo --out runs/proof --seeds 0 --methods cre uniform linear

After each cell the table is printed and `proof.html` and `proof.md` are written to `--out`: accuracy by arm, and differences on the
same pairs with the standard error over training seeds and the 95 % interval over users.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from training_seeds import Cells, accuracy, arguments, checked_run, difference, part, report

from eval.metrics import accuracy_report
from eval.report import Report, Section, write_markdown, write_report
from pgenrm_train.config import Config, load

ARMS = {
    "uniform": ("curriculum.schedule=uniform",),
    "linear": ("curriculum.schedule=linear",),
    "anti": ("curriculum.schedule=anti",),
    "self_paced": ("curriculum.schedule=self_paced",),
    "uniform_process": ("curriculum.schedule=uniform", "curriculum.process_weight=0.5"),
    "linear_process": ("curriculum.schedule=linear", "curriculum.process_weight=0.5"),
}
METHODS = ("cre", *ARMS)
COMPARISONS = (
    ("linear", "uniform"), ("self_paced", "uniform"), ("anti", "uniform"), ("linear", "anti"), ("uniform", "cre"), ("linear", "cre"),
    ("linear_process", "uniform_process"), ("linear", "linear_process"),
)  # fmt: skip
SLICES = (None, "unseen", "unseen easy", "unseen hard", "unseen rival")
TEST = (
    "data.heldout_users=600",
    "data.max_test_pairs=2400",
)  # held-out users are drawn after the training users, who stay the same


class Proof(Cells):
    """`Cells` with an arm of the curriculum a method."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.overrides = [*TEST, *args.overrides]

    def make(self, method: str, seed: int) -> None:
        if method not in ARMS:
            super().make(method, seed)
            return
        folder, start = self.folder(method, seed), self.folder("cre", seed) / "cre" / "checkpoint"
        self.hand_on_mining(folder, seed)
        self.recipe(
            folder, "curriculum", start, f"curriculum.seed={seed}", f"curriculum.steps={self.steps(method)}", *ARMS[method]
        )
        self.evaluate(folder, folder / "curriculum" / "checkpoint")

    def config(self, method: str) -> Config:
        return load("recipe=curriculum", *self.overrides, *ARMS[method])

    def steps(self, method: str) -> int:
        """The arm's optimiser steps: those of the configuration, and for an arm that does not mine what mining costs the others."""
        curriculum = self.config(method).curriculum
        saved = self.mining() if curriculum.schedule == "uniform" else 0
        return int(curriculum.steps + round(saved / (curriculum.prompts_per_step * curriculum.group_size)))

    def mining(self) -> int:
        """Chains that a schedule spends on measuring."""
        curriculum = self.config("linear").curriculum
        return int(curriculum.rows * curriculum.mining_samples) if curriculum.mine else 0

    def chains(self, method: str) -> int:
        """Chains of the arm in all."""
        curriculum = self.config(method).curriculum
        mined = 0 if curriculum.schedule == "uniform" else self.mining()
        return int(self.steps(method) * curriculum.prompts_per_step * curriculum.group_size + mined)

    def hand_on_mining(self, folder: Path, seed: int) -> None:
        """The same checkpoint and rows give the same measurement; the cache refuses another checkpoint's."""
        mine = folder / "curriculum" / "mining.parquet"
        made = [self.folder(arm, seed) / "curriculum" / "mining.parquet" for arm in ARMS]
        if not mine.exists() and (other := next((path for path in made if path.exists()), None)):
            mine.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(other, mine.with_suffix(".tmp"))
            mine.with_suffix(".tmp").rename(mine)

    def list(self, methods: Sequence[str], seeds: Sequence[int]) -> None:
        for seed in seeds:
            for method in methods:
                done = self.predictions(method, seed) is not None
                cost = f"{self.steps(method)} steps, {self.chains(method)} chains, " if method in ARMS else ""
                print(
                    f"{'complete' if done else 'to do':<9} {method + '-' + str(seed):<20} {cost}{' '.join(ARMS.get(method, ()))}"
                )


def publish(cells: Proof, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """The table and the plot, of the cells that there are."""
    found = {(m, s): p for m in methods for s in seeds if (p := cells.predictions(m, s)) is not None}
    arms = [row for method in methods if (row := _arm(found, method, seeds, cells))]
    pairs = {pair for table in found.values() for pair in table["pair_id"]}
    write_both(
        cells.out,
        Report(
            title="What the curriculum is worth",
            run={"pairs": len(pairs), "seeds": list(seeds), "protocol": "strict (both orders)", "interval": "95 %, over users"},
            stages=arms,
            sections=[
                Section(
                    "Differences on the same pairs",
                    "Intervals resample users; the standard error is over training seeds, of all pairs.",
                    _differences(found, seeds),
                )
            ],
        ),
    )


def write_both(folder: Path, said: Report) -> None:
    write_report(folder / "proof.html", said)
    write_markdown(folder / "proof.md", said)


def _arm(found: Mapping[tuple[str, int], pd.DataFrame], method: str, seeds: Sequence[int], cells: Proof) -> dict[str, Any] | None:
    tables = {s: found[method, s] for s in seeds if (method, s) in found}
    if not tables:
        return None
    whole = accuracy_report(pd.concat([table.assign(seed=s) for s, table in tables.items()]))
    row = {"arm": method, "seeds": len(tables), "chains": cells.chains(method) if method in ARMS else None}
    row |= {"accuracy": whole["accuracy"], "ci95": whole["ci95"]}
    for kind in SLICES[1:]:
        values = [accuracy(t, kind) / 100 for t in tables.values() if len(part(t, kind))]
        row[f"{kind} accuracy"] = statistics.fmean(values) if values else None
    return row


def _differences(found: Mapping[tuple[str, int], pd.DataFrame], seeds: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for one, other in COMPARISONS:
        both = [s for s in seeds if (one, s) in found and (other, s) in found]
        row: dict[str, Any] = {"comparison": f"{one} − {other}", "seeds": len(both)}
        for kind in SLICES if both else ():
            single, bounds = difference(found, one, other, both, kind)
            name = f"{kind or 'all'} difference"
            row |= {name: statistics.fmean(single) / 100, f"{name} ci95": [bound / 100 for bound in bounds]}
            if kind is None:
                row["seed stderr"] = statistics.stdev(single) / len(single) ** 0.5 / 100 if len(single) > 1 else None
        if both:
            rows.append(row)
    return rows


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], METHODS, range(5))
    parser.add_argument("--list", action="store_true", help="say which cells are complete and what each costs, start nothing")
    args = parser.parse_args()
    cells = Proof(args)
    if args.list:
        cells.list(args.methods, args.seeds)
        return
    checked_run(args.run)
    for seed in args.seeds:
        for method in args.methods:
            cells.make(method, seed)
            report(cells, args.methods, args.seeds, COMPARISONS, SLICES)
            publish(cells, METHODS, args.seeds)


if __name__ == "__main__":
    main()
