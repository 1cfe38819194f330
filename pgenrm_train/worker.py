"""Run one recipe of a resolved configuration: `python -m pgenrm_train.worker CONFIG.yaml RECIPE`.

`recipe=pipeline` starts each of its recipes so.
"""

import dataclasses
import sys
from pathlib import Path

from pgenrm_train.__main__ import run_recipe
from pgenrm_train.config import ROOT, StageName, parse
from pgenrm_train.errors import PGenRMError
from pgenrm_train.run.process import end_on_sigterm


def main(config_file: str, recipe: str) -> int:
    import yaml

    sys.path.insert(0, str(ROOT))
    end_on_sigterm()
    try:
        config = parse(yaml.safe_load(Path(config_file).read_text(encoding="utf-8")))
        if recipe not in [stage for stage in StageName if not stage.starts_from]:
            config.model.path = None  # PSI starts there; later stages start from a checkpoint of the run
        return run_recipe(dataclasses.replace(config, recipe=recipe))
    except KeyboardInterrupt:
        return 130
    except PGenRMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
