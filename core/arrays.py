"""Names for the array types that the science is written in, and the thread rule for linear algebra."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os import cpu_count
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.int64]
T = TypeVar("T")


_limit_lock = threading.Lock()
_limit: list[Any] = []  # the limit in force, then one entry per context that wants it


@contextmanager
def limit_blas_threads() -> Iterator[None]:
    """Return a context in which BLAS and LAPACK use one thread: their last bits change with the number of threads.

    The limit is the whole process's. Contexts may overlap in several threads: the first sets it, the last lifts it.
    (Importing core before numpy sets it for good.)

    Yields
    ------
    Iterator[None]
    """
    with _limit_lock:
        if not _limit:
            _limit.append(threadpool_limits(limits=1))
        _limit.append(None)
    try:
        yield
    finally:
        with _limit_lock:
            _limit.pop()
            if len(_limit) == 1:
                _limit.pop().restore_original_limits()


def run_in_threads(work: Callable[[T], object], items: Iterable[T]) -> None:
    """Do `work` for every item in as many threads as there are cores, BLAS on one; returns when all is done.

    An item's result must not depend on when it is done. Raises what the work raises.

    Parameters
    ----------
    work : Callable[[T], object]
        What is called with each item.
    items : Iterable[T]
        In the order in which they are read.
    """
    with limit_blas_threads(), ThreadPoolExecutor(cpu_count()) as pool:
        list(pool.map(work, items))


def fix_signs(components: Floats) -> Floats:
    """Return components (k x n) with the sign that makes the entry of largest absolute value of each positive.

    Parameters
    ----------
    components : Floats
        k x n.

    Returns
    -------
    Floats
    """
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return np.asarray(components * np.where(largest < 0, -1.0, 1.0))
