"""Reading h5ad files, the whole or only the names in them, and writing them some rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import anndata as ad
import h5py
import pandas as pd
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from core.errors import UserError

# Half a megabyte a chunk: HDF5 keeps one such chunk at hand. More than 2^31 values must be countable.
STORAGE = {"compression": "lzf", "chunks": (1 << 17,), "indptr_dtype": "int64"}


def open_h5ad(path: Path) -> ad.AnnData:
    """The AnnData in `path`, in memory. Raises UserError where there is no such file or it is not an h5ad."""
    return _opened(path, backed=None)


def _opened(path: Path, backed: Literal["r"] | None) -> ad.AnnData:
    if not path.is_file():
        raise UserError(path, "file", "no such file", "check the path, or name the file as the data set's source")
    try:
        return ad.read_h5ad(path, backed=backed)
    except MemoryError:
        raise
    # A damaged or foreign file makes h5py and anndata raise almost anything, classes of their own included.
    except Exception as error:
        raise UserError(
            path,
            "format",
            f"not a readable h5ad ({type(error).__name__}: {error})",
            "give an AnnData .h5ad file",
        ) from error


def read_names(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Only the tables of the rows (obs) and the columns (var) of an h5ad. Raises UserError as `open_h5ad` does."""
    backed = _opened(path, backed="r")
    try:
        return backed.obs.copy(), backed.var.copy()
    finally:
        backed.file.close()


def read_obs(path: Path) -> pd.DataFrame:
    """Only the description of the rows of an h5ad."""
    return read_names(path)[0]


def read_genes(path: Path) -> pd.Index:
    """Only the names of the columns of an h5ad."""
    return read_names(path)[1].index


def write_by_rows(path: Path, frame: ad.AnnData, parts: Iterable[Mapping[str, sparse.csr_matrix]]) -> None:
    """Write an h5ad whose matrices come some rows at a time.

    frame: all but the matrices. parts: the next rows of each matrix by its place in the file, "X" or "layers/<name>",
    CSR; together as many rows as `frame` has.
    """
    frame.write_h5ad(path)
    matrices = {}
    with h5py.File(path, "r+") as file:
        for part in parts:
            for place, rows in part.items():
                if place not in matrices:
                    write_elem(file, place, rows[:0], dataset_kwargs=STORAGE)
                    matrices[place] = sparse_dataset(file[place])
                matrices[place].append(rows)
