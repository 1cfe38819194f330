"""Atomic writes, hashes and links of files."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgenrm_train.errors import ArtifactError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.  Raises ArtifactError if it is missing or half-written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({error}); delete it and run again") from None


def write_table(path: Path, rows: "Sequence[Mapping[str, object]] | pd.DataFrame | pa.Table") -> None:
    """Write rows, a frame without its index or an Arrow table as parquet, atomically."""
    import pandas as pd
    import pyarrow.parquet

    if isinstance(rows, pd.DataFrame):
        rows = pyarrow.Table.from_pandas(rows, preserve_index=False)
    elif not isinstance(rows, pyarrow.Table):
        rows = pyarrow.Table.from_pylist(list(rows))
    with atomic(path) as temporary:
        pyarrow.parquet.write_table(rows, temporary)


def replace_folder(staging: Path, final: Path) -> None:
    """Replace `final` by `staging`; a kill leaves the old folder, the new one, or a complete `staging`."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield a path for a new folder, which replaces `final` only when the block ends well."""
    staging = final.with_name(final.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)  # left by a start that was killed here
    yield staging
    replace_folder(staging, final)


@contextmanager
def next_part(folder: Path, lock: Path, suffix: str) -> Iterator[Path]:
    """Yield the path of the folder's next numbered part; the lock keeps numbers unique across processes."""
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        numbers = (int(path.stem.removeprefix("part-")) for path in folder.glob(f"part-*{suffix}"))
        yield folder / f"part-{1 + max(numbers, default=-1):06d}{suffix}"


def link(target: Path, place: Path) -> None:
    """Make `place` a relative link to `target`, so that the run folder can be moved."""
    place.unlink(missing_ok=True)
    place.symlink_to(os.path.relpath(target, place.parent))


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Short hash of JSON-able values; equal settings give equal fingerprints on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
