"""Reading h5ad files: the whole, or only the names in them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import anndata as ad
import pandas as pd

from core.errors import UserError


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
