"""Check the harness against the reference accuracies of the three development sets (shared/data/README.md).

    python benchmarks/reference_accuracies.py [FOLDER]        FOLDER defaults to ../shared/data

The README's majority counts *all* other voters of the source (columns `n_other_*`), also those whose votes were held back from
the files; `counted` scores by these columns through the same harness.  `majority` sees only the votes that are in a file, so its
figure is lower and its ties are more; it is printed beside, with the other baselines.  Exit code 1 when a reference is missed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from eval.baselines import BASELINES, Scorer, fit_baseline, predict_baseline
from eval.metrics import accuracy_report
from pgenrm_train.records import Example, PreferencePair, read_pairs

TOLERANCE = 0.0005  # the README's figures hold to the third decimal
REFERENCES = {  # file, shared context only → pairs, users, longer, shorter, counted
    ("llmfao_dev", False): (1112, 47, 0.3426, 0.6574, 0.6223),
    ("mtbench_judges_dev", False): (874, 39, 0.6625, 0.3307, 0.5446),
    ("mtbench_judges_dev", True): (436, 39, 0.6674, 0.3234, 0.5550),
    ("ukpconvarg_dev", False): (9857, 462, 0.6909, 0.3066, 0.6718),
}


@dataclass(frozen=True)
class CountedVotes:
    """Scores a response by the source's counts of other voters: pair_id → {text: votes}."""

    votes: Mapping[str, Mapping[str, int]]

    def score(self, example: Example) -> tuple[float, ...]:
        return tuple(float(self.votes[example.pair_id][text]) for text in example.responses)


def main(folder: Path) -> int:
    missed = 0
    for (name, shared_only), reference in REFERENCES.items():
        frame = _frame(folder / f"{name}.parquet", shared_only)
        pairs = _pairs(frame)
        test = [p for p in pairs if p.split == "test"]
        train = [p for p in pairs if p.split != "test"]
        print(f"{name}{', shared context only' if shared_only else ''}")
        scorers: dict[str, Scorer] = {"counted": _counted(frame)}
        scorers |= {baseline: fit_baseline(baseline, train, pairs) for baseline in BASELINES}
        measured = {key: accuracy_report(predict_baseline(s, test, None), draws=500) for key, s in scorers.items()}
        expected = dict(zip(("n_pairs", "n_users", "longer", "shorter", "counted"), reference, strict=True))
        missed += _print(measured, expected)
    print("all references reproduced" if not missed else f"{missed} references missed")
    return int(missed > 0)


def _print(measured: Mapping[str, Mapping], expected: Mapping[str, float]) -> int:
    sizes = measured["longer"]
    wrong = [key for key in ("n_pairs", "n_users") if sizes[key] != expected[key]]
    for key in wrong:
        print(f"  {key} {sizes[key]}, reference {expected[key]}: MISSED")
    for name, report in measured.items():
        low, high = report["ci95"]
        line = f"  {name:12s} {report['accuracy']:.4f} [{low:.3f}, {high:.3f}]  tied {report['ties'] / 2 / report['n_pairs']:.3f}"
        if name in expected:
            good = abs(report["accuracy"] - expected[name]) <= TOLERANCE
            line += f"  reference {expected[name]:.4f} {'ok' if good else 'MISSED'}"
            wrong += [] if good else [name]
        print(line)
    return len(wrong)


def _frame(path: Path, shared_only: bool) -> pd.DataFrame:
    frame = pd.read_parquet(path)
    if shared_only:
        frame = frame[frame["shared_context"]]
    # Two of the files name a pair by its content; here an id names one vote.  Their `user_split` is not one of ours.
    return frame.assign(pair_id=frame["user_id"] + "/" + frame["pair_id"]).drop(columns="user_split")


def _pairs(frame: pd.DataFrame) -> list[PreferencePair]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.parquet")
        frame.to_parquet(path)
        return list(read_pairs(path))


def _counted(frame: pd.DataFrame) -> CountedVotes:
    against = frame.get("n_other_disagree")
    if against is None:  # mtbench gives the number of other judges instead
        against = frame["n_other_judges"] - frame["n_other_agree"] - frame["n_other_tie"]
    rows = zip(frame["pair_id"], frame["chosen"], frame["rejected"], frame["n_other_agree"], against, strict=True)
    return CountedVotes({key: {c["content"]: int(n), r["content"]: int(m)} for key, c, r, n, m in rows})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")))
