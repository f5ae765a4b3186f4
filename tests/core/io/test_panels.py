"""Reading ahead: the order stays, errors arrive, and the reader's thread ends with its consumer."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from core.io.panels import PANEL, read_ahead, read_float_panels, split_rows


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("n", "rows", "expected"),
    [(0, 3, []), (2, 3, [(0, 2)]), (3, 3, [(0, 3)]), (7, 3, [(0, 3), (3, 6), (6, 7)])],
)
def test_spans(n: int, rows: int, expected: list[tuple[int, int]]) -> None:
    assert split_rows(n, rows) == [slice(a, b) for a, b in expected]


def test_results_come_in_order_from_another_thread() -> None:
    readers = set()

    def read(item: int) -> int:
        readers.add(threading.get_ident())
        return item * item

    assert list(read_ahead(read, range(20))) == [i * i for i in range(20)]
    assert len(readers) == 1
    assert threading.get_ident() not in readers
    assert list(read_ahead(read, [])) == []


def test_the_next_is_read_while_the_consumer_works_and_no_more() -> None:
    began = [threading.Event() for _ in range(4)]

    def read(item: int) -> int:
        began[item].set()
        return item

    results = read_ahead(read, range(4))
    assert next(results) == 0
    # The consumer is at work on the first now.
    assert began[1].wait(10)
    assert not began[2].is_set()
    assert list(results) == [1, 2, 3]


def test_an_error_of_the_reader_reaches_the_consumer_after_what_came_before() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise OSError("torn")
        return item

    results = read_ahead(read, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="torn"):
        next(results)


def test_an_error_of_the_items_reaches_the_consumer() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        list(read_ahead(lambda item: item, items()))


def test_a_consumer_that_stops_early_ends_the_thread() -> None:
    for value in read_ahead(lambda item: item, range(100)):
        if value == 3:
            break
    matrix = sparse.random(3 * PANEL, 2, density=0.1, format="csr")
    for span, _ in read_float_panels(matrix):
        assert span == slice(0, PANEL)
        break


def test_a_consumer_that_fails_ends_the_thread() -> None:
    def consume() -> None:
        for value in read_ahead(lambda item: item, range(100)):
            raise RuntimeError(f"failed at {value}")

    with pytest.raises(RuntimeError, match="failed at 0"):
        consume()


def test_panels_are_the_matrix_in_memory_and_on_disk(tmp_path: Path) -> None:
    n = 2 * PANEL + 5
    matrix = sparse.random(n, 3, density=0.2, format="csr", dtype=np.float32, random_state=1)
    ad.AnnData(matrix).write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    some = np.r_[0:10, 500 : 500 + PANEL, n - 1]
    for X in (matrix, backed.X):
        for rows in (None, some):
            found = list(read_float_panels(X, rows))
            expected = matrix if rows is None else matrix[rows]
            assert [span for span, _ in found] == split_rows(expected.shape[0])
            assert all(block.dtype == np.float64 for _, block in found)
            np.testing.assert_array_equal(sparse.vstack([block for _, block in found]).toarray(), expected.toarray())
    backed.file.close()
