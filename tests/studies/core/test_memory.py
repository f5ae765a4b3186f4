"""The preparation takes no more memory for a larger file: measured from outside, of a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from blocks.config.paths import PROJECT_ROOT

GENES, PER_CELL, AT_ONCE = 400, 200, 5_000
MEMORY = 30_000_000

# What the process needs before it reads the matrix is taken off.
PREPARE = """
import resource, sys
from pathlib import Path
from core.catalog.schema import DatasetSpec
from core.prepare.cells import read_names, write_cells
raw, out, memory = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
spec = DatasetSpec.model_validate({"name": "large", "title": "large", "task": "single",
    "source": {"kind": "local", "hint": "x"}, "labels": {"column": "perturbation"}, "min_genes_per_cell": 10})
read_names(raw)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_cells(raw, spec, {}, out, memory)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def write_raw(path: Path, cells: int) -> int:
    """A raw file of that many cells, each with PER_CELL counts; the bytes that its stored values take in memory."""
    rng = np.random.default_rng(0)
    labels = np.array([*(f"G{i:03d}" for i in range(40)), "control"])
    obs = pd.DataFrame({"perturbation": pd.Categorical(labels[np.arange(cells) % 41])})
    obs.index = pd.Index([f"c{i:06d}" for i in range(cells)])
    ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"G{i:03d}" for i in range(GENES)])).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for start in range(0, cells, AT_ONCE):
            first = rng.integers(0, GENES - PER_CELL, AT_ONCE)
            indices = (first[:, None] + np.arange(PER_CELL)).ravel()
            counts = rng.integers(1, 9, len(indices)).astype(np.float32)
            rows = sparse.csr_matrix((counts, indices, np.arange(AT_ONCE + 1) * PER_CELL), shape=(AT_ONCE, GENES))
            if start == 0:
                write_elem(file, "X", rows, dataset_kwargs={"chunks": (1 << 16,), "indptr_dtype": "int64"})
                matrix = sparse_dataset(file["X"])
            else:
                matrix.append(rows)
    return cells * PER_CELL * 8


def test_four_times_the_cells_take_no_more_memory(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for cells in (20_000, 80_000):
        sizes.append(write_raw(tmp_path / f"{cells}.h5ad", cells))
        (tmp_path / f"out_{cells}").mkdir()
        arguments = [str(tmp_path / f"{cells}.h5ad"), str(tmp_path / f"out_{cells}"), str(MEMORY)]
        command = [sys.executable, "-c", PREPARE, *arguments]
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    # The names of a cell take some hundred bytes in several tables; its counts would take 1,600 and their copies more.
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 3
    assert peaks[1] < sizes[1] + 4 * MEMORY
