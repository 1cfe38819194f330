"""Keep a run's store up to date while the run works on this machine's disk.

At the start everything is fetched that the store has and this machine lacks.  Then a thread checks every few
seconds for complete stages and new step checkpoints, and publishes them, earlier stages first.  A failing
store never stops the run: the failure is reported and tried again.  An error at the end names everything that
the store still lacks.  Only one process publishes a run: of a pipeline, the outer one.
"""

import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pgenrm_train.config import Config, StageName
from pgenrm_train.errors import ArtifactError
from pgenrm_train.files import read_json, sha256_file, write_json
from pgenrm_train.run.folder import set_aside
from pgenrm_train.run.store.objects import Publication, Store, StoreLost, StoreTaken
from pgenrm_train.run.store.snapshots import Moved, freeze, state_of

LOOK = 2.0  # seconds between two checks of the run's folder
WAIT, LONGEST_WAIT = 5.0, 300.0  # seconds after a failure, doubled each time
LAST_WAITS = (2.0, 8.0)  # between the last tries, when the run is over
OWN = ".store"  # in the run's folder: this machine's attempts, and files in transfer


class Publisher:
    """One run, its folder here and its store."""

    def __init__(self, store: Store, run_dir: Path) -> None:
        self.store, self.run_dir = store, run_dir
        self.published: dict[str, Publication | None] = {}
        self.lost: Exception | None = None  # why the last try failed
        self._given_up: dict[str, tuple[str, str]] = {}  # stage → state and attempt of the failed try
        self._digests: dict[tuple[int, int, int], str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name="store", daemon=True)

    def open(self) -> None:
        """Prove that the store can be written, and fetch stages in which it is ahead of this machine."""
        self.store.put("config.yaml", self.run_dir / "config.yaml")
        for stage in StageName:
            self._pass_over(stage)
            self.published[stage] = published = self.store.read(stage)
            if published and (
                published.attempt not in self._attempts() or not (self.run_dir / stage).exists()
            ):
                if aside := set_aside(self.run_dir / stage):
                    print(
                        f"{self.store.url} is ahead of this machine; its {stage} was moved to {aside}",
                        flush=True,
                    )
                self._fetch(published)

    def start(self) -> None:
        self._thread.start()

    def _pass_over(self, stage: str) -> None:
        """Remove own cut-off attempts; only report others, which may still be running."""
        attempts = self._attempts()
        for attempt, files in self.store.left_over(stage).items():
            mine = attempts.get(attempt) == "made"
            print(
                f"{'removing' if mine else 'ignoring'} {self.store.url}/{stage}/{attempt}, which is "
                f"half-published ({len(files)} files)",
                flush=True,
            )
            if mine:
                self.store.forget(stage, files)

    def fetch_missing(self) -> None:
        """Fetch the stages of which this machine has nothing, for reading only."""
        for stage in StageName:
            if not (self.run_dir / stage).exists() and (published := self.store.read(stage)):
                self._fetch(published)

    def close(self) -> list[str]:
        """Publish the rest; returns the stages that the store still lacks."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if lacking := [stage for stage in StageName if self._waits(stage)]:
            print(f"publishing the rest to {self.store.url}: {', '.join(lacking)}", flush=True)
        for wait in (*LAST_WAITS, 0.0):
            if isinstance(self.lost, StoreTaken) or self.round():
                break
            time.sleep(wait)
        return [stage for stage in StageName if self._waits(stage)]

    def show(self) -> None:
        """Copy the final files from the top of the run's folder to the top of the URL."""
        for path in sorted(self.run_dir.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                self.store.put(path.name, path)

    def round(self) -> bool:
        """Check and publish every stage; False if one failed, so that the later ones wait for it."""
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
                    f"warning: {self.store.url} fails ({self.lost}); the run continues, next try in "
                    f"{wait:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            elif was_lost:
                print(f"{self.store.url} answers again", flush=True)

    def _waits(self, stage: str) -> bool:
        """True if the folder has publishable content that the store lacks."""
        published, state = self.published.get(stage), state_of(self.run_dir / stage)
        return state is not None and (published is None or published.state != state)

    def _publish(self, stage: str) -> None:
        snapshot = self.run_dir / OWN / "leaving"
        state = freeze(self.run_dir / stage, snapshot)
        paths = {p.relative_to(snapshot).as_posix(): p for p in snapshot.rglob("*") if p.is_file()}
        files = {name: (path, self._digest(path)) for name, path in paths.items()}
        attempt = self._attempt(stage, state)
        before = self.published[stage]
        if before is None or before.attempt != attempt:
            self.published[stage] = self.store.publish(stage, attempt, state, files, before)
        del self._given_up[stage]
        shutil.rmtree(snapshot, ignore_errors=True)
        print(
            f"published {stage} ({state.partition(' ')[0]}): {self.store.url}/{stage}/{attempt}", flush=True
        )

    def _attempt(self, stage: str, state: str) -> str:
        """Name of the failed attempt if its content is unchanged, else of a new one."""
        before, attempt = self._given_up.get(stage, ("", ""))
        published = self.store.read(stage) if attempt else None
        arrived = published is not None and published.attempt == attempt  # only the answer was lost
        if arrived:
            self.published[stage] = published
        if arrived or (attempt and before != state):
            self._pass_over(stage)
        if before != state:
            attempt = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
            # Before it is valid: after a kill this machine must still recognise its own attempt.
            self._remember(attempt, "made")
            self._given_up[stage] = (state, attempt)
        return attempt

    def _fetch(self, published: Publication) -> None:
        mib = sum(file.size for file in published.files) / 2**20
        print(f"fetching {published.stage} from {self.store.url} ({mib:.1f} MiB)", flush=True)
        coming = self.run_dir / OWN / "coming"
        shutil.rmtree(coming, ignore_errors=True)
        self.store.fetch(published, coming)
        self._remember(published.attempt, "fetched")
        coming.rename(self.run_dir / published.stage)

    def _digest(self, path: Path) -> str:
        """sha256 of a file, computed again only if the file changed."""
        stat = path.stat()
        key = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._digests:
            self._digests[key] = sha256_file(path)
        return self._digests[key]

    def _attempts(self) -> dict[str, str]:
        """Attempts of this machine → `made` or `fetched`."""
        path = self.run_dir / OWN / "attempts.json"
        return dict(read_json(path)) if path.exists() else {}

    def _remember(self, attempt: str, how: str) -> None:
        write_json(self.run_dir / OWN / "attempts.json", self._attempts() | {attempt: how})


T = TypeVar("T")
_OPEN: dict[Path, Publisher] = {}  # run folder → its publisher, in this process


def begin(config: Config) -> None:
    """Open the store of a run and start to publish to it.

    The run's folder is locked and holds its configuration.  Raises ArtifactError if the store cannot be used.
    """
    run_dir = Path(config.run_dir)
    if config.store is None or run_dir.resolve() in _OPEN:
        return
    publisher = Publisher(Store(config.store), run_dir)
    _use(config, publisher.open)
    publisher.start()
    _OPEN[run_dir.resolve()] = publisher


def fetch(config: Config) -> None:
    """Fetch the missing stages of a run at a URL, for a recipe that only reads."""
    if config.store is not None:
        _use(config, Publisher(Store(config.store), Path(config.run_dir)).fetch_missing)


def refuse_to_replace(config: Config) -> None:
    """Raise ArtifactError if the store holds a run: to set it aside would copy every object."""
    if config.store is None:
        return
    store = Store(config.store)
    if any(_use(config, lambda stage=stage: store.read(stage)) for stage in StageName):  # type: ignore[misc]
        raise ArtifactError(
            f"resume=false: {config.store} holds a run, which is never moved or deleted; give another "
            "run_dir="
        )


@contextmanager
def kept() -> Iterator[None]:
    """Publish the rest when the block ends, for whatever reason.  Raises ArtifactError if that fails."""
    try:
        yield
    except BaseException:
        if _OPEN:
            print("publishing complete files before the end; Ctrl-C skips this", file=sys.stderr, flush=True)
        for problem in _close():
            print(f"warning: {problem}", file=sys.stderr, flush=True)
        raise
    if problems := _close(final=True):
        raise ArtifactError("; ".join(problems))


def _close(final: bool = False) -> list[str]:
    """Close every publisher; returns one sentence per store that lacks something."""
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
                f"{publisher.lost}; this machine's files are in {publisher.run_dir}, and a new start sets it "
                "aside and fetches the published ones"
            )
        elif missing:
            reason = publisher.lost or "it was still being written"
            problems.append(
                f"the run is complete in {publisher.run_dir}, but {url} lacks {', '.join(missing)} "
                f"({reason}); "
                "the same command publishes it"
            )
    return problems


def _use(config: Config, call: Callable[[], T]) -> T:
    """Call; a lost store becomes an ArtifactError with the local folder as remedy."""
    try:
        return call()
    except StoreLost as error:
        raise ArtifactError(
            f"run_dir={config.store} cannot be used ({error}); mend that, or continue without it: "
            f"run_dir={config.run_dir}"
        ) from None
