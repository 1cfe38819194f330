"""Sentences for mistakes on the command line, from the errors of Hydra and OmegaConf."""

import re
import shlex
from difflib import get_close_matches

from pgenrm_train.config import CONFIG_DIR, Config
from pgenrm_train.errors import ConfigError, PGenRMError, first_line

SPECIAL = set('"\\$')  # characters that keep a meaning within double quotes


def groups() -> list[str]:
    return sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def explain(error: Exception) -> str | None:
    """One sentence for a user's mistake; None for any other error."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PGenRMError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return (
            f"a group takes the name of one of its files, as in data=pairs; groups are {', '.join(groups())}"
        )
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = f"{error}\n{error.__cause__ or ''}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if match := re.search(
        r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'(\n| requires)", text, re.DOTALL
    ):
        key, _, value = match[1].partition("=")
        quoting = _quoting(key, value)
        return f"{key}={value} stands for several values; {quoting}, or give -m for one run per value"
    if match := re.search(r"Could not find '(\w+)/([^']+)'", text):
        return f"{match[1]}={match[2]} is not one of {', '.join(choices(match[1]))}"
    if match := re.search(r"Could not override '([\w.]+)'|not in '\w+'\s+full_key: (\S+)", text):
        return _unknown_key(match[1] or match[2])
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]}= must be given"
    if match := re.search(r"Could not find '([^']+)'", text):
        return f"config group or file '{match[1]}' does not exist; groups are {', '.join(groups())}"
    if match := re.search(r"Error merging override (.+)", text):
        key, _, value = match[1].partition("=")
        hint = f"; {_quoting(key, value)}" if value[:1] in ("[", "{") else ""
        return f"{match[1]}: {first_line(error.__cause__ or error)}{hint}"
    return " ".join(text.split())


def _unknown_key(key: str) -> str:
    """A key that is not in the schema: the keys of its section and the nearest match."""
    from omegaconf import OmegaConf

    node, parts = OmegaConf.structured(Config), key.split(".")
    while len(parts) > 1 and parts[0] in node and OmegaConf.is_config(node[parts[0]]):
        node = node[parts.pop(0)]
    section = key[: len(key) - len(".".join(parts))]
    names = sorted(str(name) for name in node)
    if not names:  # a free dictionary
        return f"key '{key}' is new and takes a plus: +{key}=VALUE"
    if parts[0] in names:
        plus = "" if node[parts[0]] else "+"  # a free dictionary
        return f"{key}= cannot take this value; its keys are set one by one, as in {plus}{key}.KEY=VALUE"
    near = get_close_matches(parts[0], names, n=1)
    hint = f"did you mean {section}{near[0]}? " if near else ""
    where = f"{section.rstrip('.')} has" if section else "top-level keys are"
    return f"unknown key '{key}'; {hint}{where} {', '.join(names)}"


def _unreadable(override: str) -> str:
    """An argument that Hydra's grammar refuses, and how it is quoted."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"'{override}' is not key=value; a value with blanks is one argument: 'key=a b'"
    if not re.fullmatch(r"[~+]{0,2}[A-Za-z0-9_$./@:-]*", key):
        return f"'{override}' is not key=value: the key '{key}' may hold ASCII letters, digits, _, - and dots"
    return f"{key}= cannot read {value} without quotes; {_quoting(key, value)}"


def _quoting(key: str, value: str) -> str:
    """How a value is quoted for Hydra and for the shell."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from pgenrm_train.cluster.launch.files import hydra_value

    try:
        quoted = (
            f'{key}="{value}"'
            if value.isprintable() and not set(value) & SPECIAL
            else f"{key}={hydra_value(value)}"
        )
        OverridesParser.create().parse_override(quoted)
    except (ConfigError, HydraException):
        return "a text on the command line has no control character, and ${…} names a key"
    return f"quote a text for Hydra and for the shell: {shlex.quote(quoted)}"
