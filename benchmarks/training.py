"""One fold of each neural model: wall time, samples per second and host memory.

    python -m benchmarks.training

With a GPU: the whole default training at the size of replogle22k562 (1,400 training conditions, 110,000 cells, 8,300
genes), beside the times and the memory that were published for one H200. Without one: a few epochs at a tenth of the
size, beside the obvious implementation. A tenth is a tenth of the conditions and cells, with all genes: these decide
how wide the networks and how large a step is, cells and conditions only how many steps there are.

Each training is a process of its own, as in a benchmark of models, so that the peak of memory is its own. The peer
(benchmarks/dense_rows) is the same network with the same draws and steps, and its losses have to be the same. gears and
scgpt have none: fetching the cells takes about a hundredth of a step, or less, in whatever way it is done, and the peer
would time the same network once more. On a CPU scgpt takes seconds for a cell: it gets 8 cells.

Cells are made up, a third of their entries filled. The embedding, in four sources, is a noisy projection of the
effects: with nothing to be learned presage would end too early.
"""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, NamedTuple
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import torch
import typer
from scipy import sparse

from benchmarks.comparison import CONSOLE, Agreement, Timing, agreement, machine, show, show_agreement, show_times
from benchmarks.made_up_cells import log_cells
from blocks.config.paths import MODEL_CONTAINERS
from blocks.engines.base import Usage
from blocks.engines.lines import Event
from blocks.engines.process import ProcessEngine
from blocks.local.gpus import Gpu, lease_gpu
from core.prepare.splits import VALIDATION_SHARE
from core.rng import generator
from model_containers.contract import CONTROL

PEER = Path(__file__).parent / "dense_rows"
CONDITIONS, CELLS = 1_400, 110_000
SOURCES, DIMENSIONS = 4, 256  # of the embedding, of each source
LINKS = 20  # of a gene in the graph
OF_CONTROLS = 40  # made-up conditions for each that is counted as control; those without effect are every fourth
TOLERANCE = 1e-4
GB = 1e9


class Plan(NamedTuple):
    """How a model is timed.

    sample: what an epoch passes over. given: the file that tells of genes, or None. few: hyperparameters of the short
    training. aim: seconds. published, published_gb: seconds and host memory on an H200; None where there are none.
    """

    sample: str
    given: str | None
    few: dict[str, Any]
    aim: float
    published: float | None = None
    published_gb: float | None = None


# On a CPU scgpt takes 2 GB of memory for each cell of a batch.
PLANS = {
    "fmlp": Plan("cells", "embedding.parquet", {"epochs": 4}, 20),
    "presage": Plan("conditions", "embedding.parquet", {"epochs": 20}, 20, 3 * 60, 35),
    "sclambda": Plan("cells", "embedding.parquet", {"epochs": 3}, 100, 16 * 60, 44),
    "gears": Plan("perturbed cells", "graph.parquet", {"epochs": 2}, 8 * 60, 78 * 60, 60),
    "scgpt": Plan("perturbed cells", None, {"epochs": 2, "batch_size": 2}, 12 * 60, 121 * 60, 55),
}
WITH_PEER = ("fmlp", "presage", "sclambda")


class Fold(NamedTuple):
    """A fold in a folder. sparse: bytes of the cells in CSR. samples: how many there are of each kind in training."""

    folder: Path
    sparse: int
    samples: dict[str, int]


class Training(NamedTuple):
    """What a training took and told. losses: name and epoch -> value. told: seconds at which each epoch was over."""

    usage: Usage
    losses: dict[tuple[str, int], float]
    told: list[float]

    def rate(self, samples: int) -> float:
        """Compute samples per second, from the end of the first epoch to that of the last, of two at least."""
        return samples * (len(self.told) - 1) / (self.told[-1] - self.told[0])


