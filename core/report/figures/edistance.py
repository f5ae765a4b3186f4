"""Figure: pairwise E-distances between the conditions of one covariate."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from core.report.figures import style

_MOST_LABELS = 100


@style.apply_look()
def draw_edistance(matrix: pd.DataFrame) -> Figure:
    """Draw a heat map of one covariate's E-distances, conditions ordered by average-linkage clustering.

    NaN cells are drawn grey. More than 100 conditions are not named, except control.

    Parameters
    ----------
    matrix
        Square, index and columns the conditions including `control`; squared distances in principal components
        (docs/science.md, section 5).

    Returns
    -------
    Figure
        The heat map with its colour bar.
    """
    order = order_conditions(matrix)
    ordered = matrix.loc[order, order]
    n = len(ordered)
    named = n <= _MOST_LABELS
    side = 2.6 + 0.115 * n if named else 7.4
    side = min(11.4, max(4.6, side))
    figure = Figure(figsize=(side, side * 0.92))
    axes = figure.subplots()
    values = np.clip(ordered.to_numpy(float), 0, None)
    # A few strong perturbations are much farther than the rest: the square root keeps both visible.
    # Beyond the 99th percentile all are equally yellow, because one outlier would darken the rest.
    top = float(np.nanquantile(values, 0.99)) if n > 10 else float(np.nanmax(values))
    norm = PowerNorm(0.5, vmin=0, vmax=top or 1.0)
    colours = colormaps["cividis"].with_extremes(bad=style.FAINT)
    image = axes.imshow(values, cmap=colours, norm=norm, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_visible(False)
    labels = list(ordered.index)
    positions = [i for i in range(n) if named or labels[i] == "control"]
    size = float(np.clip(46 * side / n, 4.6, 8)) if named else 8
    axes.set_yticks(positions, [labels[i] for i in positions], fontsize=size)
    axes.set_xticks(positions, [labels[i] for i in positions], fontsize=size, rotation=90)
    axes.tick_params(length=0 if named else 3)
    for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        if tick.get_text() == "control":
            tick.set_fontweight("bold")
    if not named:
        axes.set_xlabel(f"{n:,} conditions, clustered")
    extend = "max" if np.nanmax(values) > norm.vmax else "neither"
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, aspect=28, extend=extend)
    bar.outline.set_visible(False)
    bar.set_label("E-distance (square-root colour scale)", fontsize=8)
    style.use_plain_ticks(bar.ax.yaxis)
    return figure


def order_conditions(matrix: pd.DataFrame) -> list[str]:
    """Order conditions as in their average-linkage dendrogram, leaves ordered optimally up to 400 conditions.

    Parameters
    ----------
    matrix
        Square table of distances. Estimates below 0 count as 0; NaN counts as the largest distance, so that such a
        condition goes to an edge.

    Returns
    -------
    list of str
        The names of its rows.
    """
    names = sorted(matrix.index)
    if len(names) < 3:
        return names
    square = np.clip(matrix.loc[names, names].to_numpy(float), 0, None)
    square = np.nan_to_num((square + square.T) / 2, nan=float(np.nanmax(square, initial=0.0)))
    np.fill_diagonal(square, 0)
    tree = linkage(squareform(square), "average", optimal_ordering=len(names) <= 400)
    return [names[leaf] for leaf in leaves_list(tree)]
