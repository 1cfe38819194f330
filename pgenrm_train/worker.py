"""`python -m pgenrm_train.worker CONFIG.yaml RECIPE`: run one recipe from a resolved configuration, as `recipe=pipeline` does."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from pgenrm_train.__main__ import run_recipe
from pgenrm_train.config import ROOT, parse
from pgenrm_train.errors import PGenRMError
from pgenrm_train.run.process import end_on_sigterm


def main(config_file: str, recipe: str) -> int:
    import yaml

    sys.path.insert(0, str(ROOT))
    end_on_sigterm()
    try:
        config = parse(yaml.safe_load(Path(config_file).read_text(encoding="utf-8")))
        if recipe not in ("build_data", "build_sec", "psi"):
            config.model.path = (
                None  # it names where PSI starts; later stages start from what the run has made
            )
        return run_recipe(dataclasses.replace(config, recipe=recipe))
    except KeyboardInterrupt:
        return 130
    except PGenRMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
