"""Prepare a generated genome-wide screen: wall time, peak memory, disk, throughput, and what bounds them.

    python -m benchmarks.prepare --folder /big/disk

The raw file is made once and kept in the folder: counts of 2,500 conditions, gzip as published files are. Then the
stages of `prepare` run on it in a process of their own, whose memory and disk are watched while they run. The bound of
a pass over a file is a bare loop that reads the same arrays with h5py and does nothing with them; that of the
principal components is the products alone, at the speed at which one of them was timed.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import psutil
import typer
from anndata.io import sparse_dataset, write_elem
from rich.console import Console
from rich.table import Table
from scipy import sparse

from core.arrays import limit_blas_threads
from core.catalog.schema import DatasetSpec
from core.io.panels import PANEL
from core.prepare.cells import MEMORY, read_cells, write_cells
from core.prepare.files import CELLS
from core.reference.build import write_reference
from core.reference.files import read_keys
from core.reference.quality import write_quality
from core.stats.edistance import STRIP

CONSOLE = Console(highlight=False, width=110)
AT_ONCE = 4_000  # cells that are generated at once
READ = 1 << 22  # stored values that the bare loop reads at once
GB = 1e9


def main(
    folder: Annotated[Path, typer.Option(help="Where the raw file and what is made of it lie.")],
    cells: Annotated[int, typer.Option(help="Cells of the raw file, up to 2 million and more.")] = 500_000,
    genes: Annotated[int, typer.Option(help="Genes of the raw file.")] = 8_000,
    conditions: Annotated[int, typer.Option(help="Perturbed conditions.")] = 2_500,
    filled: Annotated[float, typer.Option(help="Share of values that are not zero.")] = 0.1,
    compression: Annotated[str, typer.Option(help="Of the raw file: gzip or lzf.")] = "gzip",
    memory_gb: Annotated[float, typer.Option(help="What the chunks of the raw matrix may take.")] = MEMORY / GB,
    half_seeds: Annotated[int, typer.Option(help="Half splits, of which one is the reference's own.")] = 5,
) -> None:
    """Generate the raw file if it is not there, prepare it, and print where time, memory and disk went."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / f"raw_{cells}x{genes}_{conditions}_{filled:g}.{compression}.h5ad"
    if not raw.exists():
        with CONSOLE.status(f"generating {raw.name}"):
            generate(raw.with_suffix(".partial"), cells, genes, conditions, filled, compression)
            raw.with_suffix(".partial").replace(raw)
    spec = DatasetSpec.model_validate(
        {
            "name": "generated",
            "title": "generated screen",
            "task": "single",
            "source": {"kind": "local", "hint": "generated"},
            "labels": {"column": "perturbation"},
            "half_seeds": half_seeds,
        }
    )
    with TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch)
        work = multiprocessing.get_context("spawn").Process(target=watched, args=(raw, spec, out, int(memory_gb * GB)))
        work.start()
        work.join()
        if work.exitcode:
            raise SystemExit(f"the preparation failed with exit code {work.exitcode}")
        show(raw, out, json.loads((out / "measured.json").read_text(encoding="utf-8")))


def generate(path: Path, cells: int, genes: int, conditions: int, filled: float, compression: str) -> None:
    """Write a raw file as published screens are: CSR counts, cells in no order, labels in obs["perturbation"].

    One cell in twenty is control. A gene's share of cells varies tenfold around `filled`; 40 genes of each condition
    are filled twice as often in its cells.
    """
    rng = np.random.default_rng(0)
    share = np.clip(rng.gamma(2.0, 0.5, genes), 0.2, 3.0)
    share *= filled / share.mean()
    raised = np.array([rng.choice(genes, min(40, genes), replace=False) for _ in range(conditions)])
    of_cell = np.where(rng.random(cells) < 0.05, conditions, rng.integers(conditions, size=cells))
    labels = pd.Index([*(f"G{i:05d}" for i in range(conditions)), "control"])
    obs = pd.DataFrame({"perturbation": pd.Categorical.from_codes(of_cell, labels)})
    obs.index = pd.Index([f"cell_{i:07d}" for i in range(cells)])
    ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"G{i:05d}" for i in range(genes)])).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for number, block in enumerate(_blocks(rng, share, raised, of_cell)):
            if number == 0:
                options = {"compression": compression, "chunks": (1 << 17,), "indptr_dtype": "int64"}
                write_elem(file, "X", block, dataset_kwargs=options)
                matrix = sparse_dataset(file["X"])
            else:
                matrix.append(block)


def _blocks(rng: np.random.Generator, share: Any, raised: Any, of_cell: Any) -> Iterator[sparse.csr_matrix]:
    counts = np.concatenate([[1] * 180, [2] * 45, [3] * 16, [4] * 8, range(5, 12)]).astype(np.float32)
    for start in range(0, len(of_cell), AT_ONCE):
        own = of_cell[start : start + AT_ONCE]
        chance = np.tile(share.astype(np.float32), (len(own), 1))
        rows = np.flatnonzero(own < len(raised))
        chance[rows[:, None], raised[own[rows]]] *= 2
        there = sparse.csr_matrix(rng.random(chance.shape, dtype=np.float32) < chance)
        there.sort_indices()
        values = counts[rng.integers(0, len(counts), there.nnz)]
        yield sparse.csr_matrix((values, there.indices, there.indptr), shape=there.shape)


