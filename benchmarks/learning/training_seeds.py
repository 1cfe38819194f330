"""CRE and the curriculum over several training seeds, and veRL against plain GRPO.

From one run's PSI checkpoint, on the same data, for each seed: `cre` on veRL; from it `curriculum`
(linear schedule) and `uniform` (the control: the same budget without a schedule); and `reference`, CRE's
settings and rows in the page of torch of `grpo_reference.py`.  Every checkpoint judges the same
questions.  A complete cell is kept, so the benchmark may be killed and started again, or run seed by
seed:

    python benchmarks/learning/training_seeds.py --run RUN --out runs/seeds --seeds 0 1 2
    python benchmarks/learning/training_seeds.py --run RUN --out runs/seeds --seeds 3 --methods cre reference

The table gives accuracy (strict, one evaluation seed) and differences on the same pairs: the mean over
seeds, the standard error over seeds, and for the pooled pairs the 95 % interval by a bootstrap over
users.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import yaml

from eval.metrics.accuracy import accuracy_report, paired_difference

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("cre", "curriculum", "uniform", "reference")
COMPARISONS = (("cre", "psi"), ("curriculum", "cre"), ("curriculum", "uniform"), ("cre", "reference"))
SLICES = (None, "easy", "hard", "rival")


def arguments(
    description: str, methods: Sequence[str], seeds: Sequence[int], out: Path
) -> argparse.ArgumentParser:
    """Parser of the options that all benchmarks over cells of (method, seed) share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out", type=Path, default=out, help=f"folder for one run folder per cell (default: {out})"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument(
        "--overrides",
        nargs="*",
        default=[],
        help="more Hydra overrides, e.g. pipeline.budget=smoke cre.steps=60",
    )
    return parser


class Cells:
    """One run folder per method and seed; `model.path` chains them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.overrides = args.out, args.overrides
        self.psi = checked(args.start)

    def folder(self, method: str, seed: int | None) -> Path:
        return self.out / (method if seed is None else f"{method}-{seed}")

    def make(self, method: str, seed: int) -> None:
        folder = self.folder(method, seed)
        if method == "cre":
            self.recipe(folder, "cre", self.psi, f"cre.seed={seed}")
        elif method == "reference":
            self.reference(folder, seed)
        else:
            schedule = {"curriculum": "linear", "uniform": "uniform"}[method]
            start = self.folder("cre", seed) / "cre" / "checkpoint"
            self.recipe(
                folder, "curriculum", start, f"curriculum.seed={seed}", f"curriculum.schedule={schedule}"
            )
        self.evaluate(folder, folder / {"uniform": "curriculum"}.get(method, method) / "checkpoint")

    def evaluate(self, folder: Path, checkpoint: Path) -> None:
        # Every cell judges the same pairs with these settings.
        few = ("eval.seeds=1", "eval.ind=1", "eval.one_pair_ind=[]", "eval.baselines=[]")
        self.recipe(folder, "evaluate", checkpoint, "eval.probes=false", *few)

    def recipe(self, folder: Path, recipe: str, start: Path, *more: str) -> None:
        self.call(
            "-m",
            "pgenrm_train",
            f"recipe={recipe}",
            f"run_dir={folder}",
            f"model.path={start}",
            "tracking=none",
            *more,
            *self.overrides,
        )

    def reference(self, folder: Path, seed: int) -> None:
        """Train plain GRPO on CRE's rows and settings of the same seed."""
        path = self.folder("cre", seed) / "cre" / "config.yaml"
        config = yaml.safe_load(path.read_text())
        cre, out = config["cre"], folder / "reference"
        if (out / "checkpoint" / "config.json").exists():
            return
        if cre["kl_coefficient"]:
            sys.exit(
                f"error: {path}: cre.kl_coefficient={cre['kl_coefficient']}, "
                "and the plain loop has no KL term"
            )
        settings = {
            "start": self.psi,
            "rows": path.parent / "rows.parquet",
            "out": out,
            "seed": seed,
            "steps": cre["steps"],
            "prompts": cre["prompts_per_step"],
            "group": cre["group_size"],
            "learning-rate": cre["learning_rate"],
            "clip": cre["clip_ratio"],
            "response-tokens": config["model"]["max_response_tokens"],
            "process-weight": cre["process_weight"],
            "weight-decay": cre["weight_decay"],
        }
        judge = (
            ["--judge", "data_builders.teachers.oracle:judge_for_rewards"]
            if config["judge"]["kind"] == "oracle"
            else []
        )
        self.call(
            "benchmarks/learning/grpo_reference.py",
            *(f"--{key}={value}" for key, value in settings.items()),
            *judge,
        )

    def call(self, *command: str) -> None:
        print("·", " ".join(command), flush=True)
        env = os.environ | {
            "PYTHONPATH": str(ROOT)
        }  # a script's own folder comes first on its path, the checkout must come next
        if code := subprocess.run([sys.executable, *command], cwd=ROOT, env=env).returncode:
            sys.exit(f"error: exit code {code}; the same command continues here")

    def predictions(self, method: str, seed: int | None) -> pd.DataFrame | None:
        path = self.folder(method, None if method == "psi" else seed) / "evaluate" / "predictions.parquet"
        if not path.exists():
            return None
        frame = pd.read_parquet(path)
        return frame[frame["set"] == "own"]


