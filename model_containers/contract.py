"""The contract between the benchmark and a model, or a maker of gene embeddings: commands that are given one JSON file.

`python model.py describe|train|predict|embed SPEC.json`. This module is copied into every model's image and lies on
the path of every model that runs as a process. It imports nothing of the project, and heavy packages only when
they are used: `describe` answers at once, and `main` can set the number of threads before a BLAS is loaded. The
contract in full, file by file, is docs/models.md.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args, get_type_hints

CONTROL = "control"
INPUTS = ("cells", "means", "files")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# How many cells `read_means` holds at a time. Fixed, so that its sums keep their bits on every machine.
BLOCK_OF_CELLS = 65_536
MODEL = "model.json"

Settings = TypeVar("Settings")
ShapeOf = TypeVar("ShapeOf")
_METRICS: list[tuple[str, int, float]] = []


class LateModule:
    """A module that is imported when something of it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if not TYPE_CHECKING:
    ad, np, pd, sparse = map(LateModule, ("anndata", "numpy", "pandas", "scipy.sparse"))
else:
    import anndata as ad
    import numpy as np
    import pandas as pd
    from scipy import sparse


class ContractError(Exception):
    """What the model was given, or what it would write, breaks the contract; the message says where and how."""


class Key(NamedTuple):
    """What a profile belongs to: a condition (`A`, `A+B`) in a covariate (cell line, donor)."""

    covariate: str
    condition: str


@dataclass(frozen=True)
class Description:
    """What a model can do and needs.

    name:         the model's name, equal to its folder's.
    combinations: it predicts conditions of more than one gene.
    embedding:    it needs an embedding of genes.
    counts:       it needs raw counts (layers["counts"]) beside log1p expression.
    gpu:          it uses a GPU where there is one.
    input:        "cells" if it learns from single cells, "means" if from the means of conditions alone; "files" if it
                  learns from neither, and makes embeddings of published files.
    """

    name: str
    combinations: bool
    embedding: bool
    counts: bool = False
    gpu: bool = False
    input: str = "cells"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ContractError(f"describe: name: {self.name!r} is not a name")
        for field in ("combinations", "embedding", "counts", "gpu"):
            if not isinstance(getattr(self, field), bool):
                raise ContractError(f"describe: {field}: {getattr(self, field)!r} is neither true nor false")
        if self.input not in INPUTS:
            raise ContractError(f"describe: input: {self.input!r} is none of {', '.join(INPUTS)}")


@dataclass(frozen=True)
class Shape:
    """What else than its settings the size of a model of one embedding hangs on.

    dimensions of the embedding, names of the measured genes, names of the covariates of the train cells.
    """

    dimensions: int
    genes: list[str]
    covariates: list[str]


@dataclass(frozen=True)
class DescribeTask:
    """A question for the model's description, which goes into the folder `output`."""

    output: Path


@dataclass(frozen=True)
class TrainTask:
    """One training run.

    cells:           h5ad of the fold's train and val cells, control included: X log1p(CP10k), obs `covariate`,
                     `condition`, `split` ("train" or "val"); test cells are not in the file.
    embedding:       parquet of genes x dimensions, or what else the model gets about genes (`read_sources`,
                     `read_graph`), or None.
    pretrained:      folder of published weights that the model starts from, or None.
    hyperparameters: what differs from the model's own defaults.
    seed:            seed of every draw.
    threads:         CPU threads to use.
    output:          the only folder to write into, with:
    checkpoint:      a folder that outlives a training which is killed, for what lets the next one go on; or None.
    """

    cells: Path
    embedding: Path | None
    hyperparameters: dict[str, Any]
    seed: int
    threads: int
    output: Path
    pretrained: Path | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class PredictTask:
    """One prediction run.

    model:      the folder that training wrote.
    control:    h5ad of the control cells of the train split, laid out as TrainTask.cells.
    conditions: what to predict.
    embedding, pretrained: what training had.
    seed, threads, output: as in TrainTask.
    """

    model: Path
    control: Path
    conditions: tuple[Key, ...]
    embedding: Path | None
    seed: int
    threads: int
    output: Path
    pretrained: Path | None = None


