"""Models against controls, in pairs (docs/science.md, section 6)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from core.rng import generator
from core.scoring import comparison as module
from core.scoring.comparison import (
    RESAMPLES,
    compare_models,
    compute_signed_rank_p,
    correct_p_values,
    find_detectable_effect,
)

METRICS = ("mse", "nir")
CONDITIONS = [(line, f"G{number:02d}") for line in ("line_1", "line_2") for number in range(20)]
N_DEGS = pd.Series(
    [0, 0, 0, 0, 0, 1, 5, 9, 9, 3, 10, 50, 99, 99, 20, 100, 101, 500, 5000, 120] * 2,
    index=pd.MultiIndex.from_tuples(CONDITIONS, names=["covariate", "condition"]),
)
STRATA = {
    "all": lambda n: n >= 0,
    "0": lambda n: n == 0,
    "1-9": lambda n: (n >= 1) & (n <= 9),
    "10-99": lambda n: (n >= 10) & (n <= 99),
    ">=100": lambda n: n >= 100,
}


def score_table(seed: int = 0, skew: float = 0.05) -> pd.DataFrame:
    """Two models and two controls at random; `good` is better than `bad`."""
    rng = np.random.default_rng(seed)
    rows = [
        (model, *condition, metric)
        for model in ("good", "bad", "dataset_mean", "additive")
        for metric in METRICS
        for condition in CONDITIONS
    ]
    table = pd.DataFrame(rows, columns=["model", "covariate", "condition", "metric"])
    shift = table["model"].map({"good": skew, "bad": -skew}).fillna(0) * np.where(table["metric"] == "mse", -1, 1)
    return table.assign(value=0.5 + 0.1 * rng.standard_normal(len(table)) + shift)


def quick(scores: pd.DataFrame, n_degs: pd.Series, seed: int) -> pd.DataFrame:
    """compare with fewer resamples, for what does not hang on the intervals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RESAMPLES", 200)
        return compare_models(scores, n_degs, seed)


def differences(scores: pd.DataFrame, model: str, control: str, metric: str) -> pd.Series:
    """By (covariate, condition), positive where the model is better; only where both have a value."""
    of_metric = scores[scores["metric"] == metric].set_index(["covariate", "condition"])
    wide = {name: of_metric.loc[of_metric["model"] == name, "value"] for name in (model, control)}
    difference = (wide[model] - wide[control]).dropna()
    return -difference if metric == "mse" else difference


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    table = score_table()
    # `bad` was not predicted for some conditions and is undefined for one; `good` lacks one elsewhere.
    hole = (table["model"] == "bad") & (table["condition"] >= "G18")
    table.loc[(table["model"] == "good") & (table["condition"] == "G03") & (table["metric"] == "nir"), "value"] = np.nan
    return table[~hole].sample(frac=1, random_state=0)


@pytest.fixture(scope="module")
def comparison(scores: pd.DataFrame) -> pd.DataFrame:
    return quick(scores, N_DEGS, 5)


def test_one_row_per_model_control_metric_and_stratum(comparison: pd.DataFrame) -> None:
    keys = ["model", "control", "metric", "stratum"]
    assert not comparison.duplicated(keys).any()
    assert {name: set(comparison[name]) for name in keys} == {
        "model": {"good", "bad"},
        "control": {"dataset_mean", "additive"},
        "metric": set(METRICS),
        "stratum": set(STRATA),
    }
    assert len(comparison) == 2 * 2 * 2 * 5


def test_every_row_equals_scipy_on_the_pairs(scores: pd.DataFrame, comparison: pd.DataFrame) -> None:
    for row in comparison.itertuples():
        difference = differences(scores, row.model, row.control, row.metric)
        d = difference[STRATA[row.stratum](N_DEGS[difference.index])].to_numpy()
        assert row.n == len(d)
        assert row.mean_difference == pytest.approx(d.mean())
        assert row.t_p == pytest.approx(stats.ttest_1samp(d, 0, alternative="greater").pvalue)
        assert row.wilcoxon_p == pytest.approx(stats.wilcoxon(d, alternative="greater").pvalue)
    everything = comparison[comparison["stratum"] == "all"].set_index(["model", "control", "metric"])["n"]
    assert everything["good", "additive", "mse"] == 40
    assert everything["good", "additive", "nir"] == 38
    assert everything["bad", "additive", "nir"] == 36


def test_positive_is_better_and_the_test_is_one_sided(comparison: pd.DataFrame) -> None:
    rows = comparison[(comparison["stratum"] == "all")]
    good, bad = rows[rows["model"] == "good"], rows[rows["model"] == "bad"]
    assert (good["mean_difference"] > 0).all()
    assert (bad["mean_difference"] < 0).all()
    assert (good["t_p"] < 0.5).all()
    assert (bad[["t_p", "wilcoxon_p"]] > 0.5).all(axis=None)


