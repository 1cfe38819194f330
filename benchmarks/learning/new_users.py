"""Accuracy of the preference vector z on users that training has not seen, by the number of known votes.

    python benchmarks/learning/new_users.py RUN [--seeds 3]

Needs build_data and prototypes of a PersonaWorld run.  Clusters and refines again per seed, then scores every
validation and test pair of unseen users.  The mean of all centroids takes the place of their own prototypes,
so no chain is needed.  `resemblance` is Σ_τ (y_τ⁺ − y_τ⁻)ᵀ(y⁺ − y⁻): nothing is learnt.
"""

import argparse
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq

from pgenrm_train.config import load
from pgenrm_train.prompts.writer import histories, load_pairs
from pgenrm_train.prototypes import clusters
from pgenrm_train.prototypes.refinement import RefinementBatch, RefinementSettings, cold_start, refine
from pgenrm_train.stages.prototypes import samples_of
from recipes.wiring.models import make_embedder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    config = load("recipe=prototypes", f"run_dir={args.run}", "data=personaworld")
    pairs, embed = load_pairs(args.run), make_embedder(config)
    sampler, made = histories(config, pairs), clusters.load(args.run / "prototypes")
    by_id = {pair.pair_id: pair for pair in pairs}
    rows = [by_id[i] for i in read_ids(args.run / "prototypes" / "analyses.parquet")]
    trained = {pair.user_id for pair in pairs if pair.trains}
    unseen = [pair for pair in pairs if pair.user_id not in trained]
    samples = samples_of(rows, {pair.pair_id: sampler(pair) for pair in rows}, embed)
    known = {
        votes: samples_of(unseen, {pair.pair_id: sampler(pair, votes) for pair in unseen}, embed)
        for votes in range(config.data.history_size + 1)
    }
    facts = {votes: [] for votes in known}
    for seed in range(args.seeds):
        settings = RefinementSettings.of(config.prototypes, seed)
        start = clusters.cluster(made.embeddings, len(made.A), seed, list(made.users))
        refined, _ = refine(start, samples, settings)
        for votes, batch in known.items():
            facts[votes].append(cold_start(refined, batch, np.full(len(unseen), -1), settings))
    first = facts[0][0]
    print(
        f"{len(rows)} analyses; {first['pairs']} pairs of {first['users']} unseen users; {args.seeds} seeds"
    )
    for votes, each in facts.items():
        low, high = (fmean(f["accuracy ci95"][side] for f in each) for side in (0, 1))
        plain = f", resemblance {100 * resemblance(known[votes]):.1f}" if votes else ""
        print(
            f"{votes} votes: z {100 * fmean(f['accuracy'] for f in each):.1f} [{100 * low:.1f}, "
            f"{100 * high:.1f}]{plain}"
        )


def read_ids(table: Path) -> list[str]:
    return pq.read_table(table, columns=["pair_id"])["pair_id"].to_pylist()


def resemblance(samples: RefinementBatch) -> float:
    rows = np.arange(len(samples))
    past = (samples.history_chosen[rows] - samples.history_rejected[rows]) * samples.mask[..., None]
    difference = samples.chosen[rows] - samples.rejected[rows]
    return float(((past.sum(1) * difference).sum(-1) > 0).mean())


if __name__ == "__main__":
    main()
