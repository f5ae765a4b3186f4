"""Names are read alone; a file that is written by rows reads as if anndata had written it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from core.errors import UserError
from core.io.h5ad import open_h5ad, read_genes, read_names, require_space, write_by_rows


def whole(n: int = 12) -> ad.AnnData:
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.integers(0, 3, (n, 5)).astype(np.float32))
    obs = pd.DataFrame({"condition": pd.Categorical(["a", "b", "c"] * (n // 3)), "size": rng.random(n)})
    obs.index = [f"cell {i}" for i in range(n)]
    log = counts.copy()
    np.log1p(log.data, out=log.data)
    var = pd.DataFrame({"length": range(5)}, index=[f"g{i}" for i in range(5)])
    return ad.AnnData(log, obs=obs, var=var, layers={"counts": counts}, uns={"note": "kept"})


def frame_of(data: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(obs=data.obs, var=data.var, uns=data.uns)


def parts_of(data: ad.AnnData, cuts: list[int]) -> list[dict[str, sparse.csr_matrix]]:
    ends = [0, *cuts, data.n_obs]
    return [{"X": data.X[a:b], "layers/counts": data.layers["counts"][a:b]} for a, b in pairwise(ends)]


@pytest.mark.parametrize("cuts", [[], [5], [0, 5], [5, 5, 11], [12], list(range(1, 12))])
def test_written_by_rows_reads_as_written_at_once(cuts: list[int], tmp_path: Path) -> None:
    """Among the parts, some without a row: at the beginning, between others, at the end."""
    data = whole()
    write_by_rows(tmp_path / "rows.h5ad", frame_of(data), parts_of(data, cuts))
    found = ad.read_h5ad(tmp_path / "rows.h5ad")
    pd.testing.assert_frame_equal(found.obs, data.obs)
    pd.testing.assert_frame_equal(found.var, data.var)
    assert dict(found.uns) == {"note": "kept"}
    for one, two in ((found.X, data.X), (found.layers["counts"], data.layers["counts"])):
        assert isinstance(one, sparse.csr_matrix)
        assert one.dtype == two.dtype
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(one, part), getattr(two, part))
    with h5py.File(tmp_path / "rows.h5ad") as file:
        assert file["X/indptr"].dtype == np.int64
        assert file["X/data"].compression == "lzf"


def test_the_same_parts_give_the_same_bytes(tmp_path: Path) -> None:
    data = whole()
    for number in (0, 1):
        write_by_rows(tmp_path / f"{number}.h5ad", frame_of(data), parts_of(data, [4, 8]))
    assert (tmp_path / "0.h5ad").read_bytes() == (tmp_path / "1.h5ad").read_bytes()


def test_without_parts_there_is_no_matrix(tmp_path: Path) -> None:
    empty = frame_of(whole())[:0].copy()
    write_by_rows(tmp_path / "empty.h5ad", empty, [])
    found = ad.read_h5ad(tmp_path / "empty.h5ad")
    assert (found.shape, found.X) == ((0, 5), None)


@pytest.mark.parametrize("cut", [0, 5])
def test_missing_rows_are_an_error(cut: int, tmp_path: Path) -> None:
    data = whole()
    with pytest.raises(ValueError, match="12 rows to write, but parts with"):
        write_by_rows(tmp_path / "short.h5ad", frame_of(data), parts_of(data, [5])[: 1 if cut else 0])
    lopsided = parts_of(data, [5])
    del lopsided[1]["layers/counts"]
    with pytest.raises(ValueError, match="'layers/counts': 5"):
        write_by_rows(tmp_path / "short.h5ad", frame_of(data), lopsided)


def test_names_are_those_that_anndata_reads(tmp_path: Path) -> None:
    data = whole()
    data.obs["flag"] = pd.array([True, None] * 6, dtype="boolean")
    data.write_h5ad(tmp_path / "whole.h5ad")
    there = ad.read_h5ad(tmp_path / "whole.h5ad")
    obs, var = read_names(tmp_path / "whole.h5ad")
    pd.testing.assert_frame_equal(obs, there.obs)
    pd.testing.assert_frame_equal(var, there.var)
    assert list(read_genes(tmp_path / "whole.h5ad")) == list(there.var_names)


def test_nothing_but_the_names_is_read(tmp_path: Path) -> None:
    """A layer or an embedding can be as large as the matrix."""
    data = whole()
    data.obsm["pca"] = np.ones((12, 2))
    data.write_h5ad(tmp_path / "whole.h5ad")
    with h5py.File(tmp_path / "whole.h5ad", "r+") as file:
        for place in ("layers/counts", "obsm/pca", "X"):
            file[place].attrs["encoding-type"] = "unreadable"
    assert read_names(tmp_path / "whole.h5ad")[0].shape == (12, 2)
    with pytest.raises(UserError, match="not a readable h5ad"):
        open_h5ad(tmp_path / "whole.h5ad")


def test_names_of_a_file_older_than_anndata_0_7(tmp_path: Path) -> None:
    """The tables were compound arrays then, with the categories in uns."""
    obs = np.array([(b"c1", 0), (b"c2", 1), (b"c3", 0)], dtype=[("index", "S2"), ("label", "i1")])
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obs"] = obs
        file["var"] = np.array([(b"g1",), (b"g2",)], dtype=[("index", "S2")])
        file["X"] = np.ones((3, 2), dtype=np.float32)
        file["uns/label_categories"] = np.array([b"A", b"control"])
    obs, var = read_names(tmp_path / "old.h5ad")
    assert list(obs.index) == ["c1", "c2", "c3"]
    assert list(obs["label"].astype(str)) == ["A", "control", "A"]
    assert list(var.index) == ["g1", "g2"]


@pytest.mark.parametrize("spoilt", ["obs", "var"])
def test_a_file_without_its_tables_is_refused(spoilt: str, tmp_path: Path) -> None:
    whole().write_h5ad(tmp_path / "spoilt.h5ad")
    with h5py.File(tmp_path / "spoilt.h5ad", "r+") as file:
        file[spoilt].attrs["encoding-type"] = "dict"
        file[spoilt].attrs["encoding-version"] = "0.1.0"
    with pytest.raises(UserError, match=r"not a readable h5ad .*is no table"):
        read_names(tmp_path / "spoilt.h5ad")
    with h5py.File(tmp_path / "spoilt.h5ad", "r+") as file:
        del file[spoilt]
    with pytest.raises(UserError, match="not a readable h5ad"):
        read_names(tmp_path / "spoilt.h5ad")


def test_missing_space_is_told_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2_500_000_000}))
    require_space(tmp_path, 2_500_000_000, "the cells")
    with pytest.raises(UserError) as error:
        require_space(tmp_path, 4_000_000_000, "the cells")
    assert (error.value.where, error.value.field) == (str(tmp_path), "free disk space")
    assert error.value.found == ("2.500 GB free; about 4.000 GB are needed for the cells: 1.500 GB are missing")
    assert "CALIPERT_DATA" in error.value.remedy
