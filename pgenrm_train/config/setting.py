"""One setting: a dataclass field that carries its constraint and its one-line document."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

T = TypeVar("T")
REQUIRED: Any = dataclasses.MISSING  # a default for fields that must be given


@dataclass(frozen=True)
class Rule:
    """Bounds or choices of a value; a list follows its rule item by item."""

    document: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[str | int, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether `value` is one of the choices and within the bounds."""
        return (
            (not self.choices or value in self.choices)
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def bounds(self) -> str:
        """The valid range in words, e.g. "above 0 and at most 1"."""
        if self.ge is not None and self.le is not None:
            return f"within {self.ge:g} and {self.le:g}"
        words = {"above": self.gt, "at least": self.ge, "below": self.lt, "at most": self.le}
        return " and ".join(f"{word} {limit:g}" for word, limit in words.items() if limit is not None)


def setting(default: T, document: str = "", **rule: Any) -> T:
    """A dataclass field with its document and the constraints of `Rule`; a mutable default is copied."""
    mutable = isinstance(default, list | dict) or dataclasses.is_dataclass(default)
    value: Any = {"default_factory": lambda: copy.deepcopy(default)} if mutable else {"default": default}
    return cast(T, dataclasses.field(metadata={"rule": Rule(document, **rule)}, **value))


def nullable(field: dataclasses.Field[Any]) -> bool:
    """Whether the field's type allows null."""
    return "None" in str(field.type)


def violations(section: Any, prefix: str = "") -> Iterator[str]:
    """One sentence per value of a section, or of its own sections, that breaks the rule of its field."""
    for field in dataclasses.fields(section):
        key, value = prefix + field.name, getattr(section, field.name)
        rule: Rule = field.metadata["rule"]
        if dataclasses.is_dataclass(value):
            yield from violations(value, f"{key}.")
            continue
        for item in value if isinstance(value, list) else [value]:
            if item is None or rule.allows(item):
                continue
            if rule.choices:
                yield not_one_of(key, item, (*rule.choices, *["null"] * nullable(field)))
            else:
                null = ", or null" if nullable(field) else ""
                yield f"{key}={item} must be {rule.bounds()}{null}: {rule.document}"


def not_one_of(key: str, value: object, valid: Iterable[object]) -> str:
    """The sentence for a value that is none of the valid ones."""
    return f"{key}={value} is not one of {', '.join(map(str, valid))}"
