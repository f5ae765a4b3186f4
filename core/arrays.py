"""Names for the array types that the science is written in, and the thread rule for linear algebra."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Ints: TypeAlias = npt.NDArray[np.int64]


def one_blas_thread() -> Any:
    """A context in which BLAS and LAPACK use one thread: their last bits change with the number of threads."""
    return threadpool_limits(limits=1)


def fixed_signs(components: Floats) -> Floats:
    """Components (k x n) with the sign that makes the entry of largest absolute value of each positive."""
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return np.asarray(components * np.where(largest < 0, -1.0, 1.0))
