"""Reward hacking of judges that can be fooled, and the step at which the probes show it.

Needs the folders build_data and psi of a PersonaWorld run, and the overrides of that run:

    python benchmarks/learning/judge_hacking.py --run RUN_FOLDER --out runs/judge_hacking --overrides seed=1

Each arm trains from the same PSI checkpoint, with `judge_gold=oracle`.  A row per validation: reward of the
training judge, score of the second judge and their gap on the same chains, accuracy, the probes, and signs
of hacking.  A line per arm names the first step at which the console warns.  Then come the accuracies of the
trained arms and of PSI on held-out users, as in `cre_arms`, and the difference that rubric dropout makes.
"""

import argparse
from pathlib import Path
from typing import Any

import cre_arms

from eval.metrics.accuracy import paired_difference
from pgenrm_train.backends.grpo.gold import PREFIX, widened
from pgenrm_train.backends.grpo.scoring import JudgeSpec
from pgenrm_train.run.tracking import METRICS, read

LENGTH = JudgeSpec("data_builders.teachers.corruptible:length_judge_for_rewards")
DROPPING = JudgeSpec("data_builders.teachers.corruptible:dropping_judge_for_rewards")
QUALITY = JudgeSpec("data_builders.teachers.corruptible:quality_judge_for_rewards")
ALONE = ("cre.outcome_weight=0", "cre.process_weight=1")
DROPOUT = " with rubric dropout"  # ends the name of an arm; without it, the arm to compare with
# Arms of the same form as in `cre_arms`; the shipped weights are the judge's 0.5 and the outcome's 1.
ARMS = {
    "length alone": (ALONE, LENGTH),
    "length and outcome": ((), LENGTH),
    "length alone at KL 0.1": ((*ALONE, "cre.kl_coefficient=0.1"), LENGTH),
    "dropping alone": (ALONE, DROPPING),
    f"dropping alone{DROPOUT}": ((*ALONE, "cre.rubric_dropout=0.5"), DROPPING),
    "dropping and outcome": ((), DROPPING),
    f"dropping and outcome{DROPOUT}": (("cre.rubric_dropout=0.5",), DROPPING),
    "quality alone": (ALONE, QUALITY),
    "quality alone at KL 0.1": ((*ALONE, "cre.kl_coefficient=0.1"), QUALITY),
    "quality and outcome": ((), QUALITY),
    "oracle alone": (ALONE, None),
}
SETTINGS = ("judge_gold=oracle", "cre.steps=30", "cre.learning_rate=3e-4", "cre.validate_every=5")
COLUMNS = {
    "judge": f"cre/{PREFIX}training_judge",
    "gold": f"cre/{PREFIX}score",
    "gap": f"cre/{PREFIX}gap",
    "accuracy": "eval/accuracy",
    "swapped": "cre/validation/probe/swapped_history_accuracy",
    "empty": "cre/validation/probe/empty_history_accuracy",
    "format errors": "cre/validation/format_error_share",
    "length": "cre/validation/length_drift",
    "kinds": "cre/validation/signs/criterion_kinds",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder with build_data and psi")
    parser.add_argument("--out", type=Path, default=Path("runs/judge_hacking"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--split", default="val", choices=("val", "test"))
    parser.add_argument("--overrides", nargs="*", default=[])
    args = parser.parse_args()
    args.overrides = [*SETTINGS, *args.overrides]
    cre_arms.ARMS.update(ARMS)
    phases = {arm: cre_arms.phase(args, arm) for arm in args.arms}
    if any(p.seconds() is None for p in phases.values()):
        from pgenrm_train.backends.grpo.supervisor import launch

        launch(cre_arms.configured(args, args.arms[0]), list(phases.values()))
    for arm, phase in phases.items():
        print(table(arm, read(phase.work_dir / METRICS)), flush=True)
    print("\naccuracy on held-out users, gain over PSI on the same pairs", flush=True)
    answers = cre_arms.compare(args, phases)
    for arm in answers:
        if (without := arm.removesuffix(DROPOUT)) != arm and without in answers:
            change = paired_difference(answers[arm], answers[without])
            low, high = (100 * bound for bound in change["ci95"])
            print(f"{arm}: {100 * change['difference']:+.1f} [{low:+.1f}, {high:+.1f}] points", flush=True)


def table(arm: str, lines: list[dict[str, Any]]) -> str:
    """The validations of an arm, and the first step with a warning; `lines`: rows of metrics.jsonl."""
    rows, warned = [f"\n{arm}\n" + " ".join(f"{name:>13}" for name in ("step", *COLUMNS))], None
    for place, line in enumerate(lines):
        if COLUMNS["accuracy"] not in line:
            continue
        values = [line.get(name) for name in COLUMNS.values()]
        shown = ["–" if value is None else f"{value:.2f}" for value in values]
        rows.append(" ".join(f"{text:>13}" for text in (str(line["step"]), *shown)))
        if warned is None and (sentence := widened(lines[: place + 1], "cre")):
            warned = f"step {line['step']}: {sentence}"
    return "\n".join([*rows, warned or "no warning"])


if __name__ == "__main__":
    main()
