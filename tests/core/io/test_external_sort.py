"""Rows put away in any order come back in the order of their ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from core.io.external_sort import Spill
from core.io.panels import split_rows


def filled(folder: Path, dense: np.ndarray, order: np.ndarray, cuts: list[int]) -> Spill:
    """Row `order[i]` of the matrix is the i-th that comes; the ranks are the rows' own numbers."""
    with Spill(folder, dense.shape[1]) as spill:
        for ranks in np.split(order, sorted(cuts)):
            spill.add(ranks, sparse.csr_matrix(dense[ranks]))
    return spill


def matrix(n: int, width: int = 7, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 2**24, (n, width)) * (rng.random((n, width)) < 0.4)).astype(np.float64)


@pytest.mark.parametrize("rows", [1, 4, 30, 100])
def test_rows_come_back_in_order(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.io.external_sort.split_rows", partial(split_rows, rows=rows))
    dense = matrix(30)
    dense[[0, 5, 29]] = 0
    spill = filled(tmp_path, dense, np.random.default_rng(1).permutation(30), [3, 4, 18])
    assert len(spill) == 30
    for _ in range(2):  # as often as wanted
        found = list(spill.panels())
        assert [span for span, _ in found] == split_rows(30, rows)
        for span, block in found:
            assert block.dtype == np.float32
            assert block.has_sorted_indices
            np.testing.assert_array_equal(block.toarray(), dense[span])
    stored = np.count_nonzero(dense)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 8 * stored


@settings(max_examples=25)
@given(n=st.integers(1, 25), seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 25), max_size=5))
def test_any_order_in_any_pieces(n: int, seed: int, cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pieces without a row among them."""
    dense = matrix(n, seed=seed)
    order = np.random.default_rng(seed).permutation(n)
    spill = filled(tmp_path_factory.mktemp("spill"), dense, order, cuts)
    ((_, block),) = spill.panels()
    np.testing.assert_array_equal(block.toarray(), dense)


def test_a_file_cut_short_is_no_silent_loss(tmp_path: Path) -> None:
    spill = filled(tmp_path, matrix(30), np.arange(30), [])
    with (tmp_path / "spill.data").open("r+b") as file:
        file.truncate(20)
    with pytest.raises(ValueError, match=r"same size|index and data"):
        list(spill.panels())


def test_the_files_are_closed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), Spill(tmp_path, 3) as spill:
        raise RuntimeError("stop")
    assert all(file.closed for file in spill._files)
