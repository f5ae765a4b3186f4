"""Made-up cells for timing: made in seconds at any size, the same on every machine, with effects to be found."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from core.arrays import Ints
from core.rng import generator

FEWEST = 8  # cells of a condition
CHANGED = 0.1  # share of the genes that a condition changes


def log_cells(conditions: int, cells: int, genes: int, filled: float) -> tuple[sparse.csr_matrix, Ints]:
    """(X, codes): expression (log1p, CSR float32, cells x genes) and the condition of each cell.

    filled: share of the entries that are not 0. Conditions are together, as in prepared files, and have about
    cells / conditions cells, never below 8 (`cells` is at least that many). Each changes how often a tenth of the
    genes is seen, more or less strongly; every fourth has no effect.
    """
    rng = generator(42, "benchmark cells")
    others = rng.integers(conditions, size=cells - FEWEST * conditions)
    codes = np.sort(np.concatenate([np.repeat(np.arange(conditions), FEWEST), others]))
    seen = rng.gamma(1.0, 1.0, genes)
    seen = np.clip(seen * filled / seen.mean(), 1e-3, 0.9)
    level = rng.gamma(2.0, 2.0, genes).astype(np.float32)
    pieces = []
    for condition, n in enumerate(np.bincount(codes, minlength=conditions)):
        own = generator(42, "benchmark cells", "", str(condition))
        strength = 0.0 if condition % 4 == 0 else own.gamma(2.0, 0.7)
        changed = own.random(genes) < CHANGED
        share = np.clip(seen * np.exp(strength * changed * own.standard_normal(genes)), 0.0, 0.95)
        rows, columns = np.nonzero(own.random((n, genes), dtype=np.float32) < share.astype(np.float32))
        values = np.log1p(level[columns] * (0.5 + own.standard_exponential(len(rows), dtype=np.float32)))
        pointers = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))])
        pieces.append(sparse.csr_matrix((values, columns.astype(np.int32), pointers), shape=(n, genes)))
    return sparse.vstack(pieces, format="csr"), codes.astype(np.int64)
