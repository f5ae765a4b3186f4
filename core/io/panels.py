"""Large matrices in panels of rows: one pass, bounded memory, and the same bits whatever the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from scipy import sparse

from core.arrays import Ints

# Rows of prepared cells that are summed at once. Sums of floats depend on where they are broken off: a number
# that is fixed gives the same bits on every machine.
PANEL = 2048

T = TypeVar("T")


def split_rows(n: int, rows: int = PANEL) -> list[slice]:
    """Split the numbers 0 .. n - 1 into consecutive pieces of `rows`; the last may be shorter.

    Parameters
    ----------
    n : int
        How many.
    rows : int
        How many at a time.

    Returns
    -------
    list[slice]
    """
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def read_float_panels(X: Any, rows: Ints | None = None) -> Iterator[tuple[slice, sparse.csr_matrix]]:
    """Read the rows of a matrix in float64, PANEL at a time, in order.

    The next panel is read while the caller works on this one.

    Parameters
    ----------
    X : Any
        Cells x genes, CSR in memory or on disk (`X` or a layer of a backed AnnData).
    rows : Ints | None
        Positions, ascending, of those that take part, by default all; the spans count them.

    Returns
    -------
    Iterator[tuple[slice, sparse.csr_matrix]]
    """
    pieces = split_rows(X.shape[0] if rows is None else len(rows))
    panels = read_ahead(lambda span: sparse.csr_matrix(X[_place(span, rows)]), pieces)
    return ((span, panel.astype(np.float64)) for span, panel in zip(pieces, panels, strict=True))


def _place(span: slice, rows: Ints | None) -> slice | Ints:
    if rows is None:
        return span
    at = rows[span]
    # Neighbours on disk are read in one piece.
    return slice(int(at[0]), int(at[-1]) + 1) if at[-1] - at[0] + 1 == len(at) else at


def read_ahead(read: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """Read items in order, each in a second thread while the caller works on the one before.

    Parameters
    ----------
    read : Callable[[Any], T]
        What is called with each item.
    items : Iterable[Any]
        In the order in which they are read.

    Yields
    ------
    Iterator[T]
    """
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for item in items:
            following = reader.submit(read, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