def report(
    cells: Cells,
    methods: Sequence[str],
    seeds: Sequence[int],
    comparisons: Sequence[tuple[str, str]] = COMPARISONS,
    slices: Sequence[str | None] = SLICES,
) -> None:
    """Print accuracies and differences of the complete cells."""
    answers = {(m, s): p for m in methods for s in seeds if (p := cells.predictions(m, s)) is not None}
    print(f"\n{'':<24}" + "".join(f"{name or 'all':>28}" for name in slices))
    for method in methods:
        tables = [answers[method, s] for s in seeds if (method, s) in answers]
        print(
            f"{method:<24}" + "".join(f"{_mean([accuracy(t, kind) for t in tables]):>28}" for kind in slices)
        )
    for one, other in comparisons:
        both = [s for s in seeds if (one, s) in answers and (other, s) in answers]
        if both:
            cellwise = [_text(*difference(answers, one, other, both, kind)) for kind in slices]
            print(f"{one + ' − ' + other:<24}" + "".join(f"{text:>28}" for text in cellwise))


def accuracy(table: pd.DataFrame, kind: str | None) -> float:
    return 100 * float(accuracy_report(part(table, kind), draws=1)["accuracy"])


def difference(
    answers: Mapping[tuple[str, int], pd.DataFrame],
    one: str,
    other: str,
    seeds: Sequence[int],
    kind: str | None,
) -> tuple[list[float], list[float]]:
    """Points of accuracy per training seed, and the interval over users of all seeds together."""
    single = [accuracy(answers[one, s], kind) - accuracy(answers[other, s], kind) for s in seeds]
    pooled = [pd.concat([part(answers[m, s], kind).assign(seed=s) for s in seeds]) for m in (one, other)]
    return single, [100 * bound for bound in paired_difference(pooled[0], pooled[1])["ci95"]]


def part(table: pd.DataFrame, kind: str | None) -> pd.DataFrame:
    """Rows of a kind; `unseen`, alone or before a kind, keeps users of unseen personas."""
    words = (kind or "").split()
    if "unseen" in words:
        table = table[table["cohort"] == "unseen_persona"]
    kinds = [word for word in words if word != "unseen"]
    return table[table["kind"].isin(kinds)] if kinds else table


def _text(single: Sequence[float], bounds: Sequence[float]) -> str:
    """Mean over training seeds ± their standard error, and the interval."""
    return f"{_mean(single)} [{bounds[0]:+.1f}, {bounds[1]:+.1f}]"


def _mean(values: Sequence[float]) -> str:
    """Mean ± standard error over training seeds; of one seed there is no error."""
    if not values:
        return "—"
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else mean


def checked(start: Path) -> Path:
    if not (start / "config.json").exists():
        sys.exit(f"error: {start} is not a checkpoint; make one with `make demo` or recipe=psi")
    return start.resolve()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], METHODS, (0, 1, 2), Path("runs/seeds"))
    parser.add_argument("--run", type=Path, required=True, help="run folder with a finished PSI")
    args = parser.parse_args()
    args.start = args.run / "psi" / "checkpoint"
    cells = Cells(args)
    cells.evaluate(cells.folder("psi", None), cells.psi)
    for seed in args.seeds:
        for method in args.methods:
            cells.make(method, seed)
            report(cells, ("psi", *args.methods), args.seeds)


if __name__ == "__main__":
    main()
