"""`python -m pgenrm_train.config.reference > docs/configuration.md`: the reference of all settings."""

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

from pgenrm_train.config import CONFIG_DIR
from pgenrm_train.config.schema import Config
from pgenrm_train.config.setting import valid_values

HEAD = """\
# Configuration

Every key of `python -m pgenrm_train recipe=NAME key=value …`, generated from the schema by
`python -m pgenrm_train.config.reference > docs/configuration.md`. A key has its default and, in brackets,
its valid values (for a list, those of its items); without brackets any value of the default's type is
valid. A default of null is valid too. Rules over several keys are in
[checks.py](../pgenrm_train/config/checks.py).

A group is a choice of a file of `configs/`, whose values replace the defaults below.
`python -m pgenrm_train recipe=NAME --cfg job --resolve` prints the values of a run. The groups:

"""
NEARLY_ALL = 8  # rows of a section that is named as one
TABLE = "| key | default | meaning |\n|---|---|---|"
Row = tuple[str, str, str, str]  # name, default, constraint, document


def reference() -> str:
    """The page: one table per section, in the order of the schema.

    A row that an earlier section has too, such as `attempts` of every API, is named instead of repeated.
    """
    tables = _tables(Config(), "Top level", "keys of all recipes", "", {})
    return HEAD + "\n".join([*_groups(), "", *tables])


def _groups() -> Iterator[str]:
    """One line per group, with its files."""
    for folder in sorted(path for path in CONFIG_DIR.iterdir() if path.is_dir()):
        yield f"- `{folder.name}=`: {', '.join(f'`{path.stem}`' for path in sorted(folder.glob('*.yaml')))}"


def _tables(
    section: Any, title: str, document: str, prefix: str, printed: dict[str, list[Row]]
) -> Iterator[str]:
    """`printed` maps each section of the page to all of its rows, named ones included."""
    yield f"## {title}\n\n{document[0].upper()}{document[1:]}.\n"
    values = {field: getattr(section, field.name) for field in dataclasses.fields(section)}
    rows = [
        (field.name, _default(value), _constraint(field, value), field.metadata["document"])
        for field, value in values.items()
        if not dataclasses.is_dataclass(value)
    ]
    own = list(rows)
    for sentence, shared in _named(rows, printed):
        own = [row for row in own if row not in shared]
        yield f"{sentence}.\n"
    printed[prefix.rstrip(".")] = rows
    if own:
        yield "\n".join([TABLE, *(_row(prefix, row) for row in own), ""])
    for field, value in values.items():
        key = prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _tables(value, f"`{key}`", field.metadata["document"], f"{key}.", printed)
        elif isinstance(value, dict) and value:
            yield _dictionary(key, value, field.metadata["document"])


def _named(rows: list[Row], printed: dict[str, list[Row]]) -> Iterator[tuple[str, list[Row]]]:
    """Sentences that name rows of earlier sections, each with these rows."""
    for home, others in reversed(printed.items()):
        lacking = [f"`{row[0]}`" for row in others if row not in rows]
        if len(others) > NEARLY_ALL and len(lacking) <= 1:
            yield f"All keys of {_link(home)}{' except ' if lacking else ''}{', '.join(lacking)}", others
            return
    left = list(rows)
    for home, others in printed.items():
        if shared := [row for row in left if row in others]:
            left = [row for row in left if row not in shared]
            yield f"As in {_link(home)}: {', '.join(f'`{row[0]}`' for row in shared)}", shared


def _link(home: str) -> str:
    return f"[`{home}`](#{home.replace('.', '')})"


def _row(prefix: str, row: Row) -> str:
    name, default, constraint, document = row
    values = f" ({constraint})" if constraint else ""
    return f"| `{prefix}{name}` | `{default}`{values} | {document} |"


def _dictionary(key: str, sections: dict[str, Any], document: str) -> str:
    """One table for sections of one type: a row per key, with the default of each section."""
    fields = dataclasses.fields(next(iter(sections.values())))
    rows = []
    for field in fields:
        defaults = ", ".join(
            f"{name} {_default(getattr(section, field.name))}" for name, section in sections.items()
        )
        rows.append(_row(f"{key}.NAME.", (field.name, defaults, "", field.metadata["document"])))
    head = f"## `{key}.NAME`\n\n{document[0].upper()}{document[1:]}.\n"
    return "\n".join([head, TABLE, *rows, ""])


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(list(value)) if value else "{}"
    return value if isinstance(value, str) else json.dumps(value)


def _constraint(field: dataclasses.Field[Any], value: Any) -> str:
    """The constraint in words; empty for any value of the default's type, "or null" only if that is news."""
    kind = inspect.formatannotation(field.type).removesuffix(" | None")
    kind = {"Any": "see meaning"}.get(kind, "dict" if kind.startswith("dict") else kind)
    shown = kind == type(value).__name__ and field.metadata["bounds"]  # by the default
    words = valid_values(field, "" if field.metadata["choices"] or shown else kind)
    words = re.sub(r"at least (\S+) and at most (\S+)", r"\1 to \2", words)
    if value is None:
        return words.removesuffix(", or null")
    return "" if words == type(value).__name__ else words


if __name__ == "__main__":
    print(reference(), end="")
