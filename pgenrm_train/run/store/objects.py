"""The copy of a run at an fsspec URL.

A publication is always complete, whatever is killed or lost on the way.

    <url>/<stage>/published.json     the valid publication: its files, each with size, sha256 and place.
                                     One object, written last
    <url>/<stage>/<attempt>/<file>   files of one attempt; an unchanged file stays in an earlier one
    <url>/report.html, …             the final files of the run, as at the top of a run folder

A reader trusts `published.json` and checks every file against it.  An attempt that it does not name was cut
off and is ignored.  fsspec takes credentials from the environment or from the machine's role.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

from pgenrm_train.errors import ArtifactError, ConfigError, PreflightError
from pgenrm_train.files import sha256_file

T = TypeVar("T")
MARKER = "published.json"
AT_ONCE = 4  # parallel transfers; a store's client splits large files by itself


class StoreLost(Exception):
    """The store failed to answer; the call may be tried again."""


class StoreTaken(ArtifactError):
    """Another machine has published this run in the meantime."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a stage: `name` is its path in the local folder, `at` its path in the folder at the URL."""

    name: str
    size: int
    sha256: str
    at: str


@dataclass(frozen=True, slots=True)
class Publication:
    """A stage's folder as published.  `state`: complete, or its step checkpoints."""

    stage: str
    attempt: str
    state: str
    files: tuple[StoredFile, ...]

    @classmethod
    def parse(cls, stage: str, text: bytes) -> Self:
        record = json.loads(text)
        files = tuple(StoredFile(**item) for item in record["files"])
        for path in (PurePosixPath(p) for file in files for p in (file.name, file.at)):
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{path} leads out of the stage")
        return cls(stage, record["attempt"], record["state"], files)

    def text(self) -> bytes:
        return json.dumps({"format": 1, **asdict(self)}, indent=1).encode()


