"""Arms of CRE at equal steps from one PSI checkpoint, in one veRL session; compared on validation users.

Needs the folders build_data, build_sec and psi of a PersonaWorld run, and the overrides of that run:

    python benchmarks/learning/cre_arms.py --run RUN_FOLDER --out runs/cre_arms --overrides seed=1

Each arm and PSI write three chains per validation pair and order.  A line gives accuracy with its interval,
the gain over PSI on the same pairs, accuracy by kind, and the steps of `ChainTruth`.  Choose here; confirm a
choice over training seeds on test users.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from eval.metrics.accuracy import accuracy_report, paired_difference
from pgenrm_train.backends.grpo.scoring import JudgeSpec
from pgenrm_train.config import StageName, load, to_dict
from pgenrm_train.files import link, write_table
from pgenrm_train.run.checkpoints import write_manifest
from pgenrm_train.stages.stage import with_totals

ROOT = Path(__file__).resolve().parents[2]
NAMES = JudgeSpec("data_builders.teachers.oracle:names_judge_for_rewards")
# arm → (overrides, judge other than the shipped one)
ARMS: dict[str, tuple[tuple[str, ...], JudgeSpec | None]] = {
    "shipped": ((), None),
    "rate_3e-4": (("cre.learning_rate=3e-4",), None),
    "names": ((), NAMES),
    "names_3e-4": (("cre.learning_rate=3e-4",), NAMES),
    "names_unseen_3e-4": (("cre.learning_rate=3e-4",), NAMES),  # without the pairs of PSI's chains
    "group_16": (("cre.group_size=16",), None),
    "two_updates": (("cre.mini_batch_prompts=8",), None),
    "steps_72": (("cre.steps=72",), None),
    "async": (("cre.mode=async",), None),
}
COLUMNS = ("votes share", "criteria recalled share", "criteria allowed share", "scores share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder with build_data and psi")
    parser.add_argument("--out", type=Path, default=Path("runs/cre_arms"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--split", default="val", choices=("val", "test"))
    parser.add_argument("--overrides", nargs="*", default=[])
    args = parser.parse_args()
    phases = {arm: phase(args, arm) for arm in args.arms}
    if any(p.seconds() is None for p in phases.values()):
        from pgenrm_train.backends.grpo.supervisor import launch

        launch(configured(args, args.arms[0]), list(phases.values()))
    compare(args, phases)


def compare(args: Any, phases: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Print a line per arm and for PSI; returns their answers."""
    for arm, trained in phases.items():
        write_manifest(trained.checkpoint, configured(args, arm).model.counted)
    checkpoints = {"psi": args.run / "psi" / "checkpoint", **{arm: p.checkpoint for arm, p in phases.items()}}
    answers = {}
    for arm, checkpoint in checkpoints.items():
        folder = args.out.resolve() / arm
        evaluate(args, folder, checkpoint)
        results = json.loads((folder / "evaluate" / "results.json").read_text())
        answers[arm] = answers_of(folder)
        report, truth = next(iter(results["stages"].values())), results["chain_truth"]
        low, high = report["ci95"]
        gain = paired_difference(answers[arm], answers["psi"])
        kinds = {kind: accuracy_report(part)["accuracy"] for kind, part in answers[arm].groupby("kind")}
        print(
            f"{arm:<36}{100 * report['accuracy']:6.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            f"{100 * gain['difference']:+6.1f} [{100 * gain['ci95'][0]:+.1f}, {100 * gain['ci95'][1]:+.1f}] "
            + " ".join(f"{kind} {100 * share:.1f}" for kind, share in kinds.items())
            + "  "
            + " ".join(f"{name.removesuffix(' share')} {100 * truth[0][name]:.1f}" for name in COLUMNS)
            + f" quality {truth[0]['weight of quality, %']:.1f}",
            flush=True,
        )
    return answers


def answers_of(folder: Path) -> pd.DataFrame:
    frame = pd.read_parquet(folder / "evaluate" / "predictions.parquet")
    return frame[frame["set"] == "own"]


def evaluate(args: Any, folder: Path, checkpoint: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    link((args.run / "build_data").resolve(), folder / "build_data")
    few = (
        "eval.ind=1",
        "eval.one_pair_ind=[]",
        "eval.one_pair_pro=[]",
        "eval.baselines=[]",
        "eval.probes=false",
    )
    command = ["recipe=evaluate", f"run_dir={folder}", f"model.path={checkpoint}", f"eval.split={args.split}"]
    command += ["tracking=none", "eval.seeds=3", *few, *args.overrides]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / "evaluate.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "pgenrm_train", *command],
            env=env,
            cwd=ROOT,
            check=True,
            stdout=log,
            stderr=log,
        )


def configured(args: Any, arm: str) -> Any:
    folder = args.out.resolve() / arm
    config = load("recipe=cre", f"run_dir={folder}", "tracking=none", *args.overrides, *ARMS[arm][0])
    return with_totals(config, args.run / "psi" / "checkpoint")


def phase(args: Any, arm: str) -> Any:
    """The arm's phase, with its rows on disk."""
    from recipes.wiring import grpo

    config, start = configured(args, arm), (args.run / "psi" / "checkpoint").resolve()
    folder = Path(config.run_dir)
    (folder / "cre").mkdir(parents=True, exist_ok=True)
    link((args.run / "build_data").resolve(), folder / "build_data")
    made = grpo.phase(config, StageName.CRE, start)
    if "unseen" in arm and not made.checkpoint.exists():
        leave_out_rows_of_psi(args, made.rows)
    judge = ARMS[arm][1] or made.judge
    return dataclasses.replace(made, judge=judge, settings=to_dict(config.cre))


def leave_out_rows_of_psi(args: Any, file: Path) -> None:
    """Keep the rows whose pairs are not in the training chains of PSI."""
    learnt = set(
        pq.read_table(args.run / "build_sec" / "sec.parquet", columns=["pair_id"])["pair_id"].to_pylist()
    )
    table = pq.read_table(file)
    rows = [row for row in table.to_pylist() if row["extra_info"]["pair_id"] not in learnt]
    for index, row in enumerate(rows):
        row["extra_info"]["index"] = index
    write_table(file, rows)
    print(f"{file}: {len(rows)} of {table.num_rows} rows are new to the model")


if __name__ == "__main__":
    main()
