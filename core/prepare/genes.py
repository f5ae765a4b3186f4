"""Which genes stay: those with a symbol of their own, then the most variable ones as scanpy's "seurat" defines them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from core.arrays import Bools, Floats, Ints
from core.errors import UserError, shown

BINS = 20


def choose_columns(symbols: pd.Index) -> tuple[Ints, pd.Index, dict[str, Any]]:
    """Choose (positions of the genes to keep, sorted by symbol; their symbols; what was dropped, for the report).

    Parameters
    ----------
    symbols : pd.Index
        Of all columns of a file. A symbol that is missing, or occurs more than once, names no gene.

    Returns
    -------
    tuple[Ints, pd.Index, dict[str, Any]]
    """
    ambiguous = symbols.duplicated(keep=False) | symbols.isna()
    columns = np.flatnonzero(~ambiguous)
    columns = columns[np.argsort(symbols[columns].to_numpy().astype(str), kind="stable")]
    report = {
        "genes in the file": len(symbols),
        "genes dropped because their symbol occurs more than once": sorted(
            set(symbols[ambiguous].dropna().astype(str))
        ),
        "genes dropped because they have no symbol": int(symbols.isna().sum()),
    }
    return columns, symbols[columns].astype(str), report


def read_symbols(var: pd.DataFrame, column: str, where: str) -> pd.Series:
    """Read the gene symbols in a column of the table of genes; None where there is none.

    Parameters
    ----------
    var : pd.DataFrame
        The table of genes.
    column : str
        Its name.
    where : str
        What the input is called in messages.

    Returns
    -------
    pd.Series

    Raises
    ------
    UserError
        Without this column.
    """
    if column not in var:
        found = f"no such column; there are: {shown(sorted(map(str, var.columns)), 12)}"
        remedy = "name the right column in the catalog entry (`symbol_column`)"
        raise UserError(where, f"var[{column!r}]", found, remedy)
    return var[column].astype(object).where(var[column].notna(), None)


def measure_expression(parts: Iterable[sparse.csr_matrix], n_genes: int) -> tuple[Floats, Floats]:
    """Return the mean and variance (n-1) over cells of each gene's normalised expression.

    Parameters
    ----------
    parts : Iterable[sparse.csr_matrix]
        Cells x genes, log1p of the normalised counts, some cells at a time; moments are of expm1 of it.
    n_genes : int
        Number of genes.

    Returns
    -------
    tuple[Floats, Floats]
    """
    n, total, squares = 0, np.zeros(n_genes), np.zeros(n_genes)
    for part in parts:
        # In the input's own precision, as scanpy takes it; the sums are float64.
        values = np.expm1(part.data).astype(np.float64)
        n += part.shape[0]
        total += np.bincount(part.indices, weights=values, minlength=n_genes)
        squares += np.bincount(part.indices, weights=values * values, minlength=n_genes)
    mean = total / n
    variance = (squares / n - mean * mean) * (n / (n - 1))
    return mean, variance


def choose_variable_genes(mean: Floats, variance: Floats, genes: pd.Index, n_top: int) -> Bools:
    """Return the mask of the `n_top` genes of highest normalised dispersion (Satija et al. 2015; scanpy's "seurat").

    Equal to `scanpy.pp.highly_variable_genes(flavor="seurat", n_top_genes=n_top)` but for ties at the cut, which the
    gene's name decides (scanpy takes all of them). All genes, if there are no more than `n_top`.

    Parameters
    ----------
    mean, variance : Floats
        Per gene, of the normalised expression (not log).
    genes : pd.Index
        Their names.
    n_top : int
        How many.

    Returns
    -------
    Bools
    """
    if len(genes) <= n_top:
        return np.ones(len(genes), dtype=bool)
    mean = np.where(mean == 0, 1e-12, mean)
    dispersion = variance / mean
    with np.errstate(divide="ignore", invalid="ignore"):
        dispersion = np.log(np.where(dispersion == 0, np.nan, dispersion))
    table = pd.DataFrame({"dispersion": dispersion, "bin": pd.cut(pd.Series(np.log1p(mean)), bins=BINS)})
    bins = table.groupby("bin", observed=True)["dispersion"].agg(["mean", "std"])
    # A gene alone in its bin has no spread: its normalised dispersion is 1.
    alone = bins["std"].isna()
    bins.loc[alone, "std"] = bins.loc[alone, "mean"]
    bins.loc[alone, "mean"] = 0.0
    of_gene = bins.loc[table["bin"]]
    normalised = (table["dispersion"].to_numpy() - of_gene["mean"].to_numpy()) / of_gene["std"].to_numpy()
    ranked = pd.DataFrame({"dispersion": normalised, "gene": genes.astype(str)})
    top = ranked.dropna(subset=["dispersion"]).sort_values(["dispersion", "gene"], ascending=[False, True])
    mask = np.zeros(len(genes), dtype=bool)
    mask[top.index[:n_top]] = True
    return mask
