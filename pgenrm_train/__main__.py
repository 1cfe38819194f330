"""`python -m pgenrm_train recipe=NAME …`: compose the configuration, find the recipe, run it.  Imports nothing heavy.

Exit codes: 0 success, 1 an internal error (with traceback), 2 a user's mistake (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pgenrm_train import usage
from pgenrm_train.config import CONFIG_DIR, Config, beneath, parse, register_resolvers
from pgenrm_train.errors import ConfigError, PGenRMError
from pgenrm_train.run.process import end_on_sigterm
from pgenrm_train.run.store import publisher as publishing


def main() -> int:
    if not (CONFIG_DIR / "config.yaml").exists():
        return _fail(
            "the recipes and configs are not installed; run from a checkout, or `pip install -e .` in one"
        )
    if (text := usage.asked_for(sys.argv[1:], _groups(), choices)) is not None:
        print(text, end="")
        return 0
    sys.path.insert(0, str(CONFIG_DIR.parent))
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra then raises instead of printing, and one sentence can be made of it
    )
    end_on_sigterm()
    try:
        return _hydra_main()
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues the run", code=130)
    except Exception as error:
        if (sentence := _explain(error)) is None:
            raise
        return _fail(sentence)


def run_recipe(config: Config) -> int:
    """Import `recipes.<name>` and run it."""
    if config.cluster.device == "cpu":
        # Read when OpenMP loads, so before torch.  Its own default spins for so long that a step takes many times as long once
        # something else wants a core; with none at all SFT's small operations wait for the kernel, at two thirds of the speed.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if (
        config.ray.address is not None
    ):  # a worker of a cluster that was there before has another working directory
        config.run_dir, config.mirror = (
            str(Path(config.run_dir).absolute()),
            str(Path(config.mirror).absolute()),
        )
        config.model.path = str(Path(config.model.path).absolute()) if config.model.path else None
    try:
        module = importlib.import_module(f"recipes.{config.recipe}")
    except ModuleNotFoundError as error:
        if error.name not in ("recipes", f"recipes.{config.recipe}"):
            raise
        raise ConfigError(f"recipe={config.recipe} is not one of {', '.join(choices('recipe'))}") from None
    if config.preflight.only and config.recipe != "plan":
        module = importlib.import_module("recipes.wiring.preflight")
    with publishing.kept():
        return int(module.run(config) or 0)


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _hydra_main() -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    register_resolvers()
    codes: list[int] = []

    @hydra.main(config_path=str(CONFIG_DIR), config_name="config", version_base=None)
    def job(composed: Any) -> None:
        try:
            if OmegaConf.is_missing(composed, "recipe"):
                raise ConfigError(f"say which recipe: recipe={'|'.join(choices('recipe'))}")
            config = parse(composed)
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # a folder a job, also when run_dir= is given
                beneath(config, f"job-{HydraConfig.get().job.num}")
            codes.append(run_recipe(config))
        except Exception as error:  # told here in one sentence; Hydra would add its own lines
            if (sentence := _explain(error)) is None:
                raise
            codes.append(_fail(sentence))

    job()
    return max(codes, default=0)


def _explain(error: Exception) -> str | None:
    """One sentence for what Hydra and OmegaConf say about a user's mistake; None for anything else."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PGenRMError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return (
            f"a group takes the name of one of its files, as in data=pairs; groups are {', '.join(_groups())}"
        )
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = f"{error}\n{error.__cause__ or ''}"
    if match := re.search(r"Could not find '(\w+)/([^']+)'", text):
        return f"{match[1]}={match[2]} is not one of {', '.join(choices(match[1]))}"
    if match := re.search(r"Could not override '([\w.]+)'|not in '\w+'\s+full_key: (\S+)", text):
        return _unknown_key(match[1] or match[2])
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]}= must be given"
    if match := re.search(r"Could not find '([^']+)'", text):
        return f"config group or file '{match[1]}' does not exist; groups are {', '.join(_groups())}"
    if match := re.search(r"Error merging override (\S+)", text):
        return f"{match[1]}: {str(error.__cause__ or error).splitlines()[0]}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _unknown_key(key: str) -> str:
    """`key` is not in the schema: name what its section holds and the nearest match."""
    from omegaconf import OmegaConf

    node, parts = OmegaConf.structured(Config), key.split(".")
    while len(parts) > 1 and parts[0] in node and OmegaConf.is_config(node[parts[0]]):
        node = node[parts.pop(0)]
    section = key[: len(key) - len(".".join(parts))]
    names = sorted(str(name) for name in node)
    if not names:  # a free dictionary
        return f"key '{key}' is new and takes a plus: +{key}=VALUE"
    if parts[0] in names:
        plus = "" if node[parts[0]] else "+"  # a free dictionary
        return f"{key}= cannot take this value; its keys are set one by one, as in {plus}{key}.KEY=VALUE"
    near = get_close_matches(parts[0], names, n=1)
    hint = f"did you mean {section}{near[0]}? " if near else ""
    where = f"{section.rstrip('.')} has" if section else "top-level keys are"
    return f"unknown key '{key}'; {hint}{where} {', '.join(names)}"


def _groups() -> list[str]:
    return sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())


def _fail(sentence: str, code: int = 2) -> int:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
