"""Further plots of a report: a heat map and a map of points, as SVG that needs nothing else (see `report`)."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from eval.report import _COLOURS, _INK, _STYLE, _inline, _short

POINTS = 3000  # of a map: more are drawn from by a fixed seed, and the SVG stays readable


def heat_map(values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], *, prefix: str) -> Markup:
    """Fractions in [0, 1] as percent, one cell a value, the best in bold; None is an empty cell."""
    grid = 100 * np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(5.0, 1.0 + 0.75 * len(columns)), 0.7 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.pcolormesh(np.ma.masked_invalid(grid), cmap="Blues", alpha=0.45, edgecolor="none")
        for (y, x), value in np.ndenumerate(grid):
            if np.isfinite(value):
                weight = "bold" if value == np.nanmax(grid) else "normal"
                axes.text(x + 0.5, y + 0.5, f"{value:.1f}", ha="center", va="center", weight=weight)
        axes.set_xticks(np.arange(len(columns)) + 0.5, [_short(name) for name in columns])
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_short(name) for name in rows])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return Markup(_inline(figure, prefix))


def point_map(x: np.ndarray, y: np.ndarray, label: np.ndarray, names: Sequence[str], *, prefix: str) -> Markup:
    """Points (N,) coloured by label; each label's name stands at the middle of its points."""
    kept = np.arange(len(x))
    if len(kept) > POINTS:
        kept = np.sort(np.random.default_rng(0).choice(kept, POINTS, replace=False))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 4.0), layout="constrained")
        axes = figure.subplots()
        for j, name in enumerate(names):
            mine, shown = label == j, kept[label[kept] == j]
            if mine.any():
                axes.plot(
                    x[shown], y[shown], "o", color=_COLOURS[j % len(_COLOURS)], markersize=2.5, alpha=0.6, markeredgewidth=0
                )
                axes.text(np.median(x[mine]), np.median(y[mine]), _short(name), ha="center", va="center", fontsize=8, color=_INK)
        axes.set(xlabel="first principal axis", ylabel="second principal axis", xticks=[], yticks=[])
        return Markup(_inline(figure, prefix))