@dataclass(frozen=True)
class EmbedTask:
    """One gene embedding to make, which the caller keeps for all data sets.

    pretrained: folder of the published files that it is made of.
    settings:   what differs from the maker's own defaults.
    threads, output, checkpoint: as in TrainTask.
    """

    pretrained: Path
    settings: dict[str, Any]
    threads: int
    output: Path
    checkpoint: Path | None = None


def main(
    description: Description,
    train: Callable[[TrainTask], None] | None = None,
    predict: Callable[[PredictTask], None] | None = None,
    *,
    embed: Callable[[EmbedTask], None] | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Answer the command line `describe|train|predict|embed SPEC.json` (default: this process's own).

    Writes the description as describe.json, or calls `train`, `predict` or `embed` with the task that SPEC.json holds;
    these write into `task.output`. A model has the first two, a maker of embeddings the last. A breach of the contract
    is one line on stderr and exit status 2; any other error of the model is its traceback and exit status 1.
    """
    arguments = sys.argv[1:] if arguments is None else arguments

    def describe(task: DescribeTask) -> None:
        write_json(task.output / "describe.json", asdict(description))

    calls: dict[str, Callable[[Any], None] | None]
    calls = {"describe": describe, "train": train, "predict": predict, "embed": embed}
    known = {stage: call for stage, call in calls.items() if call}
    try:
        if len(arguments) != 2 or arguments[0] not in known:
            given = " ".join(arguments) or "nothing"
            raise ContractError(f"wanted: {'|'.join(known)} SPEC.json; given: {given}")
        stage, spec = arguments[0], _read_spec(arguments[0], Path(arguments[1]))
        if "threads" in spec:
            _use_threads(spec["threads"])
        known[stage](_TASKS[stage](**spec))
    except ContractError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def hyperparameters(task: TrainTask, settings: type[Settings]) -> Settings:
    """Read the task's hyperparameters into an instance of `settings`, a dataclass whose fields all have defaults.

    Unknown names and values of another type than the default's are refused (a whole number may stand for a
    decimal one, a list for a tuple); a ValueError of the dataclass's `__post_init__` becomes a ContractError.
    """
    return _settings("hyperparameters", task.hyperparameters, settings)


def embedding_settings(task: EmbedTask, settings: type[Settings]) -> Settings:
    """Read the task's settings into an instance of `settings`, checked as `hyperparameters` are."""
    return _settings("settings", task.settings, settings)


def no_settings(task: EmbedTask) -> None:
    """Refuse any setting: of a maker that has none."""
    for name in task.settings:
        raise ContractError(f"settings: {name}: unknown; there are none")


def _settings(where: str, wanted: Mapping[str, Any], settings: type[Settings]) -> Settings:
    defaults = settings()
    known = {field.name: getattr(defaults, field.name) for field in fields(defaults)}  # type: ignore[arg-type]
    given = {}
    for name, value in wanted.items():
        if name not in known:
            raise ContractError(f"{where}: {name}: unknown; there are {', '.join(sorted(known))}")
        if not _same_type(value, known[name]):
            raise ContractError(f"{where}: {name}: {value!r} is of another type than {known[name]!r}")
        given[name] = tuple(value) if isinstance(value, list) else value
    try:
        return settings(**given)
    except ValueError as error:
        raise ContractError(f"{where}: {error}") from None


def check_numbers(settings: object, or_zero: Sequence[str] = (), others: Sequence[str] = ()) -> None:
    """Raise ValueError unless each field of a dataclass is a number above 0: for its `__post_init__`.

    or_zero: fields that may be 0 too. others: fields that are not checked here.
    """
    for name, value in vars(settings).items():
        if name in or_zero and value < 0:
            raise ValueError(f"{name}: wanted a number of at least 0")
        if name not in (*or_zero, *others) and value <= 0:
            raise ValueError(f"{name}: wanted a number above 0")


# ---- events: one JSON object a line on stdout


def progress(done: int, total: int, unit: str) -> None:
    """Say that `done` of `total` units ("epoch", "condition") are finished."""
    _say({"event": "progress", "done": int(done), "total": int(total), "unit": unit})


def metric(name: str, step: int, value: float) -> None:
    """Report a number of the training at a step (epochs count from 1); NaN and infinity are allowed."""
    _METRICS.append((name, int(step), float(value)))
    _say({"event": "metric", "name": name, "step": int(step), "value": float(value)})


def metrics() -> list[tuple[str, int, float]]:
    """All that `metric` has reported so far: a training that goes on after it was killed reports it again."""
    return list(_METRICS)


def log(message: str) -> None:
    """Tell the user something."""
    _say({"event": "log", "message": message})


# ---- reading


def only_file(folder: Path, pattern: str) -> Path:
    """Find the one file of a folder whose name fits a glob pattern; raise ContractError for none or several."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ContractError(f"{folder}: {len(found)} files {pattern}; wanted one")
    return found[0]


def read_cells(path: Path, *, counts: bool = False) -> ad.AnnData:
    """Read the cells of an h5ad: X CSR float32 log1p(CP10k), obs `covariate`, `condition`, `split` as str.

    Layers stay on disk, except layers["counts"] (CSR float32, whole numbers) when `counts` is true. Raises
    ContractError if a column or the counts are missing.
    """
    import h5py
    from anndata.io import read_elem

    with h5py.File(path, "r") as file:
        layers = {}
        if counts:
            if "counts" not in file.get("layers", {}):
                raise ContractError(f"{path}: there is no layers/counts, and this model needs counts")
            layers["counts"] = _csr(read_elem(file["layers/counts"]))
        obs = _labels(read_elem(file["obs"]), path)
        return ad.AnnData(_csr(read_elem(file["X"])), obs=obs, var=read_elem(file["var"])[[]], layers=layers)


def read_means(path: Path) -> ad.AnnData:
    """Compute the mean profile of every (covariate, condition, split) of an h5ad of cells, control included.

    X: float64, mean log1p(CP10k) over all cells of the row; obs `covariate`, `condition`, `split` (str) and
    `n_cells`; rows sorted by these names. Cells are summed by one sparse product per block of cells, so that the
    file may be far larger than memory. Raises ContractError if a column is missing.
    """
    cells = ad.read_h5ad(path, backed="r")
    try:
        names = ["covariate", "condition", "split"]
        groups = _labels(cells.obs, path).groupby(names, sort=True)
        obs = groups.size().rename("n_cells").reset_index()
        row_of = groups.ngroup().to_numpy()
        sums = np.zeros((len(obs), cells.n_vars))
        for start in range(0, cells.n_obs, BLOCK_OF_CELLS):
            block = _csr(cells.X[start : start + BLOCK_OF_CELLS])
            rows = row_of[start : start + BLOCK_OF_CELLS]
            member = sparse.csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))), (len(sums), len(rows)))
            sums += (member @ block).toarray()
        var = pd.DataFrame(index=cells.var_names)
    finally:
        cells.file.close()
    obs.index = pd.Index(obs[names].agg("|".join, axis=1))
    return ad.AnnData(sums / obs["n_cells"].to_numpy()[:, None], obs=obs, var=var)


def read_embedding(path: Path | None, dimensions: int | None = None) -> pd.DataFrame:
    """Read the embedding as a table genes x dimensions, float64.

    dimensions: how many there must be (those that the model was trained with), or None for any.
    A row of zeros says nothing about its gene: the gene counts as one without an embedding and is left out.
    Raises ContractError if there is no embedding, its dimensions are others, a gene occurs twice, or a value is
    not finite.
    """
    table = _read_table(path)
    if dimensions not in (None, table.shape[1]):
        raise ContractError(f"{path}: {table.shape[1]} dimensions; the model was trained with {dimensions}")
    return _checked(table, path)


def _read_table(path: Path | None) -> pd.DataFrame:
    if path is None:
        raise ContractError("embedding: this model needs one, and the spec names none")
    table: pd.DataFrame = pd.read_parquet(path).astype(np.float64).rename(index=str)
    return table


def _checked(table: pd.DataFrame, path: Path | None) -> pd.DataFrame:
    """Drop the rows of zeros; raise ContractError where a gene occurs twice or a value is not finite."""
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise ContractError(f"{path}: gene {twice} occurs more than once")
    finite = np.isfinite(table.to_numpy()).all(axis=1)
    if not finite.all():
        raise ContractError(f"{path}: gene {table.index[~finite][0]} has a value that is not finite")
    return table.loc[(table.to_numpy() != 0).any(axis=1)]


def read_sources(path: Path | None) -> dict[str, pd.DataFrame]:
    """Source -> its embedding, as `read_embedding` gives one: for a model that takes several.

    In the file the columns are `<source>/<dimension>`, with NaN where a source lacks the gene: its table has no such
    row. A plain embedding is one source, "embedding". Raises ContractError as `read_embedding` does.
    """
    table = _read_table(path)
    sources = [column.rpartition("/")[0] for column in table.columns]
    if not all(sources):
        return {"embedding": _checked(table, path)}
    found = {}
    for source in dict.fromkeys(sources):
        own = table.loc[:, [source == other for other in sources]]
        found[source] = _checked(own[own.notna().any(axis=1)], path)
    return found


def read_graph(path: Path | None) -> pd.DataFrame:
    """Read a graph between genes.

    Columns `gene`, `neighbour` (str) and `weight` (float64, 0 < weight <= 1), sorted by gene, falling weight,
    neighbour. A gene without a row is not in the graph. Raises ContractError for any other file.
    """
    if path is None:
        raise ContractError("embedding: this model needs a graph between genes, and the spec names none")
    table = pd.read_parquet(path)
    if list(table.columns) != ["gene", "neighbour", "weight"]:
        raise ContractError(f"{path}: columns {', '.join(map(str, table.columns))}; wanted gene, neighbour, weight")
    table = table.astype({"gene": str, "neighbour": str, "weight": np.float64})
    if not ((table["weight"] > 0) & (table["weight"] <= 1)).all():
        raise ContractError(f"{path}: a weight that is not above 0 and at most 1")
    return table.sort_values(["gene", "weight", "neighbour"], ascending=[True, False, True], ignore_index=True)


def unit_norm(embedding: pd.DataFrame) -> pd.DataFrame:
    """Each gene's embedding divided by its Euclidean length; a row of zeros stays one."""
    length = np.linalg.norm(embedding.to_numpy(), axis=1)
    return embedding.div(np.where(length > 0, length, 1.0), axis=0)


def standardise_embedding(embedding: pd.DataFrame) -> pd.DataFrame:
    """Each dimension centred and divided by its standard deviation over all genes, then `unit_norm`.

    Sources differ in scale and offset by orders of magnitude, and a longer row than any in training would be
    extrapolated. A dimension that is the same for all genes becomes zero.
    """
    spread = embedding.std(ddof=0)
    # A constant's spread is what rounding leaves of it.
    varies = spread > 1e-12 * embedding.abs().max()
    return unit_norm((embedding - embedding.mean()) / spread.where(varies, float("inf")))


def scale_embedding(embedding: pd.DataFrame) -> pd.DataFrame:
    """Standardise, with rows of the length sqrt(dimensions): a value is about 1 in size, whatever the source."""
    return standardise_embedding(embedding) * embedding.shape[1] ** 0.5


def sum_embeddings(conditions: Sequence[str], embedding: pd.DataFrame) -> np.ndarray:
    """Sum the embeddings of each condition's genes: conditions x dimensions, float64; zeros for control."""
    rows = np.zeros((len(conditions), embedding.shape[1]))
    for row, condition in enumerate(conditions):
        rows[row] = embedding.loc[list(genes_of(condition))].to_numpy().sum(axis=0)
    return rows


# ---- conditions


def genes_of(condition: str) -> tuple[str, ...]:
    """List the perturbed genes of a condition: `A+B` -> ("A", "B"), `control` -> ()."""
    return () if condition == CONTROL else tuple(condition.split("+"))


def genes_in(keys: Iterable[Key]) -> list[str]:
    """List the perturbed genes of some conditions, sorted."""
    return sorted({gene for key in keys for gene in genes_of(key.condition)})


def mark_genes(conditions: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Mark the genes that each condition perturbs: conditions x names, bool."""
    column = {gene: index for index, gene in enumerate(names)}
    marks = np.zeros((len(conditions), len(names)), dtype=bool)
    for row, condition in enumerate(conditions):
        marks[row, [column[gene] for gene in genes_of(condition) if gene in column]] = True
    return marks


def keys_of(obs: pd.DataFrame) -> list[Key]:
    """List the key of each row."""
    return list(map(Key, obs["covariate"], obs["condition"]))


def rows_among(keys: Iterable[Key], obs: pd.DataFrame) -> np.ndarray:
    """Find the row of each cell's key in `keys`, -1 where it is not among them."""
    row_of = {key: row for row, key in enumerate(keys)}
    return np.array([row_of.get(key, -1) for key in keys_of(obs)])


def number_conditions(obs: pd.DataFrame, kept: np.ndarray) -> tuple[list[Key], np.ndarray]:
    """List the distinct keys of the kept cells, sorted, and find the row of each cell's key (`rows_among`)."""
    keys = sorted(set(keys_of(obs[kept])))
    return keys, rows_among(keys, obs)


def is_embedded(condition: str, embedding: pd.DataFrame) -> bool:
    """Whether a condition is a perturbation each of whose genes has an embedding (control is none)."""
    genes = genes_of(condition)
    return bool(genes) and all(gene in embedding.index for gene in genes)


def perturb_known(conditions: pd.Series, genes: Iterable[str]) -> np.ndarray:
    """Whether each condition is a perturbation all of whose genes are among these (control is none): bool."""
    known = set(genes)
    found = [name for name in set(conditions) - {CONTROL} if known.issuperset(genes_of(name))]
    are_known: np.ndarray = conditions.isin(found).to_numpy()
    return are_known


def learnable(obs: pd.DataFrame, embedding: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Which cells a model of embeddings can learn from (bool, one for each row of `obs`), and their covariates, sorted.

    Train cells of control and of conditions with embeddings, val cells of the latter; only of covariates with such a
    train perturbation. Raises ContractError if there is none.
    """
    is_known = perturb_known(obs["condition"], embedding.index)
    is_train = (obs["split"] == "train").to_numpy()
    covariates = sorted(set(obs["covariate"][is_known & is_train]))
    if not covariates:
        raise ContractError("cells: no train perturbation has an embedding")
    is_control = (obs["condition"] == CONTROL).to_numpy()
    return (is_known | (is_control & is_train)) & obs["covariate"].isin(covariates).to_numpy(), covariates


def select_cells(cells: ad.AnnData, embedding: pd.DataFrame) -> tuple[np.ndarray, Shape]:
    """Which cells a model of one embedding can learn from, as `learnable` says, and what its size hangs on."""
    kept, covariates = learnable(cells.obs, embedding)
    return kept, Shape(embedding.shape[1], cells.var_names.tolist(), covariates)


def require_controls(obs: pd.DataFrame, covariates: Iterable[str]) -> None:
    """Raise ContractError where one of these covariates has no control cell in the train split."""
    of_control = obs["covariate"][(obs["condition"] == CONTROL) & (obs["split"] == "train")]
    without = sorted(set(covariates) - set(of_control))
    if without:
        raise ContractError(f"cells: covariate {without[0]} has no control cell in the train split")


def dataset_means(means: ad.AnnData) -> pd.DataFrame:
    """Each covariate's dataset_mean: covariate x genes (log1p), from what `read_means` returns.

    The mean over the perturbations of the train split of their mean profiles; each weighs the same, and control
    is none of them (docs/science.md section 3). A covariate without a train perturbation has no row.
    """
    train = means[(means.obs["split"] == "train") & (means.obs["condition"] != CONTROL)]
    profiles: pd.DataFrame = train.to_df()
    return profiles.groupby(train.obs["covariate"].to_numpy(), sort=True).mean()


def unpredictable(keys: Iterable[Key], embedding: pd.DataFrame, covariates: Iterable[str]) -> dict[Key, str]:
    """List the keys that a model of embeddings cannot predict, each with its reason.

    embedding:  what `read_embedding` returned; every gene of a condition must be in it.
    covariates: those that the model learned.
    """
    known = {"no embedding for": embedding.index}
    return find_gaps(keys, known, covariates, "has no training perturbation with an embedding")


def split_keys(
    task: PredictTask, embedding: pd.DataFrame, covariates: Iterable[str]
) -> tuple[list[Key], dict[Key, str]]:
    """List the asked keys that a model of embeddings can predict, sorted, and the others (`unpredictable`)."""
    reasons = unpredictable(task.conditions, embedding, covariates)
    return sorted(set(task.conditions) - set(reasons)), reasons


def find_gaps(
    keys: Iterable[Key], known: Mapping[str, Container[str]], covariates: Iterable[str], lack: str
) -> dict[Key, str]:
    """List the keys that a model cannot predict, each with the first reason that applies.

    known:      from how a reason begins, before the genes that it names, to the genes of which it does not hold.
    covariates: those that the model learned. lack: what is said of another.
    """
    learned = set(covariates)
    reasons: dict[Key, str] = {}
    for key in keys:
        for reason, genes in known.items():
            missing = [gene for gene in genes_of(key.condition) if gene not in genes]
            if missing:
                reasons.setdefault(key, f"{reason} {', '.join(missing)}")
        if key.covariate not in learned:
            reasons.setdefault(key, f"covariate {key.covariate} {lack}")
    return reasons


# ---- writing


def predict_differences(
    task: PredictTask,
    model: Mapping[str, np.ndarray],
    embedding: pd.DataFrame,
    covariates: Iterable[str],
    difference_of: Callable[[int, list[str]], np.ndarray],
) -> None:
    """Predict dataset_mean plus a difference for each condition with embeddings, and write it.

    model:         `genes`, `covariates` and their `dataset_means`.
    covariates:    those with a training perturbation that has an embedding.
    difference_of: from a covariate's row in `model`, and conditions, to their differences, conditions x genes.
    """
    reasons = unpredictable(task.conditions, embedding, covariates)
    keys = [key for key in task.conditions if key not in reasons]
    profiles = np.empty((len(keys), len(model["genes"])))
    for row, covariate in enumerate(model["covariates"]):
        asked = [index for index, key in enumerate(keys) if key.covariate == covariate]
        if asked:
            differences = difference_of(row, [keys[index].condition for index in asked])
            profiles[asked] = model["dataset_means"][row] + differences
    write_predictions(task, keys, profiles, model["genes"], reasons)


def write_predictions(
    task: PredictTask,
    keys: Sequence[Key],
    profiles: np.ndarray,
    genes: Iterable[str],
    unpredicted: Mapping[Key, str],
) -> None:
    """Write predictions.h5ad and unpredicted.json into the task's output.

    keys:        the predicted (covariate, condition)s, in the order of `profiles`; they are written sorted.
    profiles:    len(keys) x genes, predicted mean log1p(CP10k); written as float64.
    unpredicted: the reason of every asked key that is not predicted.
    Raises ContractError unless every asked key is answered exactly once and every number is finite.
    """
    var = pd.DataFrame(index=pd.Index([str(gene) for gene in genes], dtype=object))
    values = np.asarray(profiles, dtype=np.float64)
    if values.shape != (len(keys), len(var)):
        raise ContractError(f"predictions: {values.shape} values for {len(keys)} keys x {len(var)} genes")
    answered = [*keys, *unpredicted]
    if len(set(answered)) != len(answered) or set(answered) != set(task.conditions):
        raise ContractError("predictions: predict each asked condition or give its reason, exactly once")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ContractError(f"predictions: {keys[row].condition}, gene {var.index[column]}: {values[row, column]}")
    order = sorted(range(len(keys)), key=lambda row: keys[row])
    obs = pd.DataFrame([keys[row] for row in order], columns=list(Key._fields), dtype=object)
    obs.index = pd.Index(["|".join(keys[row]) for row in order], dtype=object)
    ad.AnnData(values[order], obs=obs, var=var).write_h5ad(task.output / "predictions.h5ad")
    reasons = [{**key._asdict(), "reason": unpredicted[key]} for key in sorted(unpredicted)]
    write_json(task.output / "unpredicted.json", reasons)


def write_embedding(task: EmbedTask, embedding: pd.DataFrame) -> None:
    """Write embedding.parquet into the task's output.

    embedding: genes (index, their symbols) x dimensions; written sorted by gene, as float64 d0, d1, ...
    Raises ContractError where a gene occurs twice or has a value that is not finite, or only zeros: a gene of which
    nothing is known is left out.
    """
    table = embedding.astype(np.float64).rename(index=str).sort_index().rename_axis("gene")
    path = task.output / "embedding.parquet"
    known = _checked(table, path)
    if len(known) < len(table):
        raise ContractError(f"{path}: gene {table.index.difference(known.index)[0]} has only zeros")
    table.set_axis([f"d{column}" for column in range(table.shape[1])], axis=1).to_parquet(path)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file: indented, keys in the order given, a newline at its end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ContractError for any other."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ContractError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ContractError(f"{path}: wanted an object, found {value!r:.200}")
    return value


def write_model(task: TrainTask, settings: Any, shape: Any) -> None:
    """Write model.json: the settings and the shape of a model, both dataclasses."""
    write_json(task.output / MODEL, {"settings": asdict(settings), "shape": asdict(shape)})


def read_model(task: PredictTask, settings: type[Settings], shape: type[ShapeOf]) -> tuple[Settings, ShapeOf]:
    """Read what `write_model` wrote."""
    stored = read_object(task.model / MODEL)
    return settings(**stored["settings"]), shape(**stored["shape"])


# ---- the spec: the check of each field of each stage says what was wanted if it fails


def _existing(value: object) -> Path:
    if isinstance(value, str) and value and Path(value).exists():
        return Path(value)
    raise ValueError("the path of something that exists")


def _folder(value: object) -> Path:
    if isinstance(value, str) and value:
        Path(value).mkdir(parents=True, exist_ok=True)
        return Path(value)
    raise ValueError("the path of a folder")


def _object(value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError("an object")


def _whole(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("a whole number, not negative")


def _threads(value: object) -> int:
    if value == 0:
        raise ValueError("at least one thread")
    return _whole(value)


def _key(value: object) -> Key:
    if isinstance(value, dict) and set(value) == set(Key._fields):
        key = Key(**value)
        if all(isinstance(name, str) and name for name in key) and key.condition != CONTROL:
            return key
    raise ValueError("objects {covariate, condition}, none of them control")


def _keys(value: object) -> tuple[Key, ...]:
    if not isinstance(value, list):
        raise ValueError("a list")
    keys = tuple(_key(row) for row in value)
    if len(set(keys)) != len(keys):
        raise ValueError("each (covariate, condition) once")
    return keys


_TASKS: dict[str, type] = {"describe": DescribeTask, "train": TrainTask, "predict": PredictTask, "embed": EmbedTask}
# A stage has the fields of its task; one may be null where its type says so.
_CHECKS: dict[str, Callable[[object], object]] = {
    "cells": _existing,
    "model": _existing,
    "control": _existing,
    "conditions": _keys,
    "embedding": _existing,
    "pretrained": _existing,
    "hyperparameters": _object,
    "settings": _object,
    "seed": _whole,
    "threads": _threads,
    "output": _folder,
    "checkpoint": _folder,
}
_DEFAULTS: dict[str, object] = {"embedding": None, "hyperparameters": {}, "settings": {}, "threads": 1}


def _read_spec(stage: str, path: Path) -> dict[str, Any]:
    given, types = read_object(path), get_type_hints(_TASKS[stage])
    known = [field for field in _CHECKS if field in types]
    for field in given:
        if field not in known:
            raise ContractError(f"{path}: {field}: unknown; {stage} has {', '.join(known)}")
    values = {}
    for field in known:
        value = given.get(field, _DEFAULTS.get(field))
        may_be_null = NoneType in get_args(types[field])
        try:
            values[field] = None if value is None and may_be_null else _CHECKS[field](value)
        except ValueError as wanted:
            raise ContractError(f"{path}: {field}: wanted {wanted}; found {value!r:.200}") from None
    return values


def _use_threads(threads: int) -> None:
    """Hand the number of threads to every BLAS that is not loaded yet."""
    wanted = dict.fromkeys(THREAD_VARIABLES, str(threads))
    if "numpy" in sys.modules and any(os.environ.get(name) != value for name, value in wanted.items()):
        log(
            f"numpy was loaded before its number of threads could be set to {threads}: the environment's number applies"
        )
    os.environ.update(wanted)


def _same_type(value: object, default: object) -> bool:
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list) and all(_same_type(each, default[0]) for each in value)
    return type(value) is type(default)


def _say(event: dict[str, object]) -> None:
    print(json.dumps(event), flush=True)


def _csr(matrix: Any) -> sparse.csr_matrix:
    return sparse.csr_matrix(matrix, dtype=np.float32)


def _labels(obs: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Read obs `covariate`, `condition`, `split` as str; the three columns must exist."""
    names = ["covariate", "condition", "split"]
    missing = [name for name in names if name not in obs]
    if missing:
        raise ContractError(f"{path}: obs has no column {', '.join(missing)}")
    return obs[names].astype(str)
