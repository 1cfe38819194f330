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

No constraint means any text, or `true` and `false`. A list follows the constraint item by item. Rules that
span several keys are in [checks.py](../pgenrm_train/config/checks.py).
"""


def reference() -> str:
    """The page: one table per section, in the order of the schema.

    A row that an earlier section has too, such as `attempts` of every API, is named instead of repeated.
    """
    return "\n".join([HEAD, *_tables(Config(), "Top level", "keys of all recipes", "", {})])


def _tables(
    section: Any, title: str, document: str, prefix: str, printed: dict[tuple[str, ...], str]
) -> Iterator[str]:
    """`printed` maps each row of the page to the section that has it."""
    yield f"## {title}\n\n{document[0].upper()}{document[1:]}.\n"
    values = {field: getattr(section, field.name) for field in dataclasses.fields(section)}
    rows = []
    shared: dict[str, list[str]] = {}
    for field, value in values.items():
        if dataclasses.is_dataclass(value):
            continue
        row = (field.name, _default(value), _constraint(field), field.metadata["document"])
        if row in printed:
            shared.setdefault(printed[row], []).append(f"`{field.name}`")
        else:
            rows.append(f"| `{prefix}{row[0]}` | `{row[1]}` | {row[2]} | {row[3]} |")
            printed[row] = prefix.rstrip(".")
    for home, names in shared.items():
        yield f"These keys are as in [`{home}`](#{home.replace('.', '')}): {', '.join(names)}.\n"
    yield "\n".join(["| key | default | constraint | meaning |\n|---|---|---|---|", *rows, ""])
    for field, value in values.items():
        key = prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _tables(value, f"`{key}`", field.metadata["document"], f"{key}.", printed)
        elif isinstance(value, dict) and value:
            yield _dictionary(key, value, field.metadata["document"])


def _dictionary(key: str, sections: dict[str, Any], document: str) -> str:
    """One table for sections of one type: a row per key, with the default of each section."""
    fields = dataclasses.fields(next(iter(sections.values())))
    rows = []
    for field in fields:
        defaults = ", ".join(
            f"{name} {_default(getattr(section, field.name))}" for name, section in sections.items()
        )
        meaning = field.metadata["document"]
        rows.append(f"| `{key}.NAME.{field.name}` | `{defaults}` | {_constraint(field)} | {meaning} |")
    head = f"## `{key}.NAME`\n\n{document[0].upper()}{document[1:]}.\n"
    return "\n".join([head, "| key | default | constraint | meaning |\n|---|---|---|---|", *rows, ""])


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(list(value)) if value else "{}"
    return value if isinstance(value, str) else json.dumps(value)


def _constraint(field: dataclasses.Field[Any]) -> str:
    """The constraint in words; empty for any text and for true or false, which the default shows."""
    kind = inspect.formatannotation(field.type)
    if kind == "bool" or (kind == "str" and not field.metadata["choices"]):
        return ""
    kind = kind.removesuffix(" | None")
    kind = {"Any": "see meaning"}.get(kind, "dict" if kind.startswith("dict") else kind)
    return valid_values(field, "" if field.metadata["choices"] else kind)


if __name__ == "__main__":
    print(reference(), end="")
