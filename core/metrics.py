"""The metrics: pure functions over (conditions x genes) arrays, and one row per metric (`docs/science.md`, section 4).

Adding a metric is one function and one row of METRICS.

Two kinds of function:
* a *profile* function takes (prediction, truth, weights), each conditions x genes, and gives one value per condition.
  weights are 1 for all genes, a 0/1 mask of the DEGs, or the DEG weights; the centre is already subtracted.
* a *ranking* function takes (prediction, candidates, own): conditions x genes, candidates x genes, and the position of
  each condition's own truth among the candidates.
A value that is not defined is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from core.arrays import Bools, Floats, Ints

# Means of log1p values in float64 carry rounding of about 1e-15: what varies less than this is constant.
CONSTANT = 1e-12
FEWEST_DEGS = 3

Centre = Literal["none", "control_mean", "dataset_mean"]
Weighting = Literal["all", "degs", "effect"]


class Metric(NamedTuple):
    """One metric: how its inputs are centred and weighted, which way is better, and its negative control."""

    name: str
    function: Callable[..., Floats]
    centre: Centre
    weighting: Weighting
    higher_is_better: bool
    perfect: float
    negative_control: Literal["dataset_mean", "control_mean"]
    formula: str
    ranking: bool = False
    without_targets: bool = False  # the target genes of all candidates are left out


def squared_error(prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Weighted mean over genes of (x - t)^2; NaN where the weights sum to 0."""
    return _weighted_mean((prediction - truth) ** 2, weights)


