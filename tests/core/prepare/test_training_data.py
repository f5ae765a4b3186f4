"""A model gets its fold's training cells and nothing that could tell it of the test."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from core.errors import UserError
from core.io.panels import split_rows
from core.prepare.splits import list_fold_columns
from core.prepare.training_data import write_fold


def texts_of(path: Path) -> set[str]:
    """All text anywhere in a file: names of groups and attributes, values, categories."""
    found: set[str] = set()

    def visit(name: str, item: Any) -> None:
        found.update(name.split("/"))
        found.update(str(value) for pair in item.attrs.items() for value in pair)
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "OSU":
            found.update(value.decode() if isinstance(value, bytes) else str(value) for value in np.ravel(item[()]))

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return found


@pytest.fixture(scope="module")
def annotated(screen: ad.AnnData) -> ad.AnnData:
    """Cells with everything that a cells.h5ad may hold, and more."""
    cells = screen.copy()
    cells.uns["provenance"] = "{}"
    cells.obs["library_size"] = 1.0
    cells.var["dispersion"] = 1.0
    cells.obsm["X_pca"] = np.zeros((cells.n_obs, 2))
    cells.layers["scaled"] = cells.X.copy()
    return cells


def test_the_folder_holds_no_test_cell_and_nothing_else_in_any_fold(annotated: ad.AnnData, tmp_path: Path) -> None:
    obs = annotated.obs
    for fold, column in enumerate(list_fold_columns(obs)):
        folder = tmp_path / str(fold)
        folder.mkdir()
        write_fold(annotated, fold, folder)
        assert sorted(file.name for file in folder.iterdir()) == ["control.h5ad", "train.h5ad"]
        split = obs[column].astype(str)
        control = (obs["condition"] == "control") & (split == "train")
        for name, mine in (("train.h5ad", split.isin(["train", "val"])), ("control.h5ad", control)):
            written = ad.read_h5ad(folder / name)
            expected = annotated[mine.to_numpy()]
            assert list(written.obs_names) == list(expected.obs_names)
            assert not set(written.obs_names) & set(obs.index[split == "test"])
            assert list(written.obs.columns) == ["covariate", "condition", "split"]
            assert (written.obs["split"].astype(str) == split[mine]).all()
            for key in ("covariate", "condition"):
                assert (written.obs[key].astype(str) == expected.obs[key].astype(str)).all()
            assert (written.X != expected.X).nnz == 0
            assert (written.layers["counts"] != expected.layers["counts"]).nnz == 0
            assert list(written.var_names) == list(annotated.var_names)
            assert list(written.layers) == ["counts"]
            others = (written.var.columns, written.uns, written.obsm, written.obsp, written.varm, written.varp)
            assert [len(other) for other in others] == [0] * 6
            assert written.raw is None
            # Nowhere in the file, categories included, is there a test cell's name or a test condition's.
            texts = texts_of(folder / name)
            assert set(expected.obs_names) <= texts
            tested = obs[(split == "test").to_numpy()]
            secret = set(tested.index) | (set(tested["condition"].astype(str)) - {"control"} - set(annotated.var_names))
            assert not texts & secret
            assert not texts & {
                "half",
                "first_half",
                "second_half",
                *list_fold_columns(obs),
                "provenance",
                "preparation",
            }
        trained = ad.read_h5ad(folder / "train.h5ad")
        assert set(trained.obs["split"]) == {"train", "val"}
        assert set(trained.obs.loc[trained.obs["condition"] == "control", "split"]) == {"train", "val"}


def written_fold(cells: ad.AnnData, fold: int, folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """(train.h5ad, control.h5ad) of a fold."""
    folder.mkdir()
    write_fold(cells, fold, folder)
    return ad.read_h5ad(folder / "train.h5ad"), ad.read_h5ad(folder / "control.h5ad")


def test_a_test_condition_is_in_no_split_of_its_fold(screen: ad.AnnData, tmp_path: Path) -> None:
    obs = screen.obs
    for fold, column in enumerate(list_fold_columns(obs)):
        training, controls = written_fold(screen, fold, tmp_path / str(fold))
        perturbed = obs[obs["condition"] != "control"]
        tested = set(perturbed.loc[perturbed[column] == "test", "condition"])
        assert tested
        assert not tested & set(training.obs["condition"])
        assert set(controls.obs["condition"]) == {"control"}


def test_cells_on_disk_and_panels_give_the_same(screen: ad.AnnData, tmp_path: Path, monkeypatch) -> None:
    screen.write_h5ad(tmp_path / "cells.h5ad")
    whole = written_fold(screen, 1, tmp_path / "whole")
    monkeypatch.setattr("core.prepare.training_data.split_rows", partial(split_rows, rows=31))
    pieces = written_fold(ad.read_h5ad(tmp_path / "cells.h5ad", backed="r"), 1, tmp_path / "pieces")
    for a, b in zip(whole, pieces, strict=True):
        pd.testing.assert_frame_equal(a.obs, b.obs)
        for x, y in ((a.X, b.X), (a.layers["counts"], b.layers["counts"])):
            assert x.shape == y.shape
            assert (x != y).nnz == 0


def test_cells_without_counts_are_given_without(single_cells: ad.AnnData, tmp_path: Path) -> None:
    cells = single_cells.copy()
    del cells.layers["counts"]
    assert [list(part.layers) for part in written_fold(cells, 0, tmp_path / "fold")] == [[], []]


def test_no_control_to_train_with_is_refused(lines_cells: ad.AnnData, tmp_path: Path) -> None:
    cells = lines_cells.copy()
    controls = (cells.obs["condition"] == "control") & (cells.obs["covariate"] == "line_2")
    cells.obs.loc[controls, "fold_1"] = "test"
    write_fold(cells, 0, tmp_path)
    with pytest.raises(UserError, match=re.escape("no control cell to train with in line_2")) as error:
        write_fold(cells, 1, tmp_path)
    assert (error.value.where, error.value.field) == ("cells", "fold_1")
    assert error.value.remedy == "give more control cells"
