"""`python -m pgenrm_train.config.reference > docs/configuration.md`: the reference of all settings."""

import dataclasses
import inspect
import json
from collections.abc import Iterator
from typing import Any

from pgenrm_train.config.schema import Config
from pgenrm_train.config.setting import valid_values

HEAD = """\
# Configuration

Every key of `python -m pgenrm_train recipe=NAME key=value …`, generated from the schema by
`python -m pgenrm_train.config.reference > docs/configuration.md`. The defaults are the schema's. A group
such as `model=nano` or `data=pairs` overrides some of them by its file in `configs/`;
`python -m pgenrm_train recipe=NAME --cfg job --resolve` prints the values of a run.

A list follows the constraint item by item. Rules that span several keys are in
[checks.py](../pgenrm_train/config/checks.py).
"""


def reference() -> str:
    """The page: one table per section, in the order of the schema."""
    return "\n".join([HEAD, *_tables(Config(), "Top level", "keys of all recipes", "")])


def _tables(section: Any, title: str, document: str, prefix: str) -> Iterator[str]:
    values = {field: getattr(section, field.name) for field in dataclasses.fields(section)}
    yield f"## {title}\n\n{document[0].upper()}{document[1:]}.\n"
    yield "| key | default | constraint | meaning |\n|---|---|---|---|"
    for field, value in values.items():
        if not dataclasses.is_dataclass(value):
            meaning = field.metadata["document"]
            yield f"| `{prefix}{field.name}` | `{_default(value)}` | {_constraint(field)} | {meaning} |"
    yield ""
    for field, value in values.items():
        for key, nested in _sections(prefix + field.name, value):
            yield from _tables(nested, f"`{key}`", field.metadata["document"], f"{key}.")


def _sections(key: str, value: Any) -> list[tuple[str, Any]]:
    items = (
        [(f"{key}.{name}", item) for name, item in value.items()]
        if isinstance(value, dict)
        else [(key, value)]
    )
    return [(name, item) for name, item in items if dataclasses.is_dataclass(item)]


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(list(value)) if value else "{}"
    return value if isinstance(value, str) else json.dumps(value)


def _constraint(field: dataclasses.Field[Any]) -> str:
    kind = inspect.formatannotation(field.type).removesuffix(" | None")
    kind = {"Any": "see meaning"}.get(kind, "dict" if kind.startswith("dict") else kind)
    return valid_values(field, "" if field.metadata["choices"] else kind)


if __name__ == "__main__":
    print(reference(), end="")