def watched(raw: Path, spec: DatasetSpec, out: Path, memory: int) -> None:
    """Run the stages in this process, and write what they took to measured.json: seconds, bytes resident, on disk."""
    passes: list[tuple[str, float]] = []

    class Passes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.DEBUG and isinstance(record.args, tuple):
                passes.append((str(record.args[0]), float(record.args[3])))

    logger = logging.getLogger("calipert")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(Passes())
    stages: list[dict[str, Any]] = []
    done = threading.Event()

    def watch() -> None:
        process = psutil.Process()
        while not done.wait(0.2):
            if stages:
                stage = stages[-1]
                stage["resident"] = max(stage["resident"], process.memory_info().rss)
                stage["disk"] = max(stage["disk"], _size(out))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    steps = {
        "cells": lambda: write_cells(raw, spec, {}, out, memory),
        "reference": lambda: write_reference(read_cells(out), spec.seed, spec.half_seeds, out),
        "quality": lambda: write_quality(read_cells(out), read_keys(out), out),
    }
    for name, step in steps.items():
        stages.append({"stage": name, "resident": 0, "disk": 0})
        began, before = time.monotonic(), len(passes)
        step()
        stages[-1] |= {"seconds": time.monotonic() - began, "passes": passes[before:]}
    done.set()
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (out / "measured.json").write_text(json.dumps({"stages": stages, "peak": peak}), encoding="utf-8")


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # a scratch file that has just gone
            continue
    return total


def show(raw: Path, out: Path, measured: dict[str, Any]) -> None:
    """Print the tables: stages, then each pass beside its bound."""
    with h5py.File(raw) as file:
        n_raw, n_genes, stored = len(file["X/indptr"]) - 1, len(file["var/_index"]), file["X/data"].size
    with h5py.File(out / CELLS) as file:
        n_cells, kept = len(file["X/indptr"]) - 1, file["X/data"].size
        width = int(file["X"].attrs["shape"][1])
    CONSOLE.print(
        f"raw: {n_raw:,} cells x {n_genes:,} genes, {stored:,} stored values, {raw.stat().st_size / GB:.2f} GB; "
        f"prepared: {n_cells:,} cells x {width:,} genes, {kept:,} values, {(out / CELLS).stat().st_size / GB:.2f} GB"
    )
    table = Table("stage", "seconds", "peak resident GB", "most disk GB", title="Stages")
    for stage in measured["stages"]:
        sizes = f"{stage['resident'] / GB:.2f}", f"{stage['disk'] / GB:.2f}"
        table.add_row(stage["stage"], f"{stage['seconds']:.1f}", *sizes)
    seconds = sum(stage["seconds"] for stage in measured["stages"])
    table.add_row("all", f"{seconds:.1f}", f"{measured['peak'] / GB:.2f} (ru_maxrss)", "")
    CONSOLE.print(table)
    CONSOLE.print(f"throughput: {stored / seconds / 1e6:.1f} million stored values of the raw file per second")
    bare = {"raw": _bare_read(raw), "cells": _bare_read(out / CELLS)}
    products = _products(width) * n_cells / PANEL / (os.cpu_count() or 1)
    bounds = {
        "counting genes and cells": (stored, bare["raw"], "reading the raw file"),
        "sorting the chosen cells": (stored, bare["raw"], "reading the raw file"),
        "choosing genes": (kept, np.nan, "reading the spill, logarithms"),
        "writing cells": (kept, np.nan, "logarithms, compression"),
        "sums of conditions and halves": (kept, bare["cells"], "reading the cells"),
        "principal components": (kept, products, "products of genes"),
        "principal coordinates": (kept, bare["cells"], "reading the cells"),
    }
    table = Table("pass", "seconds", "values/µs", "bound, seconds", "bound", title="Passes beside their bounds")
    for name, took in (one for stage in measured["stages"] for one in stage["passes"]):
        values, bound, what = bounds[name]
        limit = "" if np.isnan(bound) else f"{bound:.1f}"
        table.add_row(name, f"{took:.1f}", f"{values / took / 1e6:.1f}", limit, what)
    CONSOLE.print(table)


def _bare_read(path: Path) -> float:
    """Seconds for reading the stored values and indices of X and doing nothing with them."""
    began = time.monotonic()
    with h5py.File(path) as file:
        for start in range(0, file["X/data"].size, READ):
            for name in ("data", "indices"):
                file[f"X/{name}"][start : start + READ]
    return time.monotonic() - began


def _products(width: int) -> float:
    """Seconds on one core for the upper half of the products of all genes over one panel of cells."""
    panel = np.random.default_rng(0).random((PANEL, width))
    strip = panel[:, :STRIP]
    with limit_blas_threads():
        panel[:, :STRIP].T @ strip
        began = time.monotonic()
        panel.T @ strip
        return (time.monotonic() - began) * width / min(STRIP, width) / 2


if __name__ == "__main__":
    typer.run(main)
