"""Whatever way a matrix is stored, its spans of rows are the matrix, and no span is larger than the memory allows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from core.errors import UserError
from core.io.raw_matrix import BYTES_PER_VALUE, open_rows

STORAGE: dict[str, Any] = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}
DTYPES = ("int32", "int64", "uint16", "float32", "float64")


def matrix(dtype: str = "int32", rows: int = 23, columns: int = 11) -> np.ndarray:
    """About a third of the entries are 1 .. 9; the rows 0, 7, 8 and the last are empty, as is a column."""
    rng = np.random.default_rng(4)
    dense = rng.integers(1, 10, (rows, columns)) * (rng.random((rows, columns)) < 0.35)
    dense[[0, 7, 8, -1]] = 0
    dense[:, 3] = 0
    return dense.astype(dtype)


def write(path: Path, stored: Any, layer: str | None = None, **storage: Any) -> Path:
    """An h5ad with the matrix in X or, beside another X, in a layer."""
    if layer is None:
        ad.AnnData(stored).write_h5ad(path, **storage)
    else:
        ad.AnnData(np.ones(stored.shape), layers={layer: stored}).write_h5ad(path, **storage)
    return path


def read_all(
    path: Path, shape: tuple[int, int], values: int, layer: str | None = None
) -> tuple[list[slice], list[sparse.csr_matrix]]:
    """The spans, and what each holds, in chunks of at most so many values."""
    with TemporaryDirectory() as scratch, open_rows(path, layer, shape, values * BYTES_PER_VALUE, Path(scratch)) as own:
        assert own.width == shape[1]
        assert own.field == ("X" if layer is None else f"layers[{layer!r}]")
        return own.spans, [own.read(span) for span in own.spans]


def require_same(path: Path, dense: np.ndarray, values: int, layer: str | None = None) -> None:
    spans, blocks = read_all(path, dense.shape, values, layer)
    rows = [row for span in spans for row in range(span.start, span.stop)]
    assert rows == list(range(len(dense)))
    for span, block in zip(spans, blocks, strict=True):
        assert isinstance(block, sparse.csr_matrix)
        assert block.has_sorted_indices
        assert block.dtype == dense.dtype
        np.testing.assert_array_equal(block.toarray(), dense[span])


@pytest.mark.parametrize("layer", [None, "raw"])
@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGE)
def test_every_way_of_storing(storage: str, dtype: str, compression: str | None, layer: str | None, tmp_path: Path):
    """anndata stores without compression in one contiguous piece, else in chunks."""
    dense = matrix(dtype)
    path = write(tmp_path / "raw.h5ad", STORAGE[storage](dense), layer, compression=compression)
    for values in (1, 13, 50, 10_000):
        require_same(path, dense, values, layer)


@pytest.mark.parametrize("storage", STORAGE)
def test_spans_honour_the_memory(storage: str, tmp_path: Path) -> None:
    dense = matrix(rows=60)
    path = write(tmp_path / "raw.h5ad", STORAGE[storage](dense))
    stored = np.full(60, 11) if storage == "dense" else (dense != 0).sum(axis=1)
    for values in (1, 11, 40, 100):
        spans, _ = read_all(path, dense.shape, values)
        for span in spans:
            assert stored[span].sum() <= values or span.stop - span.start == 1
        # Nor are they needlessly small: two neighbours together would be too much.
        for one, two in pairwise(spans):
            assert stored[one.start : two.stop].sum() > values or two.stop - one.start > values
    assert read_all(path, dense.shape, 10_000)[0] == [slice(0, 60)]


def test_a_dense_span_is_whole_chunks_of_the_file(tmp_path: Path) -> None:
    dense = matrix(rows=60)
    with h5py.File(write(tmp_path / "raw.h5ad", dense), "r+") as file:
        del file["X"]
        file.create_dataset("X", data=dense, chunks=(8, 4), compression="gzip")
    assert read_all(tmp_path / "raw.h5ad", dense.shape, 20 * 11)[0] == [
        slice(0, 16),
        slice(16, 32),
        slice(32, 48),
        slice(48, 60),
    ]
    assert read_all(tmp_path / "raw.h5ad", dense.shape, 5 * 11)[0][:2] == [slice(0, 5), slice(5, 10)]
    for values in (1, 20 * 11, 60 * 11):
        require_same(tmp_path / "raw.h5ad", dense, values)


def rewrite(path: Path, name: str, values: np.ndarray, **storage: Any) -> None:
    """Put other numbers into the place of one array of the stored matrix."""
    with h5py.File(path, "r+") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values, **storage).attrs.update(attributes)


@pytest.mark.parametrize("storage", ["csr", "csc"])
def test_unsorted_indices_are_sorted(storage: str, tmp_path: Path) -> None:
    dense = matrix()
    stored = STORAGE[storage](dense)
    path = write(tmp_path / "raw.h5ad", stored)
    backwards = np.concatenate([np.arange(a, b)[::-1] for a, b in zip(stored.indptr, stored.indptr[1:], strict=False)])
    rewrite(path, "X/indices", stored.indices[backwards])
    rewrite(path, "X/data", stored.data[backwards])
    for values in (1, 13, 10_000):
        require_same(path, dense, values)


@pytest.mark.parametrize("storage", ["csr", "csc"])
def test_stored_zeros_and_wide_pointers_and_foreign_types(storage: str, tmp_path: Path) -> None:
    dense = matrix("float64")
    stored = STORAGE[storage](dense)
    stored.data[::5] = 0
    path = write(tmp_path / "raw.h5ad", stored)
    rewrite(path, "X/indptr", stored.indptr.astype("uint64"))
    rewrite(path, "X/indices", stored.indices.astype(">i8"))
    rewrite(path, "X/data", stored.data.astype(">f8"), chunks=(7,), compression="gzip", shuffle=True)
    for values in (1, 13, 10_000):
        require_same(path, stored.toarray(), values)


@pytest.mark.parametrize("storage", STORAGE)
def test_half_precision_becomes_single(storage: str, tmp_path: Path) -> None:
    dense = matrix("float32")
    path = write(tmp_path / "raw.h5ad", STORAGE[storage](dense))
    rewrite(
        path,
        "X" if storage == "dense" else "X/data",
        (dense if storage == "dense" else STORAGE[storage](dense).data).astype("float16"),
    )
    require_same(path, dense, 13)


@pytest.mark.parametrize("name", ["csr", "csc", b"csr"])
def test_files_older_than_anndata_0_7(name: str | bytes, tmp_path: Path) -> None:
    dense = matrix("float32")
    stored = STORAGE["csc" if name == "csc" else "csr"](dense)
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"] = np.bytes_(name) if isinstance(name, bytes) else name
        group.attrs["h5sparse_shape"] = dense.shape
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(stored, part)
    for values in (1, 13, 10_000):
        require_same(tmp_path / "old.h5ad", dense, values)


@pytest.mark.parametrize("storage", STORAGE)
def test_a_matrix_of_zeros(storage: str, tmp_path: Path) -> None:
    dense = np.zeros((5, 4), dtype=np.int32)
    path = write(tmp_path / "raw.h5ad", STORAGE[storage](dense))
    for values in (1, 6, 100):
        require_same(path, dense, values)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 9)),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
    storage=st.sampled_from(sorted(STORAGE)),
    values=st.integers(1, 60),
)
def test_random_matrices(shape: tuple[int, int], share: float, seed: int, storage: str, values: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(-5, 6, shape) * (rng.random(shape) < share)
    with TemporaryDirectory() as folder:
        require_same(write(Path(folder) / "raw.h5ad", STORAGE[storage](dense)), dense, values)


def test_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "raw.h5ad"
    ad.AnnData(np.ones((3, 2)), layers={"raw": np.ones((3, 2))}, obs=pd.DataFrame({"x": [1, 2, 3]})).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file.move("obs", "layers/table")
        del file["X"]
    for layer, found in ((None, "no matrix there; layers there are: raw, table"), ("table", "stored as dataframe")):
        with pytest.raises(UserError) as error:
            read_all(path, (3, 2), 10, layer)
        assert (error.value.where, found in error.value.found) == (str(path), True)


def test_the_scratch_copy_of_a_matrix_by_columns_is_checked_for_space(tmp_path: Path, monkeypatch) -> None:
    dense = matrix("float64")
    path = write(tmp_path / "raw.h5ad", sparse.csc_matrix(dense))
    needed = 12 * int((dense != 0).sum()) + 24 * 8
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    with pytest.raises(UserError, match=r"free disk space[\s\S]*a copy of X by rows"):
        read_all(path, dense.shape, 10_000)
    free.free = needed
    require_same(path, dense, 10_000)
