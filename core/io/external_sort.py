"""Rows of a matrix that come in any order, kept on disk and taken again in the order of their ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from scipy import sparse

from core.arrays import Ints
from core.io.panels import read_ahead, split_rows
from core.io.raw_matrix import read_piece


class Spill:
    """Rows (float32) in sorted runs, one for each `add`: a panel of ranks is one piece of every run.

    Memory: 16 bytes a row, and the panel at hand. Disk: 8 bytes a value, in the folder that is given.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.width = width
        self._paths = folder / "spill.data", folder / "spill.indices"
        self._files = [path.open("wb") for path in self._paths]
        self._runs: list[tuple[Ints, Ints]] = []  # ranks, ascending; where each row begins (one more than rows)
        self._stored = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files:
            file.close()

    def __len__(self) -> int:
        return sum(len(ranks) for ranks, _ in self._runs)

    def add(self, ranks: Ints, rows: sparse.csr_matrix) -> None:
        """Add rows.

        Parameters
        ----------
        ranks : Ints
            Distinct over all calls, 0 to the number of all rows - 1 in the end.
        rows : sparse.csr_matrix
            CSR, sorted indices.
        """
        order = np.argsort(ranks)
        rows = rows[order]
        for file, values in zip(
            self._files, (rows.data.astype(np.float32), rows.indices.astype(np.int32)), strict=True
        ):
            file.write(values.data)
        self._runs.append((ranks[order], rows.indptr.astype(np.int64) + self._stored))
        self._stored += rows.nnz

    def panels(self) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """Return all rows by rank, PANEL each, read ahead as by core.io.panels, after the context has ended.

        Returns
        -------
        Iterator[tuple[slice, sparse.csr_matrix]]
        """
        pieces = split_rows(len(self))
        return zip(pieces, read_ahead(self._panel, pieces), strict=True)

    def _panel(self, span: slice) -> sparse.csr_matrix:
        ranks, data, indices, sizes = [], [], [], []
        for of_run, starts in self._runs:
            first, last = np.searchsorted(of_run, (span.start, span.stop))
            if last > first:
                begin, n = int(starts[first]), int(starts[last] - starts[first])
                ranks.append(of_run[first:last])
                data.append(read_piece(self._paths[0], np.float32, begin, n))
                indices.append(read_piece(self._paths[1], np.int32, begin, n))
                sizes.append(np.diff(starts[first : last + 1]))
        pointers = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        shape = (span.stop - span.start, self.width)
        mixed = sparse.csr_matrix((np.concatenate(data), np.concatenate(indices), pointers), shape=shape)
        return mixed[np.argsort(np.concatenate(ranks))]
