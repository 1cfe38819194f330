"""Trial of the kinds of totals: full training seeds of PSI, CRE and the curriculum per kind, on PersonaWorld.

    python benchmarks/learning/totals_trial.py --out runs/totals --seeds 1 2        # train the open cells
    python benchmarks/learning/totals_trial.py --table                              # the table of kept cells

A seed draws its own world, so seeds share no test users.  `declared` and `verified` share a PSI, which
both train on totals.  A finished cell (kind and seed) is one file in `--keep`: the answers of its three
checkpoints, one chain per pair and order, with the facts of its chains.  Kept cells are not made again.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from eval.metrics.accuracy import accuracy_report, paired_difference
from pgenrm_train.config import TRAINED, Totals
from pgenrm_train.files import atomic, read_json, write_json
from pgenrm_train.run.checkpoints import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
KEEP = Path(__file__).parent / "totals_trial"
COLUMNS = [
    "stage",
    "pair_id",
    "user_id",
    "kind",
    "cohort",
    "order",
    "score_chosen",
    "score_rejected",
    "failure",
]
SETTINGS = ("tracking=none", "data.max_test_pairs=800")
FEW = (
    "eval.ind=1",
    "eval.one_pair_ind=[]",
    "eval.one_pair_pro=[]",
    "eval.probes=false",
    "eval.baselines=[imitator,ideal_chain,ideal]",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/totals"), help="one run folder per cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kinds", nargs="+", choices=list(Totals), default=["declared", "code", "verified"])
    parser.add_argument("--keep", type=Path, default=KEEP)
    parser.add_argument("--table", action="store_true", help="print the table of kept cells, train nothing")
    parser.add_argument("--overrides", nargs="*", default=[])
    args = parser.parse_args()
    for seed in args.seeds:
        for kind in args.kinds:
            if not args.table and not (args.keep / f"{kind}-{seed}.parquet").exists():
                make(args, kind, seed)
                keep(args.out / f"{kind}-{seed}", args.keep / f"{kind}-{seed}.parquet")
    print(table(args.keep))


def make(args: Any, kind: str, seed: int) -> None:
    """Train and evaluate one cell.  The recipes resume a killed one."""
    folder = args.out.resolve() / f"{kind}-{seed}"
    settings = (f"run_dir={folder}", f"seed={seed}", f"model.totals={kind}", *SETTINGS, *args.overrides)
    if kind == Totals.VERIFIED:
        make_psi(args, seed)
        shared = args.out.resolve() / f"declared-{seed}"
        for name in ("build_data", "build_sec", "psi"):
            if not (folder / name).exists():
                shutil.copytree(shared / name, folder / name)
        write_json(folder / "psi" / "checkpoint" / MANIFEST, {"totals": kind})
    for recipe in ("build_sec", "psi") if kind != Totals.VERIFIED else ():
        call(f"recipe={recipe}", *settings)
    for recipe in ("cre", "curriculum"):
        call(f"recipe={recipe}", *settings)
    call("recipe=evaluate", *settings, *FEW)


def make_psi(args: Any, seed: int) -> None:
    folder = args.out.resolve() / f"declared-{seed}"
    for recipe in ("build_sec", "psi"):
        call(
            f"recipe={recipe}",
            f"run_dir={folder}",
            f"seed={seed}",
            "model.totals=declared",
            *SETTINGS,
            *args.overrides,
        )


def call(*overrides: str) -> None:
    print("·", *overrides, flush=True)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    if code := subprocess.run(
        [sys.executable, "-m", "pgenrm_train", *overrides], cwd=ROOT, env=env
    ).returncode:
        sys.exit(f"error: exit code {code}; the same command continues here")


def keep(folder: Path, file: Path) -> None:
    """Write the cell's answers, with its facts in the metadata."""
    results = read_json(folder / "evaluate" / "results.json")
    frame = pd.read_parquet(folder / "evaluate" / "predictions.parquet")
    frame = frame[(frame["set"] == "own") & frame["model"].isin(list(TRAINED))].rename(
        columns={"model": "stage"}
    )
    facts = {name: results[name] for name in ("chain_errors", "chain_truth")}
    facts["ceilings"] = {stage: results["stages"][stage]["ceiling"] for stage in TRAINED}
    facts["commit"] = read_json(folder / "evaluate" / "manifest.json").get("git_commit")
    rows = pa.Table.from_pandas(frame[COLUMNS].sort_values(COLUMNS[:6]), preserve_index=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as draft:
        text = re.sub(r"(\d\.\d{4})\d+", r"\1", json.dumps(facts))
        pq.write_table(
            rows.replace_schema_metadata({"cell": text}), draft, compression="zstd", compression_level=19
        )


def table(folder: Path) -> str:
    """Accuracy by kind and stage: per seed, mean, and gains with the interval of the pooled pairs."""
    cells = {file.stem: file for file in sorted(folder.glob("*.parquet"))}
    kinds = sorted({name.rpartition("-")[0] for name in cells}, key=["declared", "verified", "code"].index)
    lines = [
        "| totals | stage | seeds | accuracy per seed | mean | criteria allowed | gain from PSI |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        own = {name: pd.read_parquet(file) for name, file in cells.items() if name.rpartition("-")[0] == kind}
        truth = {n: json.loads(pq.read_metadata(cells[n]).metadata[b"cell"])["chain_truth"] for n in own}
        for stage in TRAINED:
            parts = {n: frame[frame["stage"] == stage].assign(seed=0, sample=0) for n, frame in own.items()}
            each = [100 * float(accuracy_report(p, draws=1)["accuracy"]) for p in parts.values()]
            allowed = statistics.fmean(
                100 * row["criteria allowed share"]
                for rows in truth.values()
                for row in rows
                if row["model"] == stage
            )
            gain = "" if stage == "psi" else gain_of(own, stage)
            lines.append(
                f"| {kind} | {stage} | {' '.join(n.rpartition('-')[2] for n in own)} | "
                f"{' '.join(f'{a:.1f}' for a in each)} | {with_error(each)} | {allowed:.1f} | {gain} |"
            )
    return "\n".join(lines)


def gain_of(cells: dict[str, pd.DataFrame], stage: str) -> str:
    pooled = [
        pd.concat(
            [
                f[f["stage"] == s].assign(
                    seed=0, sample=0, user_id=f"{name}/" + f["user_id"], pair_id=f"{name}/" + f["pair_id"]
                )
                for name, f in cells.items()
            ]
        )
        for s in (stage, "psi")
    ]
    gain = paired_difference(pooled[0], pooled[1])
    low, high = gain["ci95"]
    return f"{100 * gain['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def with_error(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


if __name__ == "__main__":
    main()
