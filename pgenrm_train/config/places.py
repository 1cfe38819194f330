"""The place of a run: `run_dir` is a folder, or a URL with a mirror of it on this machine.

`s3://bucket/runs/arena` is mirrored in `<mirror>/s3/bucket/runs/arena`, so that no two URLs share a folder.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from pgenrm_train.config.schema import Config
from pgenrm_train.errors import ConfigError

URL = re.compile(r"([A-Za-z][\w+.:-]*)://(.*)", re.DOTALL)  # with ":" for chained URLs, which are refused


def place(config: Config) -> None:
    """Expand `~`, move a URL from `run_dir` to `store`, and set `run_dir` to its mirror.

    Raises ConfigError for a URL that is not that of a run, and for a home that does not exist.
    """
    _expand_homes(config)
    for name, folder in (("run_dir", config.run_dir), ("mirror", config.mirror)):
        if not folder.strip():
            raise ConfigError(f"{name}= is empty; it names a folder, and . is this one")
    if URL.fullmatch(config.mirror):
        raise ConfigError(
            f"mirror={config.mirror} must be a folder of this machine; the URL belongs in run_dir="
        )
    if match := re.fullmatch(r"(\w{2,}):/([^/].*)", config.run_dir):
        raise ConfigError(
            f"run_dir={config.run_dir} is neither a folder nor a URL; did you mean {match[1]}://{match[2]}?"
        )
    if (match := re.match(r"[A-Za-z][\w+.-]*:", config.run_dir)) and not URL.fullmatch(config.run_dir):
        raise ConfigError(
            f"run_dir={config.run_dir} begins like a URL ({match[0]}); leave out the colon, or "
            "give the full path"
        )
    if URL.fullmatch(config.run_dir):
        config.store = plain_url(config.run_dir)
        config.run_dir = mirror_of(config.store, config.mirror)
    elif config.store is not None and (
        not URL.fullmatch(config.store) or config.run_dir != mirror_of(config.store, config.mirror)
    ):
        raise ConfigError(
            "store= follows from run_dir= and is not given by hand: use run_dir=URL, and mirror= for "
            "the local copy"
        )


def _expand_homes(section: Any, prefix: str = "") -> None:
    """Replace a leading `~` or `~user` in all settings, since a shell leaves it after a quote or `=`."""
    for field in dataclasses.fields(section):
        key, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _expand_homes(value, f"{key}.")
        elif isinstance(value, list):
            setattr(section, field.name, [_expand_home(key, item) for item in value])
        else:
            setattr(section, field.name, _expand_home(key, value))


def _expand_home(key: str, value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        raise ConfigError(f"{key}={value}: this machine knows no home {value.partition('/')[0]}") from None


def beneath(config: Config, name: str) -> None:
    """Move the run one folder down, in the store as well."""
    config.run_dir = str(Path(config.run_dir) / name)
    config.store = f"{config.store}/{name}" if config.store else None


def mirror_of(url: str, mirror: str) -> str:
    """The folder of this machine that mirrors a URL."""
    protocol, folders = _parts(url)
    return str(Path(mirror, protocol, *folders))


def plain_url(url: str) -> str:
    """A URL without double and trailing slashes.

    Raises ConfigError for a URL that holds a secret, without repeating it.
    """
    path = url.partition("://")[2]
    if ":" in path.rpartition("@")[0] or re.search(r"[?#]", path):
        raise ConfigError(
            "run_dir= holds a password or a query in its URL, which would be written into files; leave them "
            "out: credentials come from the environment, as for every fsspec URL (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY for s3, or the machine's role)"
        )
    protocol, folders = _parts(url)
    return f"{protocol}://{'/' if path.startswith('/') else ''}{'/'.join(folders)}"


def _parts(url: str) -> tuple[str, list[str]]:
    protocol, _, path = url.partition("://")
    folders = [folder for folder in path.split("/") if folder]
    if not folders or "::" in url or {".", ".."} & set(folders):
        raise ConfigError(f"run_dir={url} is not the URL of a folder; give one like s3://bucket/runs/name")
    return protocol.lower(), folders
