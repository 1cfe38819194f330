"""Run of a stage: skip it if complete, check the machine, open the folder, run the body, record the result.

Every stage of `recipe=pipeline` runs in a process of its own (`launch`).  So memory is freed, no engine's
settings reach the next stage, and a stage run alone takes the same code path as within the pipeline.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pgenrm_train.cluster.preflight.checks import check_machine
from pgenrm_train.config import TRAINED, Config, StageName, Totals, to_dict
from pgenrm_train.errors import ArtifactError, BackendError, ConfigError
from pgenrm_train.run import timeline
from pgenrm_train.run.checkpoints import totals_of, write_manifest
from pgenrm_train.run.folder import Manifest, StageFolder, check_checkpoint, set_aside, write_config
from pgenrm_train.run.lock import lock, unlock
from pgenrm_train.run.process import child_environment, run_child
from pgenrm_train.run.store import publisher
from pgenrm_train.run.timeline import Part
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages.model_card import write_card
from pgenrm_train.stages.registry import REGISTRY, as_recorded

CHILD = "PGENRM_PIPELINE_CHILD"
# Makes the stage's products in its folder; returns the facts that its manifest keeps.
Body = Callable[[StageFolder, Tracker], Mapping[str, object]]


def run_stage(
    config: Config,
    name: StageName,
    body: Body,
    summary: str,
    *,
    inputs: Sequence[StageName] = (),
    renew: bool = False,
) -> StageFolder:
    """Run `body` in `<run_dir>/<name>` unless it is complete already; return the stage's folder.

    `summary`: line printed at the end, formatted with the manifest. `inputs`: stages whose products are used
    in addition to `stage.after`. `renew`: rebuild in place if settings or inputs changed, where other stages
    refuse.  Safe for stages that train nothing: answers of a model are cached by question.
    """
    run_dir, stage = Path(config.run_dir), REGISTRY[name]
    folder = StageFolder.read(run_dir, name)
    made_from: dict[str, str] = {
        used: StageFolder.read(run_dir, used).manifest.fingerprint or "" for used in (*stage.after, *inputs)
    }
    settings = as_recorded(stage.settings(config), folder.manifest.settings)
    unchanged = folder.made_from(settings, made_from)
    if folder.complete and unchanged:
        if name == config.recipe:
            print(f"[{name}] complete in {folder.path}", flush=True)
        return folder
    check_machine(config, name)
    if renew and not unchanged:
        folder.manifest = Manifest()
    folder.begin(config=to_dict(config), settings=settings, inputs=made_from, seed=config.seed)
    timeline.begin(run_dir, name)
    with _recorded(config, folder) as tracker:
        facts = body(folder, tracker)
        if stage.method:
            write_card(config, stage, folder, facts)
            write_manifest(folder.path / "checkpoint", config.model.counted)
            facts = {**facts, "totals": config.model.counted}
        tracker.link(facts)
    folder.finish(**facts)
    print(f"[{name}] {summary.format(**folder.manifest.as_json())}", flush=True)
    return folder


@contextmanager
def _recorded(config: Config, folder: StageFolder) -> Iterator[Tracker]:
    """Tracker of the numbers; the manifest records why a stage ended early."""
    tracker = Tracker.early.pop(folder.path, None) or Tracker(
        config, folder.stage, folder.path, steps_before(config, folder.stage)
    )
    tracker.after_log = folder.beat
    timeline.mark(Part.DATA)
    try:
        yield tracker
    except (KeyboardInterrupt, Exception) as error:
        by_user = isinstance(error, KeyboardInterrupt)
        folder.interrupted("interrupted by the user" if by_user else f"{type(error).__name__}: {error}")
        raise
    finally:
        tracker.close()
        timeline.end()


def steps_before(config: Config, stage: str) -> int:
    """Optimiser steps that the run's complete training stages before `stage` have made."""
    order = list(StageName)
    before = [name for name in TRAINED if order.index(name) < order.index(StageName(stage))]
    folders = [StageFolder.read(Path(config.run_dir), name) for name in before]
    return sum(int(folder.manifest.facts["steps"]) for folder in folders if folder.complete)