def write_fold(folder: Path, conditions: int, cells: int, genes: int, filled: float) -> Fold:
    """train.h5ad, embedding.parquet and graph.parquet, as a model gets them.

    conditions: of training; so many more are val as in a real fold. cells: of all splits, control included.
    """
    folder.mkdir()
    n_perturbed = conditions + int(conditions * VALIDATION_SHARE / (1 - VALIDATION_SHARE))
    if n_perturbed > genes:
        raise typer.BadParameter(f"{n_perturbed} conditions need as many genes, not {genes}")
    rng = generator(42, "benchmark fold")
    names = np.array([f"G{number:05d}" for number in range(genes)])
    perturbed = rng.choice(names, n_perturbed, replace=False)
    n_made = n_perturbed + ceil(n_perturbed / (OF_CONTROLS - 1))
    is_control = np.arange(n_made) % OF_CONTROLS == 0
    labels, splits = np.full(n_made, CONTROL, dtype=object), np.full(n_made, "train", dtype=object)
    labels[~is_control] = perturbed
    splits[np.flatnonzero(~is_control)[conditions:]] = "val"
    X, codes = log_cells(n_made, cells, genes, filled)
    order = np.argsort(labels[codes], kind="stable")
    X, codes = X[order], codes[order]
    obs = pd.DataFrame({"covariate": "line", "condition": labels[codes], "split": splits[codes]})
    obs = obs.astype("category").set_axis([f"cell_{number:06d}" for number in range(cells)])
    ad.AnnData(X, obs=obs, var=pd.DataFrame(index=names)).write_h5ad(folder / "train.h5ad")

    member = sparse.csr_matrix((np.ones(cells), (codes, np.arange(cells))))
    means = (member @ X).toarray() / np.bincount(codes)[:, None]
    effects = means[~is_control] - means[is_control].mean(axis=0)
    vectors = rng.standard_normal((genes, SOURCES * DIMENSIONS))
    told = effects @ rng.standard_normal((genes, SOURCES * DIMENSIONS))
    vectors[np.searchsorted(names, perturbed)] += told / told.std()
    columns = [f"source{source}/{dimension}" for source in range(SOURCES) for dimension in range(DIMENSIONS)]
    embedding = pd.DataFrame(vectors.astype(np.float32), index=pd.Index(names, name="gene"), columns=columns)
    embedding.to_parquet(folder / "embedding.parquet")
    graph = pd.DataFrame({"gene": perturbed.repeat(LINKS), "neighbour": rng.choice(perturbed, LINKS * n_perturbed)})
    graph["weight"] = rng.uniform(0.1, 1, len(graph))
    graph = graph[graph["gene"] != graph["neighbour"]].drop_duplicates(["gene", "neighbour"])
    graph.to_parquet(folder / "graph.parquet")

    is_train = obs["split"] == "train"
    n_perturbed_cells = int((is_train & (obs["condition"] != CONTROL)).sum())
    samples = {"cells": int(is_train.sum()), "perturbed cells": n_perturbed_cells, "conditions": conditions}
    return Fold(folder, X.data.nbytes + X.indices.nbytes + X.indptr.nbytes, samples)


def trained(folder: Path, fold: Fold, given: str | None, hyperparameters: dict[str, Any], gpu: Gpu | None) -> Training:
    """One training of a model (its folder), in a process of its own. Raises ModelFailed if it fails."""
    losses: dict[tuple[str, int], float] = {}
    told: list[float] = []

    def hear(event: Event) -> None:
        if event["event"] == "metric" and event["name"] in ("train_loss", "val_loss"):
            losses[event["name"], event["step"]] = event["value"]
            if event["name"] == "train_loss":
                told.append(perf_counter())

    with TemporaryDirectory(dir=fold.folder) as output:
        spec = {
            "cells": str(fold.folder / "train.h5ad"),
            "embedding": given and str(fold.folder / given),
            "hyperparameters": hyperparameters,
            "seed": 0,
            "output": output,
        }
        usage = ProcessEngine().run("train", folder, spec, on_event=hear, gpu=gpu)
    return Training(usage, losses, told)


def peak(usage: Usage) -> float:
    """Host memory in GB."""
    if usage.peak_memory_bytes is None:
        raise RuntimeError("the engine does not know the memory of its processes")
    return usage.peak_memory_bytes / GB


def same_losses(name: str, ours: Training, peer: Training) -> list[Agreement]:
    """How far the losses of all epochs lie apart, for each of them; infinitely where one told of others."""
    if list(ours.losses) != list(peer.losses):
        return [Agreement(f"{name}: epochs", np.inf, TOLERANCE, "relative")]
    found = []
    for loss in sorted({loss for loss, _ in ours.losses}):
        steps = [key for key in ours.losses if key[0] == loss]
        mine, theirs = ([one.losses[key] for key in steps] for one in (ours, peer))
        found.append(agreement(f"{name}: {loss}", mine, theirs, TOLERANCE, "relative"))
    return found


