"""Strict test accuracy of the `features` baseline against longer and shorter, on real votes.

    python -m benchmarks.learning.features_baseline [folder]

The default folder is ../shared/data, next to the checkout.  Fits on the `train` rows of each file and
scores its `test` rows in both orders; a tie is not a hit.  `population` is the same rule without per-user
weights, so features − population is the gain of personalisation.  `chain` is the accuracy of the weighted
totals in the written chains (four criteria, integer scores: coarser than `features`).  Intervals: 95 %,
bootstrap over users, of the pooled accuracy.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from data_builders.teachers.features import FeatureTeacher
from pgenrm_train.records.pairs import Example, PreferencePair
from pgenrm_train.records.rows import read_pairs

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"
SLICES = (
    ("llmfao_dev", None),
    ("mtbench_judges_dev", None),
    ("mtbench_judges_dev", "shared_context"),
    ("ukpconvarg_dev", None),
)
DRAWS = 2000
NO_PERSON = 1e6  # a precision at which every user has the population's weights


def load(path: Path, only: str | None) -> list[PreferencePair]:
    """Read the pairs of one file; `only` names a boolean column that must be true."""
    rows = pd.read_parquet(path)
    rows = rows[rows[only]] if only else rows
    with tempfile.TemporaryDirectory() as folder:
        # `user_split` is "dev" throughout these files, the name of the release rather than a split.
        rows.drop(columns="user_split").to_parquet(Path(folder) / path.name)
        return list(read_pairs(Path(folder) / path.name))


def strict_hit(teacher: FeatureTeacher, pair: PreferencePair) -> bool:
    first, second = (teacher.score(example_of(pair, order)) for order in (0, 1))
    return first[0] > first[1] and second[1] > second[0]


def example_of(pair: PreferencePair, chosen_index: int = 0) -> Example:
    """The pair without history, with the chosen response first (0) or second (1)."""
    texts = (pair.chosen, pair.rejected)
    responses = texts if chosen_index == 0 else texts[::-1]
    return Example(pair.pair_id, pair.user_id, pair.context, responses, chosen_index)


def chain_hit(teacher: FeatureTeacher, pair: PreferencePair) -> bool:
    parts = teacher.chain_parts(example_of(pair))
    chosen, rejected = np.array(parts.scores) @ [weight for _, weight in parts.criteria]
    return bool(chosen > rejected)


def interval(hits: np.ndarray, users: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the pooled mean when users, not rows, are drawn with replacement."""
    _, owner = np.unique(users, return_inverse=True)
    totals, sizes = np.bincount(owner, weights=hits), np.bincount(owner)
    drawn = np.random.default_rng(seed).multinomial(
        len(sizes), np.full(len(sizes), 1 / len(sizes)), size=DRAWS
    )
    low, high = np.percentile(drawn @ totals / (drawn @ sizes), [2.5, 97.5])
    return float(low), float(high)


def report(path: Path, only: str | None) -> None:
    pairs = load(path, only)
    train = [p for p in pairs if p.split == "train"]
    teacher, population = FeatureTeacher().fit(train), FeatureTeacher(precision=NO_PERSON).fit(train)
    test = [p for p in pairs if p.split == "test"]
    users = np.array([p.user_id for p in test])
    hits = {
        "longer": np.array([len(p.chosen) > len(p.rejected) for p in test]),
        "shorter": np.array([len(p.chosen) < len(p.rejected) for p in test]),
        "population": np.array([strict_hit(population, p) for p in test]),
        "features": np.array([strict_hit(teacher, p) for p in test]),
        "chain": np.array([chain_hit(teacher, p) for p in test]),
    }
    print(
        f"\n{path.stem}, {only or 'all'} test rows: {len(test)} pairs, {len(set(users))} users; "
        f"τ = {teacher.tau:g}"
    )
    for name, hit in hits.items():
        print(
            f"  {name:10} {hit.mean():.4f}  [{', '.join(f'{bound:.4f}' for bound in interval(hit, users))}]"
        )
    for other in (max(("longer", "shorter"), key=lambda name: hits[name].mean()), "population"):
        gain = hits["features"].astype(float) - hits[other]
        print(
            f"  features − {other}: {gain.mean():+.4f}  "
            f"[{', '.join(f'{bound:+.4f}' for bound in interval(gain, users))}]"
        )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, only in SLICES:
        path = folder / f"{name}.parquet"
        if path.exists():
            report(path, only)
        else:
            print(f"\n{path} does not exist; left out")


if __name__ == "__main__":
    main()
