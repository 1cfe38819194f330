"""Sentences for mistakes on the command line, from the errors of Hydra and OmegaConf."""

import errno
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches

from pgenrm_train.config import CONFIG_DIR, Config
from pgenrm_train.config.endpoints import key_in_place_of_name
from pgenrm_train.errors import ConfigError, PGenRMError, first_line

SPECIAL = set('"\\$')  # characters that keep a meaning within double quotes


def groups() -> list[str]:
    return sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def key_on_command_line(arguments: Sequence[str]) -> str | None:
    """The sentence for a key that is given as the name of its variable; None if there is none."""
    for argument in arguments:
        setting, _, value = argument.lstrip("+").partition("=")
        section, _, field = setting.rpartition(".")
        names = [name.strip("'\"") for name in value.split(",")] if field == "api_key_env" else []
        for name in names:
            if name and not name.startswith("${") and (sentence := key_in_place_of_name(section, name)):
                return sentence
    return None


def key_with_dashes(arguments: Sequence[str]) -> str | None:
    """The sentence for a key that is written like an option, as in --seed=1; None if there is none."""
    keys = {field.name for field in fields(Config)}
    for argument in arguments:
        key, _, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and key.split(".")[0] in keys:
            setting = shlex.quote(f"{key}={value or '…'}")
            return f"{argument} begins with a dash, and a key has none: {setting}"
    return None


def explain(error: Exception) -> str | None:
    """One sentence for a user's mistake; None for any other error."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    for cause in _causes(error):
        if isinstance(cause, PGenRMError):
            return str(cause)
    if full := next(filter(_is_full, (*_causes(error), *_causes(error, context=True))), None):
        place = getattr(full, "filename", None) or getattr(full, "filename2", None)
        where = f" while {place} was written" if place else ""
        return (
            f"no space is left on the disk{where} ({first_line(full)}); free some, and the same command "
            "continues the run"
        )
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
    if match := re.search(r"Could not find 'model/([^'/]+/[^']+)'", text):
        return (
            f"model={match[1]} is not one of {', '.join(choices('model'))}; a model of the hub is "
            f"model=llama31_8b model.name={match[1]}"
        )
    if match := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        names = choices(match[1])
        return f"{match[1]}={match[2]} is not " + (f"one of {', '.join(names)}" if names else "installed")
    if match := re.search(r"ConfigError raised while resolving interpolation: (.+)", text):
        return match[1]
    if match := re.search(r"raised while resolving interpolation: (.+)\s+full_key: (\S+)", text):
        return f"{match[2]}= cannot be resolved: {match[1].strip(chr(34))}"
    if match := re.search(r"(Unsupported interpolation type .+)\s+full_key: (\S+)", text):
        return f"{match[2]}= cannot be resolved: {match[1].lower()}"
    if match := re.search(r"Interpolation key '(.+)' not found\s+full_key: (\S+)", text):
        return f"{match[2]}= names the key {match[1]}, which does not exist"
    if "Could not override ''" in text:
        return "an argument is key=value, and one lacks the key"
    if match := re.search(r"Could not override '([\w.]+)'|not in '\w+'\s+full_key: (\S+)", text):
        return _unknown_key(match[1] or match[2])
    if match := re.search(r"An item is already at '([\w.]+)'", text):
        return _of_a_section(match[1]) or f"{match[1]} has a value and takes no plus: {match[1]}=VALUE"
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]}= must be given"
    if match := re.search(r"Could not find '([^']+)'", text):
        return f"config group or file '{match[1]}' does not exist; groups are {', '.join(groups())}"
    if match := re.search(r"Error merging override (.+)", text):
        key, _, value = match[1].partition("=")
        if sentence := _of_a_section(key.lstrip("+")):
            return sentence
        is_text = "string" in str(error.__cause__ or error).lower()
        hint = f"; {_quoting(key, value)}" if value[:1] in ("[", "{") and is_text else ""
        return f"{match[1]}: {first_line(error.__cause__ or error)}{hint}"
    return " ".join(text.split())


def _causes(error: BaseException, context: bool = False) -> Iterator[BaseException]:
    """The error and its causes; with `context` the errors during whose handling it arose."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__context__ if context else cause.__cause__


def _is_full(error: BaseException) -> bool:
    """Whether a disk or a quota is full, by the operating system, Arrow or SQLite."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return "No space left on device" in text or "database or disk is full" in text


def _of_a_section(key: str) -> str | None:
    """How the keys of a section or a free dictionary are set; None for any other key."""
    from omegaconf import OmegaConf

    node = OmegaConf.select(OmegaConf.structured(Config), key)
    if not OmegaConf.is_dict(node):
        return None
    plus = "" if node else "+"  # a free dictionary
    return f"{key}= cannot take this value; its keys are set one by one, as in {plus}{key}.KEY=VALUE"


def _unknown_key(key: str) -> str:
    """A key that is not in the schema: the keys of its section and the nearest match."""
    from omegaconf import OmegaConf

    if sentence := _of_a_section(key):
        return sentence
    node, parts = OmegaConf.structured(Config), key.split(".")
    while len(parts) > 1 and parts[0] in node and OmegaConf.is_config(node[parts[0]]):
        node = node[parts.pop(0)]
    section = key[: len(key) - len(".".join(parts))]
    names = sorted(str(name) for name in node)
    if not names:  # a free dictionary
        return f"key '{key}' is new and takes a plus: +{key}=VALUE"
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
