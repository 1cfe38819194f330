"""Similar users and nearest prototypes, from the prototypes of a run (METHOD §6, §7)."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.metrics.slices import first_analyses
from eval.studies.evaluation import Tested
from eval.studies.scaling_study import FindSimilar, Similar
from pgenrm_train.config import TRAINED, Config, StageName
from pgenrm_train.errors import ArtifactError
from pgenrm_train.prompts.writer import histories
from pgenrm_train.prototypes.clusters import Neighbourhood, Prototypes, assign, load, preference_text
from pgenrm_train.records.pairs import PreferencePair
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.stages.prototypes import read_hashes
from pgenrm_train.stages.stage import newest
from recipes.wiring.models import make_embedder


def find_similar(config: Config, pairs: Sequence[PreferencePair]) -> FindSimilar:
    """Nearest training users by the text of an analysis, from the run's prototypes (METHOD §7)."""
    import pandas as pd

    folder = newest(config, StageName.PROTOTYPES)
    prototypes, embedder = load_prototypes(config, folder)
    neighbourhood = Neighbourhood(prototypes)
    members = pd.read_parquet(folder.path / "analyses.parquet").sort_values("row")
    sampler, by_id = histories(config, pairs), {p.pair_id: p for p in pairs}

    def find(analyses: Sequence[str], users: Sequence[str], n: int) -> list[list[Similar]]:
        similar = []
        for vector, user in zip(embedder([preference_text(a) for a in analyses]), users):
            rows = neighbourhood.nearest(vector, user, n, allow_fewer=True)
            nearest = [by_id[members["pair_id"].iat[row]] for row in rows]
            similar.append([Similar(p.user_id, sampler(p)) for p in nearest])
        return similar

    return find


def find_random(config: Config, pairs: Sequence[PreferencePair]) -> FindSimilar:
    """Random other training users, with the histories that `find_similar` would show: its control."""
    import pandas as pd

    folder = newest(config, StageName.PROTOTYPES)
    members = pd.read_parquet(folder.path / "analyses.parquet").sort_values("row")
    sampler, by_id = histories(config, pairs), {p.pair_id: p for p in pairs}

    pairs_of: dict[str, list[str]] = {}
    for user, pair_id in zip(members["user_id"].astype(str), members["pair_id"]):
        pairs_of.setdefault(user, []).append(pair_id)
    everyone = sorted(pairs_of)

    def find(analyses: Sequence[str], users: Sequence[str], n: int) -> list[list[Similar]]:
        found = []
        for analysis, user in zip(analyses, users):
            draw = random.Random(f"{config.seed}/{user}/{analysis}")
            drawn = draw.sample(everyone, min(n + 1, len(everyone)))
            others = [by_id[draw.choice(pairs_of[name])] for name in drawn if name != user][:n]
            found.append([Similar(pair.user_id, sampler(pair)) for pair in others])
        return found

    return find


def nearest_prototypes(config: Config, final: Tested) -> dict[str, int] | None:
    """pair_id → prototype nearest to the model's analysis of its user; None without prototypes.

    A pair without a readable first chain has none, nor has any pair if the prototypes belong to another
    model.
    """
    folder = StageFolder.read(Path(config.run_dir), StageName.PROTOTYPES)
    analyses = first_analyses(final.predictions) if folder.complete else {}
    if not analyses:
        return None
    try:
        prototypes, embedder = load_prototypes(config, folder)
    except ArtifactError as error:  # slices by prototype are optional; the evaluation continues
        print(f"no slices by prototype: {error}", flush=True)
        return None
    labels = assign(prototypes.A, embedder([preference_text(text) for text in analyses.values()]))
    return {pair: int(label) for pair, label in zip(analyses, labels, strict=True)}


def load_prototypes(config: Config, folder: StageFolder) -> tuple[Prototypes, Any]:
    """The run's prototypes and their embedder.

    Raises ArtifactError if they belong to another model, embedder or data.  The weights behind a server
    cannot be checked.
    """
    embedder, checkpoint = make_embedder(config), checkpoint_under_test(config)
    expect = read_hashes(config, checkpoint or Path("-"), embedder.fingerprint)
    if checkpoint is None:
        del expect["model"]
    return load(folder.path, expect), embedder


def checkpoint_under_test(config: Config) -> Path | None:
    """The local checkpoint for test-time scaling: `model.path` or the run's newest; None for an API."""
    if config.model.kind not in ("nano", "hf"):
        return None
    if config.model.path:
        return Path(config.model.path)
    made = (StageFolder.read(Path(config.run_dir), stage) for stage in reversed(TRAINED))
    return next((folder.path / "checkpoint" for folder in made if folder.complete), None)
