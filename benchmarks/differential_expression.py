"""Differential expression of every condition against scanpy's, and how often the cells are read for it.

    python -m benchmarks.differential_expression

Ours is what the reference is made with: moments of every condition in one pass, then Welch's t from these. scanpy runs
`rank_genes_groups(method="t-test_overestim_var", reference="rest")` on the same cells, in float64, since it takes sums
in the type of the matrix (its t statistics come back as float32: rounded to 6e-8).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import typer
from scipy import sparse

from benchmarks.comparison import CONSOLE, Timing, agreement, machine, show, show_agreement, show_times, timed
from benchmarks.made_up_cells import log_cells
from core.arrays import Floats, Ints
from core.stats.differential_expression import compare_with_rest
from core.stats.moments import sum_groups

TOLERANCE = 1e-6
AIM = ">= 50x (below 25x: too slow)"
GROUPINGS = (100, 300, 1000)


class CountedRows:
    """A matrix that counts how many of its rows are read."""

    def __init__(self, matrix: Any) -> None:
        self.matrix, self.shape, self.rows_read = matrix, matrix.shape, 0

    def __getitem__(self, rows: slice) -> Any:
        part = self.matrix[rows]
        self.rows_read += part.shape[0]
        return part


def ours(X: Any, codes: Ints, conditions: int) -> tuple[Floats, Floats]:
    """(t, adjusted p), conditions x genes."""
    return compare_with_rest(sum_groups(X, codes, conditions))


def ours_from_disk(path: Path, codes: Ints, conditions: int) -> tuple[Floats, Floats]:
    """Compute the same from a file."""
    cells = ad.read_h5ad(path, backed="r")
    result = ours(cells.X, codes, conditions)
    cells.file.close()
    return result


def scanpys(cells: ad.AnnData, groups: list[str]) -> dict[str, np.ndarray]:
    """Compute scanpy's table of results of some conditions, by field."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's own, of how it fills its table
        sc.tl.rank_genes_groups(
            cells, "condition", groups=groups, reference="rest", method="t-test_overestim_var", use_raw=False
        )
    table: dict[str, np.ndarray] = cells.uns.pop("rank_genes_groups")
    return table


def as_cells(X: sparse.csr_matrix, codes: Ints) -> ad.AnnData:
    """Prepare the cells as scanpy takes them."""
    names = [f"c{number:04d}" for number in range(codes.max() + 1)]
    obs = pd.DataFrame(
        {"condition": pd.Categorical.from_codes(codes, names)}, index=[f"cell{i}" for i in range(len(codes))]
    )
    var = pd.DataFrame(index=[f"G{number:05d}" for number in range(X.shape[1])])
    return ad.AnnData(X, obs=obs, var=var, uns={"log1p": {"base": None}})


def in_order(table: dict[str, np.ndarray], field: str, groups: list[str], genes: pd.Index) -> Floats:
    """Read a field of scanpy's results, conditions x genes: scanpy sorts the genes of each condition by score."""
    values = np.empty((len(groups), len(genes)))
    for row, group in enumerate(groups):
        values[row, genes.get_indexer(table["names"][group])] = table[field][group]
    return values


def main(
    conditions: Annotated[int, typer.Option(min=8, help="Number of conditions.")] = 300,
    cells: Annotated[int, typer.Option(min=64, help="Number of cells.")] = 30_000,
    genes: Annotated[int, typer.Option(min=10, help="Number of genes.")] = 8_000,
    filled: Annotated[float, typer.Option(help="Share of the entries that are not 0.")] = 0.1,
    peer_conditions: Annotated[
        int, typer.Option(min=0, help="Run the peer on so many of the conditions and scale its time; 0: all.")
    ] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of ours, of which the fastest counts.")] = 3,
) -> None:
    """Compare with scanpy's t-test_overestim_var; exit 1 where results differ by more than 1e-6 relative."""
    X, codes = log_cells(conditions, cells, genes, filled)
    data = as_cells(X, codes)
    CONSOLE.print(machine("anndata", "scanpy"))
    CONSOLE.print(
        f"{conditions:,} conditions, {cells:,} cells, {genes:,} genes, {X.nnz / X.shape[0] / genes:.1%} filled\n"
    )

    in_memory, (t, padj) = timed(lambda: ours(X, codes, conditions), repeats)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        data.write_h5ad(path)
        on_disk, (t_disk, padj_disk) = timed(lambda: ours_from_disk(path, codes, conditions), repeats)
    readings = [_reading(X, number) for number in GROUPINGS if number * 4 <= cells]

    names = list(data.obs["condition"].cat.categories)
    asked = np.unique(np.linspace(0, conditions - 1, peer_conditions or conditions).astype(int))
    groups = [names[row] for row in asked]
    data.X = X.astype(np.float64)
    small = data[: min(cells, 500), : min(genes, 50)].copy()
    scanpys(small, list(small.obs["condition"].cat.categories[:2]))  # what it compiles at first use is not counted
    seconds, table = timed(lambda: scanpys(data, groups))
    peer = seconds * conditions / len(groups)

    measured = "" if len(groups) == conditions else f" ({len(groups)} conditions in {seconds:.1f} s, scaled)"
    show_times(
        "Times",
        [
            Timing("scanpy, cells in memory" + measured, peer),
            Timing("calipert, cells in memory", in_memory, peer / in_memory, AIM),
            Timing("calipert, cells on disk", on_disk, peer / on_disk, AIM),
        ],
    )
    show("One pass, whatever the number of conditions", ("conditions", "rows read / rows", "seconds"), readings)
    expected = {name: in_order(table, name, groups, data.var_names) for name in ("scores", "pvals_adj")}
    show_agreement(
        [
            agreement("t", t[asked], expected["scores"], TOLERANCE, "relative"),
            agreement("adjusted p", padj[asked], expected["pvals_adj"], TOLERANCE, "relative"),
            agreement("t, disk against memory", t_disk, t, 0.0, "absolute"),
            agreement("adjusted p, disk against memory", padj_disk, padj, 0.0, "absolute"),
        ]
    )
    CONSOLE.print(f"{(padj < 0.05).mean():.1%} of the adjusted p-values are below 0.05.")


def _reading(X: sparse.csr_matrix, conditions: int) -> tuple[str, str, str]:
    """Time the same cells in other groups, as neighbours, and count the rows that are read."""
    counted = CountedRows(X)
    codes = np.arange(X.shape[0]) * conditions // X.shape[0]
    seconds, _ = timed(lambda: ours(counted, codes, conditions))
    return f"{conditions:,}", f"{counted.rows_read / X.shape[0]:.2f}", f"{seconds:.3f}"


if __name__ == "__main__":
    typer.run(main)
