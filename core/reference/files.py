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
from core.io.h5ad import read_names

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
    return read_names(folder / REFERENCE)[0].astype(dict.fromkeys(KEYS, str)).reset_index(drop=True)


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


def find_negatives(negatives: ad.AnnData, kind: str, keys: pd.DataFrame) -> Floats:
    """Return for each (covariate, condition) the profile of a negative control.

    Parameters
    ----------
    negatives : ad.AnnData
        From negatives.h5ad.
    kind : str
        `control_mean` is that of the covariate, `dataset_mean` that of the fold in which the condition is test; NaN if
        it never is.
    keys : pd.DataFrame
        The table of conditions: covariate, condition and more.

    Returns
    -------
    Floats
    """
    of_kind = negatives[negatives.obs["kind"] == kind]
    index = pd.MultiIndex.from_arrays([of_kind.obs["covariate"].astype(str), of_kind.obs["fold"].astype(int)])
    fold = keys["test_fold"].astype(int) if kind == "dataset_mean" else np.full(len(keys), -1)
    rows = index.get_indexer(pd.MultiIndex.from_arrays([keys["covariate"].astype(str), fold]))
    profiles = np.asarray(of_kind.X, dtype=np.float64)[rows]
    profiles[rows < 0] = np.nan
    return np.asarray(profiles)
