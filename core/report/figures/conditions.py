"""Figure: how many cells and DEGs the conditions of a data set have."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.arrays import Floats
from core.report.figures import style
from core.report.tables import drop_control, find_stratum

_MOST_NAMES = 30
_ZERO = -0.325  # place of 0 DEGs on the logarithmic axis


@style.apply_look()
def draw_conditions(quality: pd.DataFrame) -> Figure:
    """Draw cells per condition, DEGs per condition, and the distance from control against DEGs.

    Up to 30 conditions are named; more are counted in histograms. Control is not shown.

    Parameters
    ----------
    quality
        One row per (covariate, condition): n_cells, n_degs, edistance_to_control (NaN where unknown: left out).

    Returns
    -------
    Figure
        One row of panels per covariate.
    """
    table = drop_control(quality)
    parts = [(covariate, part) for covariate, part in table.groupby("covariate", sort=False)]
    several = len(parts) > 1
    heights = [max(2.5, 0.9 + 0.16 * len(part)) if len(part) <= _MOST_NAMES else 2.5 for _, part in parts]
    figure = Figure(figsize=(9.6, sum(heights) + 0.2))
    panels = figure.subplots(len(parts), 3, squeeze=False, width_ratios=[1, 1, 1.1], height_ratios=heights)
    for (covariate, part), (cells, degs, distance) in zip(parts, panels, strict=True):
        if len(part) <= _MOST_NAMES:
            part = part.sort_values(["n_degs", "condition"])
            _draw_bars(cells, part, "n_cells", named=True)
            _draw_bars(degs, part, "n_degs", named=False)
        else:
            _draw_cells_histogram(cells, part["n_cells"].dropna().to_numpy(float))
            _draw_degs_histogram(degs, part["n_degs"].dropna().to_numpy(float))
        _draw_distance(distance, part)
        cells.set_xlabel("cells per condition")
        degs.set_xlabel("DEGs per condition (log scale, 0 apart)")
        distance.set_xlabel("DEGs per condition (log scale, 0 apart)")
        cells.set_title(f"{covariate}, n = {len(part):,}" if several else f"n = {len(part):,} conditions", fontsize=8.5)
    return figure


def _draw_bars(axes: Axes, table: pd.DataFrame, column: str, named: bool) -> None:
    """One bar per condition, cells on a linear and DEGs on a logarithmic axis."""
    rows = np.arange(len(table))
    values = table[column].to_numpy(float)
    if column == "n_degs":
        colours = [style.STRATUM_COLOURS[find_stratum(n)] for n in values]
        axes.hlines(rows, -0.68, _place_degs(values), color=style.FAINT, linewidth=1, zorder=1)
        axes.scatter(_place_degs(values), rows, s=20, c=colours, linewidths=0)
        _set_log_axis(axes, values)
    else:
        axes.barh(rows, values, height=0.7, color=style.GREY)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        style.use_plain_ticks(axes.xaxis)
    axes.set_yticks(rows, list(table["condition"]) if named else [""] * len(rows), fontsize=7.5)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    style.hide_spine(axes)
    style.draw_grid(axes, "x")


def _draw_cells_histogram(axes: Axes, values: Floats) -> None:
    axes.hist(values, bins=min(30, round(2 * len(values) ** 0.5)), color=style.GREY, edgecolor="white", linewidth=0.5)
    axes.set_ylabel("conditions")
    style.draw_grid(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    style.use_plain_ticks(axes.xaxis)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _mark_median(axes, values, float(np.median(values)))


def _draw_degs_histogram(axes: Axes, values: Floats) -> None:
    """Quarter-decade bins; zero has a bar of its own at the left."""
    axes.set_ylabel("conditions")
    style.draw_grid(axes, "y")
    bins = int(np.ceil(4 * np.log10(max(100.0, values.max(initial=0.0) + 1))))
    edges = np.arange(bins + 1) / 4
    counts, _ = np.histogram(np.log10(values[values > 0]), edges)
    colours = [style.STRATUM_COLOURS[find_stratum(10**edge + 1e-9)] for edge in edges[:-1]]
    axes.bar(edges[:-1], counts, 0.25, align="edge", color=colours, edgecolor="white", linewidth=0.5)
    axes.bar(_ZERO, np.sum(values == 0), 0.25, color=style.STRATUM_COLOURS["0"], edgecolor="white", linewidth=0.5)
    _set_log_axis(axes, values)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _mark_median(axes, values, float(_place_degs(np.median(values, keepdims=True))[0]))


def _draw_distance(axes: Axes, table: pd.DataFrame) -> None:
    table = table[table["edistance_to_control"].notna() & table["n_degs"].notna()]
    degs = table["n_degs"].to_numpy(float)
    colours = [style.STRATUM_COLOURS[find_stratum(n)] for n in degs]
    # An unbiased estimate of a distance near 0 can be negative.
    axes.set_yscale("function", functions=(lambda y: np.sign(y) * np.sqrt(np.abs(y)), lambda y: np.sign(y) * y**2))
    size, raster = 12 if len(degs) < 300 else 6, len(degs) > 3000
    axes.scatter(_place_degs(degs), table["edistance_to_control"], s=size, c=colours, linewidths=0, rasterized=raster)
    _set_log_axis(axes, degs)
    axes.set_ylabel("E-distance to control\n(square-root scale)")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    style.use_plain_ticks(axes.yaxis)
    style.draw_grid(axes, "y")


def _place_degs(degs: Floats) -> Floats:
    """Places of numbers of DEGs: their log10, and one of its own for 0; NaN has none."""
    return np.where(degs == 0, _ZERO, np.log10(np.maximum(degs, 1)))


def _set_log_axis(axes: Axes, degs: Floats) -> None:
    top = np.log10(max(10.0, np.nanmax(degs, initial=0.0)))
    powers = range(int(top) + 1)
    axes.set_xticks([_ZERO, *powers], ["0", *(style.format_tick(10.0**power) for power in powers)])
    axes.set_xlim(-0.68, np.ceil(4 * top) / 4 + 0.1)


def _mark_median(axes: Axes, values: Floats, position: float) -> None:
    axes.axvline(position, color=style.INK, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.margins(y=0.16)
    axes.annotate(
        f"median {np.median(values):,.0f}", (position, 1), (3, -1), xycoords=("data", "axes fraction"),
        textcoords="offset points", fontsize=7, color=style.MUTED, va="top",
    )  # fmt: skip
