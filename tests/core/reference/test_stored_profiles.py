"""Stored profiles and DE results of a preprocessed mirror file, aligned by name and taken as they are."""

from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from core.errors import UserError
from core.prepare.mirror import take_mirror_cells
from core.reference.build import build_negatives, build_reference
from core.reference.cell_sums import CellSums
from core.reference.files import find_negatives
from core.reference.stored_profiles import read_stored_reference

Sums = Callable[..., CellSums]


def reference_of(mirror: ad.AnnData) -> tuple[ad.AnnData, ad.AnnData]:
    return read_stored_reference(mirror, take_mirror_cells(mirror, "mirror.h5ad"), "mirror.h5ad")


def test_stored_tables_are_taken_as_they_are(mirror: ad.AnnData) -> None:
    # Doubled, so that they cannot come from the cells.
    slots = {
        "truth": "technical_duplicate_first_half_baseline",
        "technical_duplicate": "technical_duplicate_second_half_baseline",
        "interpolated_duplicate": "interpolated_duplicate_baseline",
        "additive": "additive_baseline",
    }
    for slot in [*slots.values(), "ctrl_baseline", "split_fold_0_split_mean_baseline"]:
        mirror.uns[slot] = 2 * mirror.uns[slot]
    reference, negatives = reference_of(mirror)
    assert list(reference.obs_names) == sorted(reference.obs_names)
    for row, (covariate, condition) in enumerate(
        zip(reference.obs["covariate"], reference.obs["condition"], strict=True)
    ):
        for layer, slot in slots.items():
            table = mirror.uns[slot]
            key = f"{covariate}_{condition}"
            expected = table.loc[key, reference.var_names] if key in table.index else np.full(reference.n_vars, np.nan)
            np.testing.assert_array_equal(reference.layers[layer][row], expected)
    covariate = reference.obs["covariate"].iloc[0]
    c, m = (find_negatives(negatives, kind, reference.obs) for kind in ("control_mean", "dataset_mean"))
    expected = mirror.uns["ctrl_baseline"].loc[covariate, reference.var_names]
    np.testing.assert_array_equal(c, np.broadcast_to(expected, c.shape))
    for row, fold in enumerate(reference.obs["test_fold"]):
        if fold < 0:
            assert np.isnan(m[row]).all()
        else:
            table = mirror.uns[f"split_fold_{fold}_split_mean_baseline"]
            np.testing.assert_array_equal(m[row], table.loc[covariate, reference.var_names])


def test_de_results_are_aligned_by_the_names_beside_them(mirror: ad.AnnData) -> None:
    reference, _ = reference_of(mirror)
    for half, suffix in (("first", "_gt"), ("second", "")):
        for layer, slot in ((f"t_{half}", "scores_df_dict"), (f"padj_{half}", "pvals_adj_df_dict")):
            for row, key in enumerate(
                reference.obs["covariate"].astype(str) + "_" + reference.obs["condition"].astype(str)
            ):
                by_gene = dict(
                    zip(mirror.uns["names_df_dict" + suffix][key], mirror.uns[slot + suffix][key], strict=True)
                )
                expected = [by_gene[gene] for gene in reference.var_names]
                np.testing.assert_array_equal(reference.layers[layer][row], expected)
    np.testing.assert_array_equal(reference.obs["n_degs"], (reference.layers["padj_first"] < 0.05).sum(axis=1))


def test_what_was_not_tested_is_missing(mirror: ad.AnnData) -> None:
    full, _ = reference_of(mirror)
    key = next(iter(mirror.uns["scores_df_dict_gt"]))
    for slot in ("names", "scores", "pvals_adj"):
        del mirror.uns[f"{slot}_df_dict_gt"][key]
    reference, _ = reference_of(mirror)
    row = list(full.obs["covariate"].astype(str) + "_" + full.obs["condition"].astype(str)).index(key)
    assert np.isnan(reference.layers["t_first"][row]).all()
    assert np.isnan(reference.layers["padj_first"][row]).all()
    assert reference.obs["n_degs"].iloc[row] == 0
    others = np.arange(reference.n_obs) != row
    np.testing.assert_array_equal(reference.layers["t_first"][others], full.layers["t_first"][others])


