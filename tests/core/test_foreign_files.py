"""h5ad files by somebody who may mean harm."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest

from core.errors import UserError
from core.io.h5ad import open_foreign_h5ad, read_foreign_json


@pytest.fixture
def file(tmp_path: Path) -> Path:
    ad.AnnData(np.ones((3, 4)), layers={"raw": np.zeros((3, 4))}).write_h5ad(tmp_path / "given.h5ad")
    return tmp_path / "given.h5ad"


def test_a_plain_file_is_read(file):
    assert open_foreign_h5ad(file, 10_000).X.sum() == 12


def test_one_that_takes_more_memory_than_allowed_is_not(file):
    with pytest.raises(UserError, match="bytes once it is read, of at most 100"):
        open_foreign_h5ad(file, 100)
    with h5py.File(file, "r+") as given:
        given.create_dataset("uns/empty", (10**6, 10**6), "f8", chunks=(1000, 1000))
    assert file.stat().st_size < 100_000
    with pytest.raises(UserError, match="8,000,000,0"):
        open_foreign_h5ad(file, 10**9)


@pytest.mark.parametrize("where", ["X", "layers/raw", "uns/deep/stolen"])
@pytest.mark.parametrize("kind", ["link", "external", "virtual"])
def test_values_of_another_file_are_not_taken(file, tmp_path, where, kind):
    with h5py.File(tmp_path / "truth.h5", "w") as truth:
        truth["X"] = np.full((3, 4), 7.0)
        offset = truth["X"].id.get_offset()
    other = str(tmp_path / "truth.h5")
    with h5py.File(file, "r+") as given:
        given.pop(where, None)
        if kind == "link":
            given[where] = h5py.ExternalLink(other, "X")
        elif kind == "external":
            given.create_dataset(where, (3, 4), "f8", external=[(other, offset, 96)])
        else:
            layout = h5py.VirtualLayout((3, 4), "f8")
            layout[:] = h5py.VirtualSource(other, "X", (3, 4))
            given.create_virtual_dataset(where, layout)
    with pytest.raises(UserError, match=f"(?s){where}.*values from elsewhere"):
        open_foreign_h5ad(file, 10**9)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_one_object_is_not_read_under_many_names(file, kind):
    with h5py.File(file, "r+") as given:
        for number in range(3):
            given[f"layers/again{number}"] = given["layers/raw"] if kind == "hard" else h5py.SoftLink("/layers/raw")
    with pytest.raises(UserError, match=r"several names|from elsewhere"):
        open_foreign_h5ad(file, 10**9)


def test_texts_count_as_long_as_they_are(file):
    with h5py.File(file, "r+") as given:
        given.create_dataset("uns/text", data=["x" * 10_000] * 100, dtype=h5py.string_dtype())
    with pytest.raises(UserError, match="bytes once it is read, of at most 500,000"):
        open_foreign_h5ad(file, 500_000)
    assert open_foreign_h5ad(file, 2_000_000).n_obs == 3


@pytest.mark.parametrize(
    ("text", "fault"), [("[" * 100_000, "without end"), ("1" * 200_000, "of at most"), ("{", "property name")]
)
def test_json_that_is_too_large_or_none_is_refused(tmp_path, text, fault):
    (tmp_path / "given.json").write_text(text)
    with pytest.raises(ValueError, match=fault):
        read_foreign_json(tmp_path / "given.json", 150_000)
