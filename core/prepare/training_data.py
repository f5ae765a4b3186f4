"""What a model may see of one fold: its train and val cells, never a test cell."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import pandas as pd
from scipy import sparse

from core.arrays import Bools
from core.conditions import CONTROL, KEYS
from core.errors import UserError
from core.io.h5ad import write_by_rows
from core.io.panels import read_ahead, split_rows
from core.prepare.files import FOLD_CELLS, FOLD_CONTROL


def write_fold(cells: ad.AnnData, fold: int, folder: Path) -> None:
    """Write what a model may see of a fold into `folder`.

    train.h5ad has the train and val cells, control.h5ad the control cells of the train split. Both hold X log1p,
    layers["counts"] where the cells have it, obs covariate, condition, split; nothing else of the cells goes along: no
    halves, no other fold's splits, no report on the whole data set.

    Parameters
    ----------
    cells : ad.AnnData
        In memory or on disk, read a panel at a time.
    fold : int
        Number of the fold.
    folder : Path
        Where the files lie, or go.

    Raises
    ------
    UserError
        Where a covariate has no control cell to train with.
    """
    split = cells.obs[f"fold_{fold}"].astype(str)
    in_training = split.isin(["train", "val"]).to_numpy()
    controls = ((split == "train") & (cells.obs["condition"] == CONTROL)).to_numpy()
    covariates = cells.obs["covariate"].astype(str)
    without = sorted(set(covariates) - set(covariates[controls]))
    if without:
        raise UserError(
            "cells", f"fold_{fold}", f"no control cell to train with in {without[0]}", "give more control cells"
        )
    _write(cells, split, in_training, folder / FOLD_CELLS)
    _write(cells, split, controls, folder / FOLD_CONTROL)


def _write(cells: ad.AnnData, split: pd.Series, kept: Bools, path: Path) -> None:
    obs = pd.DataFrame({key: cells.obs[key].astype(str) for key in KEYS}).assign(split=split)[kept]
    matrices = {"X": cells.X}
    if "counts" in cells.layers:
        matrices["layers/counts"] = cells.layers["counts"]
    wanted = [span for span in split_rows(len(kept)) if kept[span].any()]

    def read(span: slice) -> dict[str, sparse.csr_matrix]:
        return {place: sparse.csr_matrix(matrix[span])[kept[span]] for place, matrix in matrices.items()}

    write_by_rows(path, ad.AnnData(obs=obs, var=pd.DataFrame(index=cells.var_names)), read_ahead(read, wanted))
