"""Files that are damaged, lie or could be read in two ways: the preparation refuses them, and says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from core.catalog.schema import DatasetSpec
from core.errors import UserError
from core.io.faults import find_count_faults, refuse_faults
from core.prepare.cells import write_cells
from core.prepare.check import check_dataset
from tests.helpers.mirror_files import mirror_of

Entry = Callable[..., DatasetSpec]
STORAGE: dict[str, Any] = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda x: x.toarray()}
DAMAGED = "write or download it again"
MEMORIES = (200_000, 1 << 30)  # some rows at a time, all at once


def stored_as(raw: ad.AnnData, storage: str, path: Path, **options: Any) -> Path:
    ad.AnnData(STORAGE[storage](raw.X), obs=raw.obs, var=raw.var).write_h5ad(path, **options)
    return path


def refusal(path: Path, spec: DatasetSpec, **options: Any) -> UserError:
    """The error of a preparation, which must leave nothing behind."""
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    with pytest.raises(UserError) as caught:
        write_cells(path, spec, {}, out, **options)
    assert list(out.iterdir()) == []
    assert caught.value.remedy
    return caught.value


def report_of(path: Path, spec: DatasetSpec) -> dict[str, Any]:
    write_cells(path, spec, {}, path.parent)
    with h5py.File(path.parent / "cells.h5ad") as file:
        return json.loads(file["uns/preparation"].asstr()[()])


# The file


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("storage", STORAGE)
def test_a_file_cut_short(storage: str, share: float, single_raw: ad.AnnData, entry: Entry, tmp_path: Path) -> None:
    path = stored_as(single_raw, storage, tmp_path / "cut.h5ad", compression="gzip")
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    error = refusal(path, entry())
    assert (error.where, error.field) == (str(path), "format")
    assert "not a readable h5ad" in error.found
    assert DAMAGED in error.remedy
    with pytest.raises(UserError, match="not a readable h5ad"):
        check_dataset(path, entry())


def garble(path: Path, name: str, number: int) -> None:
    """Fill one chunk of an array with noise: the header reads, this chunk does not."""
    with h5py.File(path) as file:
        array = file[name].id
        chunk = array.get_chunk_info(number % array.get_num_chunks())
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize(
    ("storage", "name"),
    [("dense", "X"), *((s, f"X/{part}") for s in ("csr", "csc") for part in ("data", "indices", "indptr"))],
)
def test_chunks_that_do_not_read(
    storage: str, name: str, number: int, memory: int, single_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    """Wherever in the work it comes to light: at once, in the turning of columns to rows, or in a later chunk."""
    path = stored_as(single_raw, storage, tmp_path / "torn.h5ad", compression="gzip")
    with h5py.File(path, "r+") as file:
        values, attributes = file[name][:], dict(file[name].attrs)
        del file[name]
        chunks = (50, 40) if storage == "dense" else (1000 if name != "X/indptr" else 60,)
        file.create_dataset(name, data=values, chunks=chunks, compression="gzip").attrs.update(attributes)
    garble(path, name, number)
    error = refusal(path, entry(), memory=memory)
    assert (error.where, error.field) == (str(path), "X")
    assert error.found.startswith("cannot be read (OSError: ")
    assert "the file is damaged" in error.remedy
    assert DAMAGED in error.remedy


def test_a_download_whose_end_was_never_written(single_raw: ad.AnnData, entry: Entry, tmp_path: Path) -> None:
    """Zeros to the full length, as an interrupted download into a reserved file leaves them."""
    path = stored_as(single_raw, "csr", tmp_path / "half.h5ad", compression="gzip")
    size = path.stat().st_size
    refused = 0
    for share in (0.3, 0.6, 0.9):
        other = tmp_path / f"{share}.h5ad"
        shutil.copy(path, other)
        with other.open("r+b") as file:
            file.truncate(int(size * share))
            file.truncate(size)
        error = refusal(other, entry())
        assert error.where == str(other)
        assert DAMAGED in error.remedy
        refused += 1
    assert refused == 3


def lose_data(file: h5py.File) -> None:
    del file["X/data"]


def lose_pointers(file: h5py.File) -> None:
    del file["X/indptr"]


def point_nowhere(file: h5py.File) -> None:
    del file["X"]
    file["X"] = h5py.ExternalLink("not_there.h5", "/X")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lose_data, "a sparse matrix without data"),
        (lose_pointers, "a sparse matrix without indptr"),
        (point_nowhere, "cannot be read"),
    ],
)
def test_parts_that_are_not_there(
    spoil: Callable[[h5py.File], None], found: str, single_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    path = stored_as(single_raw, "csr", tmp_path / "raw.h5ad")
    with h5py.File(path, "r+") as file:
        spoil(file)
    error = refusal(path, entry())
    assert (error.where, error.field) == (str(path), "X")
    assert found in error.found
    assert DAMAGED in error.remedy


def test_an_empty_file(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "empty.h5ad").touch()
    error = refusal(tmp_path / "empty.h5ad", entry())
    assert (error.field, error.found) == ("file", "not a readable h5ad: an empty file")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_a_file_that_may_not_be_read(locked: str, single_raw: ad.AnnData, entry: Entry) -> None:
    folder = Path(mkdtemp())
    try:
        (folder / "data").mkdir()
        path = stored_as(single_raw, "csr", folder / "data" / "raw.h5ad")
        folder.chmod(0o755)
        (path if locked == "file" else path.parent).chmod(0)
        with as_nobody(), pytest.raises(UserError) as caught:
            write_cells(path, entry(), {}, folder)
        assert (caught.value.where, caught.value.field) == (str(path), "file")
        assert caught.value.found == "no permission to read it"
        assert "chmod" in caught.value.remedy
    finally:
        (folder / "data").chmod(0o755)
        shutil.rmtree(folder)


# The matrix


def with_array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        values, attributes = change(file[name][:]), dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values).attrs.update(attributes)

    return spoil


def at(position: int, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.int64)
        values[position] = value
        return values

    return change


def other_shape(rows: int, columns: int) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        n, width = file["X"].attrs["shape"]
        file["X"].attrs["shape"] = (n + rows, width + columns)

    return spoil


def twice(values: np.ndarray) -> np.ndarray:
    """The second index of the first row or column that has two becomes the first."""
    values[1] = values[0]
    return values


NO_ASCENT = "index pointers that do not ascend"
NO_FIT = "arrays that do not fit together"
LIES: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "pointers that fall": (with_array("X/indptr", at(5, 0)), NO_ASCENT),
    "pointers that do not begin at 0": (with_array("X/indptr", at(0, 1)), NO_ASCENT),
    "pointers beyond the data": (with_array("X/indptr", at(-1, 10**9)), NO_ASCENT),
    "pointers that leave data out": (with_array("X/indptr", lambda p: np.minimum(p, p[-1] - 3)), NO_ASCENT),
    "negative pointers": (with_array("X/indptr", at(3, -4)), NO_ASCENT),
    "too few pointers": (with_array("X/indptr", lambda p: p[:-1]), NO_FIT),
    "too many pointers": (with_array("X/indptr", lambda p: np.r_[p, p[-1]]), NO_FIT),
    "pointers that are no whole numbers": (with_array("X/indptr", lambda p: p + 0.5), "indptr of type float64"),
    "indices out of range": (with_array("X/indices", at(7, 10**6)), "an index outside 0 .. "),
    "negative indices": (with_array("X/indices", at(7, -1)), "an index outside 0 .. "),
    "indices that are no numbers": (with_array("X/indices", lambda i: i.astype("S8")), "indices of type |S8"),
    "an entry twice": (with_array("X/indices", twice), "two values for one gene of one cell"),
    "fewer data than indices": (with_array("X/data", lambda d: d[:-2]), NO_FIT),
    "fewer indices than data": (with_array("X/indices", lambda i: i[:-2]), NO_FIT),
    "data that are no list": (with_array("X/data", lambda d: d[None]), NO_FIT),
    "more rows than cells": (other_shape(1, 0), "a matrix of shape ("),
    "more columns than genes": (other_shape(0, 1), "a matrix of shape ("),
    "fewer columns than genes": (other_shape(0, -1), "a matrix of shape ("),
}


@pytest.mark.parametrize("storage", ["csr", "csc"])
@pytest.mark.parametrize("case", LIES)
def test_a_sparse_matrix_that_lies(
    case: str, storage: str, single_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    spoil, found = LIES[case]
    path = stored_as(single_raw, storage, tmp_path / "raw.h5ad")
    with h5py.File(path, "r+") as file:
        spoil(file)
    for memory in MEMORIES:
        error = refusal(path, entry(), memory=memory)
        assert (error.where, error.field) == (str(path), "X")
        assert found in error.found
        assert DAMAGED in error.remedy


@pytest.mark.parametrize("cut", [np.s_[:-1], np.s_[:, :-1], np.s_[0]])
def test_a_dense_matrix_of_another_shape(cut: Any, single_raw: ad.AnnData, entry: Entry, tmp_path: Path) -> None:
    path = stored_as(single_raw, "dense", tmp_path / "raw.h5ad")
    with h5py.File(path, "r+") as file:
        with_array("X", lambda x: x[cut])(file)
    error = refusal(path, entry())
    assert (error.field, error.found.startswith("a matrix of shape (")) == ("X", True)
    assert f"in a file of {single_raw.n_obs:,} cells x {single_raw.n_vars:,} genes" in error.found


@pytest.mark.parametrize("dtype", ["S4", "bool", "complex128"])
@pytest.mark.parametrize("storage", STORAGE)
def test_values_that_are_no_numbers(
    storage: str, dtype: str, single_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    """Whether a gene was seen at all (bool) is no count either."""
    path = stored_as(single_raw, storage, tmp_path / "raw.h5ad")
    with h5py.File(path, "r+") as file:
        with_array("X" if storage == "dense" else "X/data", lambda x: x.astype(dtype))(file)
    error = refusal(path, entry())
    assert (error.where, error.field) == (str(path), "X")
    assert error.found == f"{np.dtype(dtype)} instead of numbers"
    assert "raw counts as whole numbers" in error.remedy


# Counts


WRONG = {
    np.nan: "NaN or infinite values (first: nan)",
    -np.inf: "NaN or infinite values (first: -inf)",
    -3.0: "negative values (first: -3)",
    0.25: "counts that are not whole numbers (first: 0.25)",
    2.0**24 + 2: "counts above 16,777,216, which 32-bit floats do not hold exactly (first: 16777218)",
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("storage", STORAGE)
def test_wrong_counts_are_counted_over_the_whole_file(
    storage: str, wrong: float, single_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    raw = single_raw.copy()
    counts = raw.X.astype(np.float64).tolil()
    counts[[3, 150, 299], 4] = wrong
    raw.X = counts.tocsr()
    path = stored_as(raw, storage, tmp_path / "raw.h5ad")
    for memory in MEMORIES:
        error = refusal(path, entry(), memory=memory)
        assert (error.where, error.field) == (str(path), "X")
        assert error.found == f"3 {WRONG[wrong]}"


def test_wrong_counts_in_a_layer_are_told_of_that_layer(single_raw: ad.AnnData, entry: Entry, tmp_path: Path) -> None:
    raw = ad.AnnData(single_raw.X, obs=single_raw.obs, var=single_raw.var, layers={"raw": single_raw.X * 0.5})
    raw.write_h5ad(tmp_path / "raw.h5ad")
    assert refusal(tmp_path / "raw.h5ad", entry(counts_layer="raw")).field == "layers['raw']"


def test_the_largest_count_that_is_exact_is_taken(single_raw: ad.AnnData, entry: Entry, tmp_path: Path) -> None:
    raw = single_raw.copy()
    raw.X = raw.X.astype(np.int64)
    raw.X.data[0] = 2**24
    raw.write_h5ad(tmp_path / "raw.h5ad")
    assert report_of(tmp_path / "raw.h5ad", entry())
    raw.X.data[0] = 2**24 + 1
    raw.write_h5ad(tmp_path / "raw.h5ad")
    (tmp_path / "cells.h5ad").unlink()
    assert "(first: 16777217)" in refusal(tmp_path / "raw.h5ad", entry()).found


@pytest.mark.parametrize("dtype", ["int8", "uint64", "float32", "float64"])
def test_right_counts_have_no_fault(dtype: str) -> None:
    assert find_count_faults(np.array([0, 1, 100], dtype=dtype)) == {}
    assert find_count_faults(np.array([], dtype=dtype)) == {}
    refuse_faults([{}, {}], "X", "file")


def test_a_bad_value_of_a_cell_that_is_not_used_does_no_harm(
    single_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    raw = single_raw.copy()
    raw.X = raw.X.astype(np.float64)
    raw.X.data[: raw.X.indptr[1]] = np.nan
    raw.obs["quality"] = [0, *[1] * (raw.n_obs - 1)]
    raw.write_h5ad(tmp_path / "raw.h5ad")
    assert "NaN" in refusal(tmp_path / "raw.h5ad", entry()).found
    good = entry(filters=[{"column": "quality", "op": "==", "value": 1}])
    assert report_of(tmp_path / "raw.h5ad", good)["cells dropped by the entry's filters"] == 1


@pytest.mark.parametrize(("place", "wrong"), [("X", np.nan), ("X", -0.5), ("layers", np.inf)])
def test_a_mirror_file_with_wrong_values(
    place: str, wrong: float, pairs_cells: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    mirror = mirror_of(pairs_cells)
    mirror.layers["counts"] = np.ones(mirror.shape, dtype=np.float32)
    row = int(np.flatnonzero(mirror.obs["condition"] != "ctrl_synthetic_mean")[7])
    (mirror.X if place == "X" else mirror.layers["counts"])[row, 3] = wrong
    mirror.write_h5ad(tmp_path / "mirror.h5ad")
    error = refusal(tmp_path / "mirror.h5ad", entry(task="combination"))
    assert error.field == ("X" if place == "X" else "layers['counts']")
    assert error.found.startswith("1 negative" if wrong == -0.5 else "1 NaN or infinite")


# Labels and genes


def relabelled(raw: ad.AnnData, path: Path, change: Callable[[pd.Series], pd.Series]) -> Path:
    other = ad.AnnData(raw.X, obs=raw.obs.copy(), var=raw.var)
    other.obs["perturbation"] = change(raw.obs["perturbation"].astype(str))
    other.write_h5ad(path)
    return path


def perturbed(raw: ad.AnnData) -> list[str]:
    return sorted(set(raw.obs["perturbation"].astype(str)) - {"control"})


def some(labels: pd.Series, label: str, other: str) -> pd.Series:
    """Half of the cells of one label get another."""
    mine = np.flatnonzero(labels == label)[::2]
    labels = labels.copy()
    labels.iloc[mine] = other
    return labels


def test_spaces_around_a_label_do_not_count(
    single_raw: ad.AnnData, single_cells: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    gene = perturbed(single_raw)[2]
    path = relabelled(
        single_raw,
        tmp_path / "raw.h5ad",
        lambda labels: some(some(labels, gene, f"{gene}  "), "control", " control\t"),
    )
    write_cells(path, entry(), {}, tmp_path)
    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(cells.obs, single_cells.obs)
    np.testing.assert_array_equal(cells.X.data, single_cells.X.data)


@pytest.mark.parametrize("spelling", ["Control", "CONTROL", "control+Control", " Control "])
def test_control_in_another_case(spelling: str, single_raw: ad.AnnData, entry: Entry, tmp_path: Path) -> None:
    path = relabelled(single_raw, tmp_path / "raw.h5ad", lambda labels: some(labels, "control", spelling))
    error = refusal(path, entry())
    assert error.field == "obs['perturbation']"
    assert (
        f"the label {spelling!r}: {spelling.split('+')[-1].strip()!r} differs from the control label 'control'"
        in error.found
    )
    assert "to `labels.control` in the catalog entry" in error.remedy
    with pytest.raises(UserError, match="in case only"):
        check_dataset(path, entry())


def test_control_in_two_cases_that_are_both_named(
    single_raw: ad.AnnData, single_cells: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    path = relabelled(single_raw, tmp_path / "raw.h5ad", lambda labels: some(labels, "control", "Control"))
    write_cells(path, entry(labels={"column": "perturbation", "control": ["control", "Control"]}), {}, tmp_path)
    pd.testing.assert_frame_equal(ad.read_h5ad(tmp_path / "cells.h5ad").obs, single_cells.obs)


@pytest.mark.parametrize("pair", [False, True])
def test_one_gene_in_two_cases(
    pair: bool, single_raw: ad.AnnData, pairs_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    """Alone, or where one of the two is in a combination."""
    raw = pairs_raw if pair else single_raw
    label = next(label for label in perturbed(raw) if ("+" in label) == pair)
    gene = label.split("+")[0]
    path = relabelled(raw, tmp_path / "raw.h5ad", lambda labels: some(labels, label, label.replace(gene, gene.lower())))
    error = refusal(path, entry(**({"task": "combination"} if pair else {})))
    assert error.field == "obs['perturbation']"
    assert error.found == f"perturbed genes that differ in case only: {gene} and {gene.lower()}"
    assert "spell each gene in one way" in error.remedy


MEASURED = "control labels that are also measured genes"


def test_a_control_label_that_is_a_gene_is_taken_and_told(
    single_raw: ad.AnnData, single_cells: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    gene = next(name for name in sorted(single_raw.var_names) if name not in perturbed(single_raw))
    path = relabelled(single_raw, tmp_path / "raw.h5ad", lambda labels: some(labels, "control", gene))
    spec = entry(labels={"column": "perturbation", "control": ["control", gene, "absent"]})
    assert report_of(path, spec)[MEASURED] == [gene]
    assert check_dataset(path, spec).report[MEASURED] == [gene]
    pd.testing.assert_frame_equal(ad.read_h5ad(tmp_path / "cells.h5ad").obs, single_cells.obs)
    assert json.loads(single_cells.uns["preparation"])[MEASURED] == []


@pytest.mark.parametrize("cut", [False, True])
def test_a_perturbation_is_not_swallowed_by_a_part_of_its_name(
    cut: bool, single_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    """`NT` is in `CNTN1` too."""
    gene = perturbed(single_raw)[0]
    assert gene in single_raw.var_names
    part = gene[1:]
    path = relabelled(
        single_raw,
        tmp_path / "raw.h5ad",
        lambda labels: labels.replace("control", f"{part}-1") + ("_guide" if cut else ""),
    )
    rules = {"column": "perturbation", "control_contains": part} | ({"cut_at": "_"} if cut else {})
    error = refusal(path, entry(labels=rules))
    assert error.field == "obs['perturbation']"
    assert f"contain {part!r}" in error.found
    assert gene in error.found
    assert "`labels.control_contains`" in error.remedy
    longer = rules | {"control_contains": f"{part}-1"}
    assert report_of(path, entry(labels=longer))[MEASURED] == []
    # What the user lists is meant.
    label = f"{gene}_guide" if cut else gene
    listed = report_of(path, entry(labels=rules | {"control": [label]}))
    assert listed[MEASURED] == ([] if cut else [gene])


def test_genes_named_twice_and_genes_not_measured_are_told(
    single_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    raw = single_raw.copy()
    unmeasured = set(perturbed(raw)) - set(raw.var_names)
    twice_named = next(gene for gene in perturbed(raw) if gene in set(raw.var_names))
    other = next(name for name in raw.var_names if name not in perturbed(raw))
    raw.var_names = [twice_named if name == other else name for name in raw.var_names]
    raw.write_h5ad(tmp_path / "raw.h5ad")
    for report in (report_of(tmp_path / "raw.h5ad", entry()), check_dataset(tmp_path / "raw.h5ad", entry()).report):
        assert report["genes dropped because their symbol occurs more than once"] == [twice_named]
        assert report["perturbed genes that are not measured"] == sorted({*unmeasured, twice_named})
    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert twice_named not in cells.var_names
    assert {twice_named, *unmeasured} <= set(cells.obs["condition"])


def test_no_cell_left(single_raw: ad.AnnData, entry: Entry, tmp_path: Path) -> None:
    single_raw.write_h5ad(tmp_path / "raw.h5ad")
    nobody = [{"column": "perturbation", "op": "==", "value": "nobody"}]
    assert refusal(tmp_path / "raw.h5ad", entry(filters=nobody)).found == "no cell passes the entry's filters"
    assert refusal(tmp_path / "raw.h5ad", entry(min_genes_per_cell=9999)).found == "no cell or no gene left"
