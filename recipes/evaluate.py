"""evaluate: every checkpoint of a run (or `model.path=`) on unseen users, with baselines and probes."""

from collections.abc import Mapping
from pathlib import Path

from pgenrm_train.backends.vllm.replicas import local_engines
from pgenrm_train.config import TRAINED, Config, StageName
from pgenrm_train.config.data import CHOICES
from pgenrm_train.errors import ArtifactError
from pgenrm_train.run.folder import StageFolder
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages.stage import prepare, run_stage, with_totals
from recipes import build_data
from recipes.wiring import evaluation
from recipes.wiring.benchmarks import choices, lampqa
from recipes.wiring.benchmarks.tasks import run_tasks
from recipes.wiring.candidates import candidates


def run(config: Config) -> None:
    if config.eval.compare:
        evaluation.compare_runs(config)
        return
    if config.eval.tasks:
        run_tasks(config, run)
        return
    prepare(config)
    run_dir = Path(config.run_dir)
    made = [stage for stage in TRAINED if StageFolder.read(run_dir, stage).complete]
    if config.model.kind in ("nano", "hf") and not config.model.path and not made:
        raise ArtifactError(
            f"recipe=evaluate found no complete {', '.join(TRAINED)} under run_dir={run_dir}; train one "
            "there, or give model.path="
        )
    checkpoints = (
        [Path(config.model.path)] if config.model.path else [run_dir / s / "checkpoint" for s in made]
    )
    if config.model.kind in ("nano", "hf"):
        config = with_totals(config, *checkpoints)
    build_data.run(config)
    body, summary = evaluation.evaluate, "accuracy {accuracy:.3f} of {model}"
    if config.data.name == "lampqa":
        body, summary = lampqa.evaluate, "Spearman {spearman} of {model}"
    if config.data.name in CHOICES:
        body = choices.evaluate
    clustered = StageFolder.read(run_dir, StageName.PROTOTYPES).complete
    inputs = (*made, *([StageName.PROTOTYPES] if clustered else []))

    def test(folder: StageFolder, tracker: Tracker) -> Mapping[str, object]:
        with local_engines(config) as load:
            return body(config, folder, tracker, candidates(config, made, folder.path, load))

    folder = run_stage(config, StageName.EVALUATE, test, summary, inputs=inputs, renew=True)
    print((folder.path / "table.txt").read_text(), end="")