def test_intervals_are_those_of_a_loop_over_resamples(scores: pd.DataFrame) -> None:
    full = score_table()
    row = compare_models(full, N_DEGS, 5).query("model == 'good' and control == 'additive' and metric == 'mse'")
    difference = differences(full, "good", "additive", "mse").sort_index().to_numpy()
    rng = generator(5, "comparison")
    means = [difference[rng.integers(40, size=40)].mean() for _ in range(RESAMPLES)]
    found = row[row["stratum"] == "all"].iloc[0]
    np.testing.assert_allclose([found["low"], found["high"]], np.percentile(means, [2.5, 97.5]), rtol=0, atol=1e-12)
    assert RESAMPLES >= 10_000
    # Another generator and only the pairs that are there give nearly the same.
    part = compare_models(scores, N_DEGS, 5).query("model == 'bad' and control == 'additive' and metric == 'nir'")
    found = part[part["stratum"] == "all"].iloc[0]
    difference = differences(scores, "bad", "additive", "nir").to_numpy()
    other = np.random.default_rng(1)
    means = [difference[other.integers(36, size=36)].mean() for _ in range(20_000)]
    expected = np.percentile(means, [2.5, 97.5])
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=0.06 * np.ptp(expected))


def test_corrections_run_over_models_and_metrics_of_a_control_and_stratum(comparison: pd.DataFrame) -> None:
    for (_, stratum), rows in comparison.groupby(["control", "stratum"]):
        assert len(rows) == 4
        for test in ("t", "wilcoxon"):
            p = rows[f"{test}_p"].to_numpy()
            np.testing.assert_allclose(rows[f"{test}_holm"], correct_p_values(p, "holm"), rtol=1e-12)
            np.testing.assert_allclose(rows[f"{test}_bonferroni"], correct_p_values(p, "bonferroni"), rtol=1e-12)
            if stratum == "all":
                np.testing.assert_allclose(correct_p_values(p, "holm"), multipletests(p, method="holm")[1], rtol=1e-12)


def test_corrections_by_hand_and_without_missing_values() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, np.nan])
    np.testing.assert_allclose(correct_p_values(p, "holm"), [0.03, np.nan, 0.06, 0.06, np.nan])
    np.testing.assert_allclose(correct_p_values(p, "bonferroni"), [0.03, np.nan, 0.12, 0.09, np.nan])
    for method in ("holm", "bonferroni"):
        assert np.isnan(correct_p_values(np.full(3, np.nan), method)).all()
        assert correct_p_values(np.array([]), method).shape == (0,)


def test_corrections_equal_statsmodels() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 12, 40):
        p = np.round(rng.random(n) ** 3, 2)  # rounded: with ties, and some 0
        np.testing.assert_allclose(correct_p_values(p, "holm"), multipletests(p, method="holm")[1], rtol=1e-12)
        np.testing.assert_allclose(
            correct_p_values(p, "bonferroni"), multipletests(p, method="bonferroni")[1], rtol=1e-12
        )


def test_covariates_are_conditions_of_their_own() -> None:
    scores = score_table()
    one = scores[scores["covariate"] == "line_1"]
    both = quick(scores, N_DEGS, 5).query("stratum == 'all'")
    alone = quick(one, N_DEGS, 5).query("stratum == 'all'")
    assert set(both["n"]) == {40}
    assert set(alone["n"]) == {20}
    # The same genes in the second line with the opposite outcome cancel out.
    mirrored = one.assign(covariate="line_2")
    good = (mirrored["model"] == "good").to_numpy()
    reference = one[one["model"] == "additive"]["value"].to_numpy()
    mirrored.loc[good, "value"] = 2 * reference - one.loc[good, "value"].to_numpy()
    cancelled = quick(pd.concat([one, mirrored]), N_DEGS, 5).query("model == 'good' and control == 'additive'")
    np.testing.assert_allclose(cancelled.query("stratum == 'all'")["mean_difference"], 0, atol=1e-12)


def test_the_order_of_scores_does_not_matter(scores: pd.DataFrame, comparison: pd.DataFrame) -> None:
    again = quick(scores.sample(frac=1, random_state=9), N_DEGS.sample(frac=1, random_state=3), 5)
    pd.testing.assert_frame_equal(again, comparison, check_exact=True)


