"""STATE (Adduri et al. 2025) by the command line of Arc's own package: `state tx train` and `state tx infer`.

Its package cannot live in the project's environment: this model runs in its image alone. Here its input is laid out and
its output read; README.md says how it gets a screen and why a training runs in parts.
"""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import contract
import neural

if not TYPE_CHECKING:
    ad, np, pd, torch = map(contract.LateModule, ("anndata", "numpy", "pandas", "torch"))
else:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import anndata as ad
    import numpy as np
    import pandas as pd
    import torch


DESCRIPTION = contract.Description(name="state", combinations=True, embedding=True, gpu=True, input="cells")
LICENCE = "arc-state is published under CC BY-NC-SA 4.0: for non-commercial use"
WORK, RUN = "work", "run"
LAST, BEST, PROGRESS = "last.ckpt", "best.ckpt", "progress.json"
WEIGHTS = "weights.ckpt"
LAST_LINES = 25
# So often, in steps, STATE writes down the loss of a batch.
LOG_EVERY = 50
# How much of a prediction, dense float32, is made at a time: some copies of it lie in memory.
BLOCK_BYTES = 2**29
# All of a checkpoint that a prediction needs.
OF_WEIGHTS = ("pytorch-lightning_version", "hparams_name", "hyper_parameters", "state_dict")


@dataclass(frozen=True)
class Settings:
    """The published defaults of `state tx train model=state`; predicted_cells is ours.

    hidden width, layers, heads and feedforward width of the transformer; set_size: cells that attend to each other;
    batch_size: sets in a batch; steps; learning_rate of Adam; largest_norm of a gradient; a validation every
    validate_every steps; workers: processes beside the training that read cells, or 0; predicted_cells of a condition,
    whose mean is its prediction.
    """

    hidden: int = 768
    layers: int = 8
    heads: int = 12
    feedforward: int = 3072
    set_size: int = 512
    batch_size: int = 16
    steps: int = 400_000
    learning_rate: float = 1e-4
    largest_norm: float = 10.0
    validate_every: int = 2000
    workers: int = 0
    predicted_cells: int = 1024

    def __post_init__(self) -> None:
        contract.check_numbers(self, or_zero=("workers",))
        if self.hidden % self.heads:
            raise ValueError(f"heads: wanted a divisor of hidden ({self.hidden})")
        if self.steps % self.validate_every:
            raise ValueError(f"steps: wanted a multiple of validate_every ({self.validate_every})")


@dataclass
class Progress:
    """How far a training is; least: its least validation loss so far. Its files lie beside it (LAST, BEST)."""

    task: str
    steps: int = 0
    least: float = float("inf")
    metrics: list[tuple[str, int, float]] = field(default_factory=list)


def train(task: contract.TrainTask) -> None:
    """Train in parts of `validate_every` steps and keep the weights of the least validation loss.

    Writes weights.ckpt and model.json. Without a val condition that has an embedding, the last weights are kept;
    where every loss is NaN, those of the first part.
    """
    settings = contract.hyperparameters(task, Settings)
    contract.log(LICENCE)
    embedding = contract.scale_embedding(contract.read_embedding(task.embedding))
    cells = contract.read_cells(task.cells)
    kept, shape = contract.select_cells(cells, embedding)
    contract.require_controls(cells.obs, shape.covariates)
    work = task.output / WORK
    work.mkdir()
    write_screen(cells[kept].copy(), embedding, shape, work)
    del cells
    progress = restore_training(task, work)
    while progress.steps < settings.steps:
        progress.steps += settings.validate_every
        # Its draws depend on no other part.
        seed = int(neural.generator(task.seed, progress.steps).integers(2**31))
        losses = run_part(work, settings, seed, progress.steps)
        for name, value in losses.items():
            contract.metric(name, progress.steps, value)
        loss = losses.get("val_loss", progress.least)
        if "val_loss" not in losses or loss < progress.least or not (work / BEST).exists():
            checkpoint = load_plain(work / LAST)
            torch.save({name: checkpoint[name] for name in OF_WEIGHTS}, work / BEST)
        progress.least = min(progress.least, loss)  # in this order: it stays where the loss is NaN
        progress.metrics = contract.metrics()
        contract.progress(progress.steps, settings.steps, "step")
        if task.checkpoint is not None and progress.steps < settings.steps:
            save(progress, work, task.checkpoint)
    (work / BEST).rename(task.output / WEIGHTS)
    shutil.rmtree(work)
    contract.write_model(task, settings, shape)