class Store:
    """A run at a URL.

    Methods raise StoreLost if the store fails, and ArtifactError if its content differs from the publication.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.root = _file_system(url)
        self._sent: set[StoredFile] = set()  # a second try of an attempt sends only the rest

    def read(self, stage: str) -> Publication | None:
        """The valid publication of a stage, if any."""
        try:
            self.fs.invalidate_cache()
            return Publication.parse(stage, self.fs.cat_file(self._path(stage, MARKER)))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{self.url}/{stage}/{MARKER} is not what a run writes ({error}); "
                "remove it, and the stage counts as not published"
            ) from None
        except Exception as error:  # each store's client raises its own
            raise StoreLost(_words(error)) from error

    def left_over(self, stage: str) -> Mapping[str, list[str]]:
        """Attempt → its files that the publication lacks: it was cut off, or a newer one replaced them."""
        published = self.read(stage)
        valid = {file.at for file in published.files} if published else set()
        start, unnamed = f"{self._path(stage)}/", defaultdict(list)
        for path in self._call(lambda: self.fs.find(self._path(stage))):
            at = str(path).partition(start)[2]
            attempt, inside, _ = at.partition("/")
            if inside and at not in valid:
                unnamed[attempt].append(at)
        return unnamed

    def publish(
        self,
        stage: str,
        attempt: str,
        state: str,
        files: Mapping[str, tuple[Path, str]],
        before: Publication | None,
    ) -> Publication:
        """Send `files` (name → path, sha256) to the store and publish them in place of `before`.

        Files that `before` already holds are not sent again.  Raises StoreTaken if `before` is no longer the
        valid publication.
        """
        self._expect(stage, before)
        held = {(file.name, file.sha256): file for file in before.files} if before else {}
        publication = Publication(
            stage,
            attempt,
            state,
            tuple(
                held.get((name, digest)) or StoredFile(name, path.stat().st_size, digest, f"{attempt}/{name}")
                for name, (path, digest) in sorted(files.items())
            ),
        )
        new = [file for file in publication.files if file.at.startswith(f"{attempt}/")]
        _all(lambda file: self._send(files[file.name][0], stage, file), new)
        self._expect(stage, before)
        self.put(f"{stage}/{MARKER}", publication.text())
        self.forget(stage, {file.at for file in held.values()} - {file.at for file in publication.files})
        return publication

    def fetch(self, published: Publication, to: Path) -> None:
        """Download a publication into the folder `to` and check every file."""
        for folder in {(to / file.name).parent for file in published.files}:
            folder.mkdir(parents=True, exist_ok=True)
        _all(lambda file: self._take(published.stage, file, to / file.name), published.files)

    def put(self, name: str, content: bytes | Path) -> None:
        """Write one object, completely or not at all."""
        local, path = self._local(), self._path(name)
        # In an object store an object appears with its last byte; a local file grows, so rename it last.
        target = f"{path}.tmp" if local else path
        if local:
            self._call(lambda: self.fs.makedirs(self.fs._parent(path), exist_ok=True))
        if isinstance(content, Path):
            self._call(lambda: self.fs.put_file(str(content), target))
        else:
            self._call(lambda: self.fs.pipe_file(target, content))
        if local:
            Path(target).replace(path)

    def try_out(self) -> None:
        """Write an object and remove it."""
        self.put(".tried", b"")
        self._call(lambda: self.fs.rm_file(self._path(".tried")))

    def _expect(self, stage: str, before: Publication | None) -> None:
        """Raise StoreTaken unless `before` is the valid publication."""
        current = self.read(stage)
        if (current and current.attempt) != (before and before.attempt):
            raise StoreTaken(
                f"another machine has published {stage} in {self.url} meanwhile: only one machine may work "
                f"on a run"
            )

    def _send(self, path: Path, stage: str, file: StoredFile) -> None:
        if file in self._sent:
            return
        remote = self._path(stage, file.at)
        if self._local():
            self._call(lambda: self.fs.makedirs(self.fs._parent(remote), exist_ok=True))
        self._call(lambda: self.fs.put_file(str(path), remote))
        if (size := self._call(lambda: self.fs.info(remote))["size"]) != file.size:
            raise StoreLost(f"{self.url}/{stage}/{file.at} has {size} bytes of {file.size}")
        self._sent.add(file)

    def _take(self, stage: str, file: StoredFile, path: Path) -> None:
        where = f"{self.url}/{stage}/{file.at}"
        try:
            self._call(lambda: self.fs.get_file(self._path(stage, file.at), str(path)))
        except StoreLost as lost:
            if not isinstance(lost.__cause__, FileNotFoundError):
                raise
            problem = "is not there"
        else:
            same = path.stat().st_size == file.size and sha256_file(path) == file.sha256
            problem = "" if same else "is not the file that was published: its size or sha256 differs"
        if problem:
            raise ArtifactError(
                f"{where} {problem}; remove {self.url}/{stage}/{MARKER}, and the stage runs again"
            )

    def forget(self, stage: str, places: Iterable[str]) -> None:
        """Remove files that no publication names.  A file that cannot be removed only costs space."""
        try:
            # `rm` would read a name as a pattern
            _all(lambda at: self.fs.rm_file(self._path(stage, at)), sorted(places))
        except Exception as error:
            print(
                f"warning: outdated files of {self.url}/{stage} were not removed ({_words(error)})",
                flush=True,
            )

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:  # each store's client raises its own
            raise StoreLost(_words(error)) from error

    def _path(self, *parts: str) -> str:
        return "/".join([self.root, *parts])

    def _local(self) -> bool:
        return "file" in ((self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol)


def _file_system(url: str) -> tuple[Any, str]:
    """Open a URL: fsspec's file system and the path in it.  Raises ConfigError or PreflightError."""
    import fsspec

    try:
        fs, root = fsspec.url_to_fs(url)
    except ImportError as error:  # it names the package
        raise PreflightError(
            f"run_dir={url} needs a package that is not installed: {_words(error)}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"run_dir={url} is a URL that fsspec cannot open ({_words(error)})") from None
    return fs, str(root).rstrip("/")


def _all(do: Callable[[T], None], files: Iterable[T]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(do, files):
            pass


def _words(error: BaseException) -> str:
    """An error as one line, without an endpoint's user name and password."""
    return re.sub(r"://[^/@\s]+@", "://…@", " ".join(f"{type(error).__name__}: {error}".split()))[:300]