def test_without_variation_or_pairs_there_is_no_test() -> None:
    scores = score_table()
    same = scores["model"].isin(["good", "dataset_mean"])
    scores.loc[same, "value"] = 0.5
    scores = scores[(scores["model"] != "bad") | (scores["condition"] == "G00")]
    table = quick(scores[scores["covariate"] == "line_1"], N_DEGS, 5)
    tests = ["t_p", "t_holm", "t_bonferroni", "wilcoxon_p", "wilcoxon_holm", "detectable_difference"]
    constant = table.query("model == 'good' and control == 'dataset_mean'")
    assert (constant["mean_difference"] == 0).all()
    assert (constant[["low", "high"]] == 0).all(axis=None)
    assert constant[tests].isna().all(axis=None)
    lone = table.query("model == 'bad' and stratum == '0'")
    assert (lone["n"] == 1).all()
    assert lone["mean_difference"].notna().all()
    assert lone[tests].isna().all(axis=None)
    nobody = table.query("model == 'bad' and stratum == '1-9'")
    assert (nobody["n"] == 0).all()
    assert nobody[["mean_difference", "low", "high", *tests]].isna().all(axis=None)


def test_differences_of_rounding_alone_are_no_difference() -> None:
    scores = score_table()
    good, control = (scores["model"] == name for name in ("good", "additive"))
    noise = 1e-16 * np.random.default_rng(0).uniform(1, 2, int(good.sum()))
    direction = np.where(scores.loc[good, "metric"] == "mse", -1, 1)
    scores.loc[control, "value"] = scores.loc[control, "value"] % 0.1  # so small that the noise is not rounded away
    scores.loc[good, "value"] = scores.loc[control, "value"].to_numpy() + direction * noise
    assert (scores.loc[good, "value"].to_numpy() != scores.loc[control, "value"].to_numpy()).any()
    table = quick(scores, N_DEGS, 5).query("model == 'good' and control == 'additive'")
    assert (table[["mean_difference", "low", "high"]] == 0).all(axis=None)
    assert table[["t_p", "wilcoxon_p"]].isna().all(axis=None)


def test_without_a_model_the_table_is_empty_and_has_its_columns(comparison: pd.DataFrame) -> None:
    scores = score_table()
    empty = quick(scores[scores["model"].isin(["dataset_mean", "additive"])], N_DEGS, 5)
    assert empty.empty
    assert list(empty.columns) == list(comparison.columns)


# Signed ranks


def test_the_signed_rank_p_counts_all_sign_flips() -> None:
    d = np.random.default_rng(4).standard_normal(10) + 0.4
    ranks = stats.rankdata(np.abs(d))
    flips = (np.arange(2**10)[:, None] >> np.arange(10)) & 1
    expected = np.mean(flips @ ranks >= ranks[d > 0].sum())
    assert compute_signed_rank_p(d) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [12, 30, 400])
def test_the_signed_rank_p_of_ties_and_zeros_is_the_normal_approximation(n: int) -> None:
    d = np.round(np.random.default_rng(n).normal(0.2, 1, n), 1)
    d[:2] = 0.0
    kept = d[d != 0]
    ranks = stats.rankdata(np.abs(kept))
    # Mean and variance of the sum of positive ranks when every sign is a toss of a coin.
    z = (ranks[kept > 0].sum() - ranks.sum() / 2) / np.sqrt((ranks**2).sum() / 4)
    assert compute_signed_rank_p(d) == pytest.approx(stats.norm.sf(z), rel=1e-9)


# Detectable difference


def test_a_table_tells_the_difference_that_its_own_tests_can_find(
    comparison: pd.DataFrame, scores: pd.DataFrame
) -> None:
    for row in comparison[comparison["stratum"] == "all"].itertuples():
        d = differences(scores, row.model, row.control, row.metric).to_numpy()
        assert row.detectable_difference == pytest.approx(find_detectable_effect(len(d), 4) * d.std(ddof=1))


@pytest.mark.parametrize(("n", "tests"), [(2, 1), (5, 17), (12, 85), (40, 4), (2500, 340)])
def test_the_detectable_effect_solves_the_power_equation(n: int, tests: int) -> None:
    critical = stats.t.isf(0.05 / tests, n - 1)
    power = stats.nct.sf(critical, n - 1, find_detectable_effect(n, tests) * np.sqrt(n))
    assert power == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("n", "tests"), [(12, 1), (12, 17), (100, 17)])
def test_the_detectable_effect_is_found_in_four_of_five_experiments(n: int, tests: int) -> None:
    experiments = 4000
    draws = np.random.default_rng(n * tests).standard_normal((experiments, n))
    for sd in (1.0, 0.03):
        samples = sd * (draws + find_detectable_effect(n, tests))
        p = stats.ttest_1samp(samples, 0.0, axis=1, alternative="greater").pvalue
        found = int((p < 0.05 / tests).sum())
        assert stats.binomtest(found, experiments, 0.8).pvalue > 1e-3


def test_an_interval_needs_five_pairs() -> None:
    rng = np.random.default_rng(0)
    table = module._test_differences(
        np.column_stack([rng.normal(1, 0.1, 6), [*rng.normal(1, 0.1, 4), np.nan, np.nan]]), 1
    )
    assert list(table["n"]) == [6, 4]
    assert table["low"].notna().tolist() == table["high"].notna().tolist() == [True, False]
    assert table["t_p"].notna().all()
