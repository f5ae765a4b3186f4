"""The metrics: pure functions over (conditions x genes) arrays, and one row per metric (`docs/science.md`, section 4).

Adding a metric is one function and one row of METRICS.

Two kinds of function:
* a *profile* function takes (prediction, truth, weights), each conditions x genes, and gives one value per condition.
  weights are 1 for all genes, a 0/1 mask of the DEGs, or the DEG weights; the centre is already subtracted.
* a *ranking* function takes (products, own): what distances between predictions and candidate truths are made of,
  both without control_mean, and the position of each condition's own truth among the candidates.
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
    error = prediction - truth
    return _weighted_mean(np.square(error, out=error), weights)


def absolute_error(prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Weighted mean over genes of |x - t|; NaN where the weights sum to 0."""
    error = prediction - truth
    return _weighted_mean(np.abs(error, out=error), weights)


def pearson(prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Weighted Pearson correlation; NaN where either side is constant over the genes of positive weight."""
    of_prediction, of_truth = _spread(prediction, weights), _spread(truth, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        product = _dot(of_prediction.deviations, of_truth.weighted)
        value = product / np.sqrt(of_prediction.squares * of_truth.squares)
    return np.where(of_prediction.constant | of_truth.constant, np.nan, np.clip(value, -1.0, 1.0))


def r2(prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Coefficient of determination with sample weights (scikit-learn's r2_score); NaN where the truth is constant."""
    of_truth = _spread(truth, weights)
    error = prediction - truth
    with np.errstate(invalid="ignore", divide="ignore"):
        value = 1.0 - _dot(error, error if weights is None else error * weights) / of_truth.squares
    return np.where(of_truth.constant, np.nan, value)


class Products(NamedTuple):
    """Sums over genes of products of predictions and candidates: all that their distances are made of.

    inner: conditions x candidates. prediction, candidates: squared lengths of each.
    """

    inner: Floats
    prediction: Floats
    candidates: Floats


def products(prediction: Floats, candidates: Floats) -> Products:
    """prediction: conditions x genes. candidates: candidates x genes."""
    return Products(prediction @ candidates.T, _dot(prediction, prediction), _dot(candidates, candidates))


def joined(some: Products, others: Products) -> Products:
    """The products over two disjoint sets of genes together."""
    return Products(*(a + b for a, b in zip(some, others, strict=True)))


def nir(of: Products, own: Ints) -> Floats:
    """Normalised inverse rank: share of the other truths that lie farther (Euclidean, strictly) than the own one.

    Distances are the same from everywhere, and cancel least from near: hence without control_mean. NaN where there is
    no other candidate, or a distance is not defined.
    """
    scale = of.prediction[:, None] + of.candidates[None, :]
    share = _share_farther(scale - 2.0 * of.inner, own, ties=0.0, scale=scale)
    return np.where(np.isnan(scale).any(axis=1), np.nan, share)


def pds(of: Products, own: Ints) -> Floats:
    """Perturbation discrimination: nir with cosine distance, ties at mid-rank.

    The caller removes the target genes of all candidates. NaN where the prediction or the own truth does not differ
    from control_mean, or where there is no other candidate.
    """
    lengths = np.sqrt(of.prediction)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = of.inner / (lengths[:, None] * np.sqrt(of.candidates)[None, :])
    share = _share_farther(1.0 - cosine, own, ties=0.5, scale=np.ones((1, 1)))
    return np.where(lengths <= CONSTANT, np.nan, share)


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


class _Spread(NamedTuple):
    """How profiles (conditions x genes) vary over genes around their weighted means."""

    deviations: Floats  # conditions x genes
    weighted: Floats  # the same times the weights
    squares: Floats  # per condition: sum of weight times squared deviation
    constant: Bools  # per condition: whether they do not vary over the genes of positive weight


def _spread(values: Floats, weights: Floats | None) -> _Spread:
    mean = _weighted_mean(values, weights)
    deviations = values - mean[:, None]
    weighted = deviations if weights is None else deviations * weights
    squares = _dot(deviations, weighted)
    total = np.float64(values.shape[1]) if weights is None else weights.sum(axis=1)
    # Far from constant, as nearly all rows are: no need to look for the least and the largest value.
    with np.errstate(invalid="ignore", over="ignore"):
        doubtful = np.flatnonzero(~(squares > 1e-16 * total * (1.0 + mean**2)))
    constant = np.zeros(len(values), dtype=bool)
    if len(doubtful):
        constant[doubtful] = _constant(values[doubtful], None if weights is None else weights[doubtful])
    return _Spread(deviations, weighted, squares, constant)


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