def predict(task: contract.PredictTask) -> None:
    """Predict every condition whose genes have an embedding, in the covariates of the train cells.

    The mean over predicted cells, each of a control cell that is drawn from those of the covariate.
    """
    settings, shape = contract.read_model(task, Settings, contract.Shape)
    embedding = contract.scale_embedding(contract.read_embedding(task.embedding, shape.dimensions))
    keys, reasons = contract.split_keys(task, embedding, shape.covariates)
    work = task.output / WORK
    write_run(work, {f"p{row}": key.condition for row, key in enumerate(keys)}, embedding)
    load_plain(task.model / WEIGHTS)  # STATE loads any pickle: ours is seen to be none before
    control = contract.read_cells(task.control)[:, shape.genes]
    profiles = np.empty((len(keys), len(shape.genes)))
    done = 0
    for covariate, rows in blocks(keys, control, settings.predicted_cells):
        own = control[(control.obs["covariate"] == covariate).to_numpy()]
        profiles[rows] = mean_profiles(work, task, own.X, [f"p{row}" for row in rows], settings.predicted_cells)
        done += len(rows)
        contract.progress(done, len(keys), "condition")
    shutil.rmtree(work)
    contract.write_predictions(task, keys, profiles, shape.genes, reasons)


# ---- what STATE gets


def write_screen(cells: ad.AnnData, embedding: pd.DataFrame, shape: contract.Shape, work: Path) -> None:
    """cells.h5ad, features.pt (a vector for each condition) and screen.toml (what is for validation).

    Names are replaced by numbers: no gene's or cell line's name can mean something to STATE, TOML or its shell.
    """
    names = sorted(set(cells.obs["condition"]) - {contract.CONTROL})
    code = {name: f"p{row}" for row, name in enumerate(names)} | {contract.CONTROL: contract.CONTROL}
    line = {name: f"line{row}" for row, name in enumerate(shape.covariates)}
    is_val = cells.obs["split"] == "val"
    text = '[datasets]\nscreen = "cells.h5ad"\n\n[training]\nscreen = "train"\n'
    for covariate in shape.covariates:
        own = cells.obs["condition"][is_val & (cells.obs["covariate"] == covariate)]
        text += f'\n[fewshot."screen.{line[covariate]}"]\nval = {json.dumps(sorted(code[name] for name in set(own)))}\n'
    (work / "screen.toml").write_text(text, encoding="utf-8")
    write_features(work / "features.pt", {code[name]: name for name in names}, embedding)
    obs = {"condition": cells.obs["condition"].map(code), "covariate": cells.obs["covariate"].map(line)}
    cells.obs = pd.DataFrame(obs, dtype="category")
    cells.write_h5ad(work / "cells.h5ad")


def write_run(work: Path, conditions: Mapping[str, str], embedding: pd.DataFrame) -> None:
    """Write what `state tx infer` looks for beside the weights. conditions: from codes to conditions."""
    (work / RUN).mkdir(parents=True)
    (work / RUN / "config.yaml").write_text("data: {kwargs: {}}\n", encoding="utf-8")
    (work / RUN / "var_dims.pkl").write_bytes(pickle.dumps({"pert_dim": embedding.shape[1]}))
    write_features(work / RUN / "pert_onehot_map.pt", conditions, embedding)


def write_features(path: Path, conditions: Mapping[str, str], embedding: pd.DataFrame) -> None:
    """Make a vector for each code: the sum of the embeddings of its condition's genes; zeros for control."""
    of_code = {contract.CONTROL: contract.CONTROL, **conditions}
    summed = contract.sum_embeddings(list(of_code.values()), embedding).astype(np.float32)
    torch.save({code: torch.tensor(vector) for code, vector in zip(of_code, summed, strict=True)}, path)


