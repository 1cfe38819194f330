"""Console tables with the rows of the report."""

from collections.abc import Sequence
from typing import cast

from eval.report.report import Rows

WORDS = (
    "stage",
    "task",
    "published",
    "measure",
    "source",
    "from",
    "to",
    "run",
    "model",
    "subset",
    "slice",
    "value",
    "protocol",
    "probe",
    "chooser",
)  # other columns hold numbers


def text_table(rows: Rows, title: str, width: int) -> str:
    """Format a table; a column `X ci95` is folded into X, a fraction shown in percent.

    A column without any value is left out.  Utilities, scores and gains are shown as they are.
    """
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    keys = dict.fromkeys(key for row in rows for key in row if not key.endswith("ci95"))
    columns = [key for key in keys if not all(_is_missing(row.get(key)) for row in rows)]
    for column in columns:
        table.add_column(column, justify="left" if column in WORDS else "right")
    for row in rows:
        table.add_row(
            *(
                _cell(column, row.get(column), row.get("ci95" if column == "accuracy" else f"{column} ci95"))
                for column in columns
            )
        )
    out = StringIO()
    Console(file=out, width=width, force_terminal=False).print(table)
    return out.getvalue()


def _is_plain(column: str) -> bool:
    """Whether the column has a unit of its own, and is not shown in percent."""
    return column.endswith(("utility", "score")) or column.startswith("gain")


def _is_missing(value: object) -> bool:
    return value is None or value != value


def _cell(column: str, value: object, interval: object) -> str:
    if _is_missing(value):
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    if _is_plain(column):
        bounds = ", ".join(f"{bound:.3f}" for bound in cast("Sequence[float]", interval or ()))
        return f"{value:.3f}" + (f" [{bounds}]" if bounds else "")
    if interval:
        low, high = cast("Sequence[float]", interval)
        return f"{value * 100:.1f} [{low * 100:.1f}, {high * 100:.1f}]"
    if column.endswith(("accuracy", "stderr", "flip rate", "share")):
        return f"{value * 100:.1f}"
    if isinstance(value, float) and 0 < abs(value) < 1:
        return f"{value:.2g}"
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
