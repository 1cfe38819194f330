"""The report of a run: one self-contained HTML file, and the same tables as Markdown.

The page loads nothing: CSS, script and SVG plots are inlined, and its Content-Security-Policy allows only
this script.  Model and user text is untrusted.  It enters the page only through jinja2's autoescape, and the
SVG only through matplotlib's XML writer.

Tables are generic: a row is a mapping, and columns appear in the order of the rows' keys.  A column whose
name ends in accuracy, stderr, share, difference, drop, confidence or a rate (flip, pass, failure) is a
fraction, shown in percent.  `ci95` (or `X_ci95`) is folded into `accuracy` (or `X`) as an interval; None is a
dash.
"""

import base64
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from eval.report.plots import accuracy_bars, line_plot
from pgenrm_train.files import atomic
from pgenrm_train.records.pairs import HistoryItem

TEMPLATES = Path(__file__).parent / "templates"
DASH = "–"
Row = Mapping[str, object]  # column → value of any kind; `_cell` formats it
Rows = Sequence[Row]

_FRACTION = re.compile(
    r"(accuracy|stderr|share|difference|drop|confidence|flip rate|pass rate|failure rate)$"
)
_INTERVAL = re.compile(r"(?:^|[ _])ci95$")


class Section(NamedTuple):
    """A table under a heading and an introduction."""

    title: str
    text: str
    table: pd.DataFrame | Rows


class Curve(NamedTuple):
    """Lines over a common `x`: name → one value per `x`; None and NaN are gaps.

    `bands`: name → 95 % interval per `x`, of some of the lines.
    """

    title: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]
    xlabel: str
    ylabel: str
    bands: Mapping[str, Sequence[Sequence[float] | None]] = {}


@dataclass(frozen=True)
class ChainView:
    """One evaluation chain for the chain reader.

    Scores are in presentation order; an absent part is empty or None.
    """

    pair_id: str
    user_id: str
    query: str
    responses: tuple[str, ...]
    label: int | None  # index of the response that the user preferred; None if unknown
    text: str  # the chain as generated, empty for a model without chains
    kind: str | None = None
    stage: str | None = None
    history: tuple[HistoryItem, ...] = ()
    analysis: str = ""
    criteria: tuple[tuple[str, float], ...] = ()  # (name, weight in percent)
    criterion_scores: tuple[tuple[float | None, ...], ...] = ()  # per criterion, one score per response
    declared: tuple[float, ...] | None = None
    verified: tuple[float, ...] | None = None
    issues: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def verdict(self) -> int | None:
        """Index of the response with the strictly highest declared score; None for a tie or a failure."""
        if self.failure or not self.declared:
            return None
        best = [i for i, score in enumerate(self.declared) if score == max(self.declared)]
        return best[0] if len(best) == 1 else None

    @property
    def outcome(self) -> str:
        """hit, miss, tie, failure, or unknown without the user's preference."""
        if self.failure or not self.declared:
            return "failure"
        if self.verdict is None or len(set(self.responses)) == 1:
            return "tie"
        if self.label is None:
            return "unknown"
        return "hit" if self.verdict == self.label else "miss"


@dataclass(frozen=True)
class Report:
    """The content of a report; only `title` is required."""

    title: str
    run: Row = field(default_factory=dict)  # facts: model, data, seeds, protocol, versions
    stages: Rows = ()  # the headline table; `accuracy` and `ci95` are also drawn as bars
    comparisons: Rows = ()  # baselines and other references
    sections: Sequence[Section] = ()
    curves: Sequence[Curve] = ()
    drawings: Sequence[tuple[str, Markup]] = ()  # (title, SVG), see eval.report.plots
    notes: Sequence[str] = ()  # plain sentences that qualify the figures
    chains: Sequence[ChainView] = ()


class Cell(NamedTuple):
    text: str
    interval: str = ""
    numeric: bool = False


class Table(NamedTuple):
    columns: list[tuple[str, bool]]  # (heading, numeric)
    rows: list[list[Cell]]


def write_report(path: str | Path, report: Report) -> None:
    """Write `report` as one HTML file, atomically.  Needs no network to write or to read."""
    html = render(
        "report.html.j2",
        report=report,
        facts=[(_heading(name), _fact(value)) for name, value in report.run.items()],
        headline=table_of(report.stages),
        comparisons=table_of(report.comparisons),
        sections=[(title, text, table_of(rows)) for title, text, rows in report.sections],
        plots=_plots(report),
    )
    _write(Path(path), html)


def write_page(path: Path, template: str, **values: object) -> None:
    """Write a page of `templates/` in the report's style, atomically."""
    _write(path, render(template, **values))


