"""The files of a reference: their names, and how each is read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from core.arrays import Floats
from core.conditions import KEYS
from core.io.h5ad import read_genes, read_obs

REFERENCE = "reference.h5ad"
NEGATIVES = "negatives.h5ad"
HALF_SPLITS = "half_splits"  # a folder


def read_reference(folder: Path, layers: Collection[str] | None = None) -> tuple[ad.AnnData, ad.AnnData]:
    """Return (reference, negatives) that `write_reference` wrote into `folder`; of the reference's layers only these.

    Parameters
    ----------
    folder : Path
        Where the files lie, or go.
    layers : Collection[str] | None
        Names of the layers.

    Returns
    -------
    tuple[ad.AnnData, ad.AnnData]
    """
    return read_layers(folder / REFERENCE, layers), ad.read_h5ad(folder / NEGATIVES)


def read_layers(path: Path, layers: Collection[str] | None = None) -> ad.AnnData:
    """Return the reference or half split in `path` with those of its layers that are named; None: all.

    Parameters
    ----------
    path : Path
        The file.
    layers : Collection[str] | None
        Names of the layers.

    Returns
    -------
    ad.AnnData
    """
    with h5py.File(path) as file:
        wanted = [name for name in file["layers"] if layers is None or name in layers]
        return ad.AnnData(
            obs=read_elem(file["obs"]),
            var=read_elem(file["var"]),
            layers={name: read_elem(file["layers"][name]) for name in wanted},
        )


def read_keys(folder: Path) -> pd.DataFrame:
    """Return only the rows' description (covariate, condition, n_cells, test_fold, ...) of the reference in `folder`.

    Parameters
    ----------
    folder : Path
        Where the files lie, or go.

    Returns
    -------
    pd.DataFrame
    """
    return read_obs(folder / REFERENCE).astype(dict.fromkeys(KEYS, str)).reset_index(drop=True)


def read_reference_genes(folder: Path) -> pd.Index:
    """Return only the genes of the reference in `folder`.

    Parameters
    ----------
    folder : Path
        Where the files lie, or go.

    Returns
    -------
    pd.Index
    """
    return read_genes(folder / REFERENCE)


def find_half_splits(folder: Path) -> dict[int, Path]:
    """Seed -> file of the further half splits in `folder`, in the order of the seeds.

    Parameters
    ----------
    folder : Path
        Where the files lie, or go.

    Returns
    -------
    dict[int, Path]
    """
    files = (folder / HALF_SPLITS).glob("seed_*.h5ad")
    return dict(sorted((int(file.stem.removeprefix("seed_")), file) for file in files))


def find_dataset_means(negatives: ad.AnnData, keys: pd.DataFrame) -> Floats:
    """Return for each (covariate, condition) the dataset_mean of the fold in which it is test; NaN if it never is.

    Parameters
    ----------
    negatives : ad.AnnData
        From negatives.h5ad.
    keys : pd.DataFrame
        The table of conditions: covariate, condition and more.

    Returns
    -------
    Floats
    """
    return _rows_of(negatives, "dataset_mean", keys["covariate"], keys["test_fold"])


def find_control_means(negatives: ad.AnnData, keys: pd.DataFrame) -> Floats:
    """Return for each (covariate, condition) the control_mean of its covariate.

    Parameters
    ----------
    negatives : ad.AnnData
        From negatives.h5ad.
    keys : pd.DataFrame
        The table of conditions: covariate, condition and more.

    Returns
    -------
    Floats
    """
    return _rows_of(negatives, "control_mean", keys["covariate"], pd.Series(-1, index=keys.index))


def _rows_of(negatives: ad.AnnData, kind: str, covariate: pd.Series, fold: pd.Series) -> Floats:
    of_kind = negatives[negatives.obs["kind"] == kind]
    index = pd.MultiIndex.from_arrays([of_kind.obs["covariate"].astype(str), of_kind.obs["fold"].astype(int)])
    rows = index.get_indexer(pd.MultiIndex.from_arrays([covariate.astype(str), fold.astype(int)]))
    profiles = np.asarray(of_kind.X, dtype=np.float64)[rows]
    profiles[rows < 0] = np.nan
    return np.asarray(profiles)
