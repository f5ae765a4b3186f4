"""From a published file to counts with the field's labels: conditions, covariates, gene symbols.

Everything that can be wrong with a raw file is refused here, before any work starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from core.catalog.schema import DatasetSpec, Filter, Labels
from core.errors import UserError, shown

CONTROL = "control"
SEPARATOR = "+"

COMPARISONS: dict[str, Callable[[pd.Series, Any], pd.Series]] = {
    "==": lambda column, value: column == value,
    ">=": lambda column, value: column >= value,
    "<=": lambda column, value: column <= value,
    "in": lambda column, value: column.isin(value),
}


def harmonise(raw: ad.AnnData, spec: DatasetSpec, where: str) -> tuple[ad.AnnData, dict[str, Any]]:
    """Counts with harmonised labels, and what was dropped on the way.

    raw: cells x genes as published, X whole-number counts.
    Returns an AnnData with X CSR float32 counts, genes sorted by symbol, cells in file order, obs
    `condition` (`control`, `A`, `A+B` with sorted genes), `covariate` and, where the entry names a column for it,
    `library_size`; and a report: cells dropped by the entry's filters, genes dropped because their symbol
    occurs more than once or is missing.
    Raises UserError for a missing column, duplicated cell names, counts that are not whole numbers >= 0,
    labels that cannot be read, and data without control cells.
    """
    if raw.n_obs == 0 or raw.n_vars == 0:
        raise UserError(where, "shape", f"{raw.n_obs} cells x {raw.n_vars} genes", "give a file with cells and genes")
    if raw.X is None:
        raise UserError(where, "X", "no matrix", "put the raw counts into X (they may be in a layer, or in .raw)")
    _require_expected(raw, spec, where)
    repeated = raw.obs_names[raw.obs_names.duplicated()]
    if len(repeated):
        raise UserError(
            where,
            "obs_names",
            f"{len(repeated)} duplicated cell names ({shown(list(repeated))})",
            "make the names unique, e.g. by adding the batch: adata.obs_names_make_unique()",
        )
    keep = _filtered(raw.obs, spec.filters, where)
    obs = raw.obs.loc[keep]
    conditions = condition_labels(_column(obs, spec.labels.column, where), spec.labels, where)
    labelled = conditions.notna().to_numpy()
    covariates = (
        pd.Series(spec.covariate, index=obs.index)
        if spec.covariate_column is None
        else _covariates(obs[labelled], spec.covariate_column, where).reindex(obs.index)
    )
    symbols = pd.Index(raw.var_names if spec.symbol_column is None else _symbols(raw.var, spec.symbol_column, where))
    ambiguous = symbols.duplicated(keep=False) | symbols.isna()
    order = np.argsort(symbols[~ambiguous].to_numpy().astype(str), kind="stable")
    genes = np.flatnonzero(~ambiguous)[order]

    rows = np.flatnonzero(keep)[labelled]
    counts = sparse.csr_matrix(raw.X[rows][:, genes], dtype=np.float32)
    counts.sort_indices()
    check_counts(counts, where)
    table = pd.DataFrame({"condition": conditions[labelled].astype(str), "covariate": covariates[labelled]})
    if spec.library_size is not None:
        sizes = pd.to_numeric(_column(obs, spec.library_size, where), errors="coerce")[labelled]
        if not (np.isfinite(sizes) & (sizes > 0)).all():
            raise UserError(
                where,
                f"obs[{spec.library_size!r}]",
                "library sizes that are missing, zero or negative",
                "fill the column, or take `library_size` out of the catalog entry",
            )
        table["library_size"] = sizes.astype(np.float64)
    cells = ad.AnnData(X=counts, obs=table, var=pd.DataFrame(index=symbols[genes].astype(str)))
    require_controls(cells.obs, spec.labels, where)
    report = {
        "cells in the file": int(raw.n_obs),
        "cells dropped by the entry's filters": int((~keep).sum()),
        "cells without a label": int((~labelled).sum()),
        "genes in the file": int(raw.n_vars),
        "genes dropped because their symbol occurs more than once": sorted(
            set(symbols[ambiguous].dropna().astype(str))
        ),
        "genes dropped because they have no symbol": int(symbols.isna().sum()),
    }
    return cells, report


def _require_expected(raw: ad.AnnData, spec: DatasetSpec, where: str) -> None:
    expected = spec.expected
    if expected is None:
        return
    labels = condition_labels(_column(raw.obs, spec.labels.column, where), spec.labels, where)
    conditions = len(set(labels.dropna()) - {CONTROL})
    if (raw.n_obs, raw.n_vars, conditions) != (expected.cells, expected.genes, expected.conditions):
        raise UserError(
            where,
            "shape",
            f"{raw.n_obs:,} cells x {raw.n_vars:,} genes, {conditions} conditions; "
            f"{spec.name} has {expected.cells:,} x {expected.genes:,}, {expected.conditions}",
            "give the file that the catalog entry describes, or write an entry of your own for this one",
        )


def condition_labels(labels: pd.Series, rules: Labels, where: str) -> pd.Series:
    """Published labels as conditions; a missing label stays missing.

    The genes of a combination are sorted, so that `B+A` is `A+B`. A label that holds both the entry's
    separator and `+` is refused: it could be read in two ways.
    """
    distinct = pd.Index(labels.dropna().astype(str).unique())
    mapping = {label: _condition(label, rules, where) for label in distinct}
    return labels.astype(object).map(lambda label: mapping.get(str(label)), na_action="ignore")


def _condition(label: str, rules: Labels, where: str) -> str:
    name = label.strip()
    control = {CONTROL, *rules.control}
    if name in control or (rules.control_contains is not None and rules.control_contains in name):
        return CONTROL
    if rules.cut_at is not None:
        name = name.split(rules.cut_at, 1)[0]
    separator = rules.separator
    if separator is not None and separator != SEPARATOR and separator in name and SEPARATOR in name:
        raise UserError(
            where,
            f"obs[{rules.column!r}]",
            f"the label {label!r} holds both separators, {separator!r} and {SEPARATOR!r}",
            "rename it, or set `labels.separator` in the catalog entry to the one that is meant",
        )
    genes = name.split(separator) if separator is not None and separator in name else name.split(SEPARATOR)
    # A combination with control is the perturbation alone (`A+control` in some files).
    genes = sorted({gene.strip() for gene in genes} - control)
    if not genes or any(not gene for gene in genes):
        raise UserError(
            where,
            f"obs[{rules.column!r}]",
            f"the label {label!r} names no gene, or an empty one",
            "mend the label, or add it to `labels.control` in the catalog entry",
        )
    return SEPARATOR.join(genes)


def genes_of(condition: str) -> list[str]:
    """The perturbed genes of a condition; none for control."""
    return [] if condition == CONTROL else condition.split(SEPARATOR)


def check_counts(counts: sparse.csr_matrix, where: str) -> None:
    """Raise UserError unless all stored values are finite whole numbers >= 0."""
    values = counts.data
    checks = [
        ("NaN or infinite counts", ~np.isfinite(values), "remove or mend these cells"),
        ("negative counts", values < 0, "give raw counts, not scaled or corrected expression"),
        (
            "counts that are not whole numbers",
            np.isfinite(values) & (values != np.floor(values)),
            "give raw counts in X; normalised or log-transformed values cannot be used here",
        ),
    ]
    for found, wrong, remedy in checks:
        if wrong.any():
            example = values[wrong][0]
            raise UserError(where, "X", f"{int(wrong.sum()):,} {found} (first: {example:g})", remedy)


def require_controls(obs: pd.DataFrame, rules: Labels, where: str) -> None:
    """Raise UserError where a covariate has no control cells."""
    has_control = (obs["condition"] == CONTROL).groupby(obs["covariate"], observed=True).any()
    without = sorted(has_control.index[~has_control].astype(str))
    if len(has_control) == 0 or without:
        labels = sorted(obs["condition"].astype(str).unique())
        raise UserError(
            where,
            f"obs[{rules.column!r}]",
            f"no control cells in {shown(without) or 'any covariate'}; labels there: {shown(labels, 8)}",
            f"set `labels.control` in the catalog entry (now {rules.control}), or --control",
        )


def _filtered(obs: pd.DataFrame, filters: tuple[Filter, ...], where: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    keep = np.ones(len(obs), dtype=bool)
    for row in filters:
        column = _column(obs, row.column, where)
        if row.op in (">=", "<=") and not pd.api.types.is_numeric_dtype(column):
            raise UserError(
                where,
                f"obs[{row.column!r}]",
                f"{column.dtype} values, of which none is {row.op} {row.value}",
                "filter by a column of numbers, or use `op: ==` or `op: in`",
            )
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
        raise UserError(
            where,
            f"obs[{name!r}]",
            f"{int(column.isna().sum()):,} labelled cells without a covariate",
            "fill the column, or leave these cells out by `filters` in the catalog entry",
        )
    return column.astype(str)


def _symbols(var: pd.DataFrame, column: str, where: str) -> pd.Series:
    if column not in var:
        raise UserError(
            where,
            f"var[{column!r}]",
            f"no such column; there are: {shown(sorted(map(str, var.columns)), 12)}",
            "name the right column in the catalog entry (`symbol_column`)",
        )
    return var[column].astype(object).where(var[column].notna(), None)
