"""Dynamic range, discrimination and verdicts (docs/science.md, section 5)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from core.rng import generator
from core.scoring.calibration import (
    RESAMPLES,
    VARIANTS,
    build_calibration,
    decide_verdict,
    discrimination,
    dynamic_range_fraction,
)
from core.scoring.metrics import BY_NAME

MSE, PEARSON = BY_NAME["mse"], BY_NAME["pearson_deltactrl"]
NAN = np.nan
CONTROLS = ("technical_duplicate", "interpolated_duplicate", "dataset_mean", "control_mean")


def score_table(
    metrics: tuple[str, ...] = ("mse", "pearson_deltactrl", "weighted_r2_deltapert"),
    conditions: int = 20,
    half_seeds: tuple[int, ...] = (42, 43, 44),
    seed: int = 0,
) -> pd.DataFrame:
    """Scores of four controls at random, better for the positive ones; two covariates."""
    rng = np.random.default_rng(seed)
    rows = [
        (model, "line_2" if number % 3 == 0 else "line_1", f"G{number:02d}", half_seed, metric)
        for metric in metrics
        for half_seed in half_seeds
        for number in range(conditions)
        for model in CONTROLS
    ]
    table = pd.DataFrame(rows, columns=["model", "covariate", "condition", "half_seed", "metric"])
    positive = table["model"].str.endswith("duplicate").to_numpy()
    higher = table["metric"].map(lambda name: BY_NAME[name].higher_is_better).to_numpy()
    table["value"] = rng.uniform(0.1, 0.5, len(table)) + 0.3 * (positive == higher)
    return table


# One condition


@pytest.mark.parametrize(
    ("metric", "positive", "negative", "expected"),
    [
        ("mse", 0.2, 0.8, 0.6 / 0.800001),
        ("mse", 0.0, 0.8, 0.8 / 0.800001),
        ("mse", 0.8, 0.2, -1.0),  # -0.6 / 0.200001, clipped
        ("mse", 0.3, 0.2, -0.1 / 0.200001),
        ("mse", 0.0, 0.0, 0.0),
        ("mse", 1e-7, 2e-7, 1e-7 / 1.2e-6),
        ("mae", 0.5, 2.0, 1.5 / 2.000001),
        ("pearson_deltactrl", 0.9, 0.5, 0.4 / 0.500001),
        ("pearson_deltactrl", 0.2, 0.5, -0.3 / 0.500001),
        ("pearson_deltactrl", -0.9, 0.5, -1.0),
        ("pearson_deltactrl", 1.0, 1.0, 0.0),
        ("r2_deltapert", -2.0, -5.0, 3.0 / 6.000001),
        ("nir", 1.0, 0.5, 0.5 / 0.500001),
        ("nir", 1.0, NAN, NAN),
        ("nir", NAN, 1.0, NAN),
        ("mse", NAN, 1.0, NAN),
    ],
)
def test_dynamic_range_fraction_by_hand(metric: str, positive: float, negative: float, expected: float) -> None:
    found = dynamic_range_fraction(np.array([positive]), np.array([negative]), BY_NAME[metric])
    np.testing.assert_allclose(found, [expected], rtol=1e-12)


def test_the_fraction_lies_between_its_ends_and_grows_with_the_positive_control() -> None:
    rng = np.random.default_rng(0)
    for metric in BY_NAME.values():
        negative = rng.uniform(-3, 1, 200) if metric.higher_is_better else rng.uniform(0, 3, 200)
        positive = (
            np.sort(rng.uniform(-5, 1, 200)) if metric.higher_is_better else np.sort(rng.uniform(0, 5, 200))[::-1]
        )
        found = dynamic_range_fraction(positive, negative, metric)
        assert (np.abs(found) <= 1).all()
        one = dynamic_range_fraction(positive, np.full(200, 0.3), metric)
        assert (np.diff(one) >= 0).all()


def test_discrimination_is_strict_and_a_tie_is_half() -> None:
    positive, negative = np.array([1.0, 0.0, 0.5, NAN, 0.1]), np.array([0.0, 1.0, 0.5, 0.0, NAN])
    np.testing.assert_array_equal(discrimination(positive, negative, PEARSON), [1, 0, 0.5, NAN, NAN])
    np.testing.assert_array_equal(discrimination(positive, negative, MSE), [0, 1, 0.5, NAN, NAN])


@pytest.mark.parametrize(
    ("n", "low", "high", "expected"),
    [
        (10, 0.11, 0.5, "calibrated"),
        (10, 0.1, 0.5, "inconclusive"),  # the whole interval above 0.1
        (10, 0.05, 0.1, "inconclusive"),  # the whole interval below 0.1
        (10, 0.05, 0.2, "inconclusive"),
        (10, -0.3, 0.0999, "miscalibrated"),
        (9, 0.5, 0.9, "none"),
        (9, -0.5, 0.0, "none"),
        (0, NAN, NAN, "none"),
    ],
)
def test_verdicts_at_their_boundaries(n: int, low: float, high: float, expected: str) -> None:
    assert decide_verdict(n, low, high) == expected


# The table


def test_every_row_equals_a_loop_over_its_conditions() -> None:
    scores = score_table()
    scores.loc[(scores["metric"] == "mse") & (scores["condition"] == "G05"), "value"] = NAN
    table = build_calibration(scores, seed=11).set_index(["metric", "variant"])
    assert list(table.index) == [
        (m, v.name) for m in ("mse", "pearson_deltactrl", "weighted_r2_deltapert") for v in VARIANTS
    ]
    own = {"mse": "dataset_mean", "pearson_deltactrl": "dataset_mean", "weighted_r2_deltapert": "control_mean"}
    by_condition = scores.set_index(["half_seed", "metric", "model", "covariate", "condition"])["value"].sort_index()
    for (metric, variant), row in table.iterrows():
        positive = "interpolated_duplicate" if variant == "drf_interpolated" else "technical_duplicate"
        negative = "control_mean" if variant == "drf_ctrl" else own[metric]
        assert (row["positive"], row["negative"]) == (positive, negative)
        drf: dict[int, list[float]] = {}
        bds: dict[int, list[float]] = {}
        for half_seed in (42, 43, 44):
            pos, neg = by_condition[half_seed, metric, positive], by_condition[half_seed, metric, negative]
            drf[half_seed], bds[half_seed] = [], []
            for key in pos.index:
                p, n = pos[key], neg[key]
                fraction = (p - n) / (1 - n + 1e-6) if metric != "mse" else (n - p) / (n + 1e-6)
                win = p - n if metric != "mse" else n - p
                drf[half_seed].append(fraction if np.isnan(fraction) else max(-1.0, min(1.0, fraction)))
                bds[half_seed].append(NAN if np.isnan(win) else 1.0 if win > 0 else 0.5 if win == 0 else 0.0)
        usable = 19 if metric == "mse" else 20
        assert row["n_conditions"] == usable
        assert row["nan_share"] == pytest.approx(1 - usable / 20)
        assert row["drf"] == pytest.approx(np.nanmean(drf[42]))
        assert row["bds"] == pytest.approx(np.nanmean(bds[42]))
        there = ~np.isnan(drf[42])
        assert row["positive_value"] == pytest.approx(by_condition[42, metric, positive][there].mean())
        assert row["negative_value"] == pytest.approx(by_condition[42, metric, negative][there].mean())
        for name, values in (("drf", drf), ("bds", bds)):
            assert row[f"{name}_half_sd"] == pytest.approx(np.std([np.nanmean(v) for v in values.values()], ddof=1))
            rng = generator(11, "bootstrap")
            resampled = [np.nanmean(np.array(values[42])[rng.integers(20, size=20)]) for _ in range(RESAMPLES)]
            assert row[f"{name}_low"] == pytest.approx(np.percentile(resampled, 2.5), abs=1e-12)
            assert row[f"{name}_high"] == pytest.approx(np.percentile(resampled, 97.5), abs=1e-12)
        expected = decide_verdict(usable, row["drf_low"], row["drf_high"]) if variant == "drf_interpolated" else None
        assert row["verdict"] == expected
    assert RESAMPLES >= 2000


def test_the_interval_is_about_what_another_generator_gives() -> None:
    row = build_calibration(score_table(("mse",)), seed=1).iloc[0]
    scores = score_table(("mse",)).query("half_seed == 42").set_index(["model", "covariate", "condition"])["value"]
    positive, negative = (scores[name].to_numpy() for name in ("interpolated_duplicate", "dataset_mean"))
    drf = np.clip((negative - positive) / (negative + 1e-6), -1, 1)
    rng = np.random.default_rng(5)
    means = [drf[rng.integers(20, size=20)].mean() for _ in range(20_000)]
    width = row["drf_high"] - row["drf_low"]
    np.testing.assert_allclose([row["drf_low"], row["drf_high"]], np.percentile(means, [2.5, 97.5]), atol=0.06 * width)


def test_fewer_than_ten_usable_conditions_give_no_verdict() -> None:
    scores = score_table(("mse",), conditions=30)
    worst = build_calibration(scores, 0).iloc[0]
    assert worst["verdict"] == "calibrated"
    few = scores["value"].where(~((scores["model"] == "dataset_mean") & (scores["condition"] >= "G09")))
    row = build_calibration(scores.assign(value=few), 0).iloc[0]
    assert (row["n_conditions"], row["verdict"], row["nan_share"]) == (9, "none", 0.7)
    assert np.isfinite(row[["drf", "drf_low", "drf_high", "bds"]].to_numpy(float)).all()
    few = scores["value"].where(~((scores["model"] == "dataset_mean") & (scores["condition"] >= "G10")))
    assert build_calibration(scores.assign(value=few), 0).iloc[0]["verdict"] == "calibrated"


def test_a_metric_without_any_usable_condition_is_missing_throughout() -> None:
    scores = score_table(("pearson_deltactrl", "mse"))
    constant = (scores["metric"] == "pearson_deltactrl") & (scores["model"] == "control_mean")
    table = build_calibration(scores.assign(value=scores["value"].mask(constant)), 0).set_index(["metric", "variant"])
    row = table.loc[("pearson_deltactrl", "drf_ctrl")]
    numbers = [c for c in table.columns if c.startswith(("drf", "bds")) or c.endswith("_value")]
    assert row[numbers].isna().all()
    assert (row["n_conditions"], row["nan_share"], row["verdict"]) == (0, 1.0, None)
    assert np.isfinite(table.loc[("pearson_deltactrl", "drf_mean"), "drf"])
    everything = build_calibration(scores.assign(value=NAN), 0)
    assert (everything.loc[everything["variant"] == "drf_interpolated", "verdict"] == "none").all()


def test_one_half_split_has_no_spread() -> None:
    table = build_calibration(score_table(half_seeds=(42,)), 0)
    assert table[["drf_half_sd", "bds_half_sd"]].isna().all(axis=None)
    assert table["drf"].notna().all()


def test_the_quoted_split_is_the_lowest_seed() -> None:
    scores = score_table(half_seeds=(42, 43, 44))
    later = scores[scores["half_seed"] != 42]
    columns = ["drf", "drf_low", "drf_high", "bds", "n_conditions"]
    pd.testing.assert_frame_equal(
        build_calibration(later, 0)[columns], build_calibration(later[later["half_seed"] == 43], 0)[columns]
    )


def test_the_order_of_the_score_table_does_not_matter() -> None:
    scores = score_table()
    plain = build_calibration(scores, 3)
    shuffled = scores.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(build_calibration(shuffled, 3), plain, check_exact=True)
    as_categories = shuffled.astype(dict.fromkeys(["model", "covariate", "condition", "metric"], "category"))
    pd.testing.assert_frame_equal(build_calibration(as_categories, 3), plain, check_exact=True)
    of_one = build_calibration(scores[scores["metric"] == "mse"], 3)
    pd.testing.assert_frame_equal(of_one, plain.iloc[:3], check_exact=True)


def test_models_in_the_table_change_nothing() -> None:
    scores = score_table()
    model = scores[scores["model"] == "dataset_mean"].assign(model="mine", value=7.0)
    pd.testing.assert_frame_equal(
        build_calibration(pd.concat([model, scores]), 3), build_calibration(scores, 3), check_exact=True
    )


def test_calibrated_metrics_are_those_with_the_verdict() -> None:
    table = build_calibration(score_table(conditions=30), 0)
    assert list(table.loc[table["verdict"] == "calibrated", "metric"]) == [
        "mse",
        "pearson_deltactrl",
        "weighted_r2_deltapert",
    ]
    bad = score_table(("mse",), conditions=30)
    swapped = {"interpolated_duplicate": "dataset_mean", "dataset_mean": "interpolated_duplicate"}
    table = build_calibration(bad.assign(model=bad["model"].replace(swapped)), 0)
    assert not (table["verdict"] == "calibrated").any()
