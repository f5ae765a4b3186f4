"""What the names in a published file decide: which cells and genes to read, and what they are called.

Everything that can be wrong with the names is refused here, before any work starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from core.arrays import Bools, Ints
from core.conditions import CONTROL
from core.errors import UserError, shown
from core.prepare.genes import choose_columns, read_symbols
from core.prepare.labels import find_measured_controls, harmonise_labels, require_controls
from core.prepare.settings import Filter, PreparationSettings, Sampling
from core.rng import generator

COMPARISONS: dict[str, Callable[[pd.Series, Any], pd.Series]] = {
    "==": lambda column, value: column == value,
    ">=": lambda column, value: column >= value,
    "<=": lambda column, value: column <= value,
    "in": lambda column, value: column.isin(value),
}


class Plan(NamedTuple):
    """What a file's names alone decide: which cells and genes to read, and what they are called.

    rows: positions of the kept cells, in file order. obs: their `condition`, `covariate` and, where the entry names
    a column for it, `library_size`. columns: positions of the kept genes, sorted by symbol. genes: their symbols.
    report: what was dropped on the way.
    """

    rows: Ints
    obs: pd.DataFrame
    columns: Ints
    genes: pd.Index
    report: dict[str, Any]


def plan_preparation(obs: pd.DataFrame, var: pd.DataFrame, spec: PreparationSettings, where: str) -> Plan:
    """Harmonise the names of a published file, without its matrix.

    Parameters
    ----------
    obs, var : pd.DataFrame
        Its tables of cells and genes. Conditions are sampled before any filter, where the entry says so.
    spec : PreparationSettings
        What decides how the cells are prepared; an entry of the catalog is that.
    where : str
        What the input is called in messages.

    Returns
    -------
    Plan

    Raises
    ------
    UserError
        For a missing column, duplicated cell names, another size than the entry expects, labels that cannot be read or
        that differ in case only, perturbations that `control_contains` would make control of, and data without control
        cells.
    """
    if len(obs) == 0 or len(var) == 0:
        raise UserError(where, "shape", f"{len(obs)} cells x {len(var)} genes", "give a file with cells and genes")
    _require_expected(obs, len(var), spec, where)
    require_unique_cells(obs, where)
    sampled = _sampled(obs, spec, where)
    keep = _filtered(obs, spec.filters, where) & sampled
    kept = obs.loc[keep]
    labels = _column(kept, spec.labels.column, where)
    conditions = harmonise_labels(labels, spec.labels, where)
    labelled = conditions.notna().to_numpy()
    covariates = (
        pd.Series(spec.covariate, index=kept.index)
        if spec.covariate_column is None
        else _covariates(kept[labelled], spec.covariate_column, where).reindex(kept.index)
    )
    table = pd.DataFrame({"condition": conditions[labelled].astype(str), "covariate": covariates[labelled]})
    if spec.library_size is not None:
        table["library_size"] = _library_sizes(kept[labelled], spec.library_size, where)
    require_controls(table, spec.labels, where)
    symbols = pd.Index(var.index if spec.symbol_column is None else read_symbols(var, spec.symbol_column, where))
    columns, genes, dropped = choose_columns(symbols)
    if not len(columns):
        field = "var_names" if spec.symbol_column is None else f"var[{spec.symbol_column!r}]"
        found = f"no gene with a symbol of its own among {len(var):,}"
        raise UserError(
            where, field, found, "name the column with the gene symbols in the catalog entry (`symbol_column`)"
        )
    report = {
        "cells in the file": len(obs),
        "cells of conditions that were not sampled": int((~sampled).sum()),
        "cells dropped by the entry's filters": int((sampled & ~keep).sum()),
        "cells without a label": int((~labelled).sum()),
        "control labels that are also measured genes": find_measured_controls(labels, spec.labels, symbols, where),
    }
    return Plan(np.flatnonzero(keep)[labelled], table, columns, genes, report | dropped)


def require_unique_cells(obs: pd.DataFrame, where: str) -> None:
    """Raise UserError where a cell name occurs twice.

    Parameters
    ----------
    obs : pd.DataFrame
        The file's table of cells.
    where : str
        What the input is called in messages.
    """
    repeated = obs.index[obs.index.duplicated()]
    if len(repeated):
        remedy = "make the names unique, e.g. by adding the batch: adata.obs_names_make_unique()"
        raise UserError(where, "obs_names", f"{len(repeated)} duplicated cell names ({shown(list(repeated))})", remedy)


def order_cells(obs: pd.DataFrame) -> Ints:
    """Return the positions that sort cells as cells.h5ad has them: by covariate, condition and cell name, as text.

    Parameters
    ----------
    obs : pd.DataFrame
        The table of cells, with `covariate` and `condition`.

    Returns
    -------
    Ints
    """
    names = (obs.index, obs["condition"], obs["covariate"])
    return np.asarray(np.lexsort([name.to_numpy().astype(str) for name in names]))


def sample_conditions(conditions: set[str], sampling: Sampling, seed: int) -> set[str]:
    """`sampling.conditions` of the perturbed conditions: those in `priority`, the rest drawn with the seed.

    All of them, where there are no more. Priority conditions beyond the number wanted are left out from the end of the
    list.

    Parameters
    ----------
    conditions : set[str]
        Names of the conditions.
    sampling : Sampling
        How many, and which first.
    seed : int
        Seed of the draws.

    Returns
    -------
    set[str]
    """
    first = [name for name in sampling.priority if name in conditions][: sampling.conditions]
    others = sorted(conditions - set(first))
    n = min(sampling.conditions - len(first), len(others))
    drawn = generator(seed, "sample_conditions").choice(len(others), size=n, replace=False)
    return {*first, *(others[i] for i in drawn)}


def _sampled(obs: pd.DataFrame, spec: PreparationSettings, where: str) -> Bools:
    """Return the mask of the cells whose condition takes part; control and cells without a label always do."""
    if spec.sample is None:
        return np.ones(len(obs), dtype=bool)
    labels = harmonise_labels(_column(obs, spec.labels.column, where), spec.labels, where)
    kept = sample_conditions(set(labels.dropna()) - {CONTROL}, spec.sample, spec.seed)
    return np.asarray(labels.isna() | labels.isin(kept | {CONTROL}), dtype=bool)


def _library_sizes(obs: pd.DataFrame, column: str, where: str) -> pd.Series:
    sizes = pd.to_numeric(_column(obs, column, where), errors="coerce")
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        remedy = "fill the column, or take `library_size` out of the catalog entry"
        raise UserError(where, f"obs[{column!r}]", "library sizes that are missing, zero or negative", remedy)
    return sizes.astype(np.float64)


def _require_expected(obs: pd.DataFrame, n_genes: int, spec: PreparationSettings, where: str) -> None:
    expected = spec.expected
    if expected is None:
        return
    labels = harmonise_labels(_column(obs, spec.labels.column, where), spec.labels, where)
    conditions = len(set(labels.dropna()) - {CONTROL})
    if (len(obs), n_genes, conditions) != (expected.cells, expected.genes, expected.conditions):
        raise UserError(
            where,
            "shape",
            f"{len(obs):,} cells x {n_genes:,} genes, {conditions} conditions; "
            f"{spec.name} has {expected.cells:,} x {expected.genes:,}, {expected.conditions}",
            "give the file that the catalog entry describes, or write an entry of your own for this one",
        )


def _filtered(obs: pd.DataFrame, filters: tuple[Filter, ...], where: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    keep = np.ones(len(obs), dtype=bool)
    for row in filters:
        column = _column(obs, row.column, where)
        if row.op in (">=", "<=") and not pd.api.types.is_numeric_dtype(column):
            found = f"{column.dtype} values, of which none is {row.op} {row.value}"
            remedy = "filter by a column of numbers, or use `op: ==` or `op: in`"
            raise UserError(where, f"obs[{row.column!r}]", found, remedy)
        keep &= COMPARISONS[row.op](column, row.value).fillna(False).to_numpy(dtype=bool)
    if not keep.any():
        raise UserError(where, "filters", "no cell passes the entry's filters", "check `filters` in the catalog entry")
    return keep


def _column(obs: pd.DataFrame, name: str, where: str) -> pd.Series:
    if name not in obs:
        raise UserError(
            where,
            f"obs[{name!r}]",
            f"no such column; there are: {shown(sorted(map(str, obs.columns)), 12)}",
            "name the right column in the catalog entry (`labels.column`, `filters`, `covariate_column`, "
            "`library_size`), or with --column",
        )
    return obs[name]


def _covariates(obs: pd.DataFrame, name: str, where: str) -> pd.Series:
    column = _column(obs, name, where)
    if column.isna().any():
        found = f"{int(column.isna().sum()):,} labelled cells without a covariate"
        remedy = "fill the column, or leave these cells out by `filters` in the catalog entry"
        raise UserError(where, f"obs[{name!r}]", found, remedy)
    return column.astype(str)
