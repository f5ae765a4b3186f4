"""fMLP: a multilayer perceptron from gene embeddings to expression (docs/catalog.md section 3).

embedding -> 512 -> 512 -> a latent of 128 for each gene; the latents of a condition's genes are summed, and with
more than one covariate a learned latent of the covariate is added; latent -> 512 -> 512 -> genes. The loss is the
mean squared error against the log1p expression of single cells. README.md says why embeddings are standardised and
what control cells are to the network.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import contract

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad
    import numpy as np
    import pandas as pd
    import torch

DESCRIPTION = contract.Description(
    name="fmlp", combinations=True, embedding=True, counts=False, gpu=True, input="cells"
)


@dataclass(frozen=True)
class Settings:
    """The reference study's hyperparameters.

    hidden and latent widths; negative_slope of the leaky ReLU; epochs; batch_size (cells); learning_rate of Adam,
    multiplied by decay every decay_every epochs; a validation every validate_every epochs.
    """

    hidden: int = 512
    latent: int = 128
    negative_slope: float = 0.2
    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 1e-3
    decay: float = 0.2
    decay_every: int = 30
    validate_every: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name}: wanted a number above 0")


@dataclass(frozen=True)
class Shape:
    """What else the network's size hangs on; stored with the settings in model.json.

    dimensions of the embedding, names of the measured genes, names of the covariates of the train cells.
    """

    dimensions: int
    genes: list[str]
    covariates: list[str]


class Conditions(NamedTuple):
    """Distinct (covariate, condition)s as the network takes them.

    genes:      conditions x genes, 1 where the gene is perturbed.
    embedding:  genes x dimensions, on the device.
    covariates: the row of each condition's covariate in Shape.covariates.
    """

    genes: np.ndarray
    embedding: torch.Tensor
    covariates: np.ndarray


class Cells(NamedTuple):
    """Cells in compressed rows: cell i has the entries start[i] to start[i + 1] of gene and value.

    condition: the row of each cell's condition in Conditions. gene and value lie on the device, the rest does not.
    """

    condition: np.ndarray
    start: np.ndarray
    gene: torch.Tensor
    value: torch.Tensor


def train(task: contract.TrainTask) -> None:
    """Train on the train cells and keep the weights of the least validation loss: weights.pt and model.json.

    Without a val condition that has an embedding, the last weights are kept.
    """
    import numpy as np

    torch, device = start_torch(task.threads)
    settings = contract.hyperparameters(task, Settings)
    embedding = standardised(contract.read_embedding(task.embedding))
    cells = contract.read_cells(task.cells)
    kept, shape = usable(cells, embedding)
    keys = list(map(contract.Key, cells.obs["covariate"], cells.obs["condition"]))
    row_of = {key: row for row, key in enumerate(sorted({key for key, keep in zip(keys, kept, strict=True) if keep}))}
    condition = np.array([row_of.get(key, -1) for key in keys])
    conditions = tensors(list(row_of), embedding, shape, device)
    is_train = kept & (cells.obs["split"] == "train").to_numpy()
    is_val = kept & ~is_train
    train_cells = compressed(cells.X[is_train], condition[is_train], device)
    val_cells = compressed(cells.X[is_val], condition[is_val], device)
    del cells

    torch.manual_seed(task.seed)  # the initial weights, drawn on the CPU: the same for every device
    order = np.random.default_rng(task.seed)
    net = network(shape, settings).to(device)
    adam = torch.optim.Adam(net.parameters(), lr=settings.learning_rate, fused=True)
    decay = torch.optim.lr_scheduler.StepLR(adam, settings.decay_every, settings.decay)
    best, least = None, float("inf")
    for epoch in range(1, settings.epochs + 1):
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches(order.permutation(len(train_cells.condition)), settings.batch_size):
            loss = squared_error(net, conditions, train_cells, batch)
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += loss.detach() * len(batch)
        decay.step()
        contract.metric("train_loss", epoch, float(total) / len(train_cells.condition))
        if len(val_cells.condition) and epoch % settings.validate_every == 0:
            val_loss = mean_error(net, conditions, val_cells, settings.batch_size)
            contract.metric("val_loss", epoch, val_loss)
            if val_loss < least:
                best, least = copy_of(net), val_loss
        contract.progress(epoch, settings.epochs, "epoch")
    torch.save(best or copy_of(net), task.output / "weights.pt")
    contract.write_json(task.output / "model.json", {"settings": asdict(settings), "shape": asdict(shape)})


def predict(task: contract.PredictTask) -> None:
    """Predict every condition whose genes have an embedding, in the covariates of the train cells."""
    import numpy as np

    torch, device = start_torch(task.threads)
    stored = json.loads((task.model / "model.json").read_text(encoding="utf-8"))
    settings, shape = Settings(**stored["settings"]), Shape(**stored["shape"])
    embedding = standardised(contract.read_embedding(task.embedding, shape.dimensions))
    net = network(shape, settings)
    net.load_state_dict(torch.load(task.model / "weights.pt", weights_only=True))
    net.to(device)
    reasons = contract.unpredictable(task.conditions, embedding, shape.covariates)
    keys = sorted(set(task.conditions) - set(reasons))
    profiles = np.empty((len(keys), len(shape.genes)))
    conditions = tensors(keys, embedding, shape, device)
    with torch.no_grad():
        for rows in batches(np.arange(len(keys)), settings.batch_size):
            profiles[rows] = forward(net, conditions, rows).cpu().numpy()
    contract.write_predictions(task, keys, profiles, shape.genes, reasons)


def start_torch(threads: int) -> tuple[Any, Any]:
    """torch, set to as many threads and to repeat its bits, and the device: a GPU where there is one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not repeat its bits
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # Adam's vanishing moments would slow it down
    if not torch.cuda.is_available():
        # All that is used here repeats its bits on a CPU; to demand it would import the compiler, for seconds.
        return torch, torch.device("cpu")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # torch's own debugging aid
    return torch, torch.device("cuda")


