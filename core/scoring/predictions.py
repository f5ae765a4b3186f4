"""Checks of predicted profiles: aligned by name with the reference, or refused with the reason."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Floats
from core.conditions import KEYS, SEPARATOR, row_names
from core.errors import UserError, shown
from core.io.h5ad import open_foreign_h5ad, read_foreign_json, read_genes
from core.reference.files import REFERENCE, read_keys
from core.scoring.files import PREDICTIONS, REASONS

# Room for float32 at the largest value that a mean of log1p can have.
ROUNDING = 1e-3
SHARED_GENES = 0.95
# A file may be so many times as large as the predictions that are asked for: more genes, layers, tables.
ROOM = 16
ROOM_BYTES = 2**30
# Bytes that unpredicted.json may have: for each condition, and for the rest.
ROOM_REASON, ROOM_REASONS = 2**12, 2**20


def align_predictions(
    data: ad.AnnData, keys: pd.DataFrame, genes: pd.Index, where: str, target_sum: float = 10_000
) -> ad.AnnData:
    """Align predictions with a reference by the names of conditions and genes.

    The order of a combination's genes means nothing: `B+A` becomes `A+B` if that is the reference's name. Genes that
    the reference lacks are left out. Slightly negative values are allowed: linear models predict them.

    Parameters
    ----------
    data
        Conditions x genes, X predicted mean log1p(CP10k); obs `condition`, and `covariate` where the reference has
        several.
    keys
        covariate and condition of everything that may be predicted.
    genes
        The reference's. At least 95 % of them must be predicted; the others get no column (`core.scoring.scores`
        reports them).
    where
        What errors call the predictions.
    target_sum
        Counts to which the data set's cells are normalised.

    Returns
    -------
    AnnData
        X float64, rows by (covariate, condition), genes in the reference's order.

    Raises
    ------
    UserError
        For no or unknown conditions, a row or a gene twice, genes as rows, NaN, infinite values, and values that cannot
        be means of log1p(CP10k): one above log1p of target_sum, or whole numbers throughout with one above 1.
    """
    # Perturbed genes are often measured genes too, so that names of conditions among the columns say nothing.
    if genes.isin(data.obs_names).mean() >= 0.5 > genes.isin(data.var_names).mean():
        raise UserError(where, "shape", "genes are in rows", "transpose it to conditions x genes (adata.T)")
    repeated = data.var_names[data.var_names.duplicated()]
    if len(repeated):
        raise UserError(where, "var_names", f"gene {repeated[0]!r} more than once", "keep one column per gene")
    names = {"covariate": _read_covariates(data, keys, where), "condition": _read_conditions(data, keys, where)}
    found = pd.DataFrame(names, dtype=object)
    twice = found[found.duplicated()]
    if len(twice):
        raise UserError(
            where, "obs", f"{len(twice)} duplicated rows (first: {twice['condition'].iloc[0]})", "one row per condition"
        )
    known = pd.MultiIndex.from_frame(keys[KEYS].astype(str))
    unknown = found[~pd.MultiIndex.from_frame(found).isin(known)]
    if len(unknown):
        raise _explain_unknown(unknown, keys, where)
    shared = genes[genes.isin(data.var_names)]
    require_shared_genes(data.var_names, genes, where)
    order = np.lexsort([found["condition"].to_numpy(str), found["covariate"].to_numpy(str)])
    obs = found.iloc[order].set_index(row_names(found["covariate"], found["condition"])[order])
    values = _make_dense(data[:, shared], where)[order]
    _check_values(values, obs, shared, where, target_sum)
    return ad.AnnData(X=values, obs=obs, var=pd.DataFrame(index=shared))


def require_shared_genes(predicted: pd.Index, genes: pd.Index, where: str) -> None:
    """Refuse predictions that lack too many of the reference's genes.

    Parameters
    ----------
    predicted
        Names of the predicted genes.
    genes
        The reference's.
    where
        What the error calls the predictions.

    Raises
    ------
    UserError
        Unless at least 95 % of the reference's genes are predicted.
    """
    missing = genes[~genes.isin(predicted)].astype(str).tolist()
    if len(genes) - len(missing) < SHARED_GENES * len(genes):
        found = f"{len(missing)} of the reference's {len(genes)} genes are missing ({shown(missing)})"
        remedy = f"predict at least {SHARED_GENES:.0%} of them, named as in the data set"
        raise UserError(where, "var_names", found, remedy)


def check_model_output(
    folder: Path, asked: list[dict[str, str]], genes: pd.Index, model: str, target_sum: float = 10_000
) -> tuple[ad.AnnData, list[dict[str, Any]]]:
    """Check what a model predicted: aligned, and complete.

    Parameters
    ----------
    folder
        Where it wrote predictions.h5ad and unpredicted.json.
    asked
        covariate and condition of what it was asked for. Each must be predicted, or be in unpredicted.json with a
        reason; a file without any row is valid too.
    genes
        The reference's.
    model
        Its name.
    target_sum
        Counts to which the data set's cells are normalised.

    Returns
    -------
    predictions : AnnData
        As `align_predictions` gives them.
    unpredicted : list of dict
        covariate, condition and reason, sorted.

    Raises
    ------
    UserError
        Where its output breaks the contract.
    """
    where = f"output of {model}"
    keys = pd.DataFrame(asked, columns=KEYS)
    path = folder / REASONS
    try:
        unpredicted = read_foreign_json(path, ROOM_REASONS + ROOM_REASON * len(asked))
        reasons = {(str(row["covariate"]), str(row["condition"])): str(row["reason"]) for row in unpredicted}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            where, path.name, f"{type(error).__name__}: {error}", "write a list of covariate, condition and reason"
        ) from error
    given = open_foreign_h5ad(folder / PREDICTIONS, _limit_bytes(len(keys), len(genes)))
    predictions = align_predictions(given, keys, genes, where, target_sum)
    answered = set(pd.MultiIndex.from_frame(predictions.obs[KEYS]))
    wanted = set(pd.MultiIndex.from_frame(keys))
    if answered & set(reasons) or (answered | set(reasons)) != wanted:
        wrong = sorted((answered & set(reasons)) | ((answered | set(reasons)) ^ wanted))
        found = f"{len(wrong)} not answered exactly once (first: {' '.join(wrong[0])})"
        raise UserError(where, "condition", found, "predict each condition asked for, or name it in unpredicted.json")
    rows = [{"covariate": a, "condition": b, "reason": reasons[a, b]} for a, b in sorted(reasons)]
    return predictions, rows


def _limit_bytes(rows: int, genes: int) -> int:
    """Say how many bytes of memory a file of predictions may take."""
    return ROOM_BYTES + ROOM * rows * genes * np.dtype(np.float64).itemsize


def write_aligned_predictions(file: Path, reference: Path, target_sum: float, folder: Path) -> None:
    """Align a file of predictions made elsewhere with a reference.

    Parameters
    ----------
    file
        The predictions.
    reference
        The folder of the reference.
    target_sum
        Counts to which the data set's cells are normalised.
    folder
        Where predictions.h5ad and unpredicted.json (the test conditions that the file lacks) are written.

    Raises
    ------
    UserError
        Where the file cannot be used, or predicts nothing.
    """
    keys = read_keys(reference)
    tested = keys.loc[keys["test_fold"] >= 0, KEYS].reset_index(drop=True)
    genes = read_genes(reference / REFERENCE)
    given = open_foreign_h5ad(file, _limit_bytes(len(tested), len(genes)))
    predictions = align_predictions(given, tested, genes, str(file), target_sum)
    if predictions.n_obs == 0:
        raise UserError(file, "shape", "no rows", "give one row for each predicted condition")
    lacking = set(pd.MultiIndex.from_frame(tested)) - set(pd.MultiIndex.from_frame(predictions.obs[KEYS]))
    predictions.write_h5ad(folder / PREDICTIONS)
    rows = [{"covariate": a, "condition": b, "reason": "not in the file"} for a, b in sorted(lacking)]
    (folder / REASONS).write_text(json.dumps(rows), encoding="utf-8")


def _read_conditions(data: ad.AnnData, keys: pd.DataFrame, where: str) -> list[str]:
    if "condition" not in data.obs:
        found = f"no such column; there are: {shown(sorted(map(str, data.obs.columns))) or 'none'}"
        raise UserError(where, "obs['condition']", found, "name each row's condition in obs['condition']")
    known = set(keys["condition"].astype(str))
    by_genes = {_sort_genes(name): name for name in sorted(known)}
    given: list[str] = data.obs["condition"].astype(str).tolist()
    return [name if name in known else by_genes.get(_sort_genes(name), name) for name in given]


def _sort_genes(condition: str) -> tuple[str, ...]:
    return tuple(sorted(condition.split(SEPARATOR)))


def _read_covariates(data: ad.AnnData, keys: pd.DataFrame, where: str) -> list[str]:
    if "covariate" in data.obs:
        return [str(name) for name in data.obs["covariate"]]
    covariates = sorted(map(str, keys["covariate"].unique()))
    if len(covariates) > 1:
        found = f"no such column; the data set has {shown(covariates)}"
        raise UserError(where, "obs['covariate']", found, "name each row's covariate")
    return covariates * int(data.n_obs)


def _explain_unknown(unknown: pd.DataFrame, keys: pd.DataFrame, where: str) -> UserError:
    covariates = sorted(keys["covariate"].astype(str).unique())
    foreign = sorted(set(unknown["covariate"]) - set(covariates))
    if foreign:
        remedy = f"name covariates as the data set does: {shown(covariates)}"
        return UserError(where, "obs['covariate']", f"{shown(foreign)}, which the data set lacks", remedy)
    first = unknown["condition"].iloc[0]
    near = get_close_matches(first, sorted(keys["condition"].astype(str)), n=1)
    hint = f"did you mean {near[0]}? " if near and near[0] != first else ""
    found = f"{len(unknown)} rows that are not test conditions (first: {first} in {unknown['covariate'].iloc[0]})"
    return UserError(where, "obs['condition']", found, f"{hint}leave out what is not tested, control included")


def _make_dense(data: ad.AnnData, where: str) -> Floats:
    values = data.X.toarray() if sparse.issparse(data.X) else np.asarray(data.X)
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(where, "X", f"values that are not numbers ({error})", "give a matrix of numbers") from error


def _check_values(values: Floats, rows: pd.DataFrame, genes: pd.Index, where: str, target_sum: float) -> None:
    if not values.size:
        return
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        found = f"{bad.sum():,} values that are NaN or infinite (first: {rows['condition'].iloc[row]}, {genes[column]})"
        raise UserError(where, "X", found, "predict every gene of a condition, or leave the condition out")
    whole = values.max() > 1 and bool((values == np.floor(values)).all())
    # A cell whose counts are all of one gene.
    largest = float(np.log1p(target_sum))
    if whole or values.max() > largest + ROUNDING:
        found = f"values up to {values.max():g}{', all whole numbers' if whole else ''}: counts, or on another scale"
        remedy = f"give means of log1p of counts per {target_sum:,.0f} (at most {largest:.2f})"
        raise UserError(where, "X", found, remedy)
