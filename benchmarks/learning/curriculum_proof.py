"""Trial of the hard-negative curriculum: schedules against controls at an equal budget of chains.

For each seed CRE is trained from one PSI checkpoint, and from that CRE one curriculum per arm:

    without process reward   uniform · linear · anti · self_paced
    with process reward      uniform_process · linear_process
    without measurement      unmeasured: self-paced from the model-free signals, which cost no chains

Equal budget: a schedule spends K chains per pair to measure hardness before it trains.  Arms that measure
nothing train as many more steps as those chains are worth.  All arms of a seed draw from the same rows
and share one measurement.  Every checkpoint judges the same test pairs (strict, both orders).

CRE and the arms of a seed train in one veRL session.  An evaluated cell (method and seed) is kept as one
small file in `--keep`; everything else may be deleted.  Kept cells are not made again, and those of
several days share one table. The benchmark may be killed and started again, or run in parts; `--list`
prints the open cells and starts nothing:

    python benchmarks/learning/curriculum_proof.py --list
    python benchmarks/learning/curriculum_proof.py --seeds 0
    python benchmarks/learning/curriculum_proof.py --publish docs

After each cell `curriculum_proof.md` and `.svg` are written to `--out`: accuracy by arm, facts of the
training, and differences on the same pairs (CRE's from PSI too), with the standard error over training
seeds and the 95 % interval over users.  `--publish` makes them from the kept cells alone.  Run a seed's
arms in one go: arms of a CRE that was trained again join kept ones only if its weights are the same.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kept_cells
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from proof_report import publish
from training_seeds import ROOT, Cells, arguments

from pgenrm_train.config import Config, load, to_dict
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import PGenRMError
from pgenrm_train.files import link, read_json
from pgenrm_train.run.folder import StageFolder, environment_facts, weights_digest
from pgenrm_train.stages.grpo import mines

ARMS = {
    "uniform": ("curriculum.schedule=uniform",),
    "linear": ("curriculum.schedule=linear",),
    "anti": ("curriculum.schedule=anti",),
    "self_paced": ("curriculum.schedule=self_paced",),
    "uniform_process": ("curriculum.schedule=uniform", "curriculum.process_weight=0.5"),
    "linear_process": ("curriculum.schedule=linear", "curriculum.process_weight=0.5"),
    "unmeasured": ("curriculum.schedule=self_paced", "curriculum.mine=false"),
}
METHODS = ("psi", "cre", *ARMS)
# Held-out users are drawn after the training users, who stay the same.
TEST = (
    "data.heldout_users=600",
    "data.max_test_pairs=2400",
)
# Two of four chains: three quarters of the pairs waver between 0.25 and 0.75, too many for a schedule.
BAND = (
    "curriculum.hard_low=0.4",
    "curriculum.hard_high=0.6",
)
CURVES = {
    "pass_rate": "pass_rate",
    "zero_advantage_share": "groups/zero_advantage_share",
    "hard_share": "curriculum/realised_hard_share",
    "hard_pass_rate": "curriculum/hard_pass_rate",
    "rest_pass_rate": "curriculum/rest_pass_rate",
    "suspect_pass_rate": "curriculum/suspect_pass_rate",
}


class Proof(Cells):
    """`Cells` with one arm of the curriculum per method, trained together and kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.out, self.keep = args.out.resolve(), args.keep
        self.composed: dict[str, Any] = {}
        self.overrides = [*TEST, *BAND, *args.overrides]

    def section(self, method: str) -> str:
        return "curriculum" if method in ARMS else "cre"

    def trained(self, method: str, seed: int) -> Path:
        return self.folder(method, seed) / self.section(method)

    def start(self, method: str, seed: int) -> Path:
        return self.psi if method == "cre" else (self.trained("cre", seed) / "checkpoint").resolve()

    def own(self, method: str, seed: int) -> list[str]:
        """Overrides of a cell."""
        steps = [f"curriculum.steps={self.steps(method)}"] if method in ARMS else []
        return [f"{self.section(method)}.seed={seed}", *steps, *ARMS.get(method, ())]

    def config(self, method: str, *more: str) -> Config:
        return load("recipe=curriculum", *self.overrides, *ARMS.get(method, ()), *more)

    def settings(self, method: str) -> Any:
        """Settings of the method's section, before the cell's own steps and seed."""
        if method not in self.composed:
            self.composed[method] = self.config(method)
        return getattr(self.composed[method], self.section(method))

    def steps(self, method: str) -> int:
        """Optimiser steps of the cell; an arm that measures nothing also gets the cost of measurement."""
        if method == "psi":
            return 0
        settings = self.settings(method)
        saved = self.mined("linear") - self.mined(method) if method in ARMS else 0
        return int(settings.steps + round(saved / (settings.prompts_per_step * settings.group_size)))

    def mined(self, method: str) -> int:
        """Chains that the cell spends on measurement."""
        settings = self.settings(method)
        return (
            settings.rows * settings.mining_samples if method in ARMS and mines(self.composed[method]) else 0
        )

    def chains(self, method: str) -> int:
        """All chains of the cell."""
        settings = self.settings(method)
        return int(self.steps(method) * settings.prompts_per_step * settings.group_size + self.mined(method))

    def make_all(self, methods: Sequence[str], seed: int) -> None:
        """Make the cells of a seed that are not kept; print the table of all kept cells after each."""
        missing = [method for method in methods if not self.kept(method, seed)]
        if set(missing) - {"psi"}:
            self.train(missing, seed)
        for method in missing:
            if method == "psi":
                self.evaluate(self.folder(method, None), self.psi)
            else:
                self.finish(method, seed)
            self.keep_cell(method, seed)
            print(publish(kept_cells.read(self.keep), METHODS, self.out).read_text(), flush=True)

    def kept(self, method: str, seed: int) -> bool:
        return (method, 0 if method == "psi" else seed) in kept_cells.read(
            self.keep
        )  # the start is one cell for all seeds

    def train(self, methods: Sequence[str], seed: int) -> None:
        """Train the open cells of a seed, and the CRE that they start from, in one session."""
        from pgenrm_train.backends.grpo.supervisor import launch

        phases = [self.phase(method, seed) for method in METHODS[1:] if method in methods or method == "cre"]
        self.share_mining(seed)
        if any(phase.seconds() is None for phase in phases):
            print(
                f"one session for seed {seed}:", " ".join(str(phase.work_dir) for phase in phases), flush=True
            )
            launch(self.config("cre"), phases)

    def phase(self, method: str, seed: int) -> Any:
        """Phase of the cell for the engine, with its rows on disk; all checkpoints share PSI's tokenizer."""
        from recipes.wiring import grpo

        folder, data = self.folder(method, seed), self.out / "data" / "build_data"
        if not StageFolder.read(data.parent, data.name).complete:
            self.recipe(data.parent, "build_data", self.psi)
        folder.mkdir(parents=True, exist_ok=True)
        link(data, folder / data.name)
        config = self.config(method, f"run_dir={folder}", *self.own(method, seed))
        phase = grpo.phase(config, StageName(self.section(method)), self.psi)
        return dataclasses.replace(
            phase, start=self.start(method, seed), settings=to_dict(getattr(config, self.section(method)))
        )

    def share_mining(self, seed: int) -> None:
        """Link the seed's first measurement into its other arms: same checkpoint and rows, same result."""
        files = [
            self.trained(arm, seed) / "mining.parquet"
            for arm in ARMS
            if (self.trained(arm, seed) / "mirror.parquet").exists()
        ]
        files.sort(key=lambda file: not file.exists())
        for other in files[1:]:
            if not other.exists():
                link(files[0], other)

    def finish(self, method: str, seed: int) -> None:
        """Let the recipe complete the folder of the trained cell, then evaluate its checkpoint."""
        folder = self.folder(method, seed)
        self.recipe(folder, self.section(method), self.start(method, seed), *self.own(method, seed))
        self.evaluate(folder, self.trained(method, seed) / "checkpoint")

    def keep_cell(self, method: str, seed: int) -> None:
        predictions = super().predictions(method, seed)
        assert predictions is not None
        facts = self.start_facts() if method == "psi" else self.facts(method, seed)
        kept_cells.check([*(f for _, f in kept_cells.read(self.keep).values()), facts], self.keep)
        print(f"kept as {kept_cells.keep(self.keep, predictions, facts)}", flush=True)

    def start_facts(self) -> dict[str, Any]:
        start = weights_digest(self.psi)
        return {
            "method": "psi",
            "seed": 0,
            "start": start,
            "checkpoint": start,
            "settings": self.shared(),
            "git": environment_facts()["git"],
            "steps": 0,
            "chains": 0,
            "seconds": 0.0,
            "hardness": None,
            "curves": {},
        }

    def facts(self, method: str, seed: int) -> dict[str, Any]:
        folder = self.trained(method, seed)
        report = read_json(folder / "trained.json")
        return {
            "method": method,
            "seed": seed,
            "start": weights_digest(self.start(method, seed)),
            "checkpoint": weights_digest(folder / "checkpoint"),
            "settings": self.shared(),
            "git": environment_facts()["git"],
            "steps": report["steps"],
            "chains": self.chains(method),
            "seconds": report["seconds"],
            "hardness": hardness(folder),
            "curves": curves(folder),
        }

    def shared(self) -> dict[str, Any]:
        """Settings that all cells share; a change of one of them makes other cells."""
        config = to_dict(self.config("cre"))
        own = [
            f"{section}.{key}"
            for section in ("cre", "curriculum")
            for key in ("seed", "steps", "schedule", "process_weight", "mine")
        ]
        flat = {
            f"{s}.{key}": value
            for s in ("data", "model", "masking", "cre", "curriculum")
            for key, value in config[s].items()
        }
        return {"seed": config["seed"], "judge": config["judge"]["kind"]} | {
            k: v for k, v in flat.items() if k not in own
        }

    def list(self, methods: Sequence[str], seeds: Sequence[int]) -> None:
        for seed, method in itertools.product(seeds, methods):
            trained = method != "psi" and (self.trained(method, seed) / "trained.json").exists()
            state = "kept" if self.kept(method, seed) else "trained" if trained else "to do"
            cost = f"{self.steps(method)} steps, {self.chains(method)} chains"
            print(f"{state:<8} {method + '-' + str(seed):<20} {cost} {' '.join(ARMS.get(method, ()))}")


