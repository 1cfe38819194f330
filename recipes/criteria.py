"""criteria: for CRE, `teacher=` infers criteria of users who stated none, from their training votes."""

from pathlib import Path

from pgenrm_train.config import Config, StageName
from pgenrm_train.prompts.writer import load_pairs
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages import criteria
from pgenrm_train.stages.stage import prepare, run_stage
from recipes import build_data
from recipes.wiring.teachers import criteria_writer


def run(config: Config) -> None:
    prepare(config)
    build_data.run(config)

    def body(folder: StageFolder, _: Tracker) -> dict[str, object]:
        pairs = load_pairs(Path(config.run_dir))
        with criteria_writer(config, pairs, folder.path) as writer:
            return criteria.run(config, folder, pairs, writer)

    summary = (
        "criteria of {inferred} of {users} users who stated none; failures: {failures}; teacher: {teacher}"
    )
    run_stage(config, StageName.CRITERIA, body, summary, renew=True)
