"""reference.h5ad and negatives.h5ad: all that scoring and calibration need, so that nothing reads cells again."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from core.arrays import Floats, Ints, run_in_threads
from core.conditions import genes_of, row_names
from core.io.h5ad import require_space
from core.prepare.splits import draw_halves
from core.reference.cell_sums import CellSums, list_reference_keys, sum_cells
from core.reference.control_profiles import interpolate_duplicate, predict_additive
from core.reference.files import HALF_SPLITS, NEGATIVES, REFERENCE, find_negatives
from core.reference.linear_baseline import predict_linear
from core.stats.differential_expression import compare_with_rest, mask_degs
from core.stats.moments import Moments


def write_reference(cells: ad.AnnData, seed: int, half_seeds: int, folder: Path) -> None:
    """Write reference.h5ad, negatives.h5ad and half_splits/seed_<s>.h5ad of the further half splits into `folder`.

    Parameters
    ----------
    cells : ad.AnnData
        In memory or on disk; they are passed over once.
    seed : int
        Of the cells' own halves and of sparse_mean; the further splits have seed + 1, seed + 2, ...
    half_seeds : int
        Number of half splits.
    folder : Path
        Where the files lie, or go.
    """
    halves = {seed: cells.obs["half"]}
    halves |= {further: draw_halves(cells.obs, further) for further in range(seed + 1, seed + half_seeds)}
    keys, _ = list_reference_keys(cells.obs)
    n = len(keys), cells.n_vars
    # Sums of four kinds for each half split, and the layers.
    needed = 8 * n[0] * n[1] * (4 * half_seeds + 11 + 7 * (half_seeds - 1))
    require_space(folder, needed, f"the sums and profiles of {n[0]:,} conditions x {n[1]:,} genes")
    with TemporaryDirectory(dir=folder) as scratch, h5py.File(Path(scratch) / "moments.h5", "w") as file:
        sums = sum_cells(cells, halves, seed, lambda shape: file.create_dataset(None, shape, np.float64))
        negatives = build_negatives(sums)
        negatives.write_h5ad(folder / NEGATIVES)
        build_reference(sums, negatives, seed).write_h5ad(folder / REFERENCE)
        (folder / HALF_SPLITS).mkdir()
        for further in list(halves)[1:]:
            split = build_half_split(sums, further, negatives)
            split.write_h5ad(folder / HALF_SPLITS / f"seed_{further}.h5ad")


def build_negatives(sums: CellSums) -> ad.AnnData:
    """negatives.h5ad: per covariate control_mean (fold -1) and each fold's dataset_mean (rows x genes, log1p).

    dataset_mean is the mean over the fold's training perturbations of their mean profiles: every perturbation weighs
    the same, control does not take part.

    Parameters
    ----------
    sums : CellSums
        Of `sum_cells`.

    Returns
    -------
    ad.AnnData
    """
    rows, profiles = [], []
    for covariate in sorted(sums.control):
        rows.append((covariate, "control_mean", -1))
        profiles.append(sums.control[covariate])
        for fold, column in enumerate(sums.splits):
            rows.append((covariate, "dataset_mean", fold))
            profiles.append(sums.mean[_trained(sums, covariate, column)].mean(axis=0))
    return frame_negatives(rows, np.vstack(profiles), sums.genes)


def frame_negatives(rows: list[tuple[str, str, int]], profiles: Floats, genes: pd.Index) -> ad.AnnData:
    """Return negatives.h5ad.

    Parameters
    ----------
    rows : list[tuple[str, str, int]]
        Covariate, kind and fold of each profile.
    profiles : Floats
        Rows x genes, log1p.
    genes : pd.Index
        Names of the columns.

    Returns
    -------
    ad.AnnData
    """
    obs = pd.DataFrame(rows, columns=["covariate", "kind", "fold"])
    obs.index = pd.Index(obs["covariate"] + "|" + obs["kind"] + "|" + obs["fold"].astype(str))
    return ad.AnnData(X=profiles, obs=obs, var=pd.DataFrame(index=genes))


def _trained(sums: CellSums, covariate: str, column: str) -> Ints:
    """Return the rows of the covariate's perturbed conditions that train in a fold."""
    in_training = (sums.keys["covariate"] == covariate) & (sums.splits[column] == "train")
    return np.flatnonzero(in_training)


