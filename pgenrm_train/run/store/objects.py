"""A run's copy at an fsspec URL.  What counts there is whole, whatever is killed or lost on the way.

    <url>/<stage>/published.json       the publication that counts: its files, each with size, sha256 and place; one object, written last
    <url>/<stage>/<attempt>/<file>     what one attempt brought; a file that did not change stays where an earlier attempt put it
    <url>/report.html, …               the final files of the run, as at the top of a run folder

A reader believes `published.json` and checks every file against it; an attempt that it does not name was cut off, and is passed
over.  Credentials are fsspec's business: the environment, or the machine's role.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pgenrm_train.errors import ArtifactError, ConfigError, PreflightError
from pgenrm_train.files import sha256_file

T = TypeVar("T")
MARKER = "published.json"
AT_ONCE = 4  # files under way; a store's client splits large ones by itself


class StoreLost(Exception):
    """The store did not answer as it should; what was asked may be tried again."""


class StoreTaken(ArtifactError):
    """Another machine has published this run in the meantime."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """`name` in the stage's folder; `at` in the stage's folder at the URL."""

    name: str
    size: int
    sha256: str
    at: str


@dataclass(frozen=True, slots=True)
class Publication:
    """A stage's folder as published.  `state` says what stood in it: complete, or which step checkpoints."""

    stage: str
    attempt: str
    state: str
    files: tuple[StoredFile, ...]

    @classmethod
    def parse(cls, stage: str, text: bytes) -> Publication:
        found = json.loads(text)
        files = tuple(StoredFile(**item) for item in found["files"])
        for path in (PurePosixPath(p) for file in files for p in (file.name, file.at)):
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{path} leads out of the stage")
        return cls(stage, found["attempt"], found["state"], files)

    def text(self) -> bytes:
        return json.dumps({"format": 1, **asdict(self)}, indent=1).encode()


class Store:
    """A run at a URL.  Methods raise StoreLost when the store fails, ArtifactError when what it holds is not what was published."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.root = _file_system(url)
        self._sent: set[StoredFile] = set()  # a second try of an attempt sends the rest

    def read(self, stage: str) -> Publication | None:
        """What counts as published of a stage."""
        try:
            self.fs.invalidate_cache()
            return Publication.parse(stage, self.fs.cat_file(self._path(stage, MARKER)))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{self.url}/{stage}/{MARKER} is not what a run writes ({error}); remove it, and the stage counts as not published"
            ) from None
        except Exception as error:  # each store's client raises its own
            raise StoreLost(_words(error)) from error

    def left_over(self, stage: str) -> Mapping[str, list[str]]:
        """Attempt → its files that no publication names: it was cut off, or what it brought counts no more."""
        published = self.read(stage)
        known = {file.at for file in published.files} if published else set()
        start, found = f"{self._path(stage)}/", defaultdict(list)
        for path in self._ask(lambda: self.fs.find(self._path(stage))):
            attempt, inside, _ = (at := str(path).partition(start)[2]).partition("/")
            if inside and at not in known:
                found[attempt].append(at)
        return found

    def publish(
        self,
        stage: str,
        attempt: str,
        state: str,
        files: Mapping[str, tuple[Path, str]],
        before: Publication | None,
    ) -> Publication:
        """Bring `files` (name → path, sha256) to the store and let them count in place of `before`.

        Only what `before` does not hold already is sent.  Raises StoreTaken when something else than `before` is published by then.
        """
        self._expect(stage, before)
        held = {(file.name, file.sha256): file for file in before.files} if before else {}
        made = Publication(stage, attempt, state, tuple(
            held.get((name, digest)) or StoredFile(name, path.stat().st_size, digest, f"{attempt}/{name}")
            for name, (path, digest) in sorted(files.items())
        ))  # fmt: skip
        new = [file for file in made.files if file.at.startswith(f"{attempt}/")]
        _all(lambda file: self._send(files[file.name][0], stage, file), new)
        self._expect(stage, before)
        self.put(f"{stage}/{MARKER}", made.text())
        self.forget(
            stage, {file.at for file in before.files} - {file.at for file in made.files} if before else set()
        )
        return made

    def fetch(self, published: Publication, to: Path) -> None:
        """Download a publication into the folder `to`, every file checked."""
        for folder in {(to / file.name).parent for file in published.files}:
            folder.mkdir(parents=True, exist_ok=True)
        _all(lambda file: self._take(published.stage, file, to / file.name), published.files)

    def put(self, name: str, content: bytes | Path) -> None:
        """One object, whole or not at all."""
        local, path = self._local(), self._path(name)
        target = (
            f"{path}.tmp" if local else path
        )  # an object appears when its last byte has come; a file grows
        if local:
            self._ask(lambda: self.fs.makedirs(self.fs._parent(path), exist_ok=True))
        if isinstance(content, Path):
            self._ask(lambda: self.fs.put_file(str(content), target))
        else:
            self._ask(lambda: self.fs.pipe_file(target, content))
        if local:
            Path(target).replace(path)

    def try_out(self) -> None:
        """Write an object and remove it."""
        self.put(".tried", b"")
        self._ask(lambda: self.fs.rm_file(self._path(".tried")))

    def _expect(self, stage: str, before: Publication | None) -> None:
        found = self.read(stage)
        if (found and found.attempt) != (before and before.attempt):
            raise StoreTaken(
                f"another machine has published {stage} in {self.url} meanwhile: a run is one machine's at a time"
            )

    def _send(self, path: Path, stage: str, file: StoredFile) -> None:
        if file in self._sent:
            return
        remote = self._path(stage, file.at)
        if self._local():
            self._ask(lambda: self.fs.makedirs(self.fs._parent(remote), exist_ok=True))
        self._ask(lambda: self.fs.put_file(str(path), remote))
        if (size := self._ask(lambda: self.fs.info(remote))["size"]) != file.size:
            raise StoreLost(f"{self.url}/{stage}/{file.at} has {size} bytes of {file.size}")
        self._sent.add(file)

    def _take(self, stage: str, file: StoredFile, path: Path) -> None:
        where = f"{self.url}/{stage}/{file.at}"
        try:
            self._ask(lambda: self.fs.get_file(self._path(stage, file.at), str(path)))
        except StoreLost as lost:
            if not isinstance(lost.__cause__, FileNotFoundError):
                raise
            problem = "is not there"
        else:
            same = path.stat().st_size == file.size and sha256_file(path) == file.sha256
            problem = "" if same else "is not the file that was published: its size or sha256 differs"
        if problem:
            raise ArtifactError(
                f"{where} {problem}; remove {self.url}/{stage}/{MARKER}, and the stage is made again"
            )

    def forget(self, stage: str, places: Iterable[str]) -> None:
        """Remove files that no publication names.  What cannot be removed costs space and nothing else."""
        try:
            _all(
                lambda at: self.fs.rm_file(self._path(stage, at)), sorted(places)
            )  # `rm` would take a name for a pattern
        except Exception as error:
            print(
                f"warning: files of {self.url}/{stage} that count no more were not removed ({_words(error)})",
                flush=True,
            )

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:  # each store's client raises its own
            raise StoreLost(_words(error)) from error

    def _path(self, *parts: str) -> str:
        return "/".join([self.root, *parts])

    def _local(self) -> bool:
        return "file" in ((self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol)


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it.  Raises ConfigError or PreflightError."""
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
    """One line; an endpoint's user name and password are not repeated."""
    return re.sub(r"://[^/@\s]+@", "://…@", " ".join(f"{type(error).__name__}: {error}".split()))[:300]