@dataclass(frozen=True, slots=True)
class Start:
    """Checkpoint that a stage starts from, and the stage of this run that made it, if any."""

    checkpoint: Path
    made_by: tuple[StageName, ...]


def start_of(config: Config, stages: Sequence[StageName]) -> Start:
    """Checkpoint of `model.path`, else of the first complete stage of `stages`.

    Raises ArtifactError if there is none.
    """
    if config.model.path:
        return Start(Path(config.model.path), ())
    folder = newest(config, *stages)
    return Start(folder.path / "checkpoint", (StageName(folder.stage),))


def newest(config: Config, *stages: StageName) -> StageFolder:
    """The first complete stage of `stages`, the latest first.  Raises ArtifactError if there is none."""
    for stage in stages:
        folder = StageFolder.read(Path(config.run_dir), stage)
        if folder.complete:
            print(f"using {folder.path}", flush=True)
            return folder
    raise ArtifactError(
        f"recipe={config.recipe} needs a complete {' or '.join(stages)} under run_dir={config.run_dir}; "
        f"run recipe={stages[-1]} there first or give model.path="
    )


def with_totals(config: Config, *checkpoints: Path) -> Config:
    """The configuration with the kind of totals of the checkpoints' manifests, or else its own.

    Without either it is `declared`, the paper's.  But it is `code` for a nano from scratch on PersonaWorld,
    which gained most in our trial.  On real votes a nano repeats its criteria too badly (docs/results.md).

    Raises ConfigError if they differ from each other, or from `model.totals`.
    """
    stated = {path: kind for path in checkpoints if (kind := totals_of(path)) is not None}
    kinds = {*stated.values(), *([Totals(config.model.totals)] if config.model.totals else [])}
    if len(kinds) > 1:
        listed = "; ".join(f"{path} has totals={kind}" for path, kind in stated.items())
        given = config.model.totals
        raise ConfigError(
            f"model.totals={given}, but a checkpoint's manifest differs: {listed}; leave model.totals out"
            if given
            else f"checkpoints with different totals need runs of their own: {listed}; use model.path="
        )
    new_nano = config.model.kind == "nano" and not checkpoints and not config.psi.nano_start
    by_code = new_nano and config.data.name == "personaworld"
    kind = next(iter(kinds), Totals.CODE if by_code else Totals.DECLARED)
    return replace(config, model=replace(config.model, totals=kind.value))


def launch(config: Config, recipe: str) -> None:
    """Run one recipe of the same configuration in a child process that dies with this one."""
    command = [sys.executable, "-m", "pgenrm_train.worker", str(Path(config.run_dir) / "config.yaml"), recipe]
    # On Ctrl-C the child needs time to put its manifest in order.
    code = run_child(command, child_environment() | {CHILD: "1"}, patience=20.0)
    if code == 130:
        raise KeyboardInterrupt
    if code == 2:  # the child has printed the user's mistake
        raise SystemExit(2)
    if code:
        raise BackendError(
            f"recipe={recipe} exited with code {code}; see its last lines above; the same command continues"
        )


def prepare(config: Config) -> None:
    """Lock the run folder, write the resolved configuration and open the run's store.

    With resume=false an existing run folder is set aside first.
    Raises ArtifactError, before anything is written, if `model.path` holds no checkpoint.
    """
    if CHILD in os.environ:  # the pipeline has done it
        return
    if config.model.path:
        check_checkpoint(Path(config.model.path))
    run_dir = Path(config.run_dir)
    try:
        if not config.resume:
            publisher.refuse_to_replace(config)
        if not config.resume and run_dir.exists():
            lock(run_dir)
            locked = run_dir.resolve()
            print(f"resume=false: the old run was moved to {set_aside(run_dir)}", flush=True)
            unlock(locked)
        config.resume = True
        lock(run_dir)
        write_config(run_dir / "config.yaml", to_dict(config))
        publisher.begin(config)
    except OSError as error:
        raise ArtifactError(f"run_dir={run_dir} cannot be written ({error.strerror})") from None