def standardised(embedding: pd.DataFrame) -> pd.DataFrame:
    """Each dimension centred and divided by its standard deviation over all genes, then each gene's row by its length.

    Sources differ in scale and offset by orders of magnitude, and a longer row than any in training would be
    extrapolated (README.md).
    """
    spread = embedding.std(ddof=0)
    return contract.unit_norm((embedding - embedding.mean()) / spread.where(spread > 0, 1.0))


def usable(cells: ad.AnnData, embedding: pd.DataFrame) -> tuple[np.ndarray, Shape]:
    """Which cells to learn from: train cells of control and of conditions with embeddings, val cells of the latter.

    Control is the condition without a gene, whose latent, the sum of none, is zero. Only covariates with a train
    perturbation count. Raises ContractError if there is none.
    """
    conditions = cells.obs["condition"].astype("category")
    known = [name for name in conditions.cat.categories if contract.is_embedded(name, embedding)]
    is_known = conditions.isin(known).to_numpy()
    is_train = (cells.obs["split"] == "train").to_numpy()
    covariates = sorted(set(cells.obs["covariate"][is_known & is_train]))
    if not covariates:
        raise contract.ContractError("cells: no train perturbation has an embedding")
    is_control = (conditions == contract.CONTROL).to_numpy()
    kept = (is_known | (is_control & is_train)) & cells.obs["covariate"].isin(covariates).to_numpy()
    return kept, Shape(embedding.shape[1], cells.var_names.tolist(), covariates)


def network(shape: Shape, settings: Settings) -> torch.nn.ModuleDict:
    """encoder: a gene's embedding -> its latent; covariate: a latent each; decoder: summed latents -> expression."""
    from torch import nn

    def layers(*widths: int) -> nn.Sequential:
        steps: list[nn.Module] = []
        for before, after in pairwise(widths):
            steps += [nn.Linear(before, after), nn.LeakyReLU(settings.negative_slope)]
        return nn.Sequential(*steps[:-1])

    hidden, latent = settings.hidden, settings.latent
    net = nn.ModuleDict({"encoder": layers(shape.dimensions, hidden, hidden, latent)})
    if len(shape.covariates) > 1:
        net["covariate"] = nn.Embedding(len(shape.covariates), latent)
    net["decoder"] = layers(latent, hidden, hidden, len(shape.genes))
    return net


def tensors(keys: Sequence[contract.Key], embedding: pd.DataFrame, shape: Shape, device: Any) -> Conditions:
    """The distinct keys as the network takes them."""
    import numpy as np
    import torch

    names = sorted({gene for key in keys for gene in contract.genes_of(key.condition)})
    column = {gene: index for index, gene in enumerate(names)}
    genes = np.zeros((len(keys), len(names)), dtype=np.float32)
    for row, key in enumerate(keys):
        genes[row, [column[gene] for gene in contract.genes_of(key.condition)]] = 1
    rows = embedding.loc[names].to_numpy(np.float32)
    covariates = np.array([shape.covariates.index(key.covariate) for key in keys], dtype=np.int64)
    return Conditions(genes, torch.from_numpy(rows).to(device), covariates)


