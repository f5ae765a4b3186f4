"""Halves and folds are those of docs/science.md, section 1, clause by clause."""

from __future__ import annotations

import re
from fractions import Fraction
from hashlib import sha256
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.prepare.splits import draw_folds, draw_halves, iterate_groups, list_fold_columns

LOO: Literal["leave-one-out"] = "leave-one-out"


def cells_of(sizes: dict[tuple[str, str], int], shuffle: int = 0) -> pd.DataFrame:
    """obs with so many cells of each (covariate, condition), in no order, names that do not tell the condition."""
    obs = pd.DataFrame([key for key, n in sizes.items() for _ in range(n)], columns=["covariate", "condition"])
    obs.index = pd.Index(np.random.default_rng(99).permutation([f"cell{i:05d}" for i in range(len(obs))]))
    return obs.iloc[np.random.default_rng(shuffle).permutation(len(obs))]


def screen_of(
    n: int, controls: int = 40, covariates: tuple[str, ...] = ("x",), pairs: int = 0, cells: int = 4
) -> pd.DataFrame:
    """obs of n single genes and so many pairs in each covariate."""
    genes = [f"g{i:03d}" for i in range(n)]
    combinations = [f"{a}+{b}" for i, a in enumerate(genes) for b in genes[i + 1 :]][:pairs]
    sizes = {(covariate, "control"): controls for covariate in covariates}
    return cells_of(sizes | {(covariate, c): cells for covariate in covariates for c in genes + combinations})


def splits_of_conditions(obs: pd.DataFrame, folds: pd.DataFrame) -> pd.DataFrame:
    """Perturbed condition x fold; fails unless all cells of a condition, in all covariates, are in one split."""
    perturbed = folds[(obs["condition"] != "control").to_numpy()]
    groups = perturbed.groupby(obs.loc[perturbed.index, "condition"])
    assert (groups.nunique() == 1).all(axis=None)
    return groups.first()


# Halves