def render(template: str, **values: object) -> str:
    """Fill a template; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # for every name: select_autoescape would skip `.j2`
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    environment.filters["csp_hash"] = _csp_hash
    return environment.get_template(template).render(**values)


def write_markdown(path: str | Path, report: Report) -> None:
    """Write facts, tables and notes as Markdown; it only counts the curves and chains of the HTML."""
    parts = [f"# {plain(report.title)}", *(f"- {plain(note)}" for note in report.notes)]
    facts = [{"fact": _heading(name), "value": _fact(value)} for name, value in report.run.items()]
    tables = {"Run": facts, "Results": report.stages, "Baselines and references": report.comparisons}
    for heading, table in tables.items():
        if len(table):
            parts += [f"## {heading}", markdown_table(table)]
    for title, text, rows in report.sections:
        parts += [f"## {plain(title)}", plain(text), markdown_table(rows)]
    if report.curves or report.chains:
        parts.append(
            f"{len(report.curves)} curves and {len(report.chains)} evaluation chains are in the HTML report."
        )
    _write(Path(path), _join(parts))


def _plots(report: Report) -> list[tuple[str, Markup]]:
    """(title, inline SVG); matplotlib writes the SVG and escapes every label."""
    bars = _bars([*report.stages, *report.comparisons])
    plots = [("Accuracy with 95 % intervals", accuracy_bars(bars, prefix="bars"))] if bars else []
    curves = [(c.title, line_plot(*c[1:], prefix=f"curve{i}")) for i, c in enumerate(report.curves)]
    return [*plots, *curves, *report.drawings]


def _bars(rows: Rows) -> list[tuple[str, float, tuple[float, float] | None]]:
    """(label, accuracy, ci95) per row with an accuracy; the label is the row's first value."""
    bars = []
    for row in rows:
        accuracy = cast("float | None", row.get("accuracy"))
        interval = cast("tuple[float, float] | None", row.get("ci95"))
        if accuracy is not None and math.isfinite(accuracy):
            bars.append((str(next(iter(row.values()))), accuracy, interval))
    return bars


def table_of(rows: pd.DataFrame | Rows) -> Table:
    """Cells of rows, as the page's tables show them."""
    records = _records(rows)
    names = list(dict.fromkeys(str(name) for row in records for name in row))
    folded = {name for name in names if _measure(name) in names}
    shown = [name for name in names if name not in folded]
    interval_of = {_measure(name): name for name in folded}
    cells = [
        [_cell(name, row.get(name), row.get(interval_of.get(name, ""))) for name in shown] for row in records
    ]
    numeric = [all(line[i].numeric or line[i].text == DASH for line in cells) for i in range(len(shown))]
    return Table([(_heading(name), flag) for name, flag in zip(shown, numeric, strict=True)], cells)


def _records(rows: pd.DataFrame | Rows) -> Rows:
    if not isinstance(rows, pd.DataFrame):
        return rows
    return cast(Rows, (rows.reset_index() if rows.index.names != [None] else rows).to_dict("records"))


def _measure(name: str) -> str | None:
    """The column of an interval column; None for other columns."""
    return (_INTERVAL.sub("", name) or "accuracy") if _INTERVAL.search(name) else None


def _cell(name: str, value: object, interval: object = None) -> Cell:
    formatted = _percent if _FRACTION.search(_heading(name).lower()) else _number
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    text = formatted(float(cast(float, value))) if is_number else _text(value)
    if interval is None or isinstance(interval, float):
        return Cell(text, "", is_number)
    bounds = ", ".join(formatted(bound).removesuffix(" %") for bound in cast("Sequence[float]", interval))
    return Cell(text, f"[{bounds}]", is_number)


def _text(value: object) -> str:
    if value is None or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | float | np.number):
        return _number(float(value))
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items()) or DASH
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return ", ".join(_text(v) for v in value) or DASH
    return str(value)


def _fact(value: object) -> str:
    """A number without separators: a seed is no quantity."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _percent(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{100 * value:.1f} %".replace("-", "−")


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return DASH
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f").replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def _heading(name: str) -> str:
    return name.replace("_", " ")


def markdown_table(rows: pd.DataFrame | Rows) -> str:
    """Rows as a table of Markdown, which shows every text literally."""
    table = table_of(rows)
    if not table.rows:
        return "No rows."
    lines = [
        [plain(heading) for heading, _ in table.columns],
        ["---:" if n else "---" for _, n in table.columns],
        *([plain(f"{cell.text} {cell.interval}".strip()) for cell in row] for row in table.rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: str) -> str:
    """One line of Markdown that shows `text` literally: no table breaks, tags, links, emphasis."""
    return re.sub(r"([\\|<>\[\]*_`#])", r"\\\1", " ".join(text.split()))


def _join(parts: Sequence[str]) -> str:
    text = parts[0]
    for before, part in itertools.pairwise(parts):
        text += ("\n" if before.startswith("- ") and part.startswith("- ") else "\n\n") + part
    return text + "\n"


def _csp_hash(script: str) -> str:
    """Content-Security-Policy source that allows only this inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _write(path: Path, text: str) -> None:
    """Write the file atomically; lone surrogates become `?`."""
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="replace"))
