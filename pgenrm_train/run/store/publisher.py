"""Keeps a run's store up to date while the run works on this machine's disk.

At the start, what the store has and this machine has not is fetched.  Then a thread looks every few seconds whether a stage is
complete or has a new step checkpoint, and publishes it, earlier stages first.  A store that does not answer never stops the run: it
is said, tried again, and what is still missing at the end is named by an error.  One process does this: of a pipeline, the outer one.
"""

from __future__ import annotations

import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pgenrm_train.config import Config
from pgenrm_train.config.stage_names import StageName
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import read_json, sha256_file, write_json
from pgenrm_train.run.folder import set_aside
from pgenrm_train.run.store.objects import Publication, Store, StoreLost, StoreTaken
from pgenrm_train.run.store.snapshots import Moved, freeze, state_of

LOOK = 2.0  # seconds between two looks at the run's folder
WAIT, LONGEST_WAIT = 5.0, 300.0  # seconds after a failure, doubled each time
LAST_WAITS = (2.0, 8.0)  # between the last tries, when the run is over
OWN = ".store"  # in the run's folder: which attempts this machine has made or fetched, and what is on its way


class Publisher:
    """One run, its folder here and its store."""

    def __init__(self, store: Store, run_dir: Path) -> None:
        self.store, self.run_dir = store, run_dir
        self.published: dict[str, Publication | None] = {}
        self.lost: Exception | None = None  # why the last try failed
        self._given_up: dict[str, tuple[str, str]] = {}  # stage → state and attempt of a try that failed
        self._digests: dict[tuple[int, int, int], str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name="store", daemon=True)

    def open(self) -> None:
        """Show that the store can be written, and fetch what it is ahead with."""
        self.store.put("config.yaml", self.run_dir / "config.yaml")
        for stage in StageName:
            self._pass_over(stage)
            self.published[stage] = found = self.store.read(stage)
            if found and (found.attempt not in self._known() or not (self.run_dir / stage).exists()):
                if aside := set_aside(self.run_dir / stage):
                    print(
                        f"{self.store.url} is ahead of this machine; its {stage} was moved to {aside}",
                        flush=True,
                    )
                self._fetch(found)

    def start(self) -> None:
        self._thread.start()

    def _pass_over(self, stage: str) -> None:
        """Say what was cut off, and remove it where it was this machine's: another one may be at work."""
        known = self._known()
        for attempt, files in self.store.left_over(stage).items():
            mine = known.get(attempt) == "made"
            what = f"{self.store.url}/{stage}/{attempt}, which is half-published ({len(files)} files)"
            print(f"{'removing' if mine else 'ignoring'} {what}", flush=True)
            if mine:
                self.store.forget(stage, files)

    def fetch_missing(self) -> None:
        """The stages of which this machine has nothing, to be read only."""
        for stage in StageName:
            if not (self.run_dir / stage).exists() and (found := self.store.read(stage)):
                self._fetch(found)

    def close(self) -> list[str]:
        """Publish what is still to be published; returns the stages that the store lacks."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if lacking := [stage for stage in StageName if self._waits(stage)]:
            print(f"{self.store.url} gets what it lacks: {', '.join(lacking)}", flush=True)
        for wait in (*LAST_WAITS, 0.0):
            if isinstance(self.lost, StoreTaken) or self.round():
                break
            time.sleep(wait)
        return [stage for stage in StageName if self._waits(stage)]

    def show(self) -> None:
        """The final files at the top of the run's folder, to the top of the URL."""
        for path in sorted(self.run_dir.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                self.store.put(path.name, path)

    def round(self) -> bool:
        """One look at every stage; False when a stage could not be published, and the later ones wait for it."""
        for stage in filter(self._waits, StageName):
            try:
                self._publish(stage)
            except Moved:
                return False
            except (StoreLost, ArtifactError, OSError) as error:
                self.lost = error
                return False
        self.lost = None
        return True

    def _keep_up(self) -> None:
        wait = 0.0
        while not self._ended.wait(wait or LOOK):
            was_lost = self.lost is not None
            self.round()
            if isinstance(self.lost, StoreTaken):
                print(f"warning: {self.lost}; nothing more is published", file=sys.stderr, flush=True)
                return
            wait = min(2 * wait or WAIT, LONGEST_WAIT) if self.lost else 0.0
            if self.lost:
                print(
                    f"warning: {self.store.url} fails ({self.lost}); the run goes on, next try in {wait:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            elif was_lost:
                print(f"{self.store.url} answers again", flush=True)

    def _waits(self, stage: str) -> bool:
        held, state = self.published.get(stage), state_of(self.run_dir / stage)
        return state is not None and (held is None or held.state != state)

    def _publish(self, stage: str) -> None:
        still = self.run_dir / OWN / "leaving"
        state = freeze(self.run_dir / stage, still)
        files = {
            p.relative_to(still).as_posix(): (p, self._digest(p)) for p in still.rglob("*") if p.is_file()
        }
        attempt = self._attempt(stage, state)
        if (held := self.published[stage]) is None or held.attempt != attempt:
            self.published[stage] = self.store.publish(stage, attempt, state, files, held)
        del self._given_up[stage]
        shutil.rmtree(still, ignore_errors=True)
        print(
            f"published {stage} ({state.partition(' ')[0]}): {self.store.url}/{stage}/{attempt}", flush=True
        )

    def _attempt(self, stage: str, state: str) -> str:
        """The attempt that failed, where there is still the same to publish; else a new one."""
        before, attempt = self._given_up.get(stage, ("", ""))
        found = self.store.read(stage) if attempt else None
        if counts := found is not None and found.attempt == attempt:  # only the answer was lost
            self.published[stage] = found
        if counts or (attempt and before != state):
            self._pass_over(stage)
        if before != state:
            attempt = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
            self._remember(
                attempt, "made"
            )  # before it counts: a kill right after that must not make our own work a stranger's
            self._given_up[stage] = (state, attempt)
        return attempt

    def _fetch(self, found: Publication) -> None:
        print(
            f"fetching {found.stage} from {self.store.url} ({sum(f.size for f in found.files) / 2**20:.1f} MiB)",
            flush=True,
        )
        coming = self.run_dir / OWN / "coming"
        shutil.rmtree(coming, ignore_errors=True)
        self.store.fetch(found, coming)
        self._remember(found.attempt, "fetched")
        coming.rename(self.run_dir / found.stage)

    def _digest(self, path: Path) -> str:
        """sha256, computed once for a file that did not change."""
        stat = path.stat()
        key = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._digests:
            self._digests[key] = sha256_file(path)
        return self._digests[key]

    def _known(self) -> dict[str, str]:
        path = self.run_dir / OWN / "attempts.json"
        return dict(read_json(path)) if path.exists() else {}

    def _remember(self, attempt: str, how: str) -> None:
        write_json(self.run_dir / OWN / "attempts.json", self._known() | {attempt: how})


T = TypeVar("T")
_OPEN: dict[Path, Publisher] = {}  # of this process


def begin(config: Config) -> None:
    """Open the store of a run whose folder is locked and holds its configuration.  Raises ArtifactError when it cannot be used."""
    run_dir = Path(config.run_dir)
    if config.store is None or run_dir.resolve() in _OPEN:
        return
    publisher = Publisher(Store(config.store), run_dir)
    _asked(config, publisher.open)
    publisher.start()
    _OPEN[run_dir.resolve()] = publisher


def fetch(config: Config) -> None:
    """For a recipe that only reads: what this machine lacks of a run at a URL."""
    if config.store is not None:
        _asked(config, Publisher(Store(config.store), Path(config.run_dir)).fetch_missing)


def refuse_to_replace(config: Config) -> None:
    """resume=false sets a folder aside; in a store that would copy every object.  Raises ArtifactError where a run is."""
    if config.store is None:
        return
    store = Store(config.store)
    if any(_asked(config, lambda stage=stage: store.read(stage)) for stage in StageName):  # type: ignore[misc]
        raise ArtifactError(
            f"resume=false: {config.store} holds a run, which nothing here moves or deletes; give another run_dir="
        )


@contextmanager
def kept() -> Iterator[None]:
    """Around a recipe: at its end, whatever ends it, the store gets what it still lacks.  Raises ArtifactError when it does not."""
    try:
        yield
    except BaseException:
        if _OPEN:
            print(
                "the store gets what is whole before this ends; Ctrl-C skips that",
                file=sys.stderr,
                flush=True,
            )
        for problem in _close():
            print(f"warning: {problem}", file=sys.stderr, flush=True)
        raise
    if problems := _close(final=True):
        raise ArtifactError("; ".join(problems))


def _close(final: bool = False) -> list[str]:
    problems = []
    while _OPEN:
        _, publisher = _OPEN.popitem()
        missing, url = publisher.close(), publisher.store.url
        try:
            if final and not missing:
                publisher.show()
                print(f"published: {url}", flush=True)
        except StoreLost as error:
            missing, publisher.lost = ["the final files"], error
        if isinstance(publisher.lost, StoreTaken):
            problems.append(
                f"{publisher.lost}; what this machine made is in {publisher.run_dir}, and a new start sets it aside and fetches what is "
                "published"
            )
        elif missing:
            reason = publisher.lost or "it was still being written"
            problems.append(
                f"the run is whole in {publisher.run_dir}, but {url} lacks {', '.join(missing)} ({reason}); the same command publishes it"
            )
    return problems


def _asked(config: Config, call: Callable[[], T]) -> T:
    try:
        return call()
    except StoreLost as error:
        raise ArtifactError(
            f"run_dir={config.store} cannot be used ({error}); mend that, or go on without it: run_dir={config.run_dir}"
        ) from None
