"""prototypes: the newest checkpoint writes analyses of training users → embeddings → clusters → refined prototypes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval.ask.harness import PredictionStore, ask, own_questions, readable_text
from pgenrm_train.backends.vllm.replicas import local_engines
from pgenrm_train.config import Config, masking_of
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import fingerprint
from pgenrm_train.prompts.writer import PromptWriter, asked, histories, load_pairs
from pgenrm_train.prototypes.clusters import load
from pgenrm_train.prototypes.refinement import refine
from pgenrm_train.run.folder import StageFolder, weights_digest
from pgenrm_train.run.progress import progress
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages import prototypes
from pgenrm_train.stages.registry import PROTOTYPES
from pgenrm_train.stages.stage import prepare, run_stage, start_of
from recipes import build_data
from recipes.build_sec import load_tokenizer
from recipes.wiring.candidates import once

NEWCOMERS = 200  # pairs of validation users for the cold-start curve
LARGE = 20_000  # analyses, or texts to embed, from which on several processes pay for their start


def run(config: Config) -> None:
    prepare(config)
    start = start_of(config, StageName.PROTOTYPES.starts_from)
    build_data.run(config)
    reopen_damaged(StageFolder.read(Path(config.run_dir), StageName.PROTOTYPES))
    summary = "k={k} from {analyses} analyses of {users} users"

    def body(folder: StageFolder, _: Tracker) -> dict[str, Any]:
        return make(config, folder, start.checkpoint)

    run_stage(config, PROTOTYPES, body, summary, inputs=start.made_by, renew=True)


def make(config: Config, folder: StageFolder, checkpoint: Path) -> dict[str, Any]:
    """Ask the model about training users and about newcomers, then hand chains and embedder to the stage."""
    pairs = load_pairs(Path(config.run_dir))
    sampler = histories(config, pairs)
    train = prototypes.pairs_to_analyse(config, asked(pairs, "train"))
    shown = {p.pair_id: sampler(p) for p in train}
    sets = {"own": (train, shown)}
    seen = {p.user_id for p in pairs if p.trains}
    newcomers = [
        p
        for p in asked(pairs, "val", min(NEWCOMERS, config.data.max_val_pairs or NEWCOMERS))
        if p.user_id not in seen
    ]
    for size in range(config.data.history_size + 1):  # newcomers of whom so many votes are known
        sets[f"known/{size}"] = newcomers, {p.pair_id: sampler(p, size) for p in newcomers}
    questions = {name: own_questions(*these, set_name=name, orders=(0,)) for name, these in sets.items()}
    with local_engines(config) as load:  # and no longer: embedder and refinement need the devices
        start, close = once(lambda: load(checkpoint))
        table = ask(
            [q for these in questions.values() for q in these],
            start,
            PromptWriter(config, load_tokenizer(checkpoint)),
            PredictionStore(
                folder.path / f"chains-{checkpoint.parent.name}",
                fingerprint(weights_digest(checkpoint), config.seed),
            ),
            masking=masking_of(config, "eval"),
            temperature=0.0,
            progress=progress,
            what="analyses of users",
        ).set_index("key")
        close()
    chains = {
        name: [(q.pair, readable_text(table.loc[q.key])) for q in these] for name, these in questions.items()
    }
    embedder = make_embedder(config, workers=processes(config))
    own = chains.pop("own")
    newcomers_chains = [(found, sets[name][1]) for name, found in chains.items() if found]
    made_from = hashes(config, checkpoint, embedder)
    facts = prototypes.run(
        config, folder, own, shown, embedder, made_from, newcomers_chains, refiner(config, len(train))
    )
    for remark in remarks(config, facts):
        print(f"[prototypes] {remark}", flush=True)
    return facts


def reopen_damaged(folder: StageFolder) -> None:
    """Finished prototypes whose files are damaged are made anew."""
    if not folder.complete:
        return
    try:
        load(folder.path)
    except ArtifactError:
        print(f"[prototypes] files in {folder.path} are missing or damaged; they are made anew", flush=True)
        folder.interrupted("damaged files")


def remarks(config: Config, facts: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of the console should know beside the numbers."""
    if config.prototypes.k != "auto" and facts["k"] < int(config.prototypes.k):
        yield f"prototypes.k={config.prototypes.k}, but the {facts['analyses']} analyses hold only {facts['k']} distinct preferences"
    if facts["recovery"] is not None:
        yield (
            f"adjusted Rand index against what users say of themselves: {facts['recovery']:.2f} an analysis, "
            f"{facts['recovery_of_users']:.2f} a user and scenario"
        )


def processes(config: Config) -> int:
    return config.cluster.nodes * config.cluster.processes_per_node


def make_embedder(config: Config, name: str | None = None, workers: int = 1) -> Any:
    """The embedder `name`, by default that of the prototypes.

    `workers` above 1: Ray actors share large sets out; nothing else may hold the devices then.
    """
    from pgenrm_train.backends.embedding.embedder import SentenceEmbedder
    from pgenrm_train.backends.embedding.workers import EmbedderWorkers

    cache = Path(config.run_dir) / "embeddings"
    shared = EmbedderWorkers(config, workers, LARGE) if workers > 1 else None
    return SentenceEmbedder(
        name or config.prototypes.embedder, device=config.cluster.device, cache_dir=cache, shared=shared
    )


def refiner(config: Config, analyses: int) -> prototypes.Refine:
    """Large sets are shared out over this node's processes."""
    if analyses < LARGE or config.cluster.processes_per_node == 1:
        return refine
    from pgenrm_train.backends.embedding.refine_processes import refine_in_processes

    return functools.partial(refine_in_processes, processes=config.cluster.processes_per_node)


def of_users(folder: Path) -> dict[str, int]:
    """User → the prototype of most of their analyses.  Raises ArtifactError when `folder` holds no finished prototypes."""
    import pandas as pd

    if not StageFolder.read(folder.parent, folder.name).complete:
        raise ArtifactError(
            f"curriculum.prototypes={folder} holds no finished prototypes; give the folder RUN/prototypes"
        )
    table = pd.read_parquet(folder / "analyses.parquet", columns=["user_id", "prototype"])
    return {user: int(labels.mode().iloc[0]) for user, labels in table.groupby("user_id")["prototype"]}


def hashes(config: Config, checkpoint: Path, embedder: Any) -> Mapping[str, str]:
    data = StageFolder.read(Path(config.run_dir), StageName.BUILD_DATA).manifest.facts["sha256"]
    return prototypes.read_hashes(config, checkpoint, embedder.fingerprint, data)
