"""Every metric equals its definition (docs/science.md, section 4), its undefined values included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from core.scoring.metrics import (
    BY_NAME,
    METRICS,
    Metric,
    absolute_error,
    add_products,
    nir,
    pds,
    pearson,
    r2,
    squared_error,
    sum_products,
)
from tests.helpers import by_definition

DEFINITIONS = Path(__file__).parents[3] / "docs" / "science.md"
ROWS, GENES = 9, 23
PROFILES = arrays(np.float64, (ROWS, GENES), elements=st.floats(0, 9, width=16))
FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "squared": squared_error,
    "absolute": absolute_error,
    "pearson": pearson,
    "r2": r2,
}


def value_of(metric: Metric, x: np.ndarray, t: np.ndarray, second: np.ndarray | None) -> np.ndarray:
    """second: the weights, or where each condition's own truth stands."""
    return metric.function(sum_products(x, t), second) if metric.ranking else metric.function(x, t, second)


@pytest.fixture
def profiles() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    truth = rng.gamma(1.0, 1.0, (ROWS, GENES))
    return truth + 0.3 * rng.standard_normal(truth.shape), truth


def weights_of(kind: str) -> np.ndarray | None:
    rng = np.random.default_rng(2)
    if kind == "all":
        return None
    w = rng.random((ROWS, GENES))
    return (w > 0.6).astype(float) if kind == "degs" else np.where(w < 0.2, 0.0, w**2)


def test_the_table_of_metrics_is_the_documented_one() -> None:
    """What their functions, centres and weights are follows from the values (test_evaluation.py)."""
    section = DEFINITIONS.read_text(encoding="utf-8").partition("## 4. Metrics")[2].partition("## 5.")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    assert rows[0] == ["metric", "definition", "better", "perfect", "negative control"]
    found = [
        [m.name, "higher" if m.higher_is_better else "lower", f"{m.perfect:g}", m.negative_control] for m in METRICS
    ]
    assert found == [[name, *properties] for name, _, *properties in rows[2:]]
    assert [m.name for m in METRICS] == list(BY_NAME)


