"""Draws depend on the seed and on names alone: not on order, hash seed, threads, or what else is drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from core.rng import generator

# Draws a screen's cap, halves and folds and computes all that is made of them, from rows and genes in an order
# given by the first argument; prints the digests of what was drawn and of the files' bytes.
CHAIN = """
import hashlib, json, sys
from pathlib import Path
import anndata, numpy, pandas
from core.catalog.schema import DatasetSpec
from core.prepare.cells import read_cells, write_cells
from core.reference.files import read_keys
from core.reference.quality import write_quality
from core.reference.build import write_reference
from core.prepare.training_data import write_fold

folder = Path(sys.argv[2])
rng = numpy.random.default_rng(7)
genes = [f"gene{i:02d}" for i in range(60)]
labels = ["control"] + genes[:10] + [f"{genes[i]}+{genes[i + 1]}" for i in range(9)]
obs = pandas.DataFrame(
    [(label, line) for line in ("x", "y") for label in labels for _ in range(12 + 5 * (label in labels[:4]))],
    columns=["label", "line"],
)
obs.index = [f"cell{i:04d}" for i in range(len(obs))]
counts = rng.poisson(rng.gamma(1, 2, (1, len(genes))), (len(obs), len(genes))).astype("float32")
raw = anndata.AnnData(counts, obs=obs, var=pandas.DataFrame(index=genes))
order = numpy.random.default_rng(int(sys.argv[1]))
raw = raw[order.permutation(raw.n_obs)][:, order.permutation(raw.n_vars)].copy()
raw.write_h5ad(folder / "raw.h5ad")
spec = DatasetSpec.model_validate({
    "name": "screen", "title": "t", "task": "combination", "source": {"kind": "local", "hint": "h"},
    "labels": {"column": "label"}, "covariate_column": "line", "min_genes_per_cell": 5, "max_control_cells": 14,
    "n_variable_genes": 40,
})
write_cells(folder / "raw.h5ad", spec, {"made": "here"}, folder)
cells = read_cells(folder)
write_reference(cells, spec.seed, 2, folder)
write_quality(cells, read_keys(folder), folder)
write_fold(cells, 1, folder)
draws = cells.obs[["half", "fold_0", "fold_1"]].astype(str).to_csv(lineterminator="\\n")
files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "raw.h5ad")
print(json.dumps({
    "draws": hashlib.sha256(draws.encode()).hexdigest(),
    "files": {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
}))
"""


def test_generator_is_the_one_defined() -> None:
    digest = sha256(b"half/K562/KLF1+MYC").digest()
    by_hand = np.random.default_rng([42, int.from_bytes(digest[:8], "big")])
    drawn = generator(42, "half", "K562", "KLF1+MYC")
    assert drawn.integers(2**63, size=10).tolist() == by_hand.integers(2**63, size=10).tolist()


def test_draws_are_pinned() -> None:
    """The numbers themselves: another platform or library that draws differently must not go unseen."""
    assert generator(42, "half", "K562", "KLF1").permutation(8).tolist() == [3, 1, 0, 7, 5, 4, 6, 2]
    assert generator(42, "folds").permutation(8).tolist() == [2, 6, 4, 5, 1, 3, 7, 0]
    assert generator(7, "cap", "all", "control").choice(1000, size=4, replace=False).tolist() == [611, 377, 612, 443]


def test_every_name_and_seed_has_its_own_stream() -> None:
    names = [(42, "half", "a", "b"), (43, "half", "a", "b"), (42, "cap", "a", "b"), (42, "half", "c", "b")]
    names += [(42, "half", "a", "c"), (42, "half", "b", "a"), (42, "half", "", ""), (42, "half", "a", "")]
    streams = {tuple(generator(*name).integers(2**63, size=2)) for name in names}
    assert len(streams) == len(names)


def test_a_draw_leaves_others_as_they_are() -> None:
    alone = generator(1, "half", "a", "b").permutation(50)
    generator(1, "half", "a", "a").permutation(1000)
    np.random.default_rng(1).random(1000)
    assert generator(1, "half", "a", "b").permutation(50).tolist() == alone.tolist()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The digests of three processes that differ in hash seed, number of threads, and order of rows and genes."""
    root = Path(__file__).resolve().parents[2]
    processes = []
    for seed, threads in (("0", "1"), ("1", "2"), ("2", "3")):
        settings = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", CHAIN, seed, str(tmp_path_factory.mktemp("chain"))]
        processes.append(
            subprocess.Popen(command, cwd=root, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    return [json.loads(output) for output in outputs]


def test_cap_halves_and_folds_are_pinned(runs: list[dict[str, object]]) -> None:
    pinned = "9d20139567d0f6b313d1a8dcad2347c562f8ff28e311829fa3789b6ab02c577b"
    assert [run["draws"] for run in runs] == [pinned] * 3


def test_all_files_have_the_same_bytes_whatever_the_hash_seed_order_and_threads(
    runs: list[dict[str, object]],
) -> None:
    names = {"cells.h5ad", "reference.h5ad", "negatives.h5ad", "half_splits/seed_43.h5ad", "quality.parquet"}
    assert isinstance(runs[0]["files"], dict)
    assert set(runs[0]["files"]) == names | {"edistance.parquet", "train.h5ad", "control.h5ad"}
    assert runs[0]["files"] == runs[1]["files"] == runs[2]["files"]
