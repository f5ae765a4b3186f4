"""Figure: in which conditions a model beats the dataset mean."""

from __future__ import annotations

from math import ceil

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from core.report.figures import style

_TICKS = [2.0**power for power in range(-12, 13)]


@style.apply_look()
def draw_per_condition(ratios: pd.DataFrame) -> Figure:
    """Draw the wMSE of each model divided by the dataset mean's, per condition, grouped by number of DEGs.

    Within a stratum conditions are sorted by ratio, so that each curve crosses 1 where the model stops winning. Of more
    than 100 ratios the 1 % farthest from 1 may lie beyond the axis: they are drawn as triangles at its edge.

    Parameters
    ----------
    ratios
        As `core.report.tables.compute_wmse_ratios` gives them (model, covariate, condition, stratum, ratio), at least
        one row.

    Returns
    -------
    Figure
        One panel per model, in the table's order.
    """
    models = list(ratios["model"].unique())
    strata = [name for name in style.STRATUM_LABELS if name in set(ratios["stratum"])]
    columns = min(len(models), 2 if len(models) <= 4 else 3)
    lines = ceil(len(models) / columns)
    figure = Figure(figsize=(9.6 if columns > 1 else 6.4, max(3.1, 0.5 + 2.15 * lines)))
    panels = style.split_panels(figure, len(models), columns)
    distance = np.abs(np.log(ratios["ratio"].to_numpy(float)))
    bound = max(2.2, float(np.exp(np.quantile(distance, 0.99) if len(distance) > 100 else distance.max())))
    for model, axes in zip(models, panels, strict=True):
        _draw_panel(axes, ratios[ratios["model"] == model], strata, bound, raster=len(ratios) > 3000)
        axes.set_title(model, fontsize=8.5)
    first = panels[0]
    first.set_yscale("log", base=2)
    reach = np.log(1.15 * bound)
    first.set_ylim(np.exp(-reach), np.exp(1.5 * reach))  # room above the points for the counts
    step = max(1, round(np.log2(bound) / 3))
    ticks = [tick for tick in _TICKS if 1 / bound <= tick <= bound and round(np.log2(tick)) % step == 0]
    first.yaxis.set_major_locator(FixedLocator(ticks))
    first.yaxis.set_minor_locator(FixedLocator([]))
    style.use_plain_ticks(first.yaxis)
    first.set_xticks([index + 0.5 for index in range(len(strata))], [style.STRATUM_LABELS[name] for name in strata])
    first.set_xlim(0, len(strata))
    figure.supylabel("wMSE ratio to the dataset mean\n(log scale; below 1: model better)", fontsize=8.5)
    figure.supxlabel("DEGs of the condition; within a group, conditions sorted by ratio", fontsize=8.5)
    return figure


def _draw_panel(axes: Axes, table: pd.DataFrame, strata: list[str], bound: float, raster: bool) -> None:
    """One model: strata side by side, each as wide as the next whatever its number of conditions."""
    axes.axhline(1, color=style.INK, linewidth=0.8)
    style.draw_grid(axes, "y")
    axes.tick_params(axis="x", length=0)
    for index, stratum in enumerate(strata):
        if index:
            axes.axvline(index, color="#c6cad0", linewidth=0.6)
        values = np.sort(table.loc[table["stratum"] == stratum, "ratio"].to_numpy())
        if not len(values):
            axes.annotate(
                "no condition", (index + 0.5, 1), (0, -2), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="top", fontsize=7, color=style.MUTED,
            )  # fmt: skip
            continue
        x = index + 0.08 + 0.84 * (np.arange(len(values)) + 0.5) / len(values)
        size = 16 if len(values) < 20 else 9 if len(values) < 60 else 5
        for mask, marker in (
            ((values >= 1 / bound) & (values <= bound), "o"),
            (values > bound, "^"),
            (values < 1 / bound, "v"),
        ):
            y, colour = np.clip(values[mask], 1 / bound, bound), style.STRATUM_COLOURS[stratum]
            axes.scatter(x[mask], y, s=size, marker=marker, color=colour, linewidths=0, rasterized=raster)
        axes.annotate(
            f"better in\n{np.sum(values < 1):,} of {len(values):,}", (index + 0.5, 1), (0, -2),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="top", fontsize=7,
            color=style.MUTED, linespacing=1.15,
        )  # fmt: skip
