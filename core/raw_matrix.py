"""The matrix of a published h5ad in chunks of rows, however it is stored: by rows, by columns or dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from scipy import sparse

from core.arrays import Ints
from core.errors import UserError, shown
from core.panels import spans

# What a stored value takes on its way, in bytes: two chunks in flight, their numbers and indices of up to eight
# bytes each, and the copies that selecting rows and columns makes.
BYTES_PER_VALUE = 100
NUMBERS = "iuf"  # kinds of numpy types: signed, unsigned, floating


class Rows(NamedTuple):
    """A matrix in chunks of rows. spans: all rows, in order. read: one span as CSR, all `width` columns, sorted."""

    width: int
    spans: list[slice]
    read: Callable[[slice], sparse.csr_matrix]


@contextmanager
def open_rows(path: Path, layer: str | None, shape: tuple[int, int], memory: int, scratch: Path) -> Iterator[Rows]:
    """The matrix of an h5ad (X, or a layer), to be read in chunks that fit into `memory` bytes.

    shape: what the file's tables of cells and genes say. scratch: a folder for a transposed copy, which a matrix
    stored by columns (CSC) needs. Values keep their type. Raises UserError, here or while reading, for a matrix that
    is missing, has another shape, holds no numbers, or whose indices do not make sense.
    """
    field = "X" if layer is None else f"layers[{layer!r}]"
    with h5py.File(path) as file:
        place = file.get("X" if layer is None else f"layers/{layer}")
        if place is None:
            layers = sorted(file.get("layers", {}))
            remedy = "put the raw counts into X, or name their layer in the catalog entry (`counts_layer`)"
            raise UserError(path, field, f"no matrix there; layers there are: {shown(layers) or 'none'}", remedy)
        wrong = Wrong(path, field)
        kind = "array" if isinstance(place, h5py.Dataset) else _format(place)
        if kind not in STORED:
            raise wrong(f"stored as {kind}", "give a dense, CSR or CSC matrix")
        yield STORED[kind](place, shape, max(memory // BYTES_PER_VALUE, 1), scratch, wrong)


def has_layer(path: Path, layer: str) -> bool:
    """Whether the h5ad has this layer."""
    with h5py.File(path) as file:
        return f"layers/{layer}" in file


class Wrong(NamedTuple):
    """Makes the error about one matrix of one file."""

    path: Path
    field: str

    def __call__(self, found: str, remedy: str = "the file is damaged: write or download it again") -> UserError:
        return UserError(self.path, self.field, found, remedy)


def _format(group: h5py.Group) -> str:
    # Files older than anndata 0.7 say it in another attribute.
    said = str(group.attrs.get("encoding-type") or group.attrs.get("h5sparse_format", "unknown"))
    return {"csr": "csr_matrix", "csc": "csc_matrix"}.get(said, said)


def _dense(place: h5py.Dataset, shape: tuple[int, int], values: int, scratch: Path, wrong: Wrong) -> Rows:
    _require_numbers(place.dtype, wrong)
    if place.shape != shape:
        raise wrong(f"shape {place.shape} for {shape[0]:,} cells x {shape[1]:,} genes")
    n = max(values // max(shape[1], 1), 1)
    stored = place.chunks[0] if place.chunks else 1
    # Whole chunks of the file, so that none is unpacked twice.
    n = max(n // stored * stored, min(n, stored))
    return Rows(shape[1], spans(shape[0], n), lambda span: sparse.csr_matrix(place[span]))


def _by_rows(place: h5py.Group, shape: tuple[int, int], values: int, scratch: Path, wrong: Wrong) -> Rows:
    pointers = _pointers(place, shape[0], wrong)

    def read(span: slice) -> sparse.csr_matrix:
        return _block(place, pointers[span.start : span.stop + 1], shape[1], wrong)

    return Rows(shape[1], _spans(pointers, values), read)


def _by_columns(place: h5py.Group, shape: tuple[int, int], values: int, scratch: Path, wrong: Wrong) -> Rows:
    """Rows of a matrix stored by columns: blocks of columns, each turned to rows once, lie in the folder `scratch`.

    A chunk of rows is put together from its piece of every block.
    """
    pointers = _pointers(place, shape[1], wrong)
    blocks = _spans(pointers, values)
    files = {name: scratch / f"by_rows.{name}" for name in ("data", "indices", "indptr")}
    dtype, starts, per_row = place["data"].dtype, [0], np.zeros(shape[0], dtype=np.int64)
    with files["data"].open("wb") as data, files["indices"].open("wb") as indices, files["indptr"].open("wb") as indptr:
        for block in blocks:
            columns = _block(place, pointers[block.start : block.stop + 1], shape[0], wrong)
            # The rows of the transpose are the columns that were stored.
            turned = columns.T.tocsr()
            data.write(turned.data.data)
            indices.write(turned.indices.astype(np.int32).data)
            indptr.write((turned.indptr + np.int64(starts[-1])).data)
            per_row += np.diff(turned.indptr)
            starts.append(starts[-1] + turned.nnz)

    def read(span: slice) -> sparse.csr_matrix:
        pieces = []
        for number, block in enumerate(blocks):
            n = span.stop - span.start
            at = piece_of(files["indptr"], np.int64, number * (shape[0] + 1) + span.start, n + 1)
            where = int(at[0]), int(at[-1] - at[0])
            stored = (piece_of(files["data"], dtype, *where), piece_of(files["indices"], np.int32, *where), at - at[0])
            pieces.append(sparse.csr_matrix(stored, shape=(n, block.stop - block.start)))
        return sparse.hstack(pieces, format="csr")

    return Rows(shape[1], _spans(np.concatenate([[0], np.cumsum(per_row)]), values), read)


STORED: dict[str, Callable[[Any, tuple[int, int], int, Path, Wrong], Rows]] = {
    "array": _dense,
    "csr_matrix": _by_rows,
    "csc_matrix": _by_columns,
}


def piece_of(path: Path, dtype: Any, start: int, n: int) -> Any:
    """`n` numbers of a plain binary file, from number `start` on."""
    return np.fromfile(path, dtype=dtype, count=n, offset=start * np.dtype(dtype).itemsize)


def _spans(pointers: Ints, values: int) -> list[slice]:
    """Consecutive rows (or columns) that hold at most `values` stored values, and at least one row, each."""
    pieces, start, n = [], 0, len(pointers) - 1
    while start < n:
        most = int(np.searchsorted(pointers, pointers[start] + values, side="right")) - 1
        stop = min(max(most, start + 1), start + values, n)
        pieces.append(slice(start, stop))
        start = stop
    return pieces


def _pointers(place: h5py.Group, n: int, wrong: Wrong) -> Ints:
    """Where each of the `n` rows (or columns) begins, checked."""
    missing = [name for name in ("data", "indices", "indptr") if name not in place]
    if missing:
        raise wrong(f"a sparse matrix without {', '.join(missing)}")
    _require_numbers(place["data"].dtype, wrong)
    sizes = {name: place[name].shape for name in ("data", "indices", "indptr")}
    stored = int(place["data"].size)
    if sizes != {"data": (stored,), "indices": (stored,), "indptr": (n + 1,)}:
        raise wrong(f"{n:,} rows or columns, but arrays of sizes {sizes}")
    pointers = np.asarray(place["indptr"][:], dtype=np.int64)
    if pointers[0] != 0 or pointers[-1] != stored or (np.diff(pointers) < 0).any():
        raise wrong(f"row pointers that do not ascend from 0 to {stored:,}, the number of stored values")
    return pointers


def _block(place: h5py.Group, pointers: Ints, width: int, wrong: Wrong) -> sparse.csr_matrix:
    """The stored rows (or columns) between the first and the last pointer, with sorted indices below `width`."""
    lo, hi = int(pointers[0]), int(pointers[-1])
    indices = place["indices"][lo:hi]
    if hi > lo and (indices.min() < 0 or indices.max() >= width):
        raise wrong(f"an index outside 0 .. {width - 1:,}")
    block = sparse.csr_matrix((place["data"][lo:hi], indices, pointers - lo), shape=(len(pointers) - 1, width))
    block.sort_indices()
    if not block.has_canonical_format:
        raise wrong("two values for one gene of one cell")
    return block


def _require_numbers(dtype: np.dtype[Any], wrong: Wrong) -> None:
    if dtype.kind not in NUMBERS:
        raise wrong(f"{dtype} instead of numbers", "give raw counts as whole numbers (integer or float type)")
