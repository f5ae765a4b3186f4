"""Controls and the additive baseline equal their formulas (docs/science.md, section 3)."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from core.reference.control_profiles import draw_sparse_mean, interpolate_duplicate, predict_additive
from core.reference.controls import CONTROLS

PROFILE = arrays(np.float64, (3, 5), elements=st.floats(0, 9))


def test_names_and_roles() -> None:
    """The table of docs/science.md, section 3."""
    assert {control.name: control.role for control in CONTROLS} == {
        "technical_duplicate": "positive control",
        "interpolated_duplicate": "positive control",
        "dataset_mean": "negative control",
        "control_mean": "negative control",
        "sparse_mean": "negative control",
        "additive": "baseline",
        "linear": "baseline",
    }


@given(duplicate=PROFILE, mean=PROFILE, p=arrays(np.float64, (3, 5), elements=st.floats(0, 1)))
@settings(max_examples=50)
def test_interpolation(duplicate: np.ndarray, mean: np.ndarray, p: np.ndarray) -> None:
    expected = [
        [(1 - q) * d + q * m for q, d, m in zip(*rows, strict=True)] for rows in zip(p, duplicate, mean, strict=True)
    ]
    np.testing.assert_allclose(interpolate_duplicate(duplicate, mean, p), expected, rtol=1e-12, atol=1e-12)


def test_interpolation_takes_the_mean_where_nothing_was_tested() -> None:
    duplicate, mean = np.full((1, 4), 5.0), np.full((1, 4), 1.0)
    p = np.array([[0.0, 1.0, np.nan, 0.25]])
    assert interpolate_duplicate(duplicate, mean, p).tolist() == [[5.0, 1.0, 1.0, 4.0]]
    assert np.isnan(interpolate_duplicate(duplicate, np.full((1, 4), np.nan), p)).all()


# The cells of sparse_mean


@pytest.fixture
def drawing() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Cells in no order, conditions and their splits in two folds; x A and x B are tested in fold 0, y A in fold 1."""
    sizes = {("x", "A"): 20, ("x", "B"): 41, ("x", "C"): 9, ("x", "D"): 8, ("y", "A"): 30, ("y", "C"): 6}
    labels = [key for key, n in (sizes | {("x", "control"): 50}).items() for _ in range(n)]
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(labels, columns=["covariate", "condition"])
    obs.index = rng.permutation([f"cell{i:03d}" for i in range(len(obs))])
    keys = pd.DataFrame(list(sizes), columns=["covariate", "condition"]).assign(
        n_cells=list(sizes.values()), test_fold=[0, 0, -1, -1, 1, -1]
    )
    splits = pd.DataFrame(
        {
            "fold_0": ["test", "test", "train", "train", "val", "train"],
            "fold_1": ["train", "val", "train", "train", "test", "train"],
        }
    )
    return obs.iloc[rng.permutation(len(obs))], keys, splits


def names_drawn(obs: pd.DataFrame, covariate: str, condition: str, pool: list[str], size: int) -> set[str]:
    """By hand: a draw of its own from the pool's names in sorted order."""
    digest = sha256(f"sparse_mean/{covariate}/{condition}".encode()).digest()
    rng = np.random.default_rng([42, int.from_bytes(digest[:8], "big")])
    of_pool = (obs["covariate"] == covariate) & obs["condition"].isin(pool)
    return set(rng.choice(np.array(sorted(obs.index[of_pool])), size=size, replace=False))


def test_half_as_many_cells_are_drawn_from_the_training_perturbations(
    drawing: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame],
) -> None:
    obs, keys, splits = drawing
    found = draw_sparse_mean(obs, keys, splits, 42).toarray()
    assert set(np.unique(found)) == {0.0, 1.0}
    drawn = [set(obs.index[row == 1]) for row in found]
    assert drawn[0] == names_drawn(obs, "x", "A", ["C", "D"], 10)
    assert drawn[1] == names_drawn(obs, "x", "B", ["C", "D"], 17)  # half of 41 is more than the 17 there are
    assert drawn[4] == names_drawn(obs, "y", "A", ["C"], 6)
    assert [len(drawn[row]) for row in (2, 3, 5)] == [0, 0, 0]  # never test


def test_draws_do_not_hang_on_order_or_on_other_conditions(
    drawing: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame],
) -> None:
    obs, keys, splits = drawing
    found = draw_sparse_mean(obs, keys, splits, 42).toarray()
    order = np.random.default_rng(1).permutation(len(obs))
    np.testing.assert_array_equal(draw_sparse_mean(obs.iloc[order], keys, splits, 42).toarray(), found[:, order])
    fewer = keys.assign(test_fold=[-1, 0, -1, -1, -1, -1])
    np.testing.assert_array_equal(draw_sparse_mean(obs, fewer, splits, 42).toarray()[1], found[1])
    assert (draw_sparse_mean(obs, keys, splits, 43).toarray()[0] != found[0]).any()


def test_additive_by_hand() -> None:
    control = np.array([1.0, 2.0])
    singles = {"A": np.array([2.0, 2.0]), "B": np.array([0.5, 5.0]), "C": np.array([1.0, 1.0])}
    found = predict_additive(["A+B", "A", "A+D", "A+B+C", "D+E"], singles, control)
    # 1 + 1 - 0.5 and 2 + 0 + 3; a single gene is no combination; D and E have no profile.
    np.testing.assert_allclose(found[0], [1.5, 5.0])
    np.testing.assert_allclose(found[3], [1.5, 4.0])
    assert np.isnan(found[[1, 2, 4]]).all()
