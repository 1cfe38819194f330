"""The plots of a report, as inline SVG.

matplotlib writes SVG for separate files.  To share one HTML page with others, an SVG loses its prolog,
metadata, namespaces (the HTML parser supplies them), global style rule and fixed size.  Its ids get a prefix,
its text the page's colour.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

POINTS = 3000  # of a map, subsampled by a fixed seed: the SVG stays readable
_INK = "#010203"  # placeholder for the page's text colour; no series uses it
_COLOURS = ("#3b82c4", "#d9772b", "#3a9d6b", "#a866c4", "#cf4f63", "#7d8a97")
_DASHES = ("-", "--", "-.", ":")
# Transparent, for light and dark pages.
_HEAT = LinearSegmentedColormap.from_list("heat", ["#3b82c410", "#3b82c499"])
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pgenrm",  # the same report gives the same bytes
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


def accuracy_bars(bars: Sequence[tuple[str, float, tuple[float, float] | None]], *, prefix: str) -> Markup:
    """SVG of horizontal bars (label, accuracy in [0, 1], 95 % interval or None) and a line at one half."""
    with _axes(5.0, 0.75 + 0.34 * len(bars)) as (figure, axes):
        rows = np.arange(len(bars))
        axes.barh(rows, [100 * bar[1] for bar in bars], height=0.62, color=_COLOURS[0], alpha=0.55)
        for row, (_, accuracy, interval) in enumerate(bars):
            if interval is not None:
                axes.plot([100 * bound for bound in interval], [row, row], color=_INK, linewidth=1.4)
            axes.plot(100 * accuracy, row, "o", color=_INK, markersize=3.2)
        axes.axvline(50, color=_INK, linewidth=0.8, linestyle=":")
        axes.set(xlim=(0, 100), ylim=(len(bars) - 0.4, -0.6), xlabel="accuracy, % (dotted: chance)")
        axes.set_yticks(rows, [_short(bar[0]) for bar in bars])
        axes.tick_params(axis="y", length=0)
        return _inline(figure, prefix)


def line_plot(
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, Sequence[Sequence[float] | None]] | None = None,
    *,
    prefix: str,
) -> Markup:
    """SVG of lines over `x`; None and NaN are gaps, few points get markers, colours and dashes differ.

    `bands`: name of a line → its 95 % interval per `x`, drawn as a shade.
    """
    with _axes(5.0, 3.0) as (figure, axes):
        for i, (name, values) in enumerate(series.items()):
            numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
            marker = "o" if np.isfinite(numbers).sum() <= 30 else ""
            colour, dash = _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]
            axes.plot(
                x, numbers, dash, color=colour, label=_short(name), linewidth=1.6, marker=marker, markersize=3
            )
            if bands and name in bands:
                low, high = np.array([(np.nan, np.nan) if b is None else b for b in bands[name]], float).T
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel=_short(xlabel, 60), ylabel=_short(ylabel, 40))
        if all(float(value).is_integer() for value in x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="#8888", linewidth=0.4)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=min(3, len(series)), fontsize=9)
        return _inline(figure, prefix)


def heat_map(
    values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], *, prefix: str
) -> Markup:
    """Fractions in [0, 1] as percent, one cell per value, the best in bold; None is an empty cell."""
    grid = 100 * np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    with _axes(max(5.0, 1.0 + 0.75 * len(columns)), 0.7 + 0.42 * len(rows)) as (figure, axes):
        axes.pcolormesh(np.ma.masked_invalid(grid), cmap=_HEAT, edgecolor="none")
        for (y, x), value in np.ndenumerate(grid):
            if np.isfinite(value):
                weight = "bold" if value == np.nanmax(grid) else "normal"
                axes.text(x + 0.5, y + 0.5, f"{value:.1f}", ha="center", va="center", weight=weight)
        axes.set_xticks(np.arange(len(columns)) + 0.5, [_short(name) for name in columns])
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_short(name) for name in rows])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return _inline(figure, prefix)


def point_map(
    x: np.ndarray, y: np.ndarray, label: np.ndarray, names: Sequence[str], *, prefix: str
) -> Markup:
    """Points (N,) coloured by label, with each label's name above the median of its points."""
    kept = np.arange(len(x))
    if len(kept) > POINTS:
        kept = np.sort(np.random.default_rng(0).choice(kept, POINTS, replace=False))
    with _axes(5.0, 4.0) as (figure, axes):
        for j, name in enumerate(names):
            inside, shown = label == j, kept[label[kept] == j]
            if inside.any():
                axes.plot(
                    x[shown],
                    y[shown],
                    "o",
                    color=_COLOURS[j % len(_COLOURS)],
                    markersize=2.5,
                    alpha=0.6,
                    markeredgewidth=0,
                )
                middle = np.median(x[inside]), np.median(y[inside])
                axes.annotate(
                    _short(name), middle, (0, 3), textcoords="offset points", ha="center", fontsize=8
                )
        axes.set(xlabel="first principal axis", ylabel="second principal axis", xticks=[], yticks=[])
        return _inline(figure, prefix)


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _inline(figure: Figure, prefix: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    head, body = buffer.getvalue().split("<svg", 1)[1].split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None, "matplotlib writes a viewBox"
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}-", body).replace("xlink:href", "href")
    return Markup(f'<svg {view.group()} aria-hidden="true">{body}'.replace(_INK, "currentColor"))


def _short(text: str, limit: int = 28) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
