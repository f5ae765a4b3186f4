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
from core.io.h5ad import require_space
from core.io.panels import split_rows
from core.progress import log_progress

# What a stored value takes on its way, in bytes: two chunks in flight, their numbers and indices of up to eight
# bytes each, and the copies that selecting rows and columns makes.
BYTES_PER_VALUE = 100
WHOLE, NUMBERS = "iu", "iuf"  # kinds of numpy types: signed, unsigned, floating
PARTS = ("data", "indices", "indptr")  # of a sparse matrix


class Rows(NamedTuple):
    """A matrix in chunks of rows. spans: all rows, in order. read: one span as CSR, all `width` columns, sorted.

    field: where in its file it lies, for messages.
    """

    width: int
    spans: list[slice]
    read: Callable[[slice], sparse.csr_matrix]
    field: str = "X"


@contextmanager
def open_rows(path: Path, layer: str | None, shape: tuple[int, int], memory: int, scratch: Path) -> Iterator[Rows]:
    """Open the matrix of an h5ad (X, or a layer), to be read in chunks that fit into `memory` bytes.

    Parameters
    ----------
    path : Path
        The file.
    layer : str | None
        Its name; None is X.
    shape : tuple[int, int]
        What the file's tables of cells and genes say.
    memory : int
        Bytes that the chunks may take.
    scratch : Path
        A folder for a transposed copy, which a matrix stored by columns (CSC) needs. Values keep their type (float16
        becomes float32).

    Yields
    ------
    Iterator[Rows]

    Raises
    ------
    UserError
        Here or while reading, for a matrix that is missing, has another shape, holds no numbers, cannot be read, or
        whose indices do not make sense.
    """
    name = "X" if layer is None else f"layers/{layer}"
    wrong = Wrong(path, "X" if layer is None else f"layers[{layer!r}]")
    with _opened(path, wrong) as file:
        with reading(wrong):
            # Not file.get(name), which takes a damaged entry for an absent one.
            there = name in file
            place = file[name] if there else None
            layers = sorted(file["layers"]) if "layers" in file else []
        if not there:
            remedy = "put the raw counts into X, or name their layer in the catalog entry (`counts_layer`)"
            raise wrong(f"no matrix there; layers there are: {shown(layers) or 'none'}", remedy)
        with reading(wrong):
            kind = "array" if isinstance(place, h5py.Dataset) else _format(place)
        if kind not in STORED:
            raise wrong(f"stored as {kind}", "give a dense, CSR or CSC matrix")
        rows = STORED[kind](place, shape, max(memory // BYTES_PER_VALUE, 1), scratch, wrong)
        yield rows._replace(field=wrong.field)


def has_layer(path: Path, layer: str) -> bool:
    """Tell whether the h5ad has this layer.

    Parameters
    ----------
    path : Path
        The file.
    layer : str
        Its name; None is X.

    Returns
    -------
    bool

    Raises
    ------
    UserError
        Where it cannot be read.
    """
    wrong = Wrong(path, "layers")
    with _opened(path, wrong) as file, reading(wrong):
        return f"layers/{layer}" in file


class Wrong(NamedTuple):
    """Makes the error about one matrix of one file."""

    path: Path
    field: str

    def __call__(self, found: str, remedy: str = "the file is damaged: write or download it again") -> UserError:
        """Make the error."""
        return UserError(self.path, self.field, found, remedy)


@contextmanager
def reading(wrong: Wrong) -> Iterator[None]:
    """Turn any error within, where a file is read and nothing else is done, into one about the matrix.

    A damaged file makes h5py raise almost anything.

    Parameters
    ----------
    wrong : Wrong
        Makes the error about the matrix.

    Yields
    ------
    Iterator[None]
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise wrong(
            f"cannot be read ({type(error).__name__}: {error})",
            "the file is damaged, or compressed in another way than gzip or lzf: write or download it again",
        ) from error


@contextmanager
def _opened(path: Path, wrong: Wrong) -> Iterator[h5py.File]:
    with reading(wrong):
        file = h5py.File(path)
    with file:
        yield file


def _format(group: h5py.Group) -> str:
    # Files older than anndata 0.7 say it in another attribute, and some writers as bytes.
    said = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "unknown"))
    text = said.decode() if isinstance(said, bytes) else str(said)
    return {"csr": "csr_matrix", "csc": "csc_matrix"}.get(text, text)


def _dense(place: h5py.Dataset, shape: tuple[int, int], values: int, scratch: Path, wrong: Wrong) -> Rows:
    with reading(wrong):
        dtype, stored_shape, chunks = place.dtype, place.shape, place.chunks
    _require_numbers(dtype, wrong)
    _require_shape(stored_shape, shape, wrong)
    n = max(values // max(shape[1], 1), 1)
    stored = chunks[0] if chunks else 1
    # Whole chunks of the file, so that none is unpacked twice.
    n = max(n // stored * stored, min(n, stored))

    def read(span: slice) -> sparse.csr_matrix:
        with reading(wrong):
            block = place[span]
        return sparse.csr_matrix(_usable(block))

    return Rows(shape[1], split_rows(shape[0], n), read)


def _by_rows(place: h5py.Group, shape: tuple[int, int], values: int, scratch: Path, wrong: Wrong) -> Rows:
    pointers = _pointers(place, shape, shape[0], wrong)

    def read(span: slice) -> sparse.csr_matrix:
        return _block(place, pointers[span.start : span.stop + 1], shape[1], wrong)

    return Rows(shape[1], _spans(pointers, values), read)


def _by_columns(place: h5py.Group, shape: tuple[int, int], values: int, scratch: Path, wrong: Wrong) -> Rows:
    """Rows of a matrix stored by columns: blocks of columns, each turned to rows once, lie in the folder `scratch`.

    A chunk of rows is put together from its piece of every block.
    """
    pointers = _pointers(place, shape, shape[1], wrong)
    blocks = _spans(pointers, values)
    files = {name: scratch / f"by_rows.{name}" for name in PARTS}
    with reading(wrong):
        dtype = _usable(place["data"][:0]).dtype
    starts, per_row = [0], np.zeros(shape[0], dtype=np.int64)
    copied = int(pointers[-1]) * (dtype.itemsize + 4) + len(blocks) * (shape[0] + 1) * 8
    require_space(scratch, copied, f"a copy of {wrong.field} by rows, since {wrong.path.name} stores it by columns")
    with files["data"].open("wb") as data, files["indices"].open("wb") as indices, files["indptr"].open("wb") as indptr:
        parts = ((block, _block(place, pointers[block.start : block.stop + 1], shape[0], wrong)) for block in blocks)
        for _, columns in log_progress("turning columns into rows", parts, shape[1], "genes"):
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
            at = read_piece(files["indptr"], np.int64, number * (shape[0] + 1) + span.start, n + 1)
            where = int(at[0]), int(at[-1] - at[0])
            stored = (
                read_piece(files["data"], dtype, *where),
                read_piece(files["indices"], np.int32, *where),
                at - at[0],
            )
            pieces.append(sparse.csr_matrix(stored, shape=(n, block.stop - block.start)))
        return sparse.hstack(pieces, format="csr")

    return Rows(shape[1], _spans(np.concatenate([[0], np.cumsum(per_row)]), values), read)


STORED: dict[str, Callable[[Any, tuple[int, int], int, Path, Wrong], Rows]] = {
    "array": _dense,
    "csr_matrix": _by_rows,
    "csc_matrix": _by_columns,
}


def read_piece(path: Path, dtype: Any, start: int, n: int) -> Any:
    """Read `n` numbers of a plain binary file, from number `start` on.

    Parameters
    ----------
    path : Path
        The file.
    dtype : Any
        Type of the stored numbers.
    start : int
        Number of the first one.
    n : int
        How many.

    Returns
    -------
    Any
    """
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


def _pointers(place: h5py.Group, shape: tuple[int, int], n: int, wrong: Wrong) -> Ints:
    """Where each of the `n` rows (or columns) of a sparse matrix of this shape begins, checked."""
    with reading(wrong):
        missing = [name for name in PARTS if name not in place]
    if missing:
        raise wrong(f"a sparse matrix without {', '.join(missing)}")
    with reading(wrong):
        sizes = {name: place[name].shape for name in PARTS}
        dtypes = {name: place[name].dtype for name in PARTS}
        said = place.attrs.get("shape", place.attrs.get("h5sparse_shape"))
        stored_shape = shape if said is None else tuple(int(number) for number in said)
    _require_shape(stored_shape, shape, wrong)
    _require_numbers(dtypes["data"], wrong)
    for name in ("indices", "indptr"):
        if dtypes[name].kind not in WHOLE:
            raise wrong(f"{name} of type {dtypes[name]} instead of whole numbers")
    stored = sizes["data"][0] if len(sizes["data"]) == 1 else -1
    if sizes != {"data": (stored,), "indices": (stored,), "indptr": (n + 1,)}:
        raise wrong(
            f"arrays that do not fit together: data {sizes['data']}, indices {sizes['indices']}, indptr "
            f"{sizes['indptr']}; data and indices must be as long, and indptr have {n + 1:,} entries"
        )
    with reading(wrong):
        pointers = np.asarray(place["indptr"][:], dtype=np.int64)
    if pointers[0] != 0 or pointers[-1] != stored or (np.diff(pointers) < 0).any():
        raise wrong(f"index pointers that do not ascend from 0 to {stored:,}, the number of stored values")
    return pointers


def _block(place: h5py.Group, pointers: Ints, width: int, wrong: Wrong) -> sparse.csr_matrix:
    """Return the stored rows (or columns) between the first and the last pointer, with sorted indices below `width`."""
    lo, hi = int(pointers[0]), int(pointers[-1])
    with reading(wrong):
        indices, data = place["indices"][lo:hi], place["data"][lo:hi]
    if hi > lo and (indices.min() < 0 or indices.max() >= width):
        raise wrong(f"an index outside 0 .. {width - 1:,}")
    block = sparse.csr_matrix((_usable(data), _usable(indices), pointers - lo), shape=(len(pointers) - 1, width))
    block.sort_indices()
    if not block.has_canonical_format:
        raise wrong("two values for one gene of one cell")
    return block


def _usable(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the values in a type that scipy works with: not of half precision, nor in another machine's byte order."""
    half = values.dtype == np.float16
    return values.astype(np.float32 if half else values.dtype.newbyteorder("="), copy=False)


def _require_shape(stored: tuple[int, ...], shape: tuple[int, int], wrong: Wrong) -> None:
    if stored != shape:
        raise wrong(f"a matrix of shape {stored} in a file of {shape[0]:,} cells x {shape[1]:,} genes")


def _require_numbers(dtype: np.dtype[Any], wrong: Wrong) -> None:
    if dtype.kind not in NUMBERS:
        raise wrong(f"{dtype} instead of numbers", "give raw counts as whole numbers (integer or float type)")