def main(
    models: Annotated[str, typer.Option(help="Which ones, separated by commas.")] = ",".join(PLANS),
    conditions: Annotated[int | None, typer.Option(min=12, help="Of training; 1,400, or a tenth of it.")] = None,
    cells: Annotated[int | None, typer.Option(min=200, help="110,000, or a tenth of it.")] = None,
    genes: Annotated[int, typer.Option(min=30, help="Number of measured genes.")] = 8_300,
    filled: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of values that are not zero.")] = 0.33,
    whole: Annotated[
        bool | None,
        typer.Option(
            "--whole/--part",
            help="The default training beside published times, or a few epochs at a tenth of the size beside the "
            "peer; if left out, the first where there is a GPU.",
        ),
    ] = None,
) -> None:
    """Time one fold of each model; exit 1 where the losses of a model and of its peer differ by more than 1e-4."""
    chosen = models.split(",")
    unknown = sorted(set(chosen) - set(PLANS))
    if unknown:
        raise typer.BadParameter(f"no model {unknown[0]}; there are {', '.join(PLANS)}", param_hint="--models")
    CONSOLE.print(machine("torch", "anndata"))
    with (
        TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, CALIPERT_DATA=f"{folder}/data"),
        lease_gpu("benchmarks.training") as gpu,
    ):
        is_whole = gpu is not None if whole is None else whole
        part = 1 if is_whole else 10
        with CONSOLE.status("making up cells"):
            fold = write_fold(
                Path(folder) / "fold", conditions or CONDITIONS // part, cells or CELLS // part, genes, filled
            )
            few = write_fold(Path(folder) / "few", 1, 16, genes, filled)
        CONSOLE.print(
            f"{fold.samples['conditions']:,} training conditions, {genes:,} genes, {fold.samples['cells']:,} train "
            f"cells, {fold.sparse / GB:.2f} GB in compressed rows; on {device_of(gpu)}\n"
        )
        base = peak(trained(PEER, fold, None, {"model": "imports"}, None).usage)
        timings, rows, agreements = [], [], []
        for name in chosen:
            own = few if name == "scgpt" and not is_whole else fold
            runs = runs_of(name, own, is_whole, gpu)
            timings += timings_of(name, runs, is_whole)
            rows += [row_of(name, who, own, run, base, is_whole) for who, run in runs.items()]
            if "dense rows" in runs:
                agreements += same_losses(name, runs["calipert"], runs["dense rows"])
    CONSOLE.print()
    show_times("The whole process, from the file to the weights", timings)
    columns = ["", "epochs", "samples", "samples/s", "CPU s", "peak GB", "- imports", "2 x sparse"]
    columns += ["published GB"] if is_whole else []
    show("Samples from the end of the first epoch to that of the last; all else of the whole process", columns, rows)
    CONSOLE.print(f"What all models import takes {base:.2f} GB. 2 x sparse: twice the cells in compressed rows, GB.\n")
    if agreements:
        show_agreement(agreements)


def device_of(gpu: Gpu | None) -> str:
    """On what the models train."""
    if gpu is None:
        return "the CPU"
    return f"GPU {gpu.id}" + ("" if torch.cuda.is_available() else ", which torch cannot use: on the CPU")


def runs_of(name: str, fold: Fold, is_whole: bool, gpu: Gpu | None) -> dict[str, Training]:
    """Ours, and the peer's if there is one, each told of when it is done: the next may take long."""
    plan = PLANS[name]
    settings = {} if is_whole else plan.few
    runs = {}
    for who in ("calipert",) if is_whole or name not in WITH_PEER else ("calipert", "dense rows"):
        with CONSOLE.status(f"{name}, {who}"):
            folder, own = (MODEL_CONTAINERS / name, {}) if who == "calipert" else (PEER, {"model": name})
            runs[who] = trained(folder, fold, plan.given, own | settings, gpu)
        usage = runs[who].usage
        CONSOLE.print(f"{name}, {who}: {usage.seconds:,.1f} s, {peak(usage):.2f} GB")
    return runs


def timings_of(name: str, runs: dict[str, Training], is_whole: bool) -> list[Timing]:
    """Write the model's row, after that of what it is compared with."""
    plan, seconds = PLANS[name], runs["calipert"].usage.seconds
    other = {who: run.usage.seconds for who, run in runs.items() if who != "calipert"}
    if is_whole and plan.published is not None:
        other = {"published, on an H200": plan.published}
    rows = [Timing(f"{name}, {who}", their) for who, their in other.items()]
    ratio = next((their / seconds for their in other.values()), None)
    return [*rows, Timing(f"{name}, calipert", seconds, ratio, f"<= {plan.aim:,.0f} s" if is_whole else "")]


def row_of(name: str, who: str, fold: Fold, run: Training, base: float, is_whole: bool) -> list[str]:
    """Write a row of the second table. base: GB of what all models import."""
    plan, most, cpu = PLANS[name], peak(run.usage), run.usage.cpu_seconds
    row = [f"{name}, {who}", f"{len(run.told):,}", plan.sample, f"{run.rate(fold.samples[plan.sample]):,.1f}"]
    row += ["" if cpu is None else f"{cpu:,.1f}"]
    row += [f"{size:.2f}" for size in (most, most - base, 2 * fold.sparse / GB)]
    if is_whole:
        row += ["" if plan.published_gb is None else f"{plan.published_gb:.0f}"]
    return row


if __name__ == "__main__":
    typer.run(main)
