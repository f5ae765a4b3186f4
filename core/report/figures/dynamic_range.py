"""Figure: how far each metric's dynamic range reaches between its negative and its positive control."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.report.figures import style
from core.report.tables import tabulate_verdicts
from core.report.text import format_share
from core.scoring.calibration import FEWEST_CONDITIONS, THRESHOLD

_WORDS = {"none": f"no verdict (fewer than {FEWEST_CONDITIONS} conditions)"}


@style.apply_look()
def draw_dynamic_range(calibration: pd.DataFrame) -> Figure:
    """Draw the mean DRF (left) and BDS (right) of every metric, highest DRF first.

    Line: 95 % bootstrap interval over conditions; pale bar: mean plus and minus one standard deviation over half
    splits. A metric whose DRF is NaN is at the bottom with a dash.

    Parameters
    ----------
    calibration
        As `core.scoring.calibration.build_calibration` gives it; the rows of `drf_interpolated` are drawn.

    Returns
    -------
    Figure
        One row per metric.
    """
    table = tabulate_verdicts(calibration)
    table = table.sort_values("drf", ascending=False, na_position="last", kind="stable")
    figure = Figure(figsize=(9.2, 1.5 + 0.27 * len(table)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2.1, 1])
    _draw_panel(left, table, "drf")
    _draw_panel(right, table, "bds")

    left.set_yticks(range(len(table)), list(table["metric"]))
    left.set_ylim(len(table) - 0.4, -0.6)
    lowest = np.nanmin([0.0, *table["drf_low"], *(table["drf"] - table["drf_half_sd"])])
    left.set_xlim(max(-1.02, min(-0.03, 1.05 * lowest)), 1.02)
    left.axvline(0, color=style.INK, linewidth=0.7)
    left.axvline(THRESHOLD, color=style.INK, linewidth=0.9, linestyle=(0, (3, 2)))
    left.set_xlabel("mean Dynamic Range Fraction (0 = negative control, 1 = perfect)")
    left.annotate(
        f"{THRESHOLD:g}", (THRESHOLD, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="center", va="bottom", fontsize=8,
    )  # fmt: skip
    right.axvline(0.5, color=style.INK, linewidth=0.9, linestyle=(0, (3, 2)))
    right.set_xlim(-0.02, 1.02)
    right.set_xlabel("Bound Discrimination Score\n(share of conditions; 0.5 = chance)")
    for axes in (left, right):
        style.hide_spine(axes)
        style.draw_grid(axes, "x")
        style.use_plain_ticks(axes.xaxis)
    for row, (n, nan_share) in enumerate(zip(table["n_conditions"], table["nan_share"], strict=True)):
        missing = f", {format_share(nan_share)} NaN" if nan_share > 0 else ""
        right.annotate(
            f"n = {n:,.0f}{missing}", (1.03, row), xycoords=("axes fraction", "data"), va="center", fontsize=7.5,
            color=style.MUTED, annotation_clip=False,
        )  # fmt: skip
    figure.legend(handles=_explain_marks(list(table["verdict"])), loc="outside upper left", ncols=3, columnspacing=1.6)
    return figure


def _draw_panel(axes: Axes, table: pd.DataFrame, value: str) -> None:
    """Points, intervals and half-split bars of one quantity (`drf` or `bds`), one row per metric."""
    for row, entry in enumerate(table.to_dict("records")):
        colour = style.VERDICT_COLOURS[entry["verdict"]]
        mean, low, high, sd = (entry[f"{value}{suffix}"] for suffix in ("", "_low", "_high", "_half_sd"))
        if np.isnan(mean):
            axes.text(0.005, row, "–", va="center", color=style.MUTED)
            continue
        axes.barh(row, 2 * sd, left=mean - sd, height=0.62, color=colour, alpha=0.22, linewidth=0)
        axes.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(mean, row, style.VERDICT_MARKERS[entry["verdict"]], color=colour, markersize=5.5, clip_on=False)


def _explain_marks(present: list[str]) -> list[Line2D]:
    """Explain colours, lines and bars; verdicts in their fixed order, only those present."""
    marker = style.VERDICT_MARKERS
    handles = [
        Line2D([], [], color=colour, marker=marker[name], linestyle="", markersize=5.5, label=_WORDS.get(name, name))
        for name, colour in style.VERDICT_COLOURS.items()
        if name in present
    ]
    handles.append(Line2D([], [], color=style.MUTED, linewidth=1.6, label="95 % interval over conditions"))
    handles.append(Line2D([], [], color=style.FAINT, linewidth=7, label="± 1 SD over half splits"))
    return handles
