"""gpu_check: the first check of a GPU node, with a budget of 30 minutes.

It runs preflight, three steps of PSI and of CRE, an evaluation, PSI and CRE again with adapters of a Qwen3,
and gives one verdict.  Each recipe has a process of its own, as in the pipeline.  The model has random
weights (nano's code path, `model=nano_1b` or `model.nano.*`): engines, kernels, NCCL and memory are tested,
not learning.  Peak memory is compared with the plan.  The same recipe runs on a CPU.
"""

import time
from pathlib import Path

from pgenrm_train.cluster.preflight.checks import check_machine
from pgenrm_train.config import Config, attention_of, to_dict
from pgenrm_train.files import write_json
from pgenrm_train.run.folder import write_config
from pgenrm_train.stages.stage import prepare
from recipes.wiring.gpu_check import MINUTES, STEPS, Measurement, measure, passes, report_of

# A recipe that still runs then is killed, so there is always a verdict.
END_MINUTES = 2 * MINUTES


def run(config: Config) -> int:
    config.model.attention = attention_of(config)
    prepare(config)
    check_machine(config, *STEPS)
    print(f"preflight: ok · attention: {config.model.attention}", flush=True)
    measurements: dict[str, Measurement] = {}
    end, late = time.monotonic() + 60 * END_MINUTES, f"killed: not done after {END_MINUTES:g} minutes in all"
    for name, (pass_config, recipe) in passes(config).items():
        write_config(Path(pass_config.run_dir) / "config.yaml", to_dict(pass_config))
        measurements[name] = measure(pass_config, recipe, end - time.monotonic(), late)
        if measurements[name].error:
            break
    report = report_of(config, measurements)
    write_json(Path(config.run_dir) / "gpu_check.json", report.as_json())
    print(report.text())
    return 0 if report.passed else 1
