"""The preprocessed mirror's layout: its cells, halves and folds, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from core.errors import UserError
from core.prepare.cells import read_cells, write_cells
from core.prepare.mirror import has_mirror_layout, is_mirror, take_mirror_cells


def test_a_mirror_is_known_by_its_columns(mirror: ad.AnnData, pairs_cells: ad.AnnData) -> None:
    assert is_mirror(mirror.obs)
    assert not is_mirror(pairs_cells.obs)
    for column in ("condition", "donor_id", "tech_dup_split", "split_fold_0"):
        other = mirror.copy()
        del other.obs[column]
        assert not is_mirror(other.obs)


def test_cells_are_ours_again(mirror: ad.AnnData, pairs_cells: ad.AnnData) -> None:
    cells = take_mirror_cells(mirror, "mirror.h5ad")
    assert not cells.obs["condition"].str.startswith("ctrl").any()
    pd.testing.assert_index_equal(cells.obs_names, pairs_cells.obs_names)
    pd.testing.assert_index_equal(cells.var_names, pairs_cells.var_names, check_names=False)
    columns = ["condition", "covariate", "half", "fold_0", "fold_1"]
    pd.testing.assert_frame_equal(cells.obs[columns], pairs_cells.obs[columns].astype(str), check_names=False)
    assert (cells.X != pairs_cells.X).nnz == 0
    assert cells.X.dtype == np.float32


def test_conditions_that_only_look_like_controls_stay(mirror: ad.AnnData) -> None:
    labels = mirror.obs["condition"].astype(str)
    mirror.obs.loc[labels == "ctrl_synthetic_mean", "tech_dup_split"] = ["first_half", "second_half"] * 2 + [
        "first_half"
    ]
    mirror.obs["condition"] = labels.replace(
        {"ctrl_synthetic_mean": "CTRL1", labels[labels != "control"].iloc[0]: "CTR9"}
    )
    found = set(take_mirror_cells(mirror, "mirror.h5ad").obs["condition"])
    assert {"control", "CTRL1", "CTR9"} <= found


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("tech_dup_split", "third", "third"),
        ("split_fold_1", "nan", "nan"),
        ("split_fold_0", "val", "in several splits"),
    ],
)
def test_a_mirror_that_contradicts_itself_is_refused(mirror: ad.AnnData, column: str, value: str, found: str) -> None:
    labels = mirror.obs[column].astype(str)
    mirror.obs[column] = labels.where(~_first_training_cell(mirror), value)
    with pytest.raises(UserError) as error:
        take_mirror_cells(mirror, "mirror.h5ad")
    assert found in error.value.found
    assert column in error.value.field


def test_a_condition_with_cells_in_one_half_only_is_refused(mirror: ad.AnnData) -> None:
    condition = mirror.obs["condition"][_first_training_cell(mirror)].iloc[0]
    half = mirror.obs["tech_dup_split"].astype(str)
    mirror.obs["tech_dup_split"] = half.where(mirror.obs["condition"] != condition, "second_half")
    with pytest.raises(UserError, match=f"no cell of .*{condition}.* in one of the halves"):
        take_mirror_cells(mirror, "mirror.h5ad")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        ("counts", "whole numbers only: these are counts"),
        ("negative", "negative"),
        ("layer", "not whole numbers"),
        ("training", "no perturbation to train with"),
    ],
)
def test_a_mirror_that_cannot_be_used_is_refused(
    mirror: ad.AnnData, entry: Callable[..., Any], tmp_path: Path, spoil: str, found: str
) -> None:
    if spoil == "counts":
        mirror.X = np.ceil(mirror.X * 2)
    elif spoil == "negative":
        mirror.X[3, 4] = -1
    elif spoil == "layer":
        mirror.layers["counts"] = mirror.X + 0.5
    else:
        perturbed = (mirror.obs["condition"] != "control").to_numpy()
        mirror.obs["split_fold_0"] = mirror.obs["split_fold_0"].astype(str)
        mirror.obs.loc[perturbed & (mirror.obs["split_fold_0"] == "train").to_numpy(), "split_fold_0"] = "val"
    mirror.write_h5ad(tmp_path / "mirror.h5ad")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=found):
        write_cells(tmp_path / "mirror.h5ad", entry(task="combination"), {}, tmp_path / "out", 100_000)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("fields", "field", "found"),
    [
        ({"task": "single", "folds": 2}, "task", "of combination conditions; the entry says single"),
        ({}, "folds", "1 folds in a mirror file; the entry says 2"),
    ],
)
def test_a_mirror_that_is_not_what_the_entry_says_is_refused(
    mirror: ad.AnnData, entry: Callable[..., Any], tmp_path: Path, fields: dict[str, Any], field: str, found: str
) -> None:
    if not fields:
        del mirror.obs["split_fold_1"]
    mirror.write_h5ad(tmp_path / "mirror.h5ad")
    with pytest.raises(UserError, match=found) as error:
        write_cells(tmp_path / "mirror.h5ad", entry(**({"task": "combination"} | fields)), {}, tmp_path)
    assert error.value.field == field


def test_the_layout_is_said_and_told_from_the_columns_alone(
    mirror: ad.AnnData, entry: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mirror.h5ad"
    mirror.write_h5ad(path)
    assert has_mirror_layout(path)
    with caplog.at_level("INFO", "calipert"):
        write_cells(path, entry(task="combination"), {}, tmp_path)
    assert "mirror.h5ad has the layout of a preprocessed mirror" in caplog.text
    del mirror.obs["tech_dup_split"]
    mirror.write_h5ad(path)
    assert not has_mirror_layout(path)
    assert not has_mirror_layout(tmp_path / "absent.h5ad")
    with pytest.raises(UserError):
        write_cells(path, entry(task="combination", labels={"column": "condition"}), {}, tmp_path)
    assert "not all columns of a preprocessed mirror" in caplog.text


def test_a_mirror_without_control_is_refused(mirror: ad.AnnData) -> None:
    with pytest.raises(UserError, match="no 'control' cell in all"):
        take_mirror_cells(mirror[mirror.obs["condition"] != "control"].copy(), "mirror.h5ad")


def _first_training_cell(mirror: ad.AnnData) -> pd.Series:
    single = ~mirror.obs["condition"].str.contains("+", regex=False) & ~mirror.obs["condition"].str.startswith("c")
    return pd.Series(mirror.obs_names == mirror.obs_names[single][0], index=mirror.obs_names)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_prepare_takes_the_mirrors_cells_halves_and_folds(
    mirror: ad.AnnData, pairs_cells: ad.AnnData, entry: Callable[..., Any], tmp_path: Path, counts: bool, memory: int
) -> None:
    if counts:
        of_cell = pairs_cells.layers["counts"][pairs_cells.obs_names.get_indexer(mirror.obs_names)]
        mirror.layers["counts"] = of_cell[:, pairs_cells.var_names.get_indexer(mirror.var_names)]
    mirror.write_h5ad(tmp_path / "mirror.h5ad")
    write_cells(tmp_path / "mirror.h5ad", entry(task="combination"), {}, tmp_path, memory)
    cells = read_cells(tmp_path).to_memory()
    pd.testing.assert_index_equal(cells.obs_names, pairs_cells.obs_names)
    columns = ["condition", "covariate", "half", "fold_0", "fold_1"]
    pd.testing.assert_frame_equal(
        cells.obs[columns].astype(str), pairs_cells.obs[columns].astype(str), check_names=False
    )
    assert (cells.X != pairs_cells.X).nnz == 0
    assert ("counts" in cells.layers) == counts
    if counts:
        assert (cells.layers["counts"] != pairs_cells.layers["counts"]).nnz == 0
    report = json.loads(cells.uns["preparation"])
    assert report["synthetic control cells left out"] == 5
