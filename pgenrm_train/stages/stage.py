"""How a recipe runs a stage: skip what is complete, check the machine, open the folder, run, record.

Every stage of `recipe=pipeline` runs in a process of its own (`launch`), so that memory goes back, an engine's settings do not
leak into the next, and a stage alone is the same code path as a stage of the pipeline.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from pgenrm_train.cluster.preflight import check_machine, findings, still_to_do
from pgenrm_train.config import ROOT, Config, get, to_dict
from pgenrm_train.errors import ArtifactError, BackendError, PGenRMError, PreflightError
from pgenrm_train.records.shards import digest
from pgenrm_train.run.folder import Manifest, StageFolder, check_checkpoint, set_aside, write_config
from pgenrm_train.run.process import Terminated, die_with_parent
from pgenrm_train.run.store import publisher as publishing
from pgenrm_train.run.tracking import Tracker
from pgenrm_train.stages.model_card import METHODS, write_card

T = TypeVar("T")
CHILD = "PGENRM_PIPELINE_CHILD"


def run_stage(
    config: Config,
    stage: str,
    reads: Sequence[str],
    inputs: Sequence[str],
    body: Callable[[StageFolder, Tracker], Mapping[str, Any]],
    say: str,
    *,
    renew: bool = False,
) -> StageFolder:
    """Run `body` in `<run_dir>/<stage>` unless it is complete already; returns the stage's folder.

    `say` is formatted with the facts that `body` returns and told at the end.  `renew`: with other settings or inputs the stage is
    made anew in place, where others refuse: it trains nothing, and what it has asked a model is kept by what was asked.
    `reads` are the configuration keys that the stage depends on, `inputs` the stages whose products it uses.
    """
    run_dir = Path(config.run_dir)
    folder = StageFolder.read(run_dir, stage)
    made_from = {name: StageFolder.read(run_dir, name).manifest.fingerprint or "" for name in inputs}
    settings = {key: _plain(get(config, key)) for key in reads} | _source(config)
    if folder.complete and folder.made_from(settings, made_from):
        if stage == config.recipe:
            print(f"[{stage}] complete in {folder.path}", flush=True)
        return folder
    check_machine(config, stage)
    if renew and not folder.made_from(settings, made_from):
        folder.manifest = Manifest()
    folder.begin(config=to_dict(config), settings=settings, inputs=made_from, seed=config.seed)
    tracker = Tracker(config, stage, folder.path)
    tracker.after_log = folder.beat
    try:
        facts = body(folder, tracker)
        if stage in METHODS:
            write_card(config, folder, facts["steps"])
        tracker.link(facts)
    except KeyboardInterrupt:
        folder.interrupted("interrupted by the user")
        raise
    except Exception as error:
        folder.interrupted(f"{type(error).__name__}: {error}")
        raise
    finally:
        tracker.close()
    folder.finish(**facts)
    print(f"[{stage}] " + say.format(**folder.manifest.as_json()), flush=True)
    return folder


def newest(config: Config, *stages: str) -> StageFolder:
    """The first complete stage of `stages` (latest first) in this run.  Raises ArtifactError with one sentence otherwise."""
    for stage in stages:
        folder = StageFolder.read(Path(config.run_dir), stage)
        if folder.complete:
            print(f"using {folder.path}", flush=True)
            return folder
    raise ArtifactError(
        f"recipe={config.recipe} needs a complete {' or '.join(stages)} under run_dir={config.run_dir}; "
        f"run recipe={stages[-1]} there first or give model.path="
    )


def launch(config: Config, recipe: str) -> None:
    """Run one recipe of the same configuration in a child process that dies with this one."""
    file = Path(config.run_dir) / "config.yaml"
    command = [sys.executable, "-m", "pgenrm_train.worker", str(file), recipe]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, CHILD: "1"}
    child = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
    try:
        code = child.wait()
    except KeyboardInterrupt as reason:
        _stop(child, reason)
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code == 2:  # the child has told the user what is wrong
        raise SystemExit(2)
    if code:
        raise BackendError(
            f"recipe={recipe} ended with exit code {code}; its last words stand above, and the same command continues"
        )


def prepare(config: Config) -> None:
    """Make the run folder, or set an old one aside when resume=false, write the resolved configuration, and open the run's store.

    Raises ArtifactError, before it touches anything, where `model.path` holds no checkpoint.
    """
    if CHILD in os.environ:  # the pipeline has done it
        return
    if config.model.path:
        check_checkpoint(Path(config.model.path))
    run_dir = Path(config.run_dir)
    try:
        if not config.resume:
            publishing.refuse_to_replace(config)
        if not config.resume and run_dir.exists():
            _lock(run_dir)
            print(f"resume=false: the old run was moved to {set_aside(run_dir)}", flush=True)
            _LOCKS.pop(run_dir.resolve()).close()
        config.resume = True
        _lock(run_dir)
        write_config(run_dir / "config.yaml", to_dict(config))
        publishing.begin(config)
    except OSError as error:
        raise ArtifactError(f"run_dir={run_dir} cannot be written ({error.strerror})") from None


def fail_early(config: Config, stages: Sequence[str]) -> None:
    """What the last stage will lack, a judge's key say, is told before the first one has run for hours.  Raises PreflightError."""
    found = findings(config, still_to_do(config, stages))
    if problems := [p for finding in found if finding.check != "ring" for p in finding.problems]:
        raise PreflightError("; ".join(problems))


_LOCKS: dict[Path, IO[str]] = {}  # open for as long as this process lives


def _lock(run_dir: Path) -> None:
    """Two processes must not write one run.  The lock goes with the process, however it ends."""
    if run_dir.resolve() in _LOCKS:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ArtifactError(
            f"run_dir={run_dir} is in use by process {file.read().strip() or '?'}; wait for it or use another run_dir"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    atexit.register(file.close)
    _LOCKS[run_dir.resolve()] = file


def progress(items: Iterable[T], what: str, total: int | None = None, told: object = "") -> Iterable[T]:
    """A progress bar with ETA on stderr; the text of `told`, as it is by then, stands at its end."""
    from tqdm import tqdm

    for item in (bar := tqdm(items, desc=what, total=total, mininterval=0.5, dynamic_ncols=True)):
        yield item
        bar.set_postfix_str(str(told), refresh=False)


def _stop(child: subprocess.Popen[bytes], reason: KeyboardInterrupt) -> None:
    """Ctrl-C reached the child too; give it time to put its manifest in order, then end it and all that it started."""
    import psutil

    if isinstance(reason, Terminated):
        child.terminate()
    family = psutil.Process(child.pid).children(recursive=True) if psutil.pid_exists(child.pid) else []
    try:
        child.wait(timeout=20)
    except subprocess.TimeoutExpired:
        child.kill()
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _source(config: Config) -> dict[str, Any]:
    """The raw data counts by its content: a moved file is the same data, a changed file is not."""
    given = {
        key: Path(value)
        for key in ("path", "answers")
        if (value := getattr(config.data, key)) and Path(value).exists()
    }
    if not given:
        return {}
    hashes = {f"data.{key} sha256": digest(path) for key, path in given.items()}
    return {"data": to_dict(config.data) | dict.fromkeys(given)} | hashes


def _plain(value: Any) -> Any:
    return to_dict(value) if hasattr(value, "__dataclass_fields__") else value


__all__ = ["PGenRMError", "fail_early", "launch", "newest", "prepare", "progress", "run_stage"]
