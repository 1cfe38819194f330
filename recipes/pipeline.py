"""pipeline: the method from data to report, each stage in its own process."""

import time
from pathlib import Path

from pgenrm_train.cluster.preflight.checks import fail_early
from pgenrm_train.config import STAGES, TRAINED, Config, StageName
from pgenrm_train.files import link, write_json
from pgenrm_train.run import timeline
from pgenrm_train.run.folder import MANIFEST, StageFolder, Status, environment_facts
from pgenrm_train.run.tracking import METRICS
from pgenrm_train.stages.stage import launch, prepare
from recipes.wiring.models import check_base

RECIPES = (
    StageName.BUILD_DATA,  # raw source → pairs
    StageName.BUILD_SEC,  # teacher chains, rejection sampling
    StageName.PSI,  # SFT on DeepSpeed
    "cre_and_curriculum",  # GRPO on veRL: masked criteria, then hard negatives
    StageName.PROTOTYPES,  # analyses of training users → clusters → refinement
    StageName.EVALUATE,  # every checkpoint on unseen users; scaling of the last
)


def run(config: Config) -> None:
    started = time.monotonic()
    prepare(config)
    fail_early(config, STAGES)
    check_base(config)
    for number, recipe in enumerate(RECIPES, start=1):
        print(f"── {number} of {len(RECIPES)}: {recipe}", flush=True)
        launch(config, recipe)
    gather(config, time.monotonic() - started)


def gather(config: Config, seconds: float) -> None:
    """Put the final files at the top of the run folder and print their paths."""
    run_dir = Path(config.run_dir)
    for name in ("results.json", "predictions.parquet", "report.html", "report.md", "table.txt"):
        link(run_dir / StageName.EVALUATE / name, run_dir / name)
    trained = [stage for stage in TRAINED if (run_dir / stage / "checkpoint").exists()]
    link(run_dir / trained[-1] / "checkpoint", run_dir / "checkpoint")
    metrics = [path for stage in STAGES if (path := run_dir / stage / METRICS).exists()]
    (run_dir / METRICS).write_text("".join(path.read_text() for path in metrics))
    timeline.write_summary(run_dir)
    manifests = {stage: StageFolder.read(run_dir, stage).manifest for stage in STAGES}
    brief = ("status", "wall_seconds", "fingerprint", "starts")
    facts = {
        "recipe": "pipeline",
        "status": Status.COMPLETE,
        "seed": config.seed,
        "stages": {stage: {key: getattr(m, key) for key in brief} for stage, m in manifests.items()},
        "wall_seconds": round(seconds, 1),
        **environment_facts(),
    }
    write_json(run_dir / MANIFEST, facts)
    spent = ", ".join(f"{stage} {manifest.wall_seconds:.0f} s" for stage, manifest in manifests.items())
    print(f"time: {spent}\nrun folder: {run_dir} · report: {run_dir / 'report.html'}")
