"""The metrics: pure functions over (conditions x genes) arrays, and one row per metric (`docs/science.md`, section 4).

Adding a metric is one function and one row of METRICS.

There are two kinds of function:

* a *profile* function takes (prediction, truth, weights), each conditions x genes, and gives one value per condition.
  The centre is already subtracted. weights are the DEG weights, or a 0/1 mask of the DEGs; None is 1 for all genes.
* a *ranking* function takes (products, own): the sums that distances between predictions and candidate truths are
  made of, both without control_mean, and the position of each condition's own truth among the candidates.

A value that is not defined is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from core.arrays import Bools, Floats, Ints

# Means of log1p values in float64 carry rounding errors of about 1e-15: a smaller variation than this is none.
CONSTANT = 1e-12
FEWEST_DEGS = 3

Centre = Literal["none", "control_mean", "dataset_mean"]
Weighting = Literal["all", "degs", "effect"]

_WEIGHTING_WORDS: dict[Weighting, str] = {"all": "", "degs": " over the DEGs", "effect": " with weights w"}


class Metric(NamedTuple):
    """One metric: how its inputs are centred and weighted, which way is better, and its negative control.

    Attributes
    ----------
    name
        What tables call it.
    function
        A profile function, or a ranking function where `ranking` is true.
    formula
        What the function computes, in words and signs, without the weighting.
    centre
        The profile that is subtracted from prediction and truth.
    weighting
        Which genes count: all alike, the DEGs only, or each by its DEG weight.
    higher_is_better
        Whether a larger value means a better prediction.
    perfect
        The value of a prediction that equals the truth.
    negative_control
        The control that a prediction has to beat.
    ranking
        Whether `function` ranks the condition's own truth among the truths of all conditions.
    without_targets
        Whether the target genes of all candidates are left out.
    """

    name: str
    function: Callable[..., Floats]
    formula: str
    centre: Centre
    weighting: Weighting = "all"
    higher_is_better: bool = True
    perfect: float = 1.0
    negative_control: Literal["dataset_mean", "control_mean"] = "dataset_mean"
    ranking: bool = False
    without_targets: bool = False

    @property
    def definition(self) -> str:
        """The formula and the genes that count, as the report shows them."""
        return self.formula + _WEIGHTING_WORDS[self.weighting]


def average_error(measure: Callable[..., Floats], prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Weighted mean over genes of a measure of x - t.

    Parameters
    ----------
    measure
        A function of numpy: the square, or the absolute value.
    prediction, truth
        Profiles, conditions x genes.
    weights
        Of the genes, conditions x genes; None: all alike.

    Returns
    -------
    Floats
        One value per condition; NaN where the weights sum to 0.
    """
    error = prediction - truth
    return _weighted_mean(measure(error, out=error), weights)


squared_error = partial(average_error, np.square)
absolute_error = partial(average_error, np.abs)


