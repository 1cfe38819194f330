"""`python -m pgenrm_train recipe=NAME …`: compose the configuration, find the recipe, run it.

Imports nothing heavy.  Exit codes: 0 for success, 1 for an internal error (with traceback), 2 for a user's
mistake (one sentence on stderr), 130 when interrupted, 141 when the reader of the output has closed it.
"""

import importlib
import io
import os
import select
import sys
import tempfile
from contextlib import ExitStack
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pgenrm_train.cli_errors import choices, explain, groups, key_on_command_line, key_with_dashes
from pgenrm_train.config import CONFIG_DIR, Config, as_typed, beneath, parse, register_resolvers
from pgenrm_train.errors import ConfigError
from pgenrm_train.run.process import end_on_sigterm
from pgenrm_train.run.store import publisher

# Ours and not Hydra's, which takes seconds: it copies the whole schema for each file of each group.
HELP = """\
Train, evaluate and scale personalised generative reward models (P-GenRM).

usage: python -m pgenrm_train recipe=NAME [group=choice …] [key=value …]

== Recipes and groups (group=choice) ==
{groups}
== Common keys (all of them: docs/configuration.md) ==
run_dir=FOLDER|URL        place of the run; a second start with the same one continues.  A run at a URL
                          (s3://bucket/path, gs://…) works in mirror= (runs/mirror) and uploads finished
                          parts to the URL
seed=0                    of data, training and evaluation
resume=true|false         false renames an existing run folder and starts again
pipeline.budget=          smoke | demo | full
model.path=FOLDER         start from, or evaluate, this checkpoint
data.path=FILE            parquet or JSONL for data=pairs
score.input=FILE.json     the question for recipe=score; score.dry_run=true shows the prompt only
preflight.only=true       a table of what the machine or the network lacks; starts nothing

== Examples ==
python -m pgenrm_train recipe=pipeline
python -m pgenrm_train recipe=pipeline data=pairs data.path=votes.parquet
python -m pgenrm_train recipe=psi model=llama31_8b cluster=gpu8 data=pairs data.path=votes.parquet
python -m pgenrm_train recipe=plan model=llama31_8b cluster=gpu8 data=chatbot_arena  # memory, hours, cost

--cfg job --resolve prints the composed configuration; -m runs several values of a key one after the other.
"""


def main() -> int:
    """Run the command line; return the exit code."""
    _write_utf8()
    try:
        code = _run()
        sys.stdout.flush()
        return code
    except BrokenPipeError as error:
        return _fail_or_raise(error)


def _write_utf8() -> None:
    """Write UTF-8, here and in children, where the locale's encoding cannot hold every text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(encoding="utf-8")
            os.environ["PYTHONIOENCODING"] = "utf-8"


def _close_broken_output() -> bool:
    """Discard output whose reader is gone, so that its flush at exit is quiet; False if there is none."""
    outputs = select.poll()
    for stream in (sys.stdout, sys.stderr):
        outputs.register(stream.fileno(), 0)  # errors and hang-ups are always reported
    broken = [descriptor for descriptor, _ in outputs.poll(0)]
    for descriptor in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(broken)


def _run() -> int:
    try:
        Path.cwd()
    except FileNotFoundError:
        return _fail("the working directory does not exist any more; change to another one")
    if not (CONFIG_DIR / "config.yaml").exists():
        return _fail(
            "the recipes and configs are not installed; run from a checkout, or `pip install -e .` in one"
        )
    arguments = set(sys.argv[1:])
    if arguments & {"--help", "-h"}:
        print(
            HELP.format(groups="\n".join(f"{group}: {', '.join(choices(group))}" for group in groups())),
            end="",
        )
        return 0
    if "--version" in arguments:
        print(f"pgenrm-train {metadata.version('pgenrm-train')}")
        return 0
    # Now, because Hydra writes the command line of several runs to a file.
    if sentence := key_on_command_line(sys.argv[1:]) or key_with_dashes(sys.argv[1:]):
        return _fail(sentence)
    sys.path.insert(0, str(CONFIG_DIR.parent))
    # argparse reads no key=value after an option.
    arguments_in_order = sorted(sys.argv[1:], key=lambda text: text.startswith("-") or "=" not in text)
    sys.argv[1:] = map(as_typed, arguments_in_order)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises and does not print
    end_on_sigterm()
    try:
        return _hydra_main()
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues the run", code=130)
    except Exception as error:
        return _fail_or_raise(error)


def run_recipe(config: Config) -> int:
    """Import `recipes.<name>` and run it."""
    if config.cluster.device == "cpu":
        # Read when OpenMP loads, so before torch.  By default OpenMP spins so long that a step takes many
        # times as long once something else needs a core.  Without spinning, SFT's small operations wait for
        # the kernel and run at two thirds of the speed.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if config.ray.address is not None:  # workers of an existing cluster have another directory
        config.run_dir, config.mirror = (
            str(Path(config.run_dir).absolute()),
            str(Path(config.mirror).absolute()),
        )
        config.model.path = str(Path(config.model.path).absolute()) if config.model.path else None
    module = _module(config.recipe)
    if config.preflight.only and config.recipe != "plan":
        module = importlib.import_module("recipes.preflight")
    with publisher.kept():
        return int(module.run(config) or 0)


def _module(recipe: str) -> Any:
    """The recipe's module, in `recipes` or in a folder of it."""
    for package in ("recipes", "recipes.choosing", "recipes.results"):
        try:
            return importlib.import_module(f"{package}.{recipe}")
        except ModuleNotFoundError as error:
            if error.name not in ("recipes", package, f"{package}.{recipe}"):
                raise
    raise ConfigError(f"recipe={recipe} is not one of {', '.join(choices('recipe'))}")


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
                raise ConfigError(f"recipe= must be given: recipe={'|'.join(choices('recipe'))}")
            config = parse(composed)
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # a folder per job, also with run_dir=
                beneath(config, f"job-{HydraConfig.get().job.num}")
            codes.append(run_recipe(config))
        except Exception as error:  # caught here, because Hydra would add lines of its own
            codes.append(_fail_or_raise(error))

    with ExitStack() as folders:
        scratch = cache(lambda: folders.enter_context(tempfile.TemporaryDirectory(prefix="pgenrm_")))
        OmegaConf.register_new_resolver("scratch", scratch, replace=True)
        job()
    return max(codes, default=0)


def _fail_or_raise(error: Exception) -> int:
    if isinstance(error, BrokenPipeError) and _close_broken_output():
        return 141
    if (sentence := explain(error)) is None:
        raise error
    return _fail(sentence)


def _fail(sentence: str, code: int = 2) -> int:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
