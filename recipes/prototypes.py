"""prototypes: analyses by the newest checkpoint → embeddings → clusters → refined prototypes."""

from pathlib import Path

from pgenrm_train.config import Config, StageName
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.timeline import Part, mark
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages import prototypes
from pgenrm_train.stages.stage import prepare, run_stage, start_of, with_totals
from recipes import build_data
from recipes.wiring.analyses import write_analyses
from recipes.wiring.models import make_embedder, refiner


def run(config: Config) -> None:
    prepare(config)
    start = start_of(config, StageName.PROTOTYPES.starts_from)
    config = with_totals(config, start.checkpoint)
    build_data.run(config)
    prototypes.reopen_damaged(StageFolder.read(Path(config.run_dir), StageName.PROTOTYPES))

    def body(folder: StageFolder, _: Tracker) -> prototypes.PrototypeFacts:
        return make(config, folder, start.checkpoint)

    summary = "k={k} from {analyses} analyses of {users} users"
    run_stage(config, StageName.PROTOTYPES, body, summary, inputs=start.made_by, renew=True)


def make(config: Config, folder: StageFolder, checkpoint: Path) -> prototypes.PrototypeFacts:
    """Write analyses, then embed and cluster them on the devices that the engines held."""
    training, newcomers = write_analyses(config, folder, checkpoint)
    mark(Part.DATA)
    embedder = make_embedder(config, workers=config.cluster.ranks)
    hashes = prototypes.read_hashes(config, checkpoint, embedder.fingerprint)
    refine = refiner(config, len(training.chains))
    return prototypes.run(config, folder, training, newcomers, embedder, hashes, refine)
