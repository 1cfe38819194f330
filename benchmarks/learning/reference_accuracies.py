"""Check `recipe=evaluate` against the reference accuracies of the three development sets.

    python benchmarks/learning/reference_accuracies.py [FOLDER] [NAME …]

The references are those of shared/data/README.md.  FOLDER defaults to ../shared/data, the names to all
files.  Each file is built and evaluated as a user would do it, with every baseline that needs no language
model.  The README's majority counts *all* other voters of the source (columns `n_other_*`), also those
whose votes were held back from the files; `majority` uses these counts too.  A vote that its user repeats
on the same texts stays in the later split alone (`data.on_overlap=drop`), so no test pair is lost.  Exit
code 1 when a reference is missed.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout, installed or not

from pgenrm_train.config import BASELINES, load
from recipes import evaluate

TOLERANCE = 0.0005  # the README's figures hold to the third decimal
REFERENCES = {  # file, shared context only → pairs, users, longer, shorter, majority
    ("llmfao_dev", False): (1112, 47, 0.3426, 0.6574, 0.6223),
    ("mtbench_judges_dev", False): (874, 39, 0.6625, 0.3307, 0.5446),
    ("mtbench_judges_dev", True): (436, 39, 0.6674, 0.3234, 0.5550),
    ("ukpconvarg_dev", False): (9857, 462, 0.6909, 0.3066, 0.6718),
}


def main(folder: Path, names: list[str]) -> int:
    missed, lines = 0, []
    for (name, shared_only), reference in REFERENCES.items():
        if names and name not in names:
            continue
        results = evaluated(folder / f"{name}.parquet", shared_only)
        lines.append(f"{name}{', shared context only' if shared_only else ''}")
        expected = dict(zip(("n_pairs", "n_users", "longer", "shorter", "majority"), reference, strict=True))
        wrong, comparison = compared(results["baselines"], expected)
        missed += wrong
        lines += comparison
    print("\n".join([*lines, "all references reproduced" if not missed else f"{missed} references missed"]))
    return int(missed > 0)


def evaluated(path: Path, shared_only: bool) -> dict[str, Any]:
    """Run the recipe and return its results.json."""
    baselines = ",".join(name for name in BASELINES if name != "oracle")
    with tempfile.TemporaryDirectory() as run_dir:
        evaluate.run(
            load(
                "recipe=evaluate",
                "data=pairs",
                f"data.path={path}",
                "data.on_overlap=drop",
                "model=baseline",
                "model.name=majority",
                "tracking=none",
                f"eval.baselines=[{baselines}]",
                "eval.draws=500",
                f"run_dir={run_dir}",
                *(["+data.only.shared_context='True'"] if shared_only else []),
            )
        )
        return dict(json.loads(Path(run_dir, "evaluate", "results.json").read_text()))


def compared(measured: Mapping[str, Any], expected: Mapping[str, float]) -> tuple[int, list[str]]:
    """Number of missed references, and the lines to print."""
    sizes = measured["longer"]
    lines = [
        f"  {key} {sizes[key]}, reference {expected[key]}: MISSED"
        for key in ("n_pairs", "n_users")
        if sizes[key] != expected[key]
    ]
    wrong = len(lines)
    for name, report in measured.items():
        low, high = report["ci95"]
        tied = report["ties"] / 2 / report["n_pairs"]
        line = f"  {name:18s} {report['accuracy']:.4f} [{low:.3f}, {high:.3f}]  tied {tied:.3f}"
        if name in expected:
            good = abs(report["accuracy"] - expected[name]) <= TOLERANCE
            line += f"  reference {expected[name]:.4f} {'ok' if good else 'MISSED'}"
            wrong += not good
        lines.append(line)
    return wrong, lines


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data"), sys.argv[2:]))