# ---- training


def run_part(work: Path, settings: Settings, seed: int, steps: int) -> dict[str, float]:
    """Train up to so many steps, from those that LAST holds or from new weights; LAST holds them then.

    Returns the mean train_loss of the part and, where there are val conditions, the val_loss at its end.
    """
    checkpoints = work / RUN / "checkpoints"
    checkpoints.mkdir(parents=True)
    if (work / LAST).exists():
        (work / LAST).rename(checkpoints / "last.ckpt")  # the name at which STATE looks for one to go on from
    backbone = "model.kwargs.transformer_backbone_kwargs"
    settings_given = {
        "data.kwargs.toml_config_path": "screen.toml",
        "data.kwargs.perturbation_features_file": "features.pt",
        "data.kwargs.pert_col": "condition",
        "data.kwargs.cell_type_key": "covariate",
        "data.kwargs.batch_col": "covariate",
        "data.kwargs.control_pert": contract.CONTROL,
        "data.kwargs.embed_key": "null",
        "data.kwargs.output_space": "gene",
        "data.kwargs.num_workers": settings.workers,
        "+data.kwargs.random_seed": seed,
        "model": "state",
        "model.kwargs.cell_set_len": settings.set_size,
        "model.kwargs.hidden_dim": settings.hidden,
        # A second network for expression where that is not what the first one predicts; here it would idle.
        "+model.kwargs.gene_decoder_bool": "false",
        f"{backbone}.num_hidden_layers": settings.layers,
        f"{backbone}.num_attention_heads": settings.heads,
        f"{backbone}.num_key_value_heads": settings.heads,
        f"{backbone}.head_dim": settings.hidden // settings.heads,
        f"{backbone}.intermediate_size": settings.feedforward,
        "training.train_seed": seed,
        "training.max_steps": steps,
        "training.batch_size": settings.batch_size,
        "training.lr": settings.learning_rate,
        "training.gradient_clip_val": settings.largest_norm,
        "training.val_freq": settings.validate_every,
        "+training.log_every_n_steps": min(LOG_EVERY, settings.validate_every),
        "use_wandb": "false",
        "output_dir": ".",
        "name": RUN,
    }
    run_state(work, "train", [f"{name}={value}" for name, value in settings_given.items()])
    checkpoint = read_checkpoint(checkpoints / "final.ckpt")
    losses = read_losses(work / RUN / "version_0" / "metrics.csv")
    shutil.rmtree(work / RUN)
    torch.save(checkpoint, work / LAST)
    return losses


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that STATE has just written, as plain values and tensors, without the paths of its files.

    It holds numpy's numbers, which its own next run would refuse to load.
    """
    from numpy._core.multiarray import scalar

    with torch.serialization.safe_globals([scalar, np.dtype, np.dtypes.Int64DType]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value)((plain(name), plain(each)) for name, each in value.items())
        if isinstance(value, list):
            return [plain(each) for each in value]
        return value.item() if isinstance(value, np.generic) else value

    return {name: plain(part) for name, part in checkpoint.items() if name != "callbacks"}


def load_plain(path: Path) -> dict[str, Any]:
    """Read a checkpoint of plain values and tensors. Raises an error for any other pickle."""
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


def read_losses(path: Path) -> dict[str, float]:
    """Read the mean train_loss and the last val_loss of what STATE has logged; what it has not logged is left out."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    logged = {name: [float(row[name]) for row in rows if row.get(name)] for name in ("train_loss", "val_loss")}
    means = {"train_loss": float(np.mean(logged["train_loss"]))}
    return means | ({"val_loss": logged["val_loss"][-1]} if logged["val_loss"] else {})


def save(progress: Progress, work: Path, folder: Path) -> None:
    """Keep a training for one that goes on from it: a folder beside that of the part before, which then goes."""
    name = f"steps_{progress.steps:09d}"
    unfinished = folder / f"{name}.partial"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    for file in (LAST, BEST):
        shutil.copyfile(work / file, unfinished / file)
    contract.write_json(unfinished / PROGRESS, asdict(progress))
    unfinished.rename(folder / name)
    for other in folder.glob("steps_*"):
        if other.name != name:
            shutil.rmtree(other)


