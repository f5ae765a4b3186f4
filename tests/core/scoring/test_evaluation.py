"""Scores of profiles against an evaluated set: by definition, aligned by name, whatever the order or the blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.prepare.splits import draw_halves
from core.reference.build import build_half_split, build_negatives, build_reference
from core.reference.cell_sums import CellSums
from core.reference.controls import CONTROLS
from core.scoring import evaluation as module
from core.scoring.evaluation import (
    Evaluation,
    score_controls,
    score_profiles,
    select_evaluated,
)
from core.scoring.metrics import METRICS
from tests.helpers import by_definition

Sums = Callable[..., CellSums]


INDEX = ["covariate", "condition", "metric"]


def predicted(evaluation: Evaluation, seed: int = 9) -> np.ndarray:
    """So poor that the rankings of the conditions take all values between 0 and 1."""
    noise = np.random.default_rng(seed).standard_normal(evaluation.truth.shape)
    return 0.8 * evaluation.dataset_mean + 0.2 * evaluation.truth + 0.4 * noise


def subset(evaluation: Evaluation, rows: list[int] | np.ndarray) -> Evaluation:
    keys = evaluation.keys.iloc[rows].reset_index(drop=True)
    return Evaluation(keys, evaluation.genes, *(array[rows] for array in evaluation[2:]))


def values(table: pd.DataFrame) -> pd.Series:
    return table.set_index(INDEX)["value"].sort_index()


def assert_same(found: pd.DataFrame, expected: pd.Series) -> None:
    pd.testing.assert_series_equal(values(found), expected.sort_index(), atol=1e-9, rtol=0, check_names=False)


@pytest.mark.parametrize("covariates", [("all",), ("line_1", "line_2")])
@pytest.mark.parametrize("conditions", [5, 12])
def test_all_metrics_by_definition(conditions: int, covariates: tuple[str, ...]) -> None:
    evaluation = by_definition.evaluation(1, conditions, 40, covariates)
    profiles = predicted(evaluation)
    profiles[3] = evaluation.dataset_mean[3]
    profiles[4] = evaluation.control_mean[4]
    found = score_profiles(profiles, evaluation.keys, evaluation)
    assert list(found.columns) == ["covariate", "condition", "fold", "metric", "value"]
    assert set(found["metric"]) == {metric.name for metric in METRICS}
    assert_same(found, by_definition.scores(profiles, evaluation.keys, evaluation))


def test_values_that_are_not_defined_are_missing_and_never_zero() -> None:
    evaluation = by_definition.evaluation()
    profiles = predicted(evaluation)
    profiles[3], profiles[4] = evaluation.dataset_mean[3], evaluation.control_mean[4]
    wide = values(score_profiles(profiles, evaluation.keys, evaluation)).unstack("metric").droplevel("covariate")
    missing = wide.isna().loc[evaluation.keys["condition"]]
    over_degs = [name for name in missing.columns if name.endswith("_degs")]
    weighted = [name for name in missing.columns if name.startswith("weighted") or name == "wmse"]
    none: set[str] = set()
    expected = [
        set(over_degs),  # two DEGs
        set(over_degs),  # no DEG, but weights
        {*over_degs, *weighted},  # no DE results
        {"pearson_deltapert", "pearson_deltapert_degs", "weighted_pearson_deltapert"},  # predicts dataset_mean
        {"pearson_deltactrl", "pearson_deltactrl_degs", "weighted_pearson_deltactrl", "pds"},  # predicts control_mean
        none,
    ]
    for row, names in enumerate(expected):
        assert set(missing.columns[missing.iloc[row]]) == names, row


def test_equal_t_statistics_give_no_weights() -> None:
    evaluation = by_definition.evaluation()
    evaluation.t[6] = -1.5
    found = values(score_profiles(predicted(evaluation), evaluation.keys, evaluation)).unstack("metric").iloc[6]
    assert found[["wmse", "weighted_r2_deltactrl", "weighted_r2_deltapert", "weighted_pearson_deltapert"]].isna().all()
    assert found[["mse", "pearson_deltactrl", "nir", "pds"]].notna().all()


def test_perfect_predictions_are_perfect() -> None:
    evaluation = by_definition.evaluation(2, 40)
    found = score_profiles(evaluation.truth, evaluation.keys, evaluation).groupby("metric")["value"]
    for metric in METRICS:
        assert found.min()[metric.name] == pytest.approx(metric.perfect, abs=1e-12)
        assert found.max()[metric.name] == pytest.approx(metric.perfect, abs=1e-12)


def test_rankings_take_the_candidates_of_all_folds_of_the_own_covariate_only() -> None:
    evaluation = by_definition.evaluation(3, 9, 40, ("line_1", "line_2"))
    assert evaluation.keys["test_fold"].nunique() == 2
    profiles = predicted(evaluation)
    in_both = values(score_profiles(profiles, evaluation.keys, evaluation))
    # The other covariate's truths say nothing, the other fold's do.
    elsewhere = evaluation._replace(
        truth=evaluation.truth + 5.0 * (evaluation.keys["covariate"] == "line_2").to_numpy()[:, None]
    )
    moved = values(score_profiles(profiles, evaluation.keys, elsewhere))
    pd.testing.assert_series_equal(in_both["line_1"], moved["line_1"])
    first = np.flatnonzero(evaluation.keys["test_fold"] == 0)
    of_fold = values(score_profiles(profiles[first], evaluation.keys.iloc[first], evaluation))
    pd.testing.assert_series_equal(of_fold, in_both[in_both.index.isin(of_fold.index)])
    alone = subset(evaluation, first)
    assert not values(score_profiles(profiles[first], alone.keys, alone)).equals(of_fold)


def test_a_lone_candidate_has_no_rank() -> None:
    evaluation = by_definition.evaluation(0, 5)
    one = subset(evaluation, [3])
    found = values(score_profiles(predicted(one), one.keys, one)).droplevel(["covariate", "condition"])
    assert found[["nir", "pds"]].isna().all()
    assert np.isfinite(found["mse"])


# Alignment, order and blocks


@given(st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_the_order_of_genes_conditions_and_predictions_does_not_matter(random) -> None:
    evaluation = by_definition.evaluation(4, 10, 30, ("line_1", "line_2"))
    profiles = predicted(evaluation)
    plain = values(score_profiles(profiles, evaluation.keys, evaluation))
    genes, rows = random.sample(range(30), 30), random.sample(range(20), 20)
    moved = Evaluation(evaluation.keys, evaluation.genes[genes], *(a[:, genes] for a in evaluation[2:]))
    again = values(score_profiles(profiles[rows][:, genes], evaluation.keys.iloc[rows], moved))
    pd.testing.assert_series_equal(again, plain, rtol=0, atol=1e-12)


@given(st.integers(0, 19), st.integers(0, 10_000))
@settings(max_examples=25)
def test_the_score_of_a_condition_does_not_hang_on_other_predictions(row: int, seed: int) -> None:
    evaluation = by_definition.evaluation(5, 20, 30)
    profiles = predicted(evaluation)
    other = np.random.default_rng(seed).gamma(1.0, 1.0, profiles.shape)
    other[row] = profiles[row]
    condition = ("all", evaluation.keys["condition"][row])
    plain = values(score_profiles(profiles, evaluation.keys, evaluation))[condition]
    pd.testing.assert_series_equal(values(score_profiles(other, evaluation.keys, evaluation))[condition], plain)
    alone = values(score_profiles(profiles[[row]], evaluation.keys.iloc[[row]], evaluation))[condition]
    pd.testing.assert_series_equal(alone, plain)


@pytest.mark.parametrize("conditions", [31, 32, 33, 70, 257])
def test_blocks_and_threads_change_no_bit(conditions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = by_definition.evaluation(6, conditions, 2 * conditions)
    profiles = predicted(evaluation)
    plain = score_profiles(profiles, evaluation.keys, evaluation)
    assert plain["value"].notna().mean() > 0.9
    for block, workers in ((1, 1), (7, 3), (conditions, 1), (1000, 16)):
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr("core.arrays.cpu_count", partial(int, workers))
        pd.testing.assert_frame_equal(score_profiles(profiles, evaluation.keys, evaluation), plain, check_exact=True)


def test_blocks_are_by_definition_too() -> None:
    evaluation = by_definition.evaluation(7, 70, 150)
    profiles = predicted(evaluation)
    assert_same(
        score_profiles(profiles, evaluation.keys, evaluation),
        by_definition.scores(profiles, evaluation.keys, evaluation),
    )


def test_absent_predictions_have_no_score_and_the_rest_is_as_before() -> None:
    evaluation = by_definition.evaluation()
    profiles = predicted(evaluation)
    plain = values(score_profiles(profiles, evaluation.keys, evaluation))
    profiles[[2, 7]] = np.nan
    found = values(score_profiles(profiles, evaluation.keys, evaluation))
    absent = evaluation.keys["condition"][[2, 7]]
    assert not found.index.get_level_values("condition").isin(absent).any()
    pd.testing.assert_series_equal(found, plain.drop(index=list(absent), level="condition"))


def test_predictions_in_part_or_of_unknown_conditions_are_refused() -> None:
    evaluation = by_definition.evaluation()
    profiles = predicted(evaluation)
    profiles[5, 3] = np.nan
    with pytest.raises(UserError, match="NaN in part"):
        score_profiles(profiles, evaluation.keys, evaluation)
    with pytest.raises(UserError, match="'MADE_UP' is not a test condition"):
        score_profiles(predicted(evaluation), evaluation.keys.assign(condition="MADE_UP"), evaluation)


def test_fewer_genes_are_those_columns_alone() -> None:
    evaluation = by_definition.evaluation()
    kept = np.random.default_rng(0).random(40) < 0.7
    part = evaluation.with_genes(kept)
    profiles = predicted(evaluation)[:, kept]
    assert list(part.genes) == list(evaluation.genes[kept])
    assert_same(score_profiles(profiles, part.keys, part), by_definition.scores(profiles, part.keys, part))


# From a reference


def test_the_evaluated_set_is_all_test_conditions_with_their_own_centres(sums: Sums, screen: ad.AnnData) -> None:
    negatives = build_negatives(sums(screen))
    reference = build_reference(sums(screen), negatives, 42)
    evaluation = select_evaluated(reference, negatives)
    obs = screen.obs
    folds = [column for column in obs.columns if column.startswith("fold_")]
    is_test = (obs[folds] == "test").any(axis=1) & (obs["condition"] != "control")
    expected = sorted(set(zip(obs["covariate"][is_test], obs["condition"][is_test], strict=True)))
    assert list(zip(evaluation.keys["covariate"], evaluation.keys["condition"], strict=True)) == expected
    X = screen.X.toarray().astype(np.float64)
    for row, (covariate, condition) in enumerate(expected):
        of_covariate = (obs["covariate"] == covariate).to_numpy()
        own = of_covariate & (obs["condition"] == condition).to_numpy()
        fold = next(column for column in folds if (obs.loc[own, column] == "test").all())
        training = of_covariate & (obs[fold] == "train").to_numpy() & (obs["condition"] != "control").to_numpy()
        means = pd.DataFrame(X[training]).groupby(obs["condition"].astype(str).to_numpy()[training]).mean()
        np.testing.assert_allclose(evaluation.dataset_mean[row], means.mean(), rtol=1e-9, atol=1e-12)
        control = X[of_covariate & (obs["condition"] == "control").to_numpy()].mean(axis=0)
        np.testing.assert_allclose(evaluation.control_mean[row], control, rtol=1e-9, atol=1e-12)
        first = X[own & (obs["half"] == "first_half").to_numpy()].mean(axis=0)
        np.testing.assert_allclose(evaluation.truth[row], first, rtol=1e-9, atol=1e-12)


def test_control_scores_are_those_of_the_reference_profiles(sums: Sums, pairs_cells: ad.AnnData) -> None:
    negatives = build_negatives(sums(pairs_cells))
    reference = build_reference(sums(pairs_cells), negatives, 42)
    evaluation = select_evaluated(reference, negatives)
    found = score_controls(reference, negatives)
    assert list(found["model"].unique()) == [c.name for c in CONTROLS if c.name != "linear"]  # no combination in linear
    test = reference[reference.obs["test_fold"] >= 0]
    negative = {"dataset_mean": evaluation.dataset_mean, "control_mean": evaluation.control_mean}
    for model, table in found.groupby("model", sort=False):
        profiles = negative[model] if model in negative else test.layers[model]
        there = ~np.isnan(profiles).any(axis=1)
        assert there.all() == (model != "additive")
        assert_same(table, by_definition.scores(profiles[there], evaluation.keys[there], evaluation))


def test_another_half_split_brings_its_own_truth_and_duplicates(sums: Sums, single_cells: ad.AnnData) -> None:
    negatives = build_negatives(sums(single_cells))
    reference = build_reference(sums(single_cells), negatives, 42)
    split = build_half_split(sums(single_cells, {43: draw_halves(single_cells.obs, 43)}), 43, negatives)
    found = score_controls(reference, negatives, split)
    evaluation = select_evaluated(split, negatives)
    assert np.abs(evaluation.truth - select_evaluated(reference, negatives).truth).max() > 0.1
    for model, layers in (("technical_duplicate", split.layers), ("sparse_mean", reference.layers)):
        expected = by_definition.scores(layers[model], evaluation.keys, evaluation)
        assert_same(found[found["model"] == model], expected)
