"""K-means and refinement of many analyses: seconds and peak memory, with the vectors on disk.

    python benchmarks/memory/prototypes_memory.py [--analyses 100000] [--dimensions 384] [--prototypes 50]
        [--texts-per-analysis 0.5]

Analyses are rows of a memory-mapped matrix (analyses, d) around planted centres.  Queries, responses and
histories are `Lookup` of a second memory-mapped table, as the stage makes them, so equal texts are stored
once.  Printed after each step: seconds, the peak of resident memory (which counts mapped pages that could
be dropped), the anonymous memory (which could not), and the adjusted Rand index.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from pgenrm_train.config import PrototypesConfig
from pgenrm_train.prototypes.clusters import CHUNK, Neighbourhood, cluster, suggest_k
from pgenrm_train.prototypes.refinement import Lookup, RefinementBatch, RefinementSettings, refine


def mapped(
    path: Path, rows: int, d: int, rng: np.random.Generator, centres: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    table = np.lib.format.open_memmap(path, "w+", np.float32, (rows, d))
    group = rng.integers(0, 1 if centres is None else len(centres), rows)
    for start in range(0, rows, CHUNK):
        x = rng.standard_normal((min(CHUNK, rows - start), d), dtype=np.float32)
        if centres is not None:
            x = centres[group[start : start + CHUNK]] + 0.7 * x / np.sqrt(d)
        table[start : start + CHUNK] = x / np.linalg.norm(x, axis=1, keepdims=True)
    table.flush()
    return np.load(path, mmap_mode="r"), group


def anonymous_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--analyses", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--prototypes", type=int, default=50)
    parser.add_argument(
        "--texts-per-analysis", type=float, default=0.5, help="distinct queries and responses in the table"
    )
    args = parser.parse_args()
    from sklearn.metrics import adjusted_rand_score

    n, d, rng = args.analyses, args.dimensions, np.random.default_rng(0)
    clock = time.perf_counter()

    def log_step(step: str) -> None:
        nonlocal clock
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{step:32} {time.perf_counter() - clock:7.1f} s, peak {peak:5.2f} GiB resident, "
            f"{anonymous_gib():5.2f} GiB anonymous",
            flush=True,
        )
        clock = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        centres = rng.standard_normal((args.prototypes, d)).astype(np.float32)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        P, group = mapped(Path(folder, "analyses.npy"), n, d, rng, centres)
        texts, _ = mapped(Path(folder, "texts.npy"), max(16, int(args.texts_per_analysis * n)), d, rng)
        users = np.char.add("u", (np.arange(n) // 4).astype(str))
        one, many = (
            (lambda: Lookup(texts, rng.integers(0, len(texts), n))),
            (lambda: Lookup(texts, rng.integers(0, len(texts), (n, 3)))),
        )
        samples = RefinementBatch(
            one(), one(), one(), many(), many(), many(), rng.random((n, 3)) < 0.9, users
        )
        log_step(f"{n} × {d} on disk")
        suggest_k(P)
        log_step("singular values")
        clustered = cluster(P, args.prototypes, 0, users)
        log_step("K-means")
        settings = RefinementSettings.of(PrototypesConfig(refine_epochs=1), seed=0)
        refined, _ = refine(clustered, samples, settings)
        log_step("refinement, one epoch")
        neighbourhood = Neighbourhood(refined)
        for row in range(0, n, max(1, n // 200)):
            neighbourhood.nearest(np.asarray(P[row]), users[row], 8)
        log_step("neighbours of 200 queries")
        print(
            f"adjusted Rand index: {adjusted_rand_score(group, clustered.labels):.3f} clustered, "
            f"{adjusted_rand_score(group, refined.labels):.3f} refined"
        )


if __name__ == "__main__":
    main()
