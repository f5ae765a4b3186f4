"""Scores of predicted profiles against a reference: arrays in, long table out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from core.arrays import Bools, Floats, Ints, run_in_threads
from core.conditions import KEYS, genes_of
from core.errors import UserError
from core.reference.controls import CONTROLS
from core.reference.files import find_negatives
from core.scoring.metrics import FEWEST_DEGS, METRICS, Metric, add_products, sum_products
from core.stats.differential_expression import mask_degs, weigh_effects
from core.stats.moments import code_groups

# Rows scored at once: the arrays of a block fit in the cache, and results do not depend on the number of threads.
BLOCK = 16
RANKED = 256  # the same for rankings, which are products of matrices
# What a reference must have for a model to be scored against it.
SCORED_LAYERS = ("truth", "t_first", "padj_first")


class Evaluation(NamedTuple):
    """What the metrics need of the evaluated set (all test conditions), rows sorted by (covariate, condition).

    Attributes
    ----------
    keys
        covariate, condition, test_fold, n_degs.
    genes
        Their names.
    truth, control_mean, dataset_mean
        Profiles, conditions x genes, log1p.
    t, padj
        Differential expression of the first half, conditions x genes; NaN: not tested.
    """

    keys: pd.DataFrame
    genes: pd.Index
    truth: Floats
    control_mean: Floats
    dataset_mean: Floats
    t: Floats
    padj: Floats

    def with_genes(self, kept: Bools) -> Evaluation:
        """Give the same set on some of the genes.

        Parameters
        ----------
        kept
            For each gene whether it stays.

        Returns
        -------
        Evaluation
            Itself where all stay.
        """
        if kept.all():
            return self
        arrays = (a[:, kept] for a in (self.truth, self.control_mean, self.dataset_mean, self.t, self.padj))
        return Evaluation(self.keys, self.genes[kept], *arrays)


def select_evaluated(reference: ad.AnnData, negatives: ad.AnnData) -> Evaluation:
    """Select the evaluated set of a reference, or of another half split with the same rows.

    Parameters
    ----------
    reference
        With the layers of SCORED_LAYERS.
    negatives
        control_mean and dataset_mean.

    Returns
    -------
    Evaluation
        Its test conditions.
    """
    keys = reference.obs[_tested(reference)][[*KEYS, "test_fold", "n_degs"]].reset_index(drop=True)
    keys = keys.astype(dict.fromkeys(KEYS, str))
    truth, t, padj = (_tested_profiles(reference, layer) for layer in SCORED_LAYERS)
    control_mean, dataset_mean = (find_negatives(negatives, kind, keys) for kind in ("control_mean", "dataset_mean"))
    return Evaluation(keys, reference.var_names, truth, control_mean, dataset_mean, t, padj)


def _tested(reference: ad.AnnData) -> Bools:
    return np.asarray(reference.obs["test_fold"].to_numpy() >= 0)


def _tested_profiles(reference: ad.AnnData, layer: str) -> Floats:
    """Take the rows of the test conditions of a layer, float64; the layer itself where that is all."""
    values, tested = np.asarray(reference.layers[layer], dtype=np.float64), _tested(reference)
    return values if tested.all() else values[tested]


def score_controls(
    reference: ad.AnnData,
    negatives: ad.AnnData,
    half_split: ad.AnnData | None = None,
    genes: pd.Index | None = None,
    controls: Collection[str] | None = None,
) -> pd.DataFrame:
    """Score controls and baselines.

    Parameters
    ----------
    reference
        reference.h5ad.
    negatives
        negatives.h5ad.
    half_split
        Another split of the cells into halves, to score against instead of the reference's own; its duplicates take
        the place of the reference's.
    genes
        Score on these of its genes only.
    controls
        Score only these; None: all.

    Returns
    -------
    DataFrame
        Long table with `model` first, then as `score_profiles` gives it.
    """
    halves = reference if half_split is None else half_split
    evaluation = select_evaluated(halves, negatives)
    kept = np.ones(len(evaluation.genes), dtype=bool) if genes is None else evaluation.genes.isin(genes)
    evaluation = evaluation.with_genes(kept)
    tables = []
    for control in CONTROLS:
        if controls is not None and control.name not in controls:
            continue
        source = halves if control.source == "half split" else reference
        if control.source == "negatives":
            profiles = getattr(evaluation, control.name)
        elif control.name in source.layers:
            profiles = _tested_profiles(source, control.name)[:, kept]
        else:
            continue
        tables.append(score_profiles(profiles, evaluation.keys, evaluation).assign(model=control.name))
    long = pd.concat(tables, ignore_index=True)
    return long[["model", *KEYS, "fold", "metric", "value"]]


def score_profiles(
    profiles: Floats, keys: pd.DataFrame, evaluation: Evaluation, metrics: Sequence[Metric] = METRICS
) -> pd.DataFrame:
    """Score predicted profiles.

    Parameters
    ----------
    profiles
        Rows as in `keys`, columns as in evaluation.genes; log1p. A row of NaN alone is an absent prediction and gets no
        score.
    keys
        covariate, condition.
    evaluation
        What to score against.
    metrics
        By which to score.

    Returns
    -------
    DataFrame
        Long table: covariate, condition, fold, metric, value, sorted; NaN: not defined.

    Raises
    ------
    UserError
        For a condition that is not in the evaluated set, and for a row that is NaN in part.
    """
    rows = code_groups(keys[KEYS], evaluation.keys[KEYS])
    unknown = keys.loc[rows < 0, "condition"]
    if len(unknown):
        raise UserError("predictions", "condition", f"{unknown.iloc[0]!r} is not a test condition", "leave it out")
    missing = np.isnan(profiles)
    absent = missing.all(axis=1)
    if (missing.any(axis=1) & ~absent).any():
        raise UserError("predictions", "X", "rows that are NaN in part", "predict all genes of a condition, or none")
    present = np.flatnonzero(~absent)
    places = present[np.argsort(rows[present], kind="stable")]
    rows = rows[places]
    values = _score_one_by_one(profiles, places, rows, evaluation, [m for m in metrics if not m.ranking])
    values |= _score_by_rank(profiles, places, rows, evaluation, [m for m in metrics if m.ranking])
    own = evaluation.keys.iloc[rows].reset_index(drop=True)
    wide = own[KEYS].assign(fold=own["test_fold"].astype(np.int64))
    return pd.concat([wide.assign(metric=m.name, value=values[m.name]) for m in metrics], ignore_index=True)


def _score_one_by_one(
    profiles: Floats, places: Ints, rows: Ints, evaluation: Evaluation, metrics: Sequence[Metric]
) -> dict[str, Floats]:
    """Score by the metrics that compare one profile with one truth.

    places, rows: the positions of the conditions among the profiles and in the evaluated set.
    """
    values = {metric.name: np.empty(len(rows)) for metric in metrics}

    def score_block(start: int) -> None:
        at = slice(start, start + BLOCK)
        mine = rows[at]
        x, t = profiles[places[at]], evaluation.truth[mine]
        centred = {"none": (x, t)}
        for name in ("control_mean", "dataset_mean"):
            centre = getattr(evaluation, name)[mine]
            centred[name] = x - centre, t - centre
        degs = mask_degs(evaluation.padj[mine]).astype(np.float64)
        effect = weigh_effects(evaluation.t[mine])
        weights = {"all": None, "degs": degs, "effect": effect}
        undefined = {
            "all": np.zeros(len(mine), dtype=bool),
            "degs": degs.sum(axis=1) < FEWEST_DEGS,
            "effect": ~(effect > 0).any(axis=1),
        }
        for metric in metrics:
            value = metric.function(*centred[metric.centre], weights[metric.weighting])
            values[metric.name][at] = np.where(undefined[metric.weighting], np.nan, value)

    run_in_threads(score_block, range(0, len(rows), BLOCK))
    return values


def _score_by_rank(
    profiles: Floats, places: Ints, rows: Ints, evaluation: Evaluation, metrics: Sequence[Metric]
) -> dict[str, Floats]:
    """Score by rankings; candidates are the truths of the evaluated set within the covariate, over all folds."""
    values = {metric.name: np.full(len(rows), np.nan) for metric in metrics}
    covariates = evaluation.keys["covariate"].to_numpy()
    for covariate in sorted(set(covariates[rows])) if metrics else ():
        candidates = np.flatnonzero(covariates == covariate)
        mine = np.flatnonzero(covariates[rows] == covariate)
        own = np.searchsorted(candidates, rows[mine])
        for name, found in _rank_within_covariate(profiles, places[mine], own, evaluation, candidates, metrics).items():
            values[name][mine] = found
    return values


def _rank_within_covariate(
    profiles: Floats, places: Ints, own: Ints, evaluation: Evaluation, candidates: Ints, metrics: Sequence[Metric]
) -> dict[str, Floats]:
    """Rank the profiles at `places` among the truths `candidates`, all of one covariate."""
    # The control mean is the same in all rows of a covariate; dataset means differ between folds and cannot centre a
    # ranking over all folds.
    centre = evaluation.control_mean[candidates[0]]
    is_target = evaluation.genes.isin(
        {gene for c in evaluation.keys["condition"].iloc[candidates] for gene in genes_of(c)}
    )
    parts = np.flatnonzero(~is_target), np.flatnonzero(is_target)
    truths = tuple(np.empty((len(candidates), len(part))) for part in parts)
    values = {metric.name: np.empty(len(places)) for metric in metrics}

    def subtract_centre(array: Floats, rows: Ints) -> tuple[Floats, Floats]:
        whole = array[rows] - centre
        return whole[:, parts[0]], whole[:, parts[1]]

    def fill_truths(start: int) -> None:
        at = slice(start, start + BLOCK)
        for truth, values in zip(truths, subtract_centre(evaluation.truth, candidates[at]), strict=True):
            truth[at] = values

    def rank(start: int) -> None:
        at = slice(start, start + RANKED)
        without, targets = map(sum_products, subtract_centre(profiles, places[at]), truths)
        everything = add_products(without, targets)
        for metric in metrics:
            values[metric.name][at] = metric.function(without if metric.without_targets else everything, own[at])

    run_in_threads(fill_truths, range(0, len(candidates), BLOCK))
    run_in_threads(rank, range(0, len(places), RANKED))
    return values
