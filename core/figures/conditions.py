"""Figure: how many cells and DEGs the conditions of a data set have."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.figures.style import BLUE, GREY, INK, MUTED, STRATUM_COLOURS, STRATUM_LABELS, grid, plain, styled
from core.views import perturbed, stratum


@styled
def conditions(quality: pd.DataFrame) -> Figure:
    """Cells per condition, DEGs per condition, and distance from control against DEGs; one row per covariate.

    quality: one row per (covariate, condition): n_cells, n_degs, edistance_to_control (NaN where unknown: left out).
    Control cells are not shown.
    """
    table = perturbed(quality)
    covariates = list(table["covariate"].unique())
    figure = Figure(figsize=(9.6, 0.3 + 2.6 * len(covariates)))
    panels = figure.subplots(len(covariates), 3, squeeze=False, width_ratios=[1, 1, 1.1])
    for row, covariate in enumerate(covariates):
        part = table[table["covariate"] == covariate]
        title = f"{covariate}: " if len(covariates) > 1 else ""
        cells, degs, distance = panels[row]
        cells.set_title(f"{title}n = {len(part):,} conditions", fontsize=8.5)
        _cells(cells, part["n_cells"].to_numpy(float))
        _degs(degs, part["n_degs"].to_numpy(float))
        _distance(distance, part)
    return figure


def _cells(axes: Axes, values: np.ndarray) -> None:
    values = values[~np.isnan(values)]
    axes.set_xlabel("cells per condition")
    axes.set_ylabel("conditions")
    grid(axes, "y")
    if not len(values):
        return
    axes.hist(values, bins=min(30, max(5, round(2 * len(values) ** 0.5))), color=GREY, edgecolor="white", linewidth=0.5)
    _median(axes, values)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: plain(value))


def _degs(axes: Axes, values: np.ndarray) -> None:
    """Half-decade bins on a logarithmic axis; zero stands apart at its left."""
    values = values[~np.isnan(values)]
    axes.set_xlabel("DEGs per condition (log scale, 0 apart)")
    axes.set_ylabel("conditions")
    grid(axes, "y")
    top = max(2.0, np.log10(max(10.0, values.max(initial=0.0))))
    edges = 10 ** np.linspace(0, np.ceil(top * 4) / 4, int(np.ceil(top * 4)) + 1)
    counts, _ = np.histogram(values[values > 0], edges)
    left, right = np.log10(edges[:-1]), np.log10(edges[1:])
    centre = np.rint(10 ** ((left + right) / 2)).astype(int)
    axes.bar(left, counts, right - left, align="edge", color=[STRATUM_COLOURS[stratum(n)] for n in centre], edgecolor="white", linewidth=0.5)  # fmt: skip
    axes.bar(-0.45, np.sum(values == 0), 0.25, color=STRATUM_COLOURS["0"], edgecolor="white", linewidth=0.5)
    _log_axis(axes, edges[-1])
    axes.set_xlim(-0.68, right[-1] + 0.05)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if len(values):
        _median(axes, _position(values), f"median {np.median(values):,.0f}")


def _distance(axes: Axes, table: pd.DataFrame) -> None:
    table = table[table["edistance_to_control"].notna() & table["n_degs"].notna()]
    degs = table["n_degs"].to_numpy(float)
    colours = [STRATUM_COLOURS[stratum(n)] for n in degs]
    axes.scatter(_position(degs), table["edistance_to_control"], s=12, c=colours, linewidths=0, rasterized=len(table) > 3000)
    _log_axis(axes, max(10.0, degs.max(initial=10.0)))
    axes.set_xlim(-0.68, max(1.1, np.log10(degs.max(initial=10.0)) + 0.15))
    axes.set_xlabel("DEGs per condition (log scale, 0 apart)")
    axes.set_ylabel("E-distance to control")
    axes.yaxis.set_major_formatter(lambda value, _: plain(value))
    grid(axes, "y")


def _position(degs: np.ndarray) -> np.ndarray:
    """Numbers of DEGs on the axis: log10, zero at -0.325."""
    return np.where(degs > 0, np.log10(np.maximum(degs, 1)), -0.325)


def _log_axis(axes: Axes, largest: float) -> None:
    decades = range(int(np.ceil(np.log10(max(largest, 10)))) + 1)
    axes.set_xticks([-0.325, *decades], ["0", *(plain(10.0**d) for d in decades)])


def _median(axes: Axes, positions: np.ndarray, label: str | None = None) -> None:
    middle = float(np.median(positions))
    axes.axvline(middle, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.annotate(
        label or f"median {middle:,.0f}", (middle, 1), (3, -1), xycoords=("data", "axes fraction"),
        textcoords="offset points", fontsize=7, color=MUTED, va="top",
    )  # fmt: skip
