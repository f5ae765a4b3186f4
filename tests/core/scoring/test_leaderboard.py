"""The leaderboard: who is compared on what, who is ranked by what, and headroom (docs/science.md, sections 4 and 5)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from core.rng import generator
from core.scoring.calibration import RESAMPLES, VARIANTS
from core.scoring.leaderboard import build_leaderboard

METRICS = ("mse", "nir", "weighted_r2_deltapert")
CONTROLS = ("technical_duplicate", "interpolated_duplicate", "dataset_mean", "control_mean", "sparse_mean")
NEGATIVE = {"mse": "dataset_mean", "nir": "dataset_mean", "weighted_r2_deltapert": "control_mean"}
CONDITIONS = [("line_1", f"G{number:02d}") for number in range(12)] + [("line_2", f"G{n:02d}") for n in range(8)]
NAN = np.nan


def score_table(models: dict[str, list[int]], half_seeds: tuple[int, ...] = (42, 43), seed: int = 0) -> pd.DataFrame:
    """Scores at random of the controls on all 20 conditions, and of each model on those whose positions are given."""
    rng = np.random.default_rng(seed)
    covered = {name: list(range(len(CONDITIONS))) for name in CONTROLS} | models
    rows = [
        (name, *CONDITIONS[position], half_seed, metric)
        for half_seed in half_seeds
        for metric in METRICS
        for name, positions in covered.items()
        for position in positions
    ]
    table = pd.DataFrame(rows, columns=["model", "covariate", "condition", "half_seed", "metric"])
    good = table["model"].str.endswith("duplicate").to_numpy() == (table["metric"] != "mse").to_numpy()
    return table.assign(value=rng.uniform(0, 0.4, len(table)) + 0.4 * good)


def verdicts(**other: str) -> pd.DataFrame:
    """A calibration table in which all metrics are calibrated but for those given."""
    rows = [
        (metric, variant.name, other.get(metric, "calibrated") if variant is VARIANTS[0] else None)
        for metric in METRICS
        for variant in VARIANTS
    ]
    return pd.DataFrame(rows, columns=["metric", "variant", "verdict"])


def of(board: pd.DataFrame, model: str, metric: str) -> pd.Series:
    rows = board[(board["model"] == model) & (board["metric"] == metric)]
    assert len(rows) == 1
    return rows.iloc[0]


def wide(scores: pd.DataFrame, metric: str, half_seed: int = 42) -> pd.DataFrame:
    """covariate, condition x model."""
    rows = scores[(scores["metric"] == metric) & (scores["half_seed"] == half_seed)]
    return rows.pivot(index=["covariate", "condition"], columns="model", values="value")


EVERYWHERE = list(range(20))


def test_every_model_and_control_has_one_row_per_metric() -> None:
    board = build_leaderboard(score_table({"mine": EVERYWHERE, "additive": EVERYWHERE}), verdicts(), 1)
    assert len(board) == 3 * 7
    assert not board.duplicated(["model", "metric"]).any()
    kinds = board.drop_duplicates("model").set_index("model")["kind"].to_dict()
    assert kinds == {
        "mine": "model",
        "additive": "baseline",
        "technical_duplicate": "positive control",
        "interpolated_duplicate": "positive control",
        "dataset_mean": "negative control",
        "control_mean": "negative control",
        "sparse_mean": "negative control",
    }


@pytest.mark.parametrize(("covered", "in_panel"), [(20, True), (16, True), (15, False), (1, False)])
def test_a_model_of_less_than_four_fifths_is_not_in_the_panel(covered: int, in_panel: bool) -> None:
    board = build_leaderboard(score_table({"mine": list(range(covered)), "other": EVERYWHERE}), verdicts(), 1)
    row = of(board, "mine", "mse")
    assert row["coverage"] == covered / 20
    assert row["in_panel"] == in_panel
    assert np.isnan(row["rank"]) == (not in_panel)
    assert row["n_conditions"] == covered
    # Those in the panel are compared on what all of them have; the one left out takes nothing away.
    assert of(board, "other", "mse")["n_conditions"] == (covered if in_panel else 20)
    assert of(board, "dataset_mean", "mse")["n_conditions"] == (covered if in_panel else 20)


def test_means_and_medians_are_over_the_conditions_that_the_panel_shares() -> None:
    scores = score_table({"one": EVERYWHERE[2:], "two": EVERYWHERE[:-2], "few": [3, 0, 19]})
    board = build_leaderboard(scores, verdicts(), 1)
    for metric in METRICS:
        values = wide(scores, metric)
        shared = [CONDITIONS[position] for position in range(2, 18)]
        for model in [*CONTROLS, "one", "two"]:
            expected = values.loc[shared, model]
            assert of(board, model, metric)["mean"] == pytest.approx(expected.mean())
            assert of(board, model, metric)["median"] == pytest.approx(expected.median())
        own = values["few"].dropna()
        assert len(own) == 3
        assert of(board, "few", metric)["mean"] == pytest.approx(own.mean())


def test_ranks_follow_the_metric_direction_among_models_and_baselines() -> None:
    scores = score_table({"one": EVERYWHERE, "two": EVERYWHERE, "three": EVERYWHERE, "linear": EVERYWHERE, "few": [1]})
    board = build_leaderboard(scores, verdicts(), 1)
    ranked = board.dropna(subset=["rank"])
    assert set(ranked["model"]) == {"one", "two", "three", "linear"}
    for metric in METRICS:
        rows = ranked[ranked["metric"] == metric].sort_values("rank")
        assert list(rows["rank"]) == [1, 2, 3, 4]
        better_first = rows["mean"] if metric == "mse" else -rows["mean"]
        assert better_first.is_monotonic_increasing


def test_models_are_ranked_only_where_the_metric_is_calibrated() -> None:
    scores = score_table({"one": EVERYWHERE, "two": EVERYWHERE})
    board = build_leaderboard(scores, verdicts(mse="inconclusive", nir="none"), 1)
    marked = board.groupby("metric")["calibrated"].agg(["all", "any"])
    assert marked.loc["weighted_r2_deltapert"].all()
    assert not marked.loc[["mse", "nir"]].any(axis=None)
    by_metric = board[board["model"].isin(["one", "two"])].groupby("metric")["rank"]
    assert by_metric.count().to_dict() == {"mse": 0, "nir": 0, "weighted_r2_deltapert": 2}
    assert board["mean"].notna().all()
    miscalibrated = verdicts(mse="miscalibrated", nir="miscalibrated", weighted_r2_deltapert="inconclusive")
    none = build_leaderboard(scores, miscalibrated, 1)
    assert none["rank"].isna().all()


def test_equal_means_share_a_rank() -> None:
    scores = score_table({"one": EVERYWHERE, "two": EVERYWHERE, "three": EVERYWHERE})
    scores.loc[scores["model"] == "two", "value"] = scores.loc[scores["model"] == "one", "value"].to_numpy()
    scores.loc[scores["model"] == "three", "value"] = 9.0
    board = build_leaderboard(scores, verdicts(), 1)
    ranks = [of(board, model, "mse")["rank"] for model in ("one", "two", "three")]
    assert ranks == [1, 1, 3]


# Headroom


def test_headroom_is_one_for_the_positive_and_zero_for_the_negative_control_and_unclipped() -> None:
    scores = score_table({"better": EVERYWHERE, "worse": EVERYWHERE})
    for metric in METRICS:
        values = wide(scores, metric)
        gap = values["interpolated_duplicate"] - values[NEGATIVE[metric]]
        for model, share in (("better", 1.5), ("worse", -0.25)):
            at = (scores["metric"] == metric) & (scores["model"] == model) & (scores["half_seed"] == 42)
            scores.loc[at, "value"] = (values[NEGATIVE[metric]] + share * gap).to_numpy()
    board = build_leaderboard(scores, verdicts(), 1)
    for metric in METRICS:
        for model, expected in (
            ("interpolated_duplicate", 1.0),
            (NEGATIVE[metric], 0.0),
            ("better", 1.5),
            ("worse", -0.25),
        ):
            row = of(board, model, metric)
            for name in ("headroom", "headroom_low", "headroom_high"):
                assert row[name] == pytest.approx(expected, abs=1e-9), (metric, model, name)


def test_headroom_is_the_ratio_of_panel_means_with_an_interval_over_conditions() -> None:
    scores = score_table({"mine": EVERYWHERE[:17], "few": [0, 5, 7, 11]})
    board = build_leaderboard(scores, verdicts(), 6)
    for metric in METRICS:
        for model, positions in (("mine", EVERYWHERE[:17]), ("few", [0, 5, 7, 11])):
            by_half = []
            for half_seed in (42, 43):
                values = wide(scores, metric, half_seed).loc[[CONDITIONS[p] for p in positions]]
                negative = values[NEGATIVE[metric]].mean()
                by_half.append((values[model].mean() - negative) / (values["interpolated_duplicate"].mean() - negative))
            row = of(board, model, metric)
            assert row["headroom"] == pytest.approx(by_half[0])
            assert row["headroom_half_sd"] == pytest.approx(np.std(by_half, ddof=1))
            # The same draws, one resample at a time, on the conditions in sorted order.
            values = (
                wide(scores, metric).sort_index().loc[lambda t, p=positions: t.index.isin([CONDITIONS[i] for i in p])]
            )
            rng = generator(6, "bootstrap")
            resampled = []
            for _ in range(RESAMPLES):
                drawn = values.iloc[rng.integers(len(values), size=len(values))].mean()
                negative = drawn[NEGATIVE[metric]]
                resampled.append((drawn[model] - negative) / (drawn["interpolated_duplicate"] - negative))
            assert row["headroom_low"] == pytest.approx(np.percentile(resampled, 2.5))
            assert row["headroom_high"] == pytest.approx(np.percentile(resampled, 97.5))


def test_headroom_without_a_gap_between_the_controls_is_missing() -> None:
    scores = score_table({"mine": EVERYWHERE})
    scores.loc[scores["model"].isin(["dataset_mean", "interpolated_duplicate"]), "value"] = 0.5
    board = build_leaderboard(scores, verdicts(), 1)
    names = ["headroom", "headroom_low", "headroom_high"]
    assert of(board, "mine", "mse")[names].isna().all()
    assert of(board, "mine", "weighted_r2_deltapert")[names].notna().all()


def test_headroom_has_no_bound_where_the_gap_may_be_nothing() -> None:
    scores = score_table({"mine": EVERYWHERE})
    values = wide(scores, "mse")
    # One condition alone has a gap: a resample in three misses it.
    positive = values["dataset_mean"].where(values.index != ("line_1", "G04"), values["dataset_mean"] - 0.1)
    at = (scores["metric"] == "mse") & (scores["model"] == "interpolated_duplicate") & (scores["half_seed"] == 42)
    rows = scores.loc[at].set_index(["covariate", "condition"]).index
    scores.loc[at, "value"] = positive[rows].to_numpy()
    row = of(build_leaderboard(scores, verdicts(), 1), "mine", "mse")
    assert np.isfinite(row["headroom"])
    assert row[["headroom_low", "headroom_high"]].isna().all()


# Missing values


def test_missing_values_are_left_out_and_their_share_is_told() -> None:
    scores = score_table({"mine": EVERYWHERE, "constant": EVERYWHERE})
    hole = (scores["model"] == "mine") & (scores["metric"] == "mse") & scores["condition"].isin(["G00", "G01"])
    scores.loc[hole, "value"] = NAN
    scores.loc[(scores["model"] == "constant") & (scores["metric"] == "nir"), "value"] = NAN
    board = build_leaderboard(scores, verdicts(), 1)
    row = of(board, "mine", "mse")
    values = wide(scores, "mse").dropna(subset="mine")
    assert (row["n_conditions"], row["nan_share"], row["coverage"]) == (16, pytest.approx(0.2), 1.0)
    assert row["mean"] == pytest.approx(values["mine"].mean())
    # Headroom compares with the controls on the conditions that the model has.
    negative = values["dataset_mean"].mean()
    expected = (values["mine"].mean() - negative) / (values["interpolated_duplicate"].mean() - negative)
    assert row["headroom"] == pytest.approx(expected)
    none = of(board, "constant", "nir")
    assert (none["n_conditions"], none["nan_share"]) == (0, 1.0)
    assert none[["mean", "median", "headroom", "headroom_low", "headroom_high", "rank"]].isna().all()
    # Alone by a metric, a model has no rank.
    assert np.isnan(of(board, "mine", "nir")["rank"])
    assert of(board, "mine", "mse")["rank"] in (1, 2)


def test_one_half_split_has_no_spread_and_the_order_of_scores_does_not_matter() -> None:
    scores = score_table({"mine": EVERYWHERE, "few": [2, 3]})
    plain = build_leaderboard(scores, verdicts(), 1).sort_values(["metric", "model"], ignore_index=True)
    shuffled = scores.sample(frac=1, random_state=1)
    again = build_leaderboard(shuffled, verdicts(), 1).sort_values(["metric", "model"], ignore_index=True)
    pd.testing.assert_frame_equal(again, plain, check_exact=True)
    one = build_leaderboard(scores[scores["half_seed"] == 42], verdicts(), 1).sort_values(
        ["metric", "model"], ignore_index=True
    )
    assert one["headroom_half_sd"].isna().all()
    pd.testing.assert_frame_equal(one.drop(columns="headroom_half_sd"), plain.drop(columns="headroom_half_sd"))


def test_ranks_compare_models_on_the_conditions_where_the_metric_is_defined_for_all_of_them() -> None:
    scores = score_table({"steady": list(range(20)), "fickle": list(range(20)), "shy": list(range(20))})
    own = scores["metric"] == "nir"
    position = pd.Series(list(zip(scores["covariate"], scores["condition"], strict=True))).map(CONDITIONS.index)
    for model, value in (("steady", 0.5), ("fickle", 0.5), ("shy", 0.9)):
        scores.loc[own & (scores["model"] == model), "value"] = value
    # Where it is hard, the honest model does badly and the fickle one has no value: it must not gain by that.
    hard = own & (position < 3)
    scores.loc[hard & (scores["model"] == "steady"), "value"] = -1.0
    scores.loc[hard & (scores["model"] == "fickle"), "value"] = np.nan
    # Of half of the conditions the shy one has no value: it is not compared, nor does it take them from the others.
    scores.loc[own & (position < 10) & (scores["model"] == "shy"), "value"] = np.nan
    board = build_leaderboard(scores, verdicts(), 42)
    steady, fickle, shy = (of(board, name, "nir") for name in ("steady", "fickle", "shy"))
    assert (steady["n_conditions"], fickle["n_conditions"], shy["n_conditions"]) == (17, 17, 10)
    assert steady["mean"] == fickle["mean"] == 0.5
    assert steady["rank"] == fickle["rank"]
    assert np.isnan(shy["rank"])
    assert fickle["nan_share"] == pytest.approx(3 / 20)
    assert shy["mean"] == pytest.approx(0.9)
