"""plan: needs and cost of a run, a launch file, or an engine's configuration.

It starts nothing and makes no folder.  The exit code is 1 if a stage does not fit.

`plan.stage=psi|cre|…|all` selects stages; `plan.json=true` prints JSON.  `plan.emit=slurm|rayjob` prints a
launch file, `plan.emit=verl|deepspeed|vllm` the configuration of an engine, and problems go to stderr.  If
`run_dir` exists, plan.json is written there.
"""

import json
import sys
from pathlib import Path

from pgenrm_train.cluster.planning.plan import Plan, plan_of
from pgenrm_train.cluster.planning.table import show
from pgenrm_train.config import Config
from pgenrm_train.files import write_json


def run(config: Config) -> int:
    plan = plan_of(config)
    if config.plan.emit:
        return emit(config, plan)
    if (folder := Path(config.run_dir)).is_dir():
        write_json(folder / "plan.json", plan.as_json())
    if config.plan.json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        show(plan)
    return 0 if plan.fits else 1


def emit(config: Config, plan: Plan) -> int:
    """Print the file to stdout, so that it can be redirected."""
    from pgenrm_train.cluster.launch.files import idle_warning, rayjob, slurm
    from recipes.wiring.engine_config import engine_yaml

    for stage in plan.stages:
        change = [f"{stage.stage} fits with {' '.join(stage.change)}"] if stage.change else []
        for warning in (*stage.problems, *change, *stage.warnings):
            print(f"warning: {warning}", file=sys.stderr)
    if config.plan.emit == "slurm" and (idle := idle_warning(config)):
        print(f"warning: {idle}", file=sys.stderr)
    launch = {"slurm": slurm, "rayjob": rayjob}.get(what := str(config.plan.emit))
    print(launch(config, hours=plan.hours) if launch else engine_yaml(config, what), end="")
    return 0 if plan.fits else 1