def forward(net: torch.nn.ModuleDict, conditions: Conditions, rows: np.ndarray) -> torch.Tensor:
    """Predicted expression of some conditions: rows x measured genes. Each of their genes is encoded once."""
    import torch

    device = conditions.embedding.device
    used = conditions.genes[rows].any(axis=0).nonzero()[0]
    member = torch.from_numpy(conditions.genes[rows][:, used]).to(device)
    latent = member @ net["encoder"](conditions.embedding[torch.from_numpy(used).to(device)])
    if "covariate" in net:
        latent = latent + net["covariate"](torch.from_numpy(conditions.covariates[rows]).to(device))
    return net["decoder"](latent)


def compressed(matrix: Any, condition: np.ndarray, device: Any) -> Cells:
    """Cells from a CSR matrix; its entries go to the device if they leave half of its free memory to the rest."""
    import numpy as np
    import torch

    gene, value = torch.from_numpy(matrix.indices), torch.from_numpy(matrix.data)
    if device.type == "cuda" and gene.nbytes + value.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        gene, value = gene.to(device), value.to(device)
    return Cells(condition, matrix.indptr.astype(np.int64), gene, value)


def squared_error(net: torch.nn.ModuleDict, conditions: Conditions, cells: Cells, batch: np.ndarray) -> torch.Tensor:
    """The loss: mean over the cells of a batch and all genes of (predicted - measured)^2, a float64 scalar.

    All cells of a condition share one prediction p, so their sum of squared errors is n (p - mean)^2, which p
    moves, plus their spread about their own mean, which it does not: one forward pass for each condition in the
    batch gives the loss and the gradient of one for each cell.
    """
    import numpy as np
    import torch

    rows, of_cell = np.unique(cells.condition[batch], return_inverse=True)
    predicted = forward(net, conditions, rows)
    sums, squares = condition_sums(cells, batch, of_cell, predicted)
    n_cells = torch.from_numpy(np.bincount(of_cell).astype(np.float32)).to(predicted.device)[:, None]
    means = sums / n_cells
    spread = squares - (sums * means).sum(dtype=torch.float64)
    moved = (n_cells * (predicted - means).square()).sum(dtype=torch.float64)
    return (moved + spread) / (len(batch) * predicted.shape[1])


def condition_sums(
    cells: Cells, batch: np.ndarray, of_cell: np.ndarray, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The expression summed over the batch's cells of each condition, shaped `like`, and the sum of all squares.

    of_cell: the row in `like` of each cell's condition.
    """
    import numpy as np
    import torch

    store, n_genes = cells.value.device, like.shape[1]
    length = cells.start[batch + 1] - cells.start[batch]
    n_entries = int(length.sum())
    skipped = cells.start[batch] - np.concatenate([[0], np.cumsum(length)[:-1]])
    each = torch.from_numpy(np.stack([skipped, of_cell * n_genes, length])).to(store)
    entry = torch.repeat_interleave(each[0], each[2], output_size=n_entries) + torch.arange(n_entries, device=store)
    base = torch.repeat_interleave(each[1], each[2], output_size=n_entries)
    value = cells.value.index_select(0, entry).to(like.device)
    position = (base + cells.gene.index_select(0, entry)).to(like.device)
    sums = torch.zeros(like.numel(), device=like.device).index_add_(0, position, value)
    return sums.view(like.shape), value.square().sum(dtype=torch.float64)


def mean_error(net: torch.nn.ModuleDict, conditions: Conditions, cells: Cells, batch_size: int) -> float:
    """`squared_error` over all cells, without a gradient."""
    import numpy as np
    import torch

    n_cells = len(cells.condition)
    with torch.no_grad():
        of_batch = [
            float(squared_error(net, conditions, cells, batch)) * len(batch)
            for batch in batches(np.arange(n_cells), batch_size)
        ]
    return sum(of_batch) / n_cells


def batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive pieces of `size` rows; the last may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def copy_of(net: torch.nn.ModuleDict) -> dict[str, torch.Tensor]:
    """The present weights, on the CPU."""
    return {name: weights.detach().cpu().clone() for name, weights in net.state_dict().items()}


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
