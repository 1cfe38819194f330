"""One setting: a dataclass field that carries its constraint and its one-line document."""

import copy
import dataclasses
import operator
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

T = TypeVar("T")
REQUIRED: Any = dataclasses.MISSING  # a default for fields that must be given
BOUNDS = {
    "gt": ("above", operator.gt),
    "ge": ("at least", operator.ge),
    "lt": ("below", operator.lt),
    "le": ("at most", operator.le),
}


def setting(default: T, document: str, choices: Iterable[str | int] = (), **bounds: float) -> T:
    """A dataclass field with its document and its constraint: `choices`, or `bounds` with names of `BOUNDS`.

    A list follows its constraint item by item; a mutable default is copied.
    """
    mutable = isinstance(default, list | dict) or dataclasses.is_dataclass(default)
    value: Any = {"default_factory": lambda: copy.deepcopy(default)} if mutable else {"default": default}
    metadata = {"document": document, "choices": tuple(choices), "bounds": bounds}
    return cast(T, dataclasses.field(metadata=metadata, **value))


def known(value: T | None) -> T:
    """A size that is given, or that `cluster.sizes` has computed."""
    assert value is not None, "with_sizes comes first"
    return value


def valid_values(field: dataclasses.Field[Any], kind: str = "") -> str:
    """The constraint in words, e.g. "above 0, or null"; `kind` names the type of the values."""
    bounds = [
        f"{BOUNDS[name][0]} {limit if isinstance(limit, int) else f'{limit:g}'}"
        for name, limit in field.metadata["bounds"].items()
    ]
    words = " and ".join(bounds) or ", ".join(map(str, field.metadata["choices"]))
    return f"{kind} {words}".strip() + (", or null" if str(field.type).endswith("None") else "")


def violations(section: Any, prefix: str = "") -> Iterator[str]:
    """One sentence per value of a section, or of the sections in it, that breaks its constraint."""
    for field in dataclasses.fields(section):
        key, value = prefix + field.name, getattr(section, field.name)
        choices, bounds = field.metadata["choices"], field.metadata["bounds"]
        if dataclasses.is_dataclass(value):
            yield from violations(value, f"{key}.")
        for item in value if isinstance(value, list) else [value]:
            if item is not None and choices and item not in choices:
                yield f"{key}={item} is not one of {valid_values(field)}"
            if item is not None and not all(BOUNDS[name][1](item, limit) for name, limit in bounds.items()):
                yield f"{key}={item} must be {valid_values(field)}: {field.metadata['document']}"


def not_one_of(key: str, value: object, valid: Iterable[str]) -> str:
    """The sentence for a value that is none of the valid ones."""
    return f"{key}={value} is not one of {', '.join(valid)}"