def restore_training(task: contract.TrainTask, work: Path) -> Progress:
    """Find where a killed training stopped, with its files in place and its metrics printed again; else the start."""
    began = Progress(neural.identity(task))
    kept = sorted(task.checkpoint.glob("steps_*[0-9]")) if task.checkpoint else []
    if not kept:
        return began

    def read() -> dict[str, Any]:
        for file in (LAST, BEST):
            load_plain(kept[-1] / file)
        return asdict(Progress(**json.loads((kept[-1] / PROGRESS).read_text(encoding="utf-8"))))

    found = neural.accept_checkpoint(task, read)
    if found is None:
        for folder in kept:
            shutil.rmtree(folder)
        return began
    for file in (LAST, BEST):
        shutil.copyfile(kept[-1] / file, work / file)
    contract.log(f"goes on after step {found['steps']}, where an earlier training was cut off")
    return Progress(**found)


# ---- prediction


def blocks(keys: Sequence[contract.Key], control: ad.AnnData, cells: int) -> Iterator[tuple[str, list[int]]]:
    """(covariate, rows of its keys), as many keys at a time as are predicted in BLOCK_BYTES, at least one."""
    count = max(1, BLOCK_BYTES // (4 * control.n_vars * cells))
    for covariate in sorted({key.covariate for key in keys}):
        rows = [row for row, key in enumerate(keys) if key.covariate == covariate]
        for start in range(0, len(rows), count):
            yield covariate, rows[start : start + count]


def mean_profiles(work: Path, task: contract.PredictTask, control: Any, codes: Sequence[str], cells: int) -> np.ndarray:
    """Predicted mean profiles of the conditions of these codes: codes x genes, float64.

    control: CSR, the covariate's control cells. `state tx infer` replaces each further cell of a file by a prediction
    from a control cell that it draws, so that their own expression may be left empty.
    """
    from scipy.sparse import csr_matrix, vstack

    n_control, n_genes = control.shape
    condition = np.concatenate([np.repeat(contract.CONTROL, n_control), np.repeat(codes, cells)])
    index = [str(row) for row in range(len(condition))]
    obs = pd.DataFrame({"condition": condition, "covariate": "line"}, index=index, dtype="category")
    empty = csr_matrix((len(codes) * cells, n_genes), dtype=np.float32)
    ad.AnnData(vstack([control, empty], format="csr"), obs=obs).write_h5ad(work / "ask.h5ad")
    settings_given = {
        "--model-dir": RUN,
        "--checkpoint": str((task.model / WEIGHTS).resolve()),
        "--adata": "ask.h5ad",
        "--pert-col": "condition",
        "--control-pert": contract.CONTROL,
        "--celltype-col": "covariate",
        "--seed": str(task.seed % 2**32),
        "--output": "answer.npy",
    }
    run_state(work, "infer", [word for pair in settings_given.items() for word in pair])
    answer = np.load(work / "answer.npy", mmap_mode="r")[n_control:]
    means: np.ndarray = answer.reshape(len(codes), cells, n_genes).mean(axis=1, dtype=np.float64)
    return means


# ---- the command line


def run_state(work: Path, command: str, arguments: Iterable[str]) -> None:
    """Run `state tx COMMAND` within a folder that is its home too.

    Where it fails, the end of its output goes to stderr, and this process ends with exit status 1.
    """
    environment = os.environ | {
        "HOME": str(work.resolve()),
        "LOGNAME": "calipert",  # PyTorch asks for the user's name, which not every user has in a container
        "NUMBA_CACHE_DIR": str(work.resolve()),
        "MPLCONFIGDIR": str(work.resolve()),
        "PYTHONHASHSEED": "0",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
    }
    program = Path(sys.executable).with_name("state")
    said = work / "said.txt"
    with said.open("wb") as out:
        done = subprocess.run(
            [program, "tx", command, *arguments],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
        print(*lines[-LAST_LINES:], sep="\n", file=sys.stderr)
        print(f"state tx {command} ended with exit code {done.returncode}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
