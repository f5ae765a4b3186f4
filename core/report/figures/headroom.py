"""Figure: the place of each model between the negative and the positive control."""

from __future__ import annotations

from math import ceil

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.report.figures import style
from core.report.tables import list_panel_models, list_ranked_metrics

# Headroom has no lower bound; values farther out are drawn at the edge, with the number.
_WIDEST = (-1.0, 1.4)
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # behind a number
_COLOURS = {"model": style.BLUE, "baseline": style.GREY}
_MARKERS = {"model": "o", "baseline": "s"}


@style.apply_look()
def draw_headroom(leaderboard: pd.DataFrame) -> Figure:
    """Draw the headroom of each model and baseline, best mean rank on top. NaN is drawn as a dash.

    Parameters
    ----------
    leaderboard
        Long table (model, kind, metric, headroom, headroom_low, headroom_high, headroom_half_sd, ...) with at least
        one calibrated metric and one model or baseline of sufficient coverage.

    Returns
    -------
    Figure
        One panel per calibrated metric.
    """
    metrics = list_ranked_metrics(leaderboard)
    names = list_panel_models(leaderboard)
    rows = leaderboard.set_index(["metric", "model"])
    columns = min(len(metrics), 4 if len(metrics) <= 12 or len(names) <= 10 else 5)
    lines = ceil(len(metrics) / columns)
    width = 9.6 if columns > 2 else 3.2 + 2.9 * columns
    figure = Figure(figsize=(width, 0.75 + lines * (0.66 + 0.21 * len(names))))
    panels = style.split_panels(figure, len(metrics), columns)

    table = leaderboard[leaderboard["model"].isin(names) & leaderboard["metric"].isin(metrics)]
    low = np.nanmin([-0.05, *table["headroom"], *table["headroom_low"]])
    high = np.nanmax([1.05, *table["headroom"], *table["headroom_high"]])
    limits = (max(_WIDEST[0], low) - 0.06, min(_WIDEST[1], high) + 0.06)
    for metric, axes in zip(metrics, panels, strict=True):
        shown = rows.loc[metric].reindex(names)
        _draw_panel(axes, shown, limits)
        n = shown["n_conditions"].max()
        axes.set_title(style.break_name(metric), fontsize=8.5)
        axes.annotate(
            f"n = {n:,.0f}", (1, 0), (0, 2), xycoords="axes fraction", textcoords="offset points", ha="right",
            va="bottom", fontsize=7, color=style.MUTED, bbox=_WHITE,
        )  # fmt: skip
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) + 0.3, -0.6)
    panels[0].set_xlim(*limits)
    figure.supxlabel("headroom (0 = negative control, 1 = positive control)", fontsize=8.5)
    figure.legend(handles=_explain_marks(set(table["kind"])), loc="outside upper left", ncols=4, columnspacing=1.6)
    return figure


def _draw_panel(axes: Axes, table: pd.DataFrame, limits: tuple[float, float]) -> None:
    """One metric: a row per model."""
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.axvline(1, color=style.INK, linewidth=0.8, linestyle=(0, (3, 2)))
    style.draw_grid(axes, "x")
    style.hide_spine(axes)
    style.use_plain_ticks(axes.xaxis)
    inner = (limits[0] + 0.05, limits[1] - 0.05)
    for row, entry in enumerate(table.to_dict("records")):
        mean, sd = entry["headroom"], entry["headroom_half_sd"]
        if np.isnan(mean):
            axes.text(0.02, row, "–", va="center", color=style.MUTED)
            continue
        colour = _COLOURS[entry["kind"]]
        if not inner[0] <= mean <= inner[1]:
            edge, mark, side, offset = (inner[0], "<", "left", 7) if mean < inner[0] else (inner[1], ">", "right", -7)
            axes.plot(edge, row, mark, color=colour, markersize=5)
            axes.annotate(
                style.format_tick(float(f"{mean:.3g}")), (edge, row), (offset, 0), textcoords="offset points",
                ha=side, va="center", fontsize=7, color=style.MUTED, bbox=_WHITE,
            )  # fmt: skip
            continue
        axes.barh(row, 2 * sd, left=mean - sd, height=0.6, color=colour, alpha=0.22, linewidth=0)
        axes.plot([entry["headroom_low"], entry["headroom_high"]], [row, row], color=colour, linewidth=1.4)
        axes.plot(mean, row, _MARKERS[entry["kind"]], color=colour, markersize=4.5)


def _explain_marks(kinds: set[str]) -> list[Line2D]:
    handles = [
        Line2D([], [], marker=_MARKERS[kind], color=colour, linestyle="", markersize=4.5, label=kind)
        for kind, colour in _COLOURS.items()
        if kind in kinds
    ]
    handles.append(Line2D([], [], color=style.MUTED, linewidth=1.4, label="95 % interval over conditions"))
    handles.append(Line2D([], [], color=style.FAINT, linewidth=6, label="± 1 SD over half splits"))
    return handles