def build_half_split(sums: CellSums, seed: int, negatives: ad.AnnData) -> ad.AnnData:
    """Return what depends on the halves of one seed: truth, duplicates and differential expression of each half.

    Parameters
    ----------
    sums : CellSums
        Of `sum_cells`.
    seed : int
        Seed of the draws.
    negatives : ad.AnnData
        From negatives.h5ad.

    Returns
    -------
    ad.AnnData
        (covariate, condition) x genes with the layers truth, technical_duplicate, interpolated_duplicate, and t and
        padj of each half, float64; interpolated_duplicate is NaN for conditions that are never test.
    """
    first, second = sums.halves[seed]()
    t_first, padj_first = _differential(first, sums.keys)
    t_second, padj_second = _differential(second, sums.keys)
    truth, duplicate = first.mean(), second.mean()
    obs = sums.keys.assign(n_first=first.n, n_second=second.n, n_degs=mask_degs(padj_first).sum(axis=1))
    del first, second
    dataset_mean = find_negatives(negatives, "dataset_mean", sums.keys)
    layers = {
        "truth": truth,
        "technical_duplicate": duplicate,
        "interpolated_duplicate": interpolate_duplicate(duplicate, dataset_mean, padj_second),
        "t_first": t_first,
        "padj_first": padj_first,
        "t_second": t_second,
        "padj_second": padj_second,
    }
    return frame_by_condition(obs, layers, sums.genes)


def build_reference(sums: CellSums, negatives: ad.AnnData, seed: int) -> ad.AnnData:
    """reference.h5ad of the halves of `seed`: the layers of its half split and mean, sparse_mean, additive, linear.

    Rows without a value in a layer (conditions never test; combinations with an unknown single; genes not measured) are
    NaN.

    Parameters
    ----------
    sums : CellSums
        Of `sum_cells`.
    negatives : ad.AnnData
        From negatives.h5ad.
    seed : int
        Seed of the draws.

    Returns
    -------
    ad.AnnData
    """
    reference = build_half_split(sums, seed, negatives)
    keys = sums.keys
    layers = {name: np.full(sums.mean.shape, np.nan) for name in ("additive", "linear")}

    def add_baselines(part: tuple[str, int]) -> None:
        covariate, fold = part
        rows = np.flatnonzero((keys["covariate"] == covariate) & (keys["test_fold"] == fold))
        if len(rows):
            for name, values in _fold_baselines(sums, covariate, fold, rows).items():
                layers[name][rows] = values

    run_in_threads(add_baselines, product(sorted(sums.control), range(sums.splits.shape[1])))
    reference.layers["mean"] = sums.mean
    reference.layers["sparse_mean"] = sums.sparse_mean
    for name, values in layers.items():
        reference.layers[name] = values
    return reference


def _fold_baselines(sums: CellSums, covariate: str, fold: int, rows: Ints) -> dict[str, Floats]:
    """Compute additive and linear of the conditions `rows`, tested in one fold of one covariate."""
    conditions = sums.keys["condition"].to_numpy()
    singles = [
        row for row in _trained(sums, covariate, sums.splits.columns[fold]) if len(genes_of(conditions[row])) == 1
    ]
    tests = [conditions[row] for row in rows]
    # Without a combination to test there is no training control, and additive has no value.
    control = sums.training_control.get((covariate, fold), np.full(len(sums.genes), np.nan))
    return {
        "additive": predict_additive(tests, {conditions[row]: sums.mean[row] for row in singles}, control),
        "linear": predict_linear([conditions[row] for row in singles], sums.mean[singles], sums.genes, tests),
    }


def _differential(moments: Moments, keys: pd.DataFrame) -> tuple[Floats, Floats]:
    t, padj = np.empty(moments.total.shape), np.empty(moments.total.shape)
    for covariate in keys["covariate"].unique():
        rows = np.flatnonzero(keys["covariate"] == covariate)
        t[rows], padj[rows] = compare_with_rest(moments.of(rows))
    return t, padj


def frame_by_condition(keys: pd.DataFrame, layers: dict[str, Floats], genes: pd.Index) -> ad.AnnData:
    """Return (covariate, condition) x genes with `keys` as obs, named `covariate|condition`.

    Parameters
    ----------
    keys : pd.DataFrame
        The table of conditions: covariate, condition and more.
    layers : dict[str, Floats]
        Name -> conditions x genes, in the order of `keys`.
    genes : pd.Index
        Names of the columns.

    Returns
    -------
    ad.AnnData
    """
    obs = keys.copy()
    obs.index = row_names(obs["covariate"], obs["condition"])
    return ad.AnnData(obs=obs, var=pd.DataFrame(index=genes), layers=layers)