def hardness(folder: Path) -> dict[str, Any] | None:
    """Counts of the hardness record, and the share of hard pairs by kind; None without a record."""
    if not (folder / "hardness.parquet").exists():
        return None
    record = pq.read_table(folder / "hardness.parquet", columns=["hard"]).to_pandas()
    kinds = [
        extra["kind"]
        for extra in pq.read_table(folder / "rows.parquet", columns=["extra_info"])["extra_info"].to_pylist()
    ]
    by_kind = record["hard"].groupby(pd.Series(kinds, name="kind")).mean().round(4).to_dict()
    return read_json(folder / "hardness.json") | {"hard_share_by_kind": by_kind}


def curves(folder: Path) -> dict[str, list[float | None]]:
    """A few metrics per step."""
    lines = pd.read_json(folder / "metrics.jsonl", lines=True)
    steps = lines[lines[f"{folder.name}/pass_rate"].notna()]
    steps = steps.dropna(axis="columns", how="all")
    known = {name: f"{folder.name}/{key}" for name, key in CURVES.items() if f"{folder.name}/{key}" in steps}
    return {
        name: [None if np.isnan(v) else round(v, 4) for v in steps[key].astype(float)]
        for name, key in known.items()
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], METHODS, range(5), Path("runs/curriculum_proof"))
    start, kept = Path("tests/data/psi_nano"), Path("benchmarks/learning/curriculum_proof")
    parser.add_argument("--start", type=Path, default=ROOT / start, help=f"PSI checkpoint (default: {start})")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / kept, help=f"folder of the kept cells (default: {kept})"
    )
    parser.add_argument(
        "--list", action="store_true", help="list kept and open cells with their cost, start nothing"
    )
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="FOLDER",
        help="write table and plot of the kept cells into FOLDER, start nothing",
    )
    args = parser.parse_args()
    cells = Proof(args)
    if args.list:
        cells.list(args.methods, args.seeds)
    elif args.publish:
        publish(kept_cells.read(args.keep), METHODS, args.publish)
    else:
        for seed in args.seeds:
            cells.make_all(args.methods, seed)


if __name__ == "__main__":
    try:
        main()
    except PGenRMError as error:
        sys.exit(f"error: {error}")
