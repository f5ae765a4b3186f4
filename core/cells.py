"""From harmonised counts to cells.h5ad (`docs/science.md`, section 1, steps 2 to 7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Bools
from core.catalog.schema import DatasetSpec
from core.draws import generator
from core.errors import UserError, shown
from core.files import open_h5ad
from core.harmonising import CONTROL, genes_of, harmonise
from core.splits import draw_folds, draw_halves, fold_columns, sorted_groups
from core.variable_genes import expression_moments, highly_variable

FILE = "cells.h5ad"
SMALLEST_CONDITION = 4  # below it a half has fewer than two cells
FEWEST_CONDITIONS = 10


def write_cells(raw: Path, spec: DatasetSpec, provenance: dict[str, Any], folder: Path) -> None:
    """Write cells.h5ad, prepared from the published file `raw`, into `folder`; `provenance` goes into its uns."""
    cells = prepare_cells(open_h5ad(raw), spec, str(raw))
    cells.uns["provenance"] = json.dumps(provenance, sort_keys=True)
    cells.write_h5ad(folder / FILE, compression="lzf")


def read_cells(folder: Path) -> ad.AnnData:
    """The cells that `write_cells` wrote into `folder`."""
    return ad.read_h5ad(folder / FILE)


def prepare_cells(raw: ad.AnnData, spec: DatasetSpec, where: str) -> ad.AnnData:
    """The cells of a benchmark from a published file.

    raw: cells x genes, whole-number counts. where: the file's name, for messages.
    Returns cells x genes sorted by (covariate, condition, cell name) and gene: X log1p of counts normalised to
    `spec.target_sum` (CSR float32), layers["counts"], obs `condition`, `covariate`, `half`, `fold_k` and, where
    given, `library_size`; uns["preparation"] is a JSON report of what was dropped and why.
    Raises UserError where the file or what remains of it cannot be used.
    """
    cells, report = harmonise(raw, spec, where)
    # Rows in the order of their names first: nothing below can then depend on the file's order.
    cells = cells[np.argsort(cells.obs_names.to_numpy().astype(str), kind="stable")].copy()
    cells = filter_cells_and_genes(cells, spec.min_genes_per_cell, spec.min_cells_per_gene, report)
    _require(cells.n_obs > 0 and cells.n_vars > 0, where, "filters", "no cell or no gene left", _LOWER)
    without = sorted(set(cells.obs["covariate"]) - set(cells.obs.loc[cells.obs["condition"] == CONTROL, "covariate"]))
    _require(not without, where, "filters", f"no control cell left in {shown(without)}", _LOWER)
    cells = drop_small_conditions(cells, max(spec.min_cells_per_condition, SMALLEST_CONDITION), report)
    conditions = set(cells.obs["condition"]) - {CONTROL}
    _require(
        len(conditions) >= FEWEST_CONDITIONS,
        where,
        f"obs[{spec.labels.column!r}]",
        f"{len(conditions)} perturbed conditions of at least {spec.min_cells_per_condition} cells; "
        f"{FEWEST_CONDITIONS} are needed",
        _LOWER,
    )
    cells = cells[cap(cells.obs, spec.max_control_cells, spec.seed)].copy()
    report["cells kept after the cap"] = int(cells.n_obs)
    log_expression = normalise(cells, spec.target_sum)
    perturbed = {gene for condition in conditions for gene in genes_of(condition)}
    mean, variance = expression_moments(log_expression)
    genes = highly_variable(mean, variance, cells.var_names, spec.n_variable_genes) | cells.var_names.isin(perturbed)
    report["perturbed genes that are not measured"] = sorted(perturbed - set(cells.var_names))
    report["genes kept"] = int(genes.sum())

    obs = cells.obs.copy()
    obs["half"] = draw_halves(obs, spec.seed)
    obs = obs.join(draw_folds(obs, spec.task, spec.folds, spec.seed))
    _require_training(obs, where)
    order = np.lexsort([obs.index.to_numpy(str), obs["condition"].to_numpy(str), obs["covariate"].to_numpy(str)])
    obs = obs.iloc[order]
    for column in obs.columns.drop("library_size", errors="ignore"):
        obs[column] = pd.Categorical(obs[column], categories=sorted(obs[column].unique()))
    return ad.AnnData(
        X=_canonical(log_expression[order][:, genes]),
        layers={"counts": _canonical(cells.X[order][:, genes])},
        obs=obs,
        var=pd.DataFrame(index=cells.var_names[genes]),
        uns={"preparation": json.dumps(report, sort_keys=True)},
    )


def filter_cells_and_genes(cells: ad.AnnData, min_genes: int, min_cells: int, report: dict[str, Any]) -> ad.AnnData:
    """Cells with at least `min_genes` genes, then genes in at least `min_cells` of these cells. X: counts."""
    cells.X.eliminate_zeros()
    rich = np.diff(cells.X.indptr) >= min_genes
    seen = np.bincount(cells.X[rich].indices, minlength=cells.n_vars) >= min_cells
    report["cells dropped for too few genes"] = int((~rich).sum())
    report["genes dropped for too few cells"] = int((~seen).sum())
    return cells[rich][:, seen].copy()


def drop_small_conditions(cells: ad.AnnData, fewest: int, report: dict[str, Any]) -> ad.AnnData:
    """Without the (covariate, condition) groups below `fewest` cells; control always stays."""
    size = cells.obs.groupby(["covariate", "condition"], observed=True)["condition"].transform("size")
    small = (size < fewest) & (cells.obs["condition"] != CONTROL)
    dropped = cells.obs.loc[small, ["covariate", "condition"]].drop_duplicates()
    report["conditions dropped for too few cells"] = sorted(f"{a} {b}" for a, b in dropped.to_numpy())
    return cells[~small.to_numpy()].copy()


def cap(obs: pd.DataFrame, max_control: int, seed: int) -> Bools:
    """Mask of the cells kept: per perturbation at most round(mean cells per condition of its covariate).

    Control counts as one condition in the mean and is itself capped at `max_control`. Sampling is without
    replacement; round() goes to the even number at .5.
    """
    keep = pd.Series(True, index=obs.index)
    mean = obs.groupby("covariate", observed=True)["condition"].agg(lambda labels: len(labels) / labels.nunique())
    for covariate, condition, names in sorted_groups(obs):
        most = max_control if condition == CONTROL else round(mean[covariate])
        if len(names) > most:
            chosen = generator(seed, "cap", covariate, condition).choice(len(names), size=most, replace=False)
            keep.loc[names] = False
            keep.loc[names[chosen]] = True
    return np.asarray(keep, dtype=bool)


def normalise(cells: ad.AnnData, target_sum: float) -> sparse.csr_matrix:
    """log1p of the counts scaled to `target_sum` per cell, by the cell's own sum or its `library_size`.

    A cell without any count stays zero.
    """
    counts = cells.X.astype(np.float64)
    sizes = (
        cells.obs["library_size"].to_numpy(dtype=np.float64)
        if "library_size" in cells.obs
        else np.asarray(counts.sum(axis=1)).ravel()
    )
    scale = target_sum / np.where(sizes > 0, sizes, 1.0)
    counts.data *= np.repeat(scale, np.diff(counts.indptr))
    np.log1p(counts.data, out=counts.data)
    return sparse.csr_matrix(counts, dtype=np.float32)


def _canonical(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix(matrix, dtype=np.float32)
    matrix.sort_indices()
    return matrix


_LOWER = (
    "lower `min_genes_per_cell`, `min_cells_per_gene` or `min_cells_per_condition` in the catalog entry, "
    "or give more data"
)


def _require_training(obs: pd.DataFrame, where: str) -> None:
    """Raise UserError where a fold leaves a covariate without training perturbations or without training controls."""
    is_control = obs["condition"] == CONTROL
    for column in fold_columns(obs):
        training = obs[column] == "train"
        for what, rows in (("perturbation", training & ~is_control), ("control cell", training & is_control)):
            without = sorted(set(obs["covariate"].astype(str)) - set(obs.loc[rows, "covariate"].astype(str)))
            _require(not without, where, column, f"no {what} to train with in {shown(without)}", _LOWER)


def _require(condition: bool, where: str, field: str, found: str, remedy: str) -> None:
    if not condition:
        raise UserError(where, field, found, remedy)