@given(n=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_the_first_half_is_the_floor(n: int, seed: int) -> None:
    half = draw_halves(cells_of({("x", "A"): n, ("x", "control"): 9}), seed)
    of_condition = half.groupby(cells_of({("x", "A"): n, ("x", "control"): 9})["condition"]).value_counts()
    assert of_condition.get(("A", "first_half"), 0) == n // 2
    assert of_condition["control", "first_half"] == 4
    assert of_condition["control", "second_half"] == 5


def test_halves_are_the_permutation_of_sorted_names() -> None:
    """By hand: one group after the other, its names sorted, its own generator."""
    obs = cells_of({("x", "A"): 7, ("x", "control"): 12, ("y", "A"): 6, ("y", "B+C"): 5})
    expected = pd.Series("second_half", index=obs.index)
    for (covariate, condition), group in obs.groupby(["covariate", "condition"]):
        digest = sha256(f"half/{covariate}/{condition}".encode()).digest()
        order = np.random.default_rng([5, int.from_bytes(digest[:8], "big")]).permutation(len(group))
        first = np.array(sorted(group.index))[order[: len(group) // 2]]
        expected[first] = "first_half"
    pd.testing.assert_series_equal(draw_halves(obs, 5), expected, check_names=False)


def test_halves_hang_on_nothing_but_the_condition_itself() -> None:
    sizes = {("x", "A"): 30, ("x", "control"): 50, ("y", "A"): 30}
    obs = cells_of(sizes)
    half = draw_halves(obs, 3)
    shuffled = obs.iloc[np.random.default_rng(8).permutation(len(obs))]
    pd.testing.assert_series_equal(draw_halves(shuffled, 3), half[shuffled.index])
    alone = obs[(obs["condition"] == "A") & (obs["covariate"] == "x")]
    pd.testing.assert_series_equal(draw_halves(alone, 3), half[alone.index])
    as_categories = obs.astype({"condition": "category", "covariate": "category"})
    pd.testing.assert_series_equal(draw_halves(as_categories, 3), half)


def test_another_seed_and_another_covariate_draw_other_halves() -> None:
    names = [f"c{i:03d}" for i in range(60)]
    halves = {
        (seed, covariate): tuple(draw_halves(pd.DataFrame({"covariate": covariate, "condition": "A"}, names), seed))
        for seed in (1, 2)
        for covariate in ("x", "y")
    }
    assert len(set(halves.values())) == 4


def test_groups_come_sorted_with_sorted_names() -> None:
    obs = cells_of({("y", "B"): 3, ("x", "control"): 4, ("x", "A+B"): 2, ("x", "A"): 5})
    groups = list(iterate_groups(obs))
    assert [g[:2] for g in groups] == [("x", "A"), ("x", "A+B"), ("x", "control"), ("y", "B")]
    for covariate, condition, names in groups:
        mine = obs.index[(obs["covariate"] == covariate) & (obs["condition"] == condition)]
        assert list(names) == sorted(mine)


# Folds of single-gene data


@given(n=st.integers(10, 60), folds=st.one_of(st.integers(2, 10), st.just(LOO)), controls=st.integers(0, 70))
@settings(max_examples=30)
def test_single_gene_folds(n: int, folds: int | Literal["leave-one-out"], controls: int) -> None:
    obs = screen_of(n, controls=controls, cells=1)
    table = draw_folds(obs, "single", folds, 42)
    n_folds = n if folds == LOO else folds
    assert list(table.columns) == [f"fold_{i}" for i in range(n_folds)]
    assert table.index.equals(obs.index)
    assert set(table.to_numpy().ravel()) <= {"train", "val", "test"}
    parts = [splits_of_conditions(obs, table)]
    if controls:
        parts.append(table[(obs["condition"] == "control").to_numpy()])
    # Conditions, and the control cells one by one, follow the same rule.
    for part in parts:
        # Each is test exactly once: no fold leaves one out, none is test twice.
        assert ((part == "test").sum(axis=1) == 1).all()
        sizes = (part == "test").sum()
        assert sizes.max() - sizes.min() <= 1
        for column in part:
            rest = (part[column] != "test").sum()
            assert (part[column] == "val").sum() == int(Fraction("0.1375") * int(rest))


def test_control_cells_are_in_all_splits_of_every_fold() -> None:
    obs = screen_of(12, controls=100, covariates=("x", "y"))
    table = draw_folds(obs, "single", 5, 42)
    for covariate in ("x", "y"):
        control = table[((obs["condition"] == "control") & (obs["covariate"] == covariate)).to_numpy()]
        for column in control:
            assert control[column].value_counts().to_dict() == {"test": 20, "val": 11, "train": 69}


def test_validation_conditions_are_the_first_of_the_rest() -> None:
    conditions = np.array([f"g{i:03d}" for i in range(30)])
    digest = sha256(b"folds//").digest()
    order = list(conditions[np.random.default_rng([42, int.from_bytes(digest[:8], "big")]).permutation(30)])
    obs = screen_of(30)
    table = splits_of_conditions(obs, draw_folds(obs, "single", 5, 42))
    for fold in range(5):
        test = order[6 * fold : 6 * fold + 6]
        rest = [c for c in order if c not in test]
        column = table[f"fold_{fold}"]
        assert set(column.index[column == "test"]) == set(test)
        assert set(column.index[column == "val"]) == set(rest[:3])
        assert set(column.index[column == "train"]) == set(rest[3:])


# Folds of combination data


@given(n=st.integers(3, 12), pairs=st.integers(2, 3), more=st.integers(0, 20), controls=st.integers(0, 90))
@settings(max_examples=30)
def test_combination_folds(n: int, pairs: int, more: int, controls: int) -> None:
    obs = screen_of(n, controls=controls, pairs=pairs + more, cells=1)
    cells = draw_folds(obs, "combination", 2, 42)
    table = splits_of_conditions(obs, cells)
    singles = ~table.index.str.contains("+", regex=False)
    assert (table[singles] == "train").all(axis=None)
    combinations = table[~singles]
    m = len(combinations)
    # One half is test in fold 0 and the other in fold 1; what is not test is half val, half train.
    assert ((combinations == "test").sum(axis=1) == 1).all()
    tests = (combinations == "test").sum()
    assert sorted(tests) == [m // 2, m - m // 2]
    for column in combinations:
        rest = m - tests[column]
        assert (combinations[column] == "val").sum() == rest // 2
        assert (combinations[column] == "train").sum() == rest - rest // 2
    control = cells[(obs["condition"] == "control").to_numpy()]
    for column in control:
        assert (control[column] == "test").sum() == (control[column] == "val").sum() == controls // 4
    assert ((control == "test").sum(axis=1) <= 1).all()


# What folds hang on


@pytest.mark.parametrize(("task", "folds", "pairs"), [("single", 5, 0), ("combination", 2, 15)])
def test_covariates_share_the_folds_of_a_condition(
    task: Literal["single", "combination"], folds: int, pairs: int
) -> None:
    one = screen_of(12, pairs=pairs)
    two = screen_of(12, pairs=pairs, covariates=("x", "y"))
    both = splits_of_conditions(two, draw_folds(two, task, folds, 42))  # one split over both covariates
    pd.testing.assert_frame_equal(both, splits_of_conditions(one, draw_folds(one, task, folds, 42)))
    # A condition that one covariate lacks has the same fold still.
    fewer = two[(two["condition"] != "g000") | (two["covariate"] == "x")]
    pd.testing.assert_frame_equal(splits_of_conditions(fewer, draw_folds(fewer, task, folds, 42)), both)


@pytest.mark.parametrize(("task", "folds", "pairs"), [("single", 4, 0), ("combination", 2, 9)])
def test_folds_do_not_hang_on_the_order_of_rows_nor_on_the_number_of_cells(
    task: Literal["single", "combination"], folds: int, pairs: int
) -> None:
    obs = screen_of(12, pairs=pairs, covariates=("x", "y"))
    table = draw_folds(obs, task, folds, 42)
    shuffled = obs.iloc[np.random.default_rng(1).permutation(len(obs))]
    pd.testing.assert_frame_equal(draw_folds(shuffled, task, folds, 42), table.loc[shuffled.index])
    as_categories = obs.astype({"condition": "category", "covariate": "category"})
    pd.testing.assert_frame_equal(draw_folds(as_categories, task, folds, 42), table)
    more = screen_of(12, pairs=pairs, covariates=("x", "y"), cells=6)
    pd.testing.assert_frame_equal(
        splits_of_conditions(more, draw_folds(more, task, folds, 42)), splits_of_conditions(obs, table)
    )
    other = draw_folds(obs, task, folds, 43)
    assert not other.equals(table)


def test_control_folds_do_not_hang_on_the_conditions() -> None:
    many = screen_of(20)
    control = many.index[many["condition"] == "control"]
    few = many[many["condition"].isin(["control", *(f"g{i:03d}" for i in range(5, 17))])]
    left, right = (draw_folds(obs, "single", 5, 42).loc[control] for obs in (many, few))
    pd.testing.assert_frame_equal(left, right)


def test_fold_columns_are_in_the_order_of_their_numbers() -> None:
    obs = draw_folds(screen_of(12), "single", LOO, 42).assign(half="first_half")
    assert list_fold_columns(obs[obs.columns[::-1]]) == [f"fold_{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("task", "folds", "pairs", "field", "found"),
    [
        ("single", 5, 3, "task", "single, but 3 conditions are combinations (first: g000+g001)"),
        ("single", 13, 0, "folds", "13 folds for 12 conditions"),
        ("single", 1, 0, "folds", "1 folds for 12 conditions"),
        ("combination", 5, 6, "folds", "5 folds for combination data"),
        ("combination", LOO, 6, "folds", "leave-one-out folds for combination data"),
        ("combination", 2, 1, "task", "combination, but the data hold 1 combinations"),
    ],
)
def test_impossible_splits_are_refused(
    task: Literal["single", "combination"], folds: int | Literal["leave-one-out"], pairs: int, field: str, found: str
) -> None:
    with pytest.raises(UserError, match=re.escape(found)) as error:
        draw_folds(screen_of(12, pairs=pairs), task, folds, 42)
    assert (error.value.where, error.value.field) == ("catalog entry", field)
    assert error.value.remedy


def test_prepared_cells_hold_these_halves_and_folds(screen: ad.AnnData) -> None:
    obs = screen.obs
    columns = list_fold_columns(obs)
    task: Literal["single", "combination"] = "combination" if len(columns) == 2 else "single"
    plain = obs[["covariate", "condition"]].astype(str)
    assert (draw_halves(plain, 42) == obs["half"].astype(str)).all()
    pd.testing.assert_frame_equal(draw_folds(plain, task, len(columns), 42), obs[columns].astype(str).astype(object))