@pytest.mark.parametrize("kind", ["all", "degs", "effect"])
def test_profile_functions_equal_scipy_and_scikit_learn(kind: str, profiles: tuple[np.ndarray, np.ndarray]) -> None:
    x, t = profiles
    w = weights_of(kind)
    expected: dict[str, list[float]] = {name: [] for name in FUNCTIONS}
    for row in range(ROWS):
        weight = np.ones(GENES) if w is None else w[row]
        used = weight > 0
        expected["squared"].append(np.average((x[row] - t[row]) ** 2, weights=weight))
        expected["absolute"].append(np.average(np.abs(x[row] - t[row]), weights=weight))
        expected["r2"].append(by_definition.r2(x[row][used], t[row][used], weight[used]))
        # With equal weights scipy's own, otherwise from numpy's weighted covariance.
        correlation = (
            by_definition.weighted_pearson if kind == "effect" else lambda a, b, _: by_definition.pearson(a, b)
        )
        expected["pearson"].append(correlation(x[row][used], t[row][used], weight[used]))
    for name, function in FUNCTIONS.items():
        np.testing.assert_allclose(function(x, t, w), expected[name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["all", "degs", "effect"])
def test_a_perfect_prediction_is_perfect(kind: str, profiles: tuple[np.ndarray, np.ndarray]) -> None:
    _, t = profiles
    for metric in METRICS:
        value = value_of(metric, t, t, np.arange(ROWS) if metric.ranking else weights_of(kind))
        np.testing.assert_allclose(value, metric.perfect, rtol=0, atol=1e-15, err_msg=metric.name)


def test_without_weight_there_is_no_value(profiles: tuple[np.ndarray, np.ndarray]) -> None:
    x, t = profiles
    for name, function in FUNCTIONS.items():
        assert np.isnan(function(x, t, np.zeros_like(x))).all(), name


def test_one_gene_has_neither_a_correlation_nor_r2(profiles: tuple[np.ndarray, np.ndarray]) -> None:
    x, t = profiles
    w = np.zeros_like(x)
    w[:, 4] = 0.7
    assert np.isnan(pearson(x, t, w)).all()
    assert np.isnan(r2(x, t, w)).all()
    np.testing.assert_allclose(squared_error(x, t, w), ((x - t) ** 2)[:, 4])


@pytest.mark.parametrize("kind", ["all", "degs", "effect"])
def test_a_constant_side_has_no_correlation_even_when_rounding_blurs_it(
    kind: str, profiles: tuple[np.ndarray, np.ndarray]
) -> None:
    x, t = profiles
    w = weights_of(kind)
    # The same mean summed in two orders: a difference of rounding alone.
    summands = np.random.default_rng(3).gamma(1.0, 1.0, (50, GENES))
    blurred = summands.mean(axis=0) - summands[::-1].cumsum(axis=0)[-1] / 50
    assert 0 < np.ptp(blurred) < 1e-14
    flat = np.broadcast_to(blurred, x.shape)
    assert np.isnan(pearson(flat, t, w)).all()
    assert np.isnan(pearson(x, flat, w)).all()
    assert np.isnan(r2(x, flat, w)).all()
    assert np.isfinite(r2(flat, t, w)).all()


def test_a_small_difference_is_not_a_constant(profiles: tuple[np.ndarray, np.ndarray]) -> None:
    x, t = profiles
    np.testing.assert_allclose(pearson(1e-9 * x, t, None), pearson(x, t, None), rtol=0, atol=1e-12)
    np.testing.assert_allclose(r2(1e-9 * x, 1e-9 * t, None), r2(x, t, None), rtol=0, atol=1e-12)


def test_what_varies_only_where_no_weight_is_counts_as_constant(profiles: tuple[np.ndarray, np.ndarray]) -> None:
    x, t = profiles
    w = weights_of("degs")
    assert w is not None
    flat = np.where(w > 0, 2.0, t)
    assert np.isnan(pearson(x, flat, w)).all()
    assert np.isnan(r2(x, flat, w)).all()


# Rankings


def test_nir_by_hand() -> None:
    truths = np.array([[0.0], [1.0], [3.0], [7.0]])
    prediction = np.array([[0.2], [2.5], [3.0], [-9.0]])
    # 0.2: 0 is nearest. 2.5: 3 is nearer than 1 (0.5 < 1.5), 0 and 7 are farther. 3: exact. -9: 7 is the farthest.
    np.testing.assert_array_equal(nir(sum_products(prediction, truths), np.arange(4)), [1.0, 2 / 3, 1.0, 0.0])


def test_nir_counts_no_tie_and_pds_counts_half() -> None:
    truths = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    prediction = np.array([[1.0, 1.0]])
    np.testing.assert_array_equal(nir(sum_products(prediction, truths), np.array([0])), [0.5])
    np.testing.assert_array_equal(pds(sum_products(prediction, truths), np.array([0])), [0.75])


def test_identical_truths_tie_wherever_they_stand() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        truths = rng.gamma(0.5, 1.0, (rng.integers(3, 80), rng.integers(5, 300)))
        one, other = rng.choice(len(truths), 2, replace=False)
        truths[one] = truths[other]
        predictions = rng.gamma(0.5, 1.0, truths.shape)
        own = np.full(len(truths), one)
        distance = ((predictions[:, None] - truths) ** 2).sum(axis=2)
        expected = (distance > distance[:, [one]]).sum(axis=1) / (len(truths) - 1)
        np.testing.assert_array_equal(nir(sum_products(predictions, truths), own), expected)
        centred = truths - predictions.mean(axis=0)
        of = sum_products(predictions - predictions.mean(axis=0), centred)
        shares = pds(of, own) * (len(truths) - 1)
        np.testing.assert_array_equal(np.round(shares, 9) % 1, 0.5)  # one tie, with the twin


def test_products_over_parts_of_the_genes_join_to_those_over_all() -> None:
    rng = np.random.default_rng(1)
    x, t = rng.standard_normal((4, 9)), rng.standard_normal((6, 9))
    found = add_products(sum_products(x[:, :2], t[:, :2]), sum_products(x[:, 2:], t[:, 2:]))
    for part, expected in zip(found, (x @ t.T, (x**2).sum(axis=1), (t**2).sum(axis=1)), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-12)


def test_rankings_without_another_candidate_are_undefined() -> None:
    one = np.ones((1, 3))
    assert np.isnan(nir(sum_products(one, 2 * one), np.array([0]))).all()
    assert np.isnan(pds(sum_products(one, 2 * one), np.array([0]))).all()


def test_pds_is_undefined_without_a_predicted_effect() -> None:
    truths = np.eye(3)
    prediction = np.array([[0.0, 0.0, 0.0], [1e-15, -1e-15, 0.0], [0.0, 1.0, 0.1]])
    value = pds(sum_products(prediction, truths), np.arange(3))
    np.testing.assert_array_equal(np.isnan(value), [True, True, False])


def test_an_undefined_distance_to_the_own_truth_is_no_score() -> None:
    truths = np.eye(3)
    truths[0] = 0.0  # no effect: no direction either
    assert np.isnan(pds(sum_products(np.ones((1, 3)), truths), np.array([0]))).all()
    truths[0] = np.nan
    assert np.isnan(nir(sum_products(np.ones((2, 3)), truths), np.array([0, 1]))).all()


@given(PROFILES, PROFILES, st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_order_of_genes_and_of_conditions_does_not_matter(x: np.ndarray, t: np.ndarray, random) -> None:
    genes, rows = random.sample(range(GENES), GENES), random.sample(range(ROWS), ROWS)
    for metric in METRICS:
        if metric.ranking:
            plain = value_of(metric, x, t, np.arange(ROWS))
            place = np.argsort(rows)  # the candidates in another order, the own one named anew
            moved = value_of(metric, x[:, genes], t[rows][:, genes], place)
            again = value_of(metric, x[rows], t, np.array(rows))
        else:
            w = weights_of(metric.weighting)
            plain = value_of(metric, x, t, w)
            moved = value_of(metric, x[:, genes], t[:, genes], None if w is None else w[:, genes])
            again = value_of(metric, x[rows], t[rows], None if w is None else w[rows])
        # A correlation of nearly constant vectors is ill conditioned.
        np.testing.assert_allclose(moved, plain, rtol=1e-9, atol=1e-7, err_msg=metric.name)
        np.testing.assert_array_equal(again, plain[rows], err_msg=metric.name)


@given(PROFILES, PROFILES)
@settings(max_examples=60)
def test_nothing_beats_the_truth(x: np.ndarray, t: np.ndarray) -> None:
    for metric in METRICS:
        second = np.arange(ROWS) if metric.ranking else weights_of(metric.weighting)
        value, best = value_of(metric, x, t, second), value_of(metric, t, t, second)
        both = ~np.isnan(value) & ~np.isnan(best)
        assert np.isnan(value[both] - best[both]).sum() == 0
        margin = best - value if metric.higher_is_better else value - best
        assert (margin[both] >= -1e-9).all(), metric.name


@given(PROFILES, PROFILES)
@settings(max_examples=40)
def test_a_ranking_does_not_hang_on_the_other_predictions(x: np.ndarray, t: np.ndarray) -> None:
    for metric in (BY_NAME["nir"], BY_NAME["pds"]):
        together = value_of(metric, x, t, np.arange(ROWS))
        alone = [value_of(metric, x[[row]], t, np.array([row]))[0] for row in range(ROWS)]
        np.testing.assert_array_equal(together, alone)