def test_sizes_and_folds_are_those_of_the_cells(sums: Sums, mirror: ad.AnnData, pairs_cells: ad.AnnData) -> None:
    reference, negatives = reference_of(mirror)
    ours = build_reference(sums(pairs_cells), build_negatives(sums(pairs_cells)), 42)
    columns = ["covariate", "condition", "n_cells", "n_first", "n_second", "test_fold"]
    pd.testing.assert_frame_equal(reference.obs[columns], ours.obs[columns], check_dtype=False)
    assert list(negatives.obs["kind"]) == ["control_mean", "dataset_mean", "dataset_mean"]


def test_stored_and_recomputed_agree_where_they_should(sums: Sums, mirror: ad.AnnData) -> None:
    # Not the second half's DE, which has control in its rest, and what hangs on it (docs/science.md, section 7).
    reference, negatives = reference_of(mirror)
    own = sums(take_mirror_cells(mirror, "mirror.h5ad"))
    recomputed_negatives = build_negatives(own)
    recomputed = build_reference(own, recomputed_negatives, 42)
    np.testing.assert_allclose(recomputed_negatives.X, negatives.X, rtol=1e-6)
    for layer in ("truth", "technical_duplicate"):
        np.testing.assert_allclose(recomputed.layers[layer], reference.layers[layer], rtol=1e-6, atol=1e-12)
    for layer in ("t_first", "padj_first"):
        np.testing.assert_allclose(recomputed.layers[layer], reference.layers[layer], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "slot",
    [
        "technical_duplicate_first_half_baseline",
        "technical_duplicate_second_half_baseline",
        "interpolated_duplicate_baseline",
        "ctrl_baseline",
        "split_fold_1_split_mean_baseline",
        "scores_df_dict_gt",
        "pvals_adj_df_dict",
        "names_df_dict",
        "names_df_dict_gt",
    ],
)
def test_a_missing_table_is_an_error_the_user_can_mend(mirror: ad.AnnData, slot: str) -> None:
    del mirror.uns[slot]
    with pytest.raises(UserError, match="--recompute") as error:
        reference_of(mirror)
    assert error.value.where == "mirror.h5ad"
    assert "no such" in error.value.found
    if not slot.startswith("names"):
        assert slot in error.value.field


def test_data_without_combinations_have_no_additive_table(mirror: ad.AnnData) -> None:
    del mirror.uns["additive_baseline"]
    reference, _ = reference_of(mirror)
    assert "additive" not in reference.layers
    assert "interpolated_duplicate" in reference.layers


def test_a_table_without_all_genes_is_refused(mirror: ad.AnnData) -> None:
    slot = "interpolated_duplicate_baseline"
    gene = sorted(mirror.var_names)[3]
    mirror.uns[slot] = mirror.uns[slot].drop(columns=gene)
    with pytest.raises(UserError, match="1 genes of X are missing") as error:
        reference_of(mirror)
    assert gene in error.value.found
    assert slot in error.value.field


def test_a_test_condition_without_a_stored_truth_is_refused(mirror: ad.AnnData) -> None:
    slot = "technical_duplicate_first_half_baseline"
    key = mirror.uns["interpolated_duplicate_baseline"].index[0]
    mirror.uns[slot] = mirror.uns[slot].drop(index=key)
    with pytest.raises(UserError, match="1 rows are missing") as error:
        reference_of(mirror)
    assert key in error.value.found


@pytest.mark.parametrize("slot", ["ctrl_baseline", "split_fold_0_split_mean_baseline"])
def test_a_covariate_without_a_stored_mean_is_refused(mirror: ad.AnnData, slot: str) -> None:
    mirror.uns[slot].index = ["another"]
    with pytest.raises(UserError, match="1 rows are missing") as error:
        reference_of(mirror)
    assert slot in error.value.field
