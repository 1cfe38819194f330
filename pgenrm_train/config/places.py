"""Where a run lives: `run_dir` is a folder, or the URL of one; then a mirror of it on this machine is worked on.

`s3://bucket/runs/arena` is mirrored in `<mirror>/s3/bucket/runs/arena`, so that no two URLs share a folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pgenrm_train.errors import ConfigError

if TYPE_CHECKING:
    from pgenrm_train.config.schema import Config

URL = re.compile(r"([A-Za-z][\w+.:-]*)://(.*)", re.DOTALL)  # with ":" for chained ones, which are refused


def place(config: Config) -> None:
    """A `run_dir` that is a URL becomes `store`, and `run_dir` its mirror.  Raises ConfigError for what is no URL of a run."""
    if URL.fullmatch(config.mirror):
        raise ConfigError(
            f"mirror={config.mirror} must be a folder of this machine; the URL belongs into run_dir="
        )
    if match := re.fullmatch(r"(\w{2,}):/([^/].*)", config.run_dir):
        raise ConfigError(
            f"run_dir={config.run_dir} is neither a folder nor a URL; did you mean {match[1]}://{match[2]}?"
        )
    if URL.fullmatch(config.run_dir):
        config.store = plain_url(config.run_dir)
        config.run_dir = mirror_of(config.store, config.mirror)
    elif config.store is not None and (
        not URL.fullmatch(config.store) or config.run_dir != mirror_of(config.store, config.mirror)
    ):
        raise ConfigError(
            "store= follows from run_dir= and is not given by hand: use run_dir=URL, and mirror= for the local copy"
        )


def beneath(config: Config, name: str) -> None:
    """Move the run one folder down, store and mirror alike."""
    config.run_dir = str(Path(config.run_dir) / name)
    config.store = f"{config.store}/{name}" if config.store else None


def mirror_of(url: str, mirror: str) -> str:
    protocol, rest = _parts(url)
    return str(Path(mirror, protocol, *rest))


def plain_url(url: str) -> str:
    """Without double and last slashes.  Raises ConfigError for a URL that holds a secret, without repeating it."""
    match = URL.fullmatch(url)
    assert match is not None
    before, _, _ = match[2].rpartition("@")
    if ":" in before or re.search(r"[?#]", match[2]):
        raise ConfigError(
            "run_dir= holds a password or a query in its URL, which would be written into files; leave them out: credentials come "
            "from the environment, as for every fsspec URL (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3, or the machine's role)"
        )
    protocol, rest = _parts(url)
    return f"{protocol}://{'/' if match[2].startswith('/') else ''}{'/'.join(rest)}"


def _parts(url: str) -> tuple[str, list[str]]:
    match = URL.fullmatch(url)
    assert match is not None
    rest = [part for part in match[2].split("/") if part]
    if not rest or "::" in url or {".", ".."} & set(rest):
        raise ConfigError(f"run_dir={url} is not the URL of a folder; give one like s3://bucket/runs/name")
    return match[1].lower(), rest