def absolute_error(prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Weighted mean over genes of |x - t|; NaN where the weights sum to 0."""
    return _weighted_mean(np.abs(prediction - truth), weights)


def pearson(prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Weighted Pearson correlation; NaN where either side is constant over the genes of positive weight."""
    x = prediction - _weighted_mean(prediction, weights)[:, None]
    t = truth - _weighted_mean(truth, weights)[:, None]
    wt = t if weights is None else t * weights
    wx = x if weights is None else x * weights
    with np.errstate(invalid="ignore", divide="ignore"):
        value = _dot(x, wt) / np.sqrt(_dot(x, wx) * _dot(t, wt))
    undefined = _constant(prediction, weights) | _constant(truth, weights)
    return np.where(undefined, np.nan, np.clip(value, -1.0, 1.0))


def r2(prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Coefficient of determination with sample weights (scikit-learn's r2_score); NaN where the truth is constant."""
    t = truth - _weighted_mean(truth, weights)[:, None]
    error = prediction - truth
    with np.errstate(invalid="ignore", divide="ignore"):
        if weights is None:
            value = 1.0 - _dot(error, error) / _dot(t, t)
        else:
            value = 1.0 - _dot(error, error * weights) / _dot(t, t * weights)
    return np.where(_constant(truth, weights), np.nan, value)


def nir(prediction: Floats, candidates: Floats, own: Ints) -> Floats:
    """Normalised inverse rank: share of the other truths that lie farther (Euclidean, strictly) than the own one.

    NaN where there is no other candidate.
    """
    # Distances from a common centre: the expansion below then cancels little.
    origin = candidates.mean(axis=0)
    x, t = prediction - origin, candidates - origin
    x_squared, t_squared = _dot(x, x)[:, None], _dot(t, t)[None, :]
    distance = x_squared + t_squared - 2.0 * (x @ t.T)
    return _share_farther(distance, own, ties=0.0, scale=x_squared + t_squared)


def pds(prediction: Floats, candidates: Floats, own: Ints) -> Floats:
    """Perturbation discrimination: nir with cosine distance, ties at mid-rank.

    The caller subtracts control_mean and removes the target genes of all candidates. NaN where the prediction or the
    own truth does not differ from control_mean, or where there is no other candidate.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        x = prediction / np.sqrt(_dot(prediction, prediction))[:, None]
        t = candidates / np.sqrt(_dot(candidates, candidates))[:, None]
    share = _share_farther(1.0 - x @ t.T, own, ties=0.5, scale=np.ones((1, 1)))
    return np.where(np.abs(prediction).max(axis=1, initial=0.0) <= CONSTANT, np.nan, share)


def _share_farther(distance: Floats, own: Ints, ties: float, scale: Floats) -> Floats:
    """Share of the others that lie farther than the own one, plus `ties` for each that lies as far.

    scale: size of the numbers that the distances are differences of. What differs by less than rounding of these is
    a tie: such bits change with the place in the matrix. NaN where the own distance is.
    """
    mine = distance[np.arange(len(own)), own][:, None]
    others = distance.shape[1] - 1
    if others == 0:
        return np.full(len(own), np.nan)
    margin, rounding = distance - mine, CONSTANT * scale
    farther = (margin > rounding).sum(axis=1) + ties * ((np.abs(margin) <= rounding).sum(axis=1) - 1)
    return np.where(np.isnan(mine[:, 0]), np.nan, farther / others)


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("ij,ij->i", a, b))


def _weighted_mean(values: Floats, weights: Floats | None) -> Floats:
    if weights is None:
        return np.asarray(values.mean(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(_dot(values, weights) / weights.sum(axis=1))


def _constant(values: Floats, weights: Floats | None) -> Bools:
    """Rows that do not vary over the genes of positive weight; rows without such genes count as constant."""
    if weights is None:
        return np.asarray(np.ptp(values, axis=1) <= CONSTANT)
    used = weights > 0
    low = np.where(used, values, np.inf).min(axis=1)
    high = np.where(used, values, -np.inf).max(axis=1)
    return np.asarray(high - low <= CONSTANT)


METRICS = (
    Metric("mse", squared_error, "none", "all", False, 0.0, "dataset_mean", "mean over genes of (x - t)²"),
    Metric("wmse", squared_error, "none", "effect", False, 0.0, "dataset_mean", "Σ w (x - t)² / Σ w"),
    Metric(
        "pearson_deltactrl",
        pearson,
        "control_mean",
        "all",
        True,
        1.0,
        "dataset_mean",
        "Pearson(x - c, t - c)",
    ),
    Metric(
        "pearson_deltactrl_degs",
        pearson,
        "control_mean",
        "degs",
        True,
        1.0,
        "dataset_mean",
        "Pearson(x - c, t - c) over the DEGs",
    ),
    Metric("r2_deltactrl", r2, "control_mean", "all", True, 1.0, "dataset_mean", "R²(t - c, x - c)"),
    Metric(
        "r2_deltactrl_degs",
        r2,
        "control_mean",
        "degs",
        True,
        1.0,
        "dataset_mean",
        "R²(t - c, x - c) over the DEGs",
    ),
    Metric(
        "weighted_r2_deltactrl",
        r2,
        "control_mean",
        "effect",
        True,
        1.0,
        "dataset_mean",
        "R²(t - c, x - c) with weights w",
    ),
    Metric(
        "pearson_deltapert",
        pearson,
        "dataset_mean",
        "all",
        True,
        1.0,
        "control_mean",
        "Pearson(x - m, t - m)",
    ),
    Metric(
        "pearson_deltapert_degs",
        pearson,
        "dataset_mean",
        "degs",
        True,
        1.0,
        "control_mean",
        "Pearson(x - m, t - m) over the DEGs",
    ),
    Metric("r2_deltapert", r2, "dataset_mean", "all", True, 1.0, "control_mean", "R²(t - m, x - m)"),
    Metric(
        "r2_deltapert_degs",
        r2,
        "dataset_mean",
        "degs",
        True,
        1.0,
        "control_mean",
        "R²(t - m, x - m) over the DEGs",
    ),
    Metric(
        "weighted_r2_deltapert",
        r2,
        "dataset_mean",
        "effect",
        True,
        1.0,
        "control_mean",
        "R²(t - m, x - m) with weights w",
    ),
    Metric(
        "nir",
        nir,
        "none",
        "all",
        True,
        1.0,
        "dataset_mean",
        "share of the other truths farther from x than t (Euclidean)",
        ranking=True,
    ),
    Metric(
        "weighted_pearson_deltactrl",
        pearson,
        "control_mean",
        "effect",
        True,
        1.0,
        "dataset_mean",
        "Pearson(x - c, t - c) with weights w",
    ),
    Metric(
        "weighted_pearson_deltapert",
        pearson,
        "dataset_mean",
        "effect",
        True,
        1.0,
        "control_mean",
        "Pearson(x - m, t - m) with weights w",
    ),
    Metric("mae", absolute_error, "none", "all", False, 0.0, "dataset_mean", "mean over genes of |x - t|"),
    Metric(
        "pds",
        pds,
        "control_mean",
        "all",
        True,
        1.0,
        "dataset_mean",
        "share of the other truths farther from x than t (cosine of x - c, without target genes)",
        ranking=True,
        without_targets=True,
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}
