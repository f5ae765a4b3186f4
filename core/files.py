"""Reading h5ad files: the whole, or only the names in them."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import pandas as pd

from core.errors import UserError


def open_h5ad(path: Path) -> ad.AnnData:
    """The AnnData in `path`, in memory. Raises UserError where there is no such file or it is not an h5ad."""
    if not path.is_file():
        raise UserError(path, "file", "no such file", "check the path, or name the file as the data set's source")
    try:
        return ad.read_h5ad(path)
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


def read_obs(path: Path) -> pd.DataFrame:
    """Only the description of the rows of an h5ad."""
    backed = ad.read_h5ad(path, backed="r")
    try:
        obs: pd.DataFrame = backed.obs.copy()
    finally:
        backed.file.close()
    return obs


def read_genes(path: Path) -> pd.Index:
    """Only the names of the columns of an h5ad."""
    backed = ad.read_h5ad(path, backed="r")
    try:
        genes: pd.Index = backed.var_names.copy()
    finally:
        backed.file.close()
    return genes
