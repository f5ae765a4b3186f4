"""From a published file to cells.h5ad (`docs/science.md`, section 1, steps 2 to 7), in bounded memory.

The names decide most of it. The matrix is read twice, in chunks of rows: once to count genes and cells, once to put
the rows that stay on disk. From there they are taken in their final order, for the choice of genes and for writing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset
from scipy import sparse

from core.arrays import Bools, Floats, Ints
from core.conditions import CONTROL, KEYS, SEPARATOR, genes_of
from core.errors import UserError, shown
from core.io.external_sort import Spill
from core.io.faults import are_whole, find_count_faults, find_expression_faults, refuse_faults, require_log_expression
from core.io.h5ad import read_names, require_space, write_by_rows
from core.io.panels import read_ahead
from core.io.raw_matrix import Rows, has_layer, open_rows
from core.prepare.files import CELLS
from core.prepare.genes import choose_variable_genes, measure_expression
from core.prepare.mirror import REQUIRED_OBS, is_mirror, plan_mirror
from core.prepare.plan import Plan, order_cells, plan_preparation
from core.prepare.settings import PreparationSettings
from core.prepare.splits import draw_folds, draw_halves, iterate_groups, list_fold_columns
from core.progress import LOG, log_progress
from core.rng import generator

SMALLEST_CONDITION = 4  # below it a half has fewer than two cells
FEWEST_CONDITIONS = 10
MEMORY = 2_000_000_000

Parts = dict[str, sparse.csr_matrix]  # place in the file ("X", "layers/counts") -> some rows


def write_cells(
    raw: Path, spec: PreparationSettings, provenance: dict[str, Any], folder: Path, memory: int = MEMORY
) -> None:
    """Write cells.h5ad, prepared from the published file `raw`, into `folder`.

    The file holds cells x genes sorted by (covariate, condition, cell name) and gene: X log1p of counts normalised to
    `spec.target_sum` (CSR float32), layers["counts"] (not from a mirror without them), obs `condition`, `covariate`,
    `half`, `fold_k` and, where given, `library_size`; uns["preparation"], a JSON report of what was dropped and why;
    uns["provenance"], as given.

    Parameters
    ----------
    raw : Path
        Cells x genes, whole-number counts in X (or in `spec.counts_layer`), stored as CSR, CSC or dense; or a file in
        the layout of the preprocessed mirror, whose cells, halves, folds and expression are taken as they are.
    spec : PreparationSettings
        What decides how the cells are prepared; an entry of the catalog is that.
    provenance : dict[str, Any]
        What the cells come from; written into the file.
    folder : Path
        Where the files lie, or go.
    memory : int
        Bytes that the chunks of the matrix may take, beside what a few numbers a cell and a gene do. It changes no bit
        of the result.

    Raises
    ------
    UserError
        Where the file or what remains of it cannot be used.
    """
    obs, var = read_names(raw)
    prepare = _from_mirror if is_mirror(obs) else _from_counts
    with TemporaryDirectory(dir=folder) as scratch:
        frame, parts = prepare(raw, obs, var, spec, memory, Path(scratch))
        frame.uns["provenance"] = json.dumps(provenance, sort_keys=True)
        write_by_rows(folder / CELLS, frame, parts)


def read_cells(folder: Path) -> ad.AnnData:
    """Open the cells that `write_cells` wrote into `folder`; X and layers stay on disk, to be read row by row.

    The file is open for as long as the cells are in use.

    Parameters
    ----------
    folder : Path
        Where the files lie, or go.

    Returns
    -------
    ad.AnnData
    """
    file = h5py.File(folder / CELLS)
    # What anndata calls backed would read the layers.
    return ad.AnnData(
        X=sparse_dataset(file["X"]),
        layers={name: sparse_dataset(layer) for name, layer in file["layers"].items()},
        obs=read_elem(file["obs"]),
        var=read_elem(file["var"]),
        uns=read_elem(file["uns"]),
    )


def _from_counts(
    raw: Path, obs: pd.DataFrame, var: pd.DataFrame, spec: PreparationSettings, memory: int, scratch: Path
) -> tuple[ad.AnnData, Iterator[Parts]]:
    where = str(raw)
    partly = [column for column in REQUIRED_OBS[2:] if column in obs]
    if partly:
        LOG.warning("%s has %s, but not all columns of a preprocessed mirror: read as raw counts", raw.name, partly[0])
    names = plan_preparation(obs, var, spec, where)
    with open_rows(raw, spec.counts_layer, (len(obs), len(var)), memory, scratch) as matrix:
        n_genes, n_cells = count_genes_and_cells(matrix, names, spec.min_genes_per_cell, where)
        rich, seen = n_genes >= spec.min_genes_per_cell, n_cells >= spec.min_cells_per_gene
        report = names.report | {
            "cells dropped for too few genes": int((~rich).sum()),
            "genes dropped for too few cells": int((~seen).sum()),
        }
        _require(bool(rich.any() and seen.any()), where, "filters", "no cell or no gene left", _LOWER)
        cells, genes = _chosen(names.obs[rich], spec, where, report), names.genes[seen]
        rank = cells.index.get_indexer(names.obs.index)
        chosen = np.flatnonzero(rank >= 0)
        require_space(scratch, estimate_bytes(int(n_genes[chosen].sum())), f"the {len(chosen):,} chosen cells")
        with Spill(scratch, len(genes)) as spill:
            found = read_selected(matrix, names.rows[chosen], names.columns[seen])
            for own, counts in log_progress("sorting the chosen cells", found, len(chosen)):
                spill.add(rank[chosen[own]], counts)
    sizes = cells["library_size"].to_numpy() if "library_size" in cells else None
    perturbed = {gene for condition in set(cells["condition"]) for gene in genes_of(condition)}
    mean, variance = measure_expression(
        (log_expression for _, log_expression in _normalised("choosing genes", spill, sizes, spec)), len(genes)
    )
    kept = choose_variable_genes(mean, variance, genes, spec.n_variable_genes) | genes.isin(perturbed)
    report["perturbed genes that are not measured"] = sorted(perturbed - set(genes))
    report["genes kept"] = int(kept.sum())
    parts = (
        {"X": log_expression[:, kept], "layers/counts": counts[:, kept]}
        for counts, log_expression in _normalised("writing cells", spill, sizes, spec)
    )
    return _frame(cells, genes[kept], report), parts


def _normalised(
    what: str, spill: Spill, sizes: Floats | None, spec: PreparationSettings
) -> Iterator[tuple[sparse.csr_matrix, sparse.csr_matrix]]:
    """Return (counts, log1p of the normalised counts) of the cells in their final order, a panel at a time."""

    def work(panel: tuple[slice, sparse.csr_matrix]) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        span, counts = panel
        return counts, normalise_counts(counts, None if sizes is None else sizes[span], spec.target_sum)

    return read_ahead(work, log_progress(what, spill.panels(), len(spill)))


def _from_mirror(
    raw: Path, obs: pd.DataFrame, var: pd.DataFrame, spec: PreparationSettings, memory: int, scratch: Path
) -> tuple[ad.AnnData, Iterator[Parts]]:
    names = plan_mirror(obs, var, str(raw))
    where = str(raw)
    _require_conditions(names.obs, spec, where)
    _require_training(names.obs, where)
    _require_entry(names.obs, spec, where)
    LOG.info("%s has the layout of a preprocessed mirror: its cells, halves and folds are taken as they are", raw.name)
    order = np.argsort(names.rows)
    spills: dict[str, Spill] = {}
    for place, layer in {"X": None, "layers/counts": "counts"}.items():
        if layer is None or has_layer(raw, layer):
            own = scratch / (layer or "X")
            own.mkdir()
            with (
                Spill(own, len(names.genes)) as spill,
                open_rows(raw, layer, (len(obs), len(var)), memory, own) as matrix,
            ):
                wanted = read_selected(matrix, names.rows[order], names.columns)
                faults, whole, largest = [], True, 0.0
                for rows, values in log_progress(f"sorting {place}", wanted, len(order)):
                    faults.append((find_count_faults if layer else find_expression_faults)(values.data))
                    whole &= are_whole(values.data)
                    largest = max(largest, values.data.max(initial=0.0))
                    spill.add(order[rows], values)
                refuse_faults(faults, matrix.field, where)
                if layer is None:
                    require_log_expression(whole, largest, where)
            spills[place] = spill
    panels = zip(*(spill.panels() for spill in spills.values()), strict=True)
    parts = ({place: rows for place, (_, rows) in zip(spills, panel, strict=True)} for panel in panels)
    return _frame(names.obs, names.genes, names.report), parts


def read_selected(matrix: Rows, rows: Ints, columns: Ints) -> Iterator[tuple[slice, sparse.csr_matrix]]:
    """Read the wanted rows of a matrix, chunk by chunk, with which of the wanted rows they are.

    The parts are CSR with sorted indices and without stored zeros. Chunks without a wanted row are not read.

    Parameters
    ----------
    matrix : Rows
        The file's matrix.
    rows : Ints
        Their positions, ascending.
    columns : Ints
        Positions of the wanted columns, in the order in which they come.

    Returns
    -------
    Iterator[tuple[slice, sparse.csr_matrix]]
    """
    column_of = np.full(matrix.width, -1, dtype=np.int32)
    column_of[columns] = np.arange(len(columns), dtype=np.int32)
    wanted = [(span, slice(*np.searchsorted(rows, (span.start, span.stop)).tolist())) for span in matrix.spans]
    wanted = [(span, own) for span, own in wanted if own.stop > own.start]

    def read(part: tuple[slice, slice]) -> sparse.csr_matrix:
        span, own = part
        block = matrix.read(span)
        if own.stop - own.start < block.shape[0]:
            block = block[rows[own] - span.start]
        data, indices, pointers = block.data, column_of[block.indices], block.indptr
        kept = (indices >= 0) & (data != 0)
        if not kept.all():
            data, indices, pointers = data[kept], indices[kept], np.concatenate([[0], np.cumsum(kept)])[pointers]
        chosen = sparse.csr_matrix((data, indices, pointers), shape=(block.shape[0], len(columns)))
        chosen.sort_indices()
        return chosen

    return zip((own for _, own in wanted), read_ahead(read, wanted), strict=True)


def count_genes_and_cells(matrix: Rows, names: Plan, min_genes: int, where: str) -> tuple[Ints, Ints]:
    """Count the genes of each planned cell, and the cells that have each planned gene, in one pass over the counts.

    Cells with fewer than `min_genes` genes do not count for the genes.

    Parameters
    ----------
    matrix : Rows
        The file's matrix.
    names : Plan
        Which cells and genes.
    min_genes : int
        A cell with fewer does not count.
    where : str
        What the input is called in messages.

    Returns
    -------
    tuple[Ints, Ints]

    Raises
    ------
    UserError
        For values that are no counts.
    """
    n_genes = np.zeros(len(names.rows), dtype=np.int64)
    n_cells = np.zeros(len(names.columns), dtype=np.int64)
    faults = []
    parts = read_selected(matrix, names.rows, names.columns)
    for own, counts in log_progress("counting genes and cells", parts, len(names.rows)):
        faults.append(find_count_faults(counts.data))
        n_genes[own] = np.diff(counts.indptr)
        in_rich = np.repeat(n_genes[own] >= min_genes, n_genes[own])
        n_cells += np.bincount(counts.indices[in_rich], minlength=len(n_cells))
    refuse_faults(faults, matrix.field, where)
    return n_genes, n_cells


def estimate_bytes(values: int) -> int:
    """Estimate how many bytes the preparation writes for so many counts of chosen cells.

    Each is written once to the spill, as it is, and twice to the result, as count and as expression, packed to a little
    more than half of what they are.

    Parameters
    ----------
    values : int
        Number of counts.

    Returns
    -------
    int
    """
    return 18 * values


def _chosen(obs: pd.DataFrame, spec: PreparationSettings, where: str, report: dict[str, Any]) -> pd.DataFrame:
    """Return the cells that stay, in their final order, with halves and folds."""
    without = sorted(set(obs["covariate"]) - set(obs.loc[obs["condition"] == CONTROL, "covariate"]))
    _require(not without, where, "filters", f"no control cell left in {shown(without)}", _LOWER)
    small = mask_small_conditions(obs, max(spec.min_cells_per_condition, SMALLEST_CONDITION))
    dropped = obs.loc[small, KEYS].drop_duplicates().to_numpy()
    report["conditions dropped for too few cells"] = sorted(f"{covariate} {name}" for covariate, name in dropped)
    obs = obs[~small]
    _require_conditions(obs, spec, where)
    obs = obs[cap_conditions(obs, spec.max_control_cells, spec.seed)].copy()
    report["cells kept after the cap"] = len(obs)
    obs["half"] = draw_halves(obs, spec.seed)
    obs = obs.join(draw_folds(obs, spec.task, spec.folds, spec.seed))
    _require_training(obs, where)
    return obs.iloc[order_cells(obs)]


def _frame(cells: pd.DataFrame, genes: pd.Index, report: dict[str, Any]) -> ad.AnnData:
    """cells.h5ad without its matrices."""
    obs = cells.copy()
    for column in obs.columns.drop("library_size", errors="ignore"):
        obs[column] = pd.Categorical(obs[column], categories=sorted(obs[column].unique()))
    preparation = json.dumps(report, sort_keys=True)
    return ad.AnnData(obs=obs, var=pd.DataFrame(index=genes), uns={"preparation": preparation})


def mask_small_conditions(obs: pd.DataFrame, fewest: int) -> Bools:
    """Return the mask of the cells of (covariate, condition) groups below `fewest` cells; control is never small.

    Parameters
    ----------
    obs : pd.DataFrame
        The table of cells, with `covariate` and `condition`.
    fewest : int
        A condition with fewer is small.

    Returns
    -------
    Bools
    """
    size = obs.groupby(KEYS, observed=True)["condition"].transform("size")
    return np.asarray((size < fewest) & (obs["condition"] != CONTROL), dtype=bool)


def cap_conditions(obs: pd.DataFrame, max_control: int, seed: int) -> Bools:
    """Return the mask of the cells kept: per perturbation at most round(mean cells per condition of its covariate).

    Control counts as one condition in the mean and is itself capped at `max_control`. Sampling is without replacement;
    round() goes to the even number at .5.

    Parameters
    ----------
    obs : pd.DataFrame
        The table of cells, with `covariate` and `condition`.
    max_control : int
        The most control cells of a covariate.
    seed : int
        Seed of the draws.

    Returns
    -------
    Bools
    """
    keep = pd.Series(True, index=obs.index)
    mean = obs.groupby("covariate", observed=True)["condition"].agg(lambda labels: len(labels) / labels.nunique())
    for covariate, condition, names in iterate_groups(obs):
        most = max_control if condition == CONTROL else round(mean[covariate])
        if len(names) > most:
            chosen = generator(seed, "cap", covariate, condition).choice(len(names), size=most, replace=False)
            keep.loc[names] = False
            keep.loc[names[chosen]] = True
    return np.asarray(keep, dtype=bool)


def normalise_counts(counts: sparse.csr_matrix, sizes: Floats | None, target_sum: float) -> sparse.csr_matrix:
    """Scale the counts of each cell to `target_sum`, then take log1p.

    A cell without any count stays zero. Float32.

    Parameters
    ----------
    counts : sparse.csr_matrix
        Cells x genes.
    sizes : Floats | None
        Library size of each cell; None for its own sum.
    target_sum : float
        Sum of the counts of a cell, once it is normalised.

    Returns
    -------
    sparse.csr_matrix
    """
    scaled = counts.astype(np.float64)
    if sizes is None:
        sizes = np.asarray(scaled.sum(axis=1)).ravel()
    scaled.data *= np.repeat(target_sum / np.where(sizes > 0, sizes, 1.0), np.diff(scaled.indptr))
    np.log1p(scaled.data, out=scaled.data)
    return sparse.csr_matrix(scaled, dtype=np.float32)


def _require_entry(obs: pd.DataFrame, spec: PreparationSettings, where: str) -> None:
    """Raise UserError where a mirror is not what the entry says: another task, or other folds."""
    combined = obs["condition"].str.contains(SEPARATOR, regex=False).any()
    task, folds = "combination" if combined else "single", len(list_fold_columns(obs))
    remedy = "use the entry that belongs to this file, without a number of folds of your own"
    found = f"a mirror file of {task} conditions; the entry says {spec.task}"
    _require(task == spec.task, where, "task", found, remedy)
    found = f"{folds} folds in a mirror file; the entry says {spec.folds}"
    _require(folds == spec.folds, where, "folds", found, remedy)


_LOWER = (
    "lower `min_genes_per_cell`, `min_cells_per_gene` or `min_cells_per_condition` in the catalog entry, "
    "or give more data"
)


def _require_conditions(obs: pd.DataFrame, spec: PreparationSettings, where: str) -> None:
    n = obs["condition"].nunique() - 1
    found = f"{n} perturbed conditions of at least {spec.min_cells_per_condition} cells; {FEWEST_CONDITIONS} are needed"
    _require(n >= FEWEST_CONDITIONS, where, f"obs[{spec.labels.column!r}]", found, _LOWER)


def _require_training(obs: pd.DataFrame, where: str) -> None:
    """Raise UserError where a fold leaves a covariate without training perturbations or without training controls."""
    is_control = obs["condition"] == CONTROL
    for column in list_fold_columns(obs):
        training = obs[column] == "train"
        for what, rows in (("perturbation", training & ~is_control), ("control cell", training & is_control)):
            without = sorted(set(obs["covariate"].astype(str)) - set(obs.loc[rows, "covariate"].astype(str)))
            _require(not without, where, column, f"no {what} to train with in {shown(without)}", _LOWER)


def _require(condition: bool, where: str, field: str, found: str, remedy: str) -> None:
    if not condition:
        raise UserError(where, field, found, remedy)
