"""reference.h5ad and negatives.h5ad hold the truth and controls that docs/science.md, sections 2 and 3, define."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from core.catalog.registry import Catalog
from core.errors import UserError
from core.io.h5ad import open_h5ad
from core.prepare.mirror import take_mirror_cells
from core.prepare.splits import draw_halves, list_fold_columns
from core.reference.build import build_half_split, build_negatives, build_reference, write_reference
from core.reference.cell_sums import CellSums
from core.reference.files import find_half_splits, find_negatives, read_keys, read_reference
from core.reference.linear_baseline import predict_linear
from core.reference.stored_profiles import read_stored_reference
from core.stats.differential_expression import compare_with_rest
from core.stats.moments import Moments

Sums = Callable[..., CellSums]

Prepare = Callable[..., ad.AnnData]


class Built(NamedTuple):
    """Cells, dense and in float64, and what is made of them."""

    cells: ad.AnnData
    x: np.ndarray
    obs: pd.DataFrame
    negatives: ad.AnnData
    reference: ad.AnnData

    def mean(self, mask: pd.Series) -> np.ndarray:
        """Mean profile of some cells."""
        profile: np.ndarray = self.x[mask.to_numpy()].mean(axis=0)
        return profile

    def of(self, covariate: str, condition: str) -> pd.Series:
        return (self.obs["covariate"] == covariate) & (self.obs["condition"] == condition)

    def trained(self, covariate: str, fold: int) -> list[str]:
        """The perturbed conditions of the covariate that train in a fold."""
        mine = self.obs[(self.obs["covariate"] == covariate) & (self.obs[f"fold_{fold}"] == "train")]
        return sorted(set(mine["condition"]) - {"control"})


@pytest.fixture(scope="module")
def built(sums: Sums, screen: ad.AnnData) -> Built:
    negatives = build_negatives(sums(screen))
    reference = build_reference(sums(screen), negatives, 42)
    return Built(screen, screen.X.toarray().astype(np.float64), screen.obs.astype(str), negatives, reference)


def rows_of(built: Built) -> list[tuple[np.ndarray, str, str, int]]:
    """(mask of the row, covariate, condition, fold in which it is test) of each row of the reference."""
    obs = built.reference.obs
    return [
        (obs.index == f"{a}|{b}", str(a), str(b), int(fold))
        for a, b, fold in zip(obs["covariate"], obs["condition"], obs["test_fold"], strict=True)
    ]


def same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-9, atol=1e-12)


# Rows


def test_rows_are_all_perturbed_conditions_in_sorted_order(built: Built) -> None:
    obs = built.reference.obs
    groups = built.obs[built.obs["condition"] != "control"].groupby(["covariate", "condition"])
    assert list(zip(obs["covariate"], obs["condition"], strict=True)) == sorted(groups.groups)
    assert list(obs.index) == [f"{a}|{b}" for a, b in sorted(groups.groups)]
    assert list(obs["n_cells"]) == [len(group) for _, group in groups]
    assert list(obs["n_first"]) == [(group["half"] == "first_half").sum() for _, group in groups]
    assert list(obs["n_second"]) == [(group["half"] == "second_half").sum() for _, group in groups]
    assert list(obs["n_degs"]) == (built.reference.layers["padj_first"] < 0.05).sum(axis=1).tolist()
    assert obs["n_degs"].sum() > 0
    for (_, group), fold in zip(groups, obs["test_fold"], strict=True):
        tested = [k for k, column in enumerate(list_fold_columns(built.obs)) if (group[column] == "test").all()]
        assert tested == ([fold] if fold >= 0 else [])
    assert list(built.reference.var_names) == list(built.cells.var_names)


# What depends on the halves.
HALF_LAYERS = {
    "truth",
    "technical_duplicate",
    "interpolated_duplicate",
    "t_first",
    "padj_first",
    "t_second",
    "padj_second",
}


def test_layers_are_float64_and_missing_by_whole_rows(built: Built) -> None:
    assert set(built.reference.layers) == {*HALF_LAYERS, "mean", "sparse_mean", "additive", "linear"}
    never_test = (built.reference.obs["test_fold"] < 0).to_numpy()
    for name, layer in built.reference.layers.items():
        assert layer.dtype == np.float64
        missing = np.isnan(layer)
        assert (missing.all(axis=1) == missing.any(axis=1)).all()
        if name in ("interpolated_duplicate", "sparse_mean"):
            assert (missing.all(axis=1) == never_test).all()
        elif name not in ("additive", "linear"):
            assert not missing.any()


# Truth and duplicates


def test_truth_duplicate_and_mean(built: Built) -> None:
    layers = built.reference.layers
    for row, covariate, condition, _ in rows_of(built):
        mine = built.of(covariate, condition)
        same(layers["truth"][row], built.mean(mine & (built.obs["half"] == "first_half")))
        same(layers["technical_duplicate"][row], built.mean(mine & (built.obs["half"] == "second_half")))
        same(layers["mean"][row], built.mean(mine))


def test_differential_expression_of_each_half_within_its_covariate(built: Built) -> None:
    """Control is neither group nor rest; other covariates' cells are in no rest."""
    for half, suffix in (("first_half", "first"), ("second_half", "second")):
        for covariate in sorted(set(built.obs["covariate"])):
            rows = (built.reference.obs["covariate"] == covariate).to_numpy()
            conditions = built.reference.obs["condition"][rows]
            groups = [built.x[(built.of(covariate, c) & (built.obs["half"] == half)).to_numpy()] for c in conditions]
            moments = Moments(
                np.array([len(g) for g in groups]),
                np.array([g.sum(axis=0) for g in groups]),
                np.array([(g**2).sum(axis=0) for g in groups]),
            )
            t, padj = compare_with_rest(moments)
            np.testing.assert_allclose(built.reference.layers[f"t_{suffix}"][rows], t, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(built.reference.layers[f"padj_{suffix}"][rows], padj, rtol=1e-7)


def test_interpolated_duplicate(built: Built) -> None:
    """By the second half's adjusted p-values, towards the dataset mean of the fold in which the condition is test."""
    layers = built.reference.layers
    for row, covariate, _, fold in rows_of(built):
        if fold < 0:
            assert np.isnan(layers["interpolated_duplicate"][row]).all()
            continue
        mean = np.mean([built.mean(built.of(covariate, c)) for c in built.trained(covariate, fold)], axis=0)
        a = 1 - layers["padj_second"][row]
        same(layers["interpolated_duplicate"][row], a * layers["technical_duplicate"][row] + (1 - a) * mean)


# Negative controls


def test_negatives(built: Built) -> None:
    """Every training perturbation weighs the same; no control, no val or test condition takes part."""
    obs = built.negatives.obs
    folds = range(len(list_fold_columns(built.obs)))
    covariates = sorted(set(built.obs["covariate"]))
    expected = [(c, "control_mean", -1) for c in covariates] + [
        (c, "dataset_mean", f) for c in covariates for f in folds
    ]
    assert sorted(zip(obs["covariate"], obs["kind"], obs["fold"], strict=True)) == sorted(expected)
    assert list(built.negatives.var_names) == list(built.cells.var_names)
    for (covariate, kind, fold), profile in zip(
        obs[["covariate", "kind", "fold"]].to_numpy(), built.negatives.X, strict=True
    ):
        if kind == "control_mean":
            same(profile, built.mean(built.of(covariate, "control")))
        else:
            trained = built.trained(covariate, fold)
            assert len(trained) > 2
            same(profile, np.mean([built.mean(built.of(covariate, c)) for c in trained], axis=0))


def test_negatives_of_each_row(built: Built) -> None:
    keys = built.reference.obs
    means, controls = (find_negatives(built.negatives, kind, keys) for kind in ("dataset_mean", "control_mean"))
    profile = dict(zip(built.negatives.obs_names, built.negatives.X, strict=True))
    for row, covariate, _, fold in rows_of(built):
        same(controls[row], profile[f"{covariate}|control_mean|-1"])
        if fold < 0:
            assert np.isnan(means[row]).all()
        else:
            same(means[row], profile[f"{covariate}|dataset_mean|{fold}"])


def test_sparse_mean_is_of_half_as_many_training_cells(sums: Sums, built: Built) -> None:
    """As many cells as half of the condition's, all from the training perturbations of its fold and covariate.

    Each cell is marked by a gene of its own, so that the profile tells which cells it is the mean of.
    """
    marks = ad.AnnData(
        X=sparse.identity(built.cells.n_obs, dtype=np.float32, format="csr"),
        obs=built.cells.obs,
    )
    keys = built.reference.obs
    found = build_reference(sums(marks), build_negatives(sums(marks)), 42).layers["sparse_mean"]
    chosen_by_condition = []
    for row, covariate, _, fold in rows_of(built):
        profile = found[row][0]
        if fold < 0:
            assert np.isnan(profile).all()
            continue
        n = int(keys["n_cells"][row].iloc[0]) // 2
        chosen = np.flatnonzero(profile)
        assert len(chosen) == n
        same(profile[chosen], np.full(n, 1 / n))
        cells = built.obs.iloc[chosen]
        assert set(cells["covariate"]) == {covariate}
        assert "control" not in set(cells["condition"])
        assert set(cells[f"fold_{fold}"]) == {"train"}
        same(built.reference.layers["sparse_mean"][row][0], built.x[chosen].mean(axis=0))
        chosen_by_condition.append(tuple(chosen))
    assert len(set(chosen_by_condition)) == len(chosen_by_condition)


# Baselines


def test_additive(built: Built) -> None:
    """From the fold's training control cells and singles; absent, never zero, where a single is not there."""
    present = 0
    for row, covariate, condition, fold in rows_of(built):
        found = built.reference.layers["additive"][row][0]
        genes = condition.split("+")
        if fold < 0 or len(genes) == 1 or not set(genes) <= set(built.trained(covariate, fold)):
            assert np.isnan(found).all()
            continue
        control = built.mean(built.of(covariate, "control") & (built.obs[f"fold_{fold}"] == "train"))
        same(found, control + sum(built.mean(built.of(covariate, g)) - control for g in genes))
        present += 1
    combinations = built.reference.obs["condition"].str.contains("+", regex=False).sum()
    assert present < combinations if combinations else present == 0
    assert present > 5 or not combinations


def test_linear(built: Built) -> None:
    """Learnt from the single-gene training conditions of the fold and covariate; single measured genes only."""
    genes = built.cells.var_names
    present = 0
    for row, covariate, condition, fold in rows_of(built):
        found = built.reference.layers["linear"][row][0]
        if fold < 0 or condition not in genes:
            assert np.isnan(found).all()
            continue
        singles = [c for c in built.trained(covariate, fold) if "+" not in c]
        means = np.array([built.mean(built.of(covariate, c)) for c in singles])
        same(found, predict_linear(singles, means, genes, [condition])[0])
        present += 1
    combined = built.reference.obs["condition"].str.contains("+", regex=False).any()
    assert present == 0 if combined else 5 < present < built.reference.n_obs


def test_each_covariate_is_computed_as_if_it_were_alone(sums: Sums, lines_cells: ad.AnnData) -> None:
    negatives = build_negatives(sums(lines_cells))
    both = build_reference(sums(lines_cells), negatives, 42)
    for line in ("line_1", "line_2"):
        own = lines_cells[(lines_cells.obs["covariate"] == line).to_numpy()].copy()
        alone = build_reference(sums(own), build_negatives(sums(own)), 42)
        rows = (both.obs["covariate"] == line).to_numpy()
        pd.testing.assert_frame_equal(alone.obs, both.obs[rows])
        for name, layer in both.layers.items():
            np.testing.assert_array_equal(alone.layers[name], layer[rows], err_msg=name)
    assert len(set(both.obs["covariate"])) == 2
    first, second = (set(both.obs.loc[both.obs["covariate"] == line, "condition"]) for line in ("line_1", "line_2"))
    assert len(first - second) == 1


# Half splits


def test_a_half_split_of_another_seed_changes_the_halves_alone(sums: Sums, built: Built) -> None:
    own = build_half_split(sums(built.cells, {42: draw_halves(built.cells.obs, 42)}), 42, built.negatives)
    assert set(own.layers) == HALF_LAYERS
    for name in HALF_LAYERS:
        np.testing.assert_array_equal(own.layers[name], built.reference.layers[name], err_msg=name)
    half = draw_halves(built.cells.obs, 43)
    other = build_half_split(sums(built.cells, {0: half}), 0, built.negatives)
    pd.testing.assert_frame_equal(other.obs.drop(columns="n_degs"), own.obs.drop(columns="n_degs"))
    for row, covariate, condition, _ in rows_of(built):
        mine = built.of(covariate, condition)
        same(other.layers["truth"][row], built.mean(mine & (half == "first_half").to_numpy()))
        same(other.layers["technical_duplicate"][row], built.mean(mine & (half == "second_half").to_numpy()))
        assert not np.allclose(other.layers["truth"][row], own.layers["truth"][row])


# Files


def test_written_files_are_read_back(sums: Sums, pairs_cells: ad.AnnData, tmp_path: Path) -> None:
    write_reference(pairs_cells, 42, 3, tmp_path)
    reference, negatives = read_reference(tmp_path)
    built = build_reference(sums(pairs_cells), build_negatives(sums(pairs_cells)), 42)
    for name, layer in built.layers.items():
        np.testing.assert_array_equal(reference.layers[name], layer, err_msg=name)
    np.testing.assert_array_equal(negatives.X, build_negatives(sums(pairs_cells)).X)
    keys = read_keys(tmp_path)
    pd.testing.assert_frame_equal(keys, built.obs.reset_index(drop=True), check_dtype=False)
    files = find_half_splits(tmp_path)
    assert list(files) == [43, 44]
    split = ad.read_h5ad(files[43])
    again = build_half_split(sums(pairs_cells, {43: draw_halves(pairs_cells.obs, 43)}), 43, negatives)
    for name in HALF_LAYERS:
        np.testing.assert_array_equal(split.layers[name], again.layers[name], err_msg=name)


def test_one_half_seed_means_no_further_split(single_cells: ad.AnnData, tmp_path: Path) -> None:
    write_reference(single_cells, 42, 1, tmp_path)
    assert find_half_splits(tmp_path) == {}


# Golden and real data


@pytest.mark.shared
def test_golden_halves_control_and_first_differential_expression(sums: Sums, shared: Path) -> None:
    """Recomputed from the cells of the mirror file these agree with the stored ones, to float32."""
    data = open_h5ad(shared / "golden" / "combo_mirror.h5ad")
    cells = take_mirror_cells(data, "mirror.h5ad")
    stored, stored_negatives = read_stored_reference(data, cells, "combo_mirror.h5ad")
    negatives = build_negatives(sums(cells))
    reference = build_reference(sums(cells), negatives, 42)
    assert list(reference.obs_names) == list(stored.obs_names)
    for name in ("truth", "technical_duplicate"):
        np.testing.assert_allclose(reference.layers[name], stored.layers[name], rtol=2e-6, atol=1e-7, err_msg=name)
    kept = (stored_negatives.obs["kind"] == "control_mean").to_numpy()
    own = negatives[negatives.obs["kind"] == "control_mean"].X
    np.testing.assert_allclose(own, stored_negatives.X[kept], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(reference.layers["t_first"], stored.layers["t_first"], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(reference.layers["padj_first"], stored.layers["padj_first"], rtol=2e-5)
    assert list(reference.obs["n_degs"]) == list(stored.obs["n_degs"])


@pytest.mark.shared
def test_norman_panel(sums: Sums, prepared: Prepare, shared: Path) -> None:
    raw = open_h5ad(shared / "data" / "norman19_small.h5ad")
    cells = prepared(raw, Catalog().dataset("norman19_small"), "norman19_small.h5ad")
    reference = build_reference(sums(cells), build_negatives(sums(cells)), 42)
    keys = reference.obs
    combined = keys["condition"].str.contains("+", regex=False)
    assert (combined.sum(), (~combined).sum()) == (15, 18)
    assert ((keys["test_fold"] >= 0) == combined).all()
    present = keys.loc[np.isfinite(reference.layers["additive"]).all(axis=1), "condition"]
    singles = set(keys.loc[~combined, "condition"])
    assert len(present) == 5
    assert set(present) == {c for c in keys["condition"][combined] if set(c.split("+")) <= singles}
    # One target is measured, and single genes are never test.
    assert np.isnan(reference.layers["linear"]).all()


def test_a_disk_too_small_for_the_profiles_is_found_first(
    single_cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="are missing") as error:
        write_reference(single_cells, 42, 2, tmp_path)
    assert "conditions x" in error.value.found
    assert not list(tmp_path.iterdir())