def pearson(prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Weighted Pearson correlation over genes.

    Parameters
    ----------
    prediction, truth
        Profiles without their centre, conditions x genes.
    weights
        Of the genes, conditions x genes; None: all alike.

    Returns
    -------
    Floats
        One value per condition, between -1 and 1; NaN where prediction or truth is constant over the genes of
        positive weight.
    """
    of_prediction, of_truth = _measure_spread(prediction, weights), _measure_spread(truth, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        product = _dot(of_prediction.deviations, of_truth.weighted)
        value = product / np.sqrt(of_prediction.squares * of_truth.squares)
    return np.where(of_prediction.constant | of_truth.constant, np.nan, np.clip(value, -1.0, 1.0))


def r2(prediction: Floats, truth: Floats, weights: Floats | None) -> Floats:
    """Coefficient of determination with sample weights (scikit-learn's r2_score).

    Parameters
    ----------
    prediction, truth
        Profiles without their centre, conditions x genes.
    weights
        Of the genes, conditions x genes; None: all alike.

    Returns
    -------
    Floats
        One value per condition, at most 1; NaN where the truth is constant over the genes of positive weight.
    """
    of_truth = _measure_spread(truth, weights)
    error = prediction - truth
    with np.errstate(invalid="ignore", divide="ignore"):
        value = 1.0 - _dot(error, error if weights is None else error * weights) / of_truth.squares
    return np.where(of_truth.constant, np.nan, value)


class Products(NamedTuple):
    """Sums over genes of products of predictions and candidates: all that their distances are made of.

    Attributes
    ----------
    inner
        Of each prediction with each candidate, conditions x candidates.
    prediction, candidates
        Of each prediction and of each candidate with itself: their squared lengths.
    """

    inner: Floats
    prediction: Floats
    candidates: Floats


def sum_products(prediction: Floats, candidates: Floats) -> Products:
    """Sum the products of predictions and candidates over genes.

    Parameters
    ----------
    prediction
        Conditions x genes.
    candidates
        Candidates x genes.

    Returns
    -------
    Products
        The sums over these genes.
    """
    return Products(prediction @ candidates.T, _dot(prediction, prediction), _dot(candidates, candidates))


def add_products(some: Products, others: Products) -> Products:
    """Add the products over two sets of genes that share none.

    Parameters
    ----------
    some, others
        Sums over one set of genes each.

    Returns
    -------
    Products
        The sums over both sets.
    """
    return Products(*(a + b for a, b in zip(some, others, strict=True)))


def nir(of: Products, own: Ints) -> Floats:
    """Normalised inverse rank: share of the other truths that lie farther (Euclidean, strictly) than the own one.

    Distances are the same wherever the origin is, and lose the fewest digits with it nearby: hence without
    control_mean.

    Parameters
    ----------
    of
        Sums over genes of predictions and candidates.
    own
        For each prediction the position of its own truth among the candidates.

    Returns
    -------
    Floats
        One value per prediction, between 0 and 1; NaN where there is no other candidate, or a distance is not defined.
    """
    scale = of.prediction[:, None] + of.candidates[None, :]
    share = _share_farther(scale - 2.0 * of.inner, own, ties=0.0, scale=scale)
    return np.where(np.isnan(scale).any(axis=1), np.nan, share)


def pds(of: Products, own: Ints) -> Floats:
    """Perturbation discrimination score: nir with cosine distance, ties at mid-rank.

    Parameters
    ----------
    of
        Sums over genes of predictions and candidates, without the target genes of all candidates.
    own
        For each prediction the position of its own truth among the candidates.

    Returns
    -------
    Floats
        One value per prediction, between 0 and 1; NaN where the prediction or its own truth does not differ from
        control_mean, or where there is no other candidate.
    """
    lengths = np.sqrt(of.prediction)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = of.inner / (lengths[:, None] * np.sqrt(of.candidates)[None, :])
    share = _share_farther(1.0 - cosine, own, ties=0.5, scale=np.ones((1, 1)))
    return np.where(lengths <= CONSTANT, np.nan, share)


def _share_farther(distance: Floats, own: Ints, ties: float, scale: Floats) -> Floats:
    """Share of the others that lie farther than the own one, plus `ties` for each that lies as far.

    scale: size of the numbers that the distances are differences of. A difference within the rounding error of these
    is a tie: such bits change with the place in the matrix. NaN where the own distance is NaN.
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
    constant: Bools  # per condition: whether it does not vary over the genes of positive weight


def _measure_spread(values: Floats, weights: Floats | None) -> _Spread:
    mean = _weighted_mean(values, weights)
    deviations = values - mean[:, None]
    weighted = deviations if weights is None else deviations * weights
    squares = _dot(deviations, weighted)
    total = np.float64(values.shape[1]) if weights is None else weights.sum(axis=1)
    # Nearly all rows are far from constant: only the others need a look at their least and their largest value.
    with np.errstate(invalid="ignore", over="ignore"):
        doubtful = np.flatnonzero(~(squares > 1e-16 * total * (1.0 + mean**2)))
    constant = np.zeros(len(values), dtype=bool)
    if len(doubtful):
        constant[doubtful] = _is_constant(values[doubtful], None if weights is None else weights[doubtful])
    return _Spread(deviations, weighted, squares, constant)


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("ij,ij->i", a, b))


def _weighted_mean(values: Floats, weights: Floats | None) -> Floats:
    if weights is None:
        return np.asarray(values.mean(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(_dot(values, weights) / weights.sum(axis=1))


def _is_constant(values: Floats, weights: Floats | None) -> Bools:
    """For each row whether it does not vary over the genes of positive weight; true where no gene has any."""
    if weights is None:
        return np.asarray(np.ptp(values, axis=1) <= CONSTANT)
    used = weights > 0
    low = np.where(used, values, np.inf).min(axis=1)
    high = np.where(used, values, -np.inf).max(axis=1)
    return np.asarray(high - low <= CONSTANT)


# What metrics have in common: x is the prediction, t the truth, c control_mean, m dataset_mean.
_ERROR: dict[str, Any] = {"centre": "none", "higher_is_better": False, "perfect": 0.0}
_TO_CONTROL: dict[str, Any] = {"centre": "control_mean"}
_TO_DATASET: dict[str, Any] = {"centre": "dataset_mean", "negative_control": "control_mean"}
_SQUARED = _ERROR | {"function": squared_error, "formula": "mean over genes of (x - t)²"}
_ABSOLUTE = _ERROR | {"function": absolute_error, "formula": "mean over genes of |x - t|"}
_PEARSON_CTRL = _TO_CONTROL | {"function": pearson, "formula": "Pearson(x - c, t - c)"}
_PEARSON_PERT = _TO_DATASET | {"function": pearson, "formula": "Pearson(x - m, t - m)"}
_R2_CTRL = _TO_CONTROL | {"function": r2, "formula": "R²(t - c, x - c)"}
_R2_PERT = _TO_DATASET | {"function": r2, "formula": "R²(t - m, x - m)"}
_FARTHER = "share of the other truths farther from x than t ({})"
_NIR: dict[str, Any] = {"function": nir, "centre": "none", "formula": _FARTHER.format("Euclidean")}
_PDS = _TO_CONTROL | {"function": pds, "formula": _FARTHER.format("cosine of x - c, without target genes")}

METRICS = (
    Metric(name="mse", **_SQUARED),
    Metric(name="wmse", **_SQUARED, weighting="effect"),
    Metric(name="pearson_deltactrl", **_PEARSON_CTRL),
    Metric(name="pearson_deltactrl_degs", **_PEARSON_CTRL, weighting="degs"),
    Metric(name="r2_deltactrl", **_R2_CTRL),
    Metric(name="r2_deltactrl_degs", **_R2_CTRL, weighting="degs"),
    Metric(name="weighted_r2_deltactrl", **_R2_CTRL, weighting="effect"),
    Metric(name="pearson_deltapert", **_PEARSON_PERT),
    Metric(name="pearson_deltapert_degs", **_PEARSON_PERT, weighting="degs"),
    Metric(name="r2_deltapert", **_R2_PERT),
    Metric(name="r2_deltapert_degs", **_R2_PERT, weighting="degs"),
    Metric(name="weighted_r2_deltapert", **_R2_PERT, weighting="effect"),
    Metric(name="nir", **_NIR, ranking=True),
    Metric(name="weighted_pearson_deltactrl", **_PEARSON_CTRL, weighting="effect"),
    Metric(name="weighted_pearson_deltapert", **_PEARSON_PERT, weighting="effect"),
    Metric(name="mae", **_ABSOLUTE),
    Metric(name="pds", **_PDS, ranking=True, without_targets=True),
)

BY_NAME = {metric.name: metric for metric in METRICS}
