"""What a model may see of one fold: its train and val cells, never a test cell."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import pandas as pd

from core.errors import UserError
from core.harmonising import CONTROL
from core.reference import KEYS


def write_fold(cells: ad.AnnData, fold: int, folder: Path) -> None:
    """Write what a model may see of a fold into `folder`: train.h5ad (train and val cells) and control.h5ad."""
    training_cells(cells, fold).write_h5ad(folder / "train.h5ad", compression="lzf")
    training_controls(cells, fold).write_h5ad(folder / "control.h5ad", compression="lzf")


def training_cells(cells: ad.AnnData, fold: int) -> ad.AnnData:
    """The fold's train and val cells, control included: X log1p, layers["counts"], obs covariate, condition, split.

    Nothing else of the cells goes along: no halves, no other fold's splits, no report on the whole data set.
    """
    split = cells.obs[f"fold_{fold}"].astype(str)
    return _bare(cells, split, split.isin(["train", "val"]))


def training_controls(cells: ad.AnnData, fold: int) -> ad.AnnData:
    """The control cells of the fold's train split, laid out as `training_cells`.

    Raises UserError where a covariate has none.
    """
    split = cells.obs[f"fold_{fold}"].astype(str)
    controls = _bare(cells, split, (split == "train") & (cells.obs["condition"] == CONTROL))
    without = sorted(set(cells.obs["covariate"].astype(str)) - set(controls.obs["covariate"]))
    if without:
        raise UserError(
            "cells", f"fold_{fold}", f"no control cell to train with in {without[0]}", "give more control cells"
        )
    return controls


def _bare(cells: ad.AnnData, split: pd.Series, kept: pd.Series) -> ad.AnnData:
    rows = kept.to_numpy()
    obs = pd.DataFrame({key: cells.obs[key].astype(str) for key in KEYS}).assign(split=split)[rows]
    layers = {"counts": cells.layers["counts"][rows]} if "counts" in cells.layers else {}
    return ad.AnnData(X=cells.X[rows], layers=layers, obs=obs, var=pd.DataFrame(index=cells.var_names))
