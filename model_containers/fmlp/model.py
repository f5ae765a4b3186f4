"""fMLP: a multilayer perceptron from gene embeddings to expression (docs/catalog.md section 3).

embedding -> 512 -> 512 -> a latent of 128 for each gene; the latents of a condition's genes are summed, and with
more than one covariate a learned latent of the covariate is added; latent -> 512 -> 512 -> genes. The loss is the
mean squared error against the log1p expression of single cells. README.md says why embeddings are standardised and
what control cells are to the network.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import contract
import neural

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    """Cells of one split.

    condition: the row of each cell's condition in Conditions.
    rows:      from numbers of cells to their expression, dense, on the device.
    """

    condition: np.ndarray
    rows: Callable[[np.ndarray], torch.Tensor]


def train(task: contract.TrainTask) -> None:
    """Train on the train cells and keep the weights of the least validation loss: weights.pt and model.json.

    Without a val condition that has an embedding, the last weights are kept.
    """
    import numpy as np

    torch, device = neural.start_torch(task.threads)
    settings = contract.hyperparameters(task, Settings)
    embedding = contract.standardised(contract.read_embedding(task.embedding))
    cells = contract.read_cells(task.cells)
    kept, shape = usable(cells, embedding)
    keys = list(map(contract.Key, cells.obs["covariate"], cells.obs["condition"]))
    row_of = {key: row for row, key in enumerate(sorted({key for key, keep in zip(keys, kept, strict=True) if keep}))}
    condition = np.array([row_of.get(key, -1) for key in keys])
    conditions = conditions_of(list(row_of), embedding, shape, device)
    is_train = kept & (cells.obs["split"] == "train").to_numpy()
    is_val = kept & ~is_train
    rows = neural.held(cells.X, device)
    train_cells = Cells(condition[is_train], neural.among(rows, np.flatnonzero(is_train)))
    val_cells = Cells(condition[is_val], neural.among(rows, np.flatnonzero(is_val)))
    del cells

    torch.manual_seed(task.seed)  # the initial weights, drawn on the CPU: the same for every device
    net = network(shape, settings).to(device)
    adam, best = neural.Adam(list(net.parameters())), neural.Best(net)
    for epoch in neural.epochs(task, settings.epochs, {"net": net, "adam": adam, "best": best}):
        rate = settings.learning_rate * settings.decay ** ((epoch - 1) // settings.decay_every)
        total = torch.zeros((), dtype=torch.float64, device=device)
        order = neural.generator(task.seed, epoch).permutation(len(train_cells.condition))
        for batch in neural.batches(order, settings.batch_size):
            loss = squared_error(net, conditions, train_cells, batch)
            adam.step(loss, rate)
            total += loss.detach() * len(batch)
        contract.metric("train_loss", epoch, float(total) / len(train_cells.condition))
        if len(val_cells.condition) and epoch % settings.validate_every == 0:
            val_loss = mean_error(net, conditions, val_cells, settings.batch_size)
            contract.metric("val_loss", epoch, val_loss)
            best.offer(val_loss)
    torch.save(best.weights, task.output / "weights.pt")
    contract.write_json(task.output / "model.json", {"settings": asdict(settings), "shape": asdict(shape)})


def predict(task: contract.PredictTask) -> None:
    """Predict every condition whose genes have an embedding, in the covariates of the train cells."""
    import numpy as np

    torch, device = neural.start_torch(task.threads)
    stored = json.loads((task.model / "model.json").read_text(encoding="utf-8"))
    settings, shape = Settings(**stored["settings"]), Shape(**stored["shape"])
    embedding = contract.standardised(contract.read_embedding(task.embedding, shape.dimensions))
    net = network(shape, settings)
    net.load_state_dict(torch.load(task.model / "weights.pt", weights_only=True))
    net.to(device)
    reasons = contract.unpredictable(task.conditions, embedding, shape.covariates)
    keys = sorted(set(task.conditions) - set(reasons))
    profiles = np.empty((len(keys), len(shape.genes)))
    conditions = conditions_of(keys, embedding, shape, device)
    with torch.no_grad():
        for rows in neural.batches(np.arange(len(keys)), settings.batch_size):
            profiles[rows] = forward(net, conditions, rows).cpu().numpy()
    contract.write_predictions(task, keys, profiles, shape.genes, reasons)


def usable(cells: ad.AnnData, embedding: pd.DataFrame) -> tuple[np.ndarray, Shape]:
    """Which cells to learn from (`contract.learnable`).

    Control is the condition without a gene, whose latent, the sum of none, is zero.
    """
    kept, covariates = contract.learnable(cells.obs, embedding)
    return kept, Shape(embedding.shape[1], cells.var_names.tolist(), covariates)


def network(shape: Shape, settings: Settings) -> torch.nn.ModuleDict:
    """Build the network.

    encoder: a gene's embedding -> its latent; covariate: a latent each; decoder: summed latents -> expression.
    """
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


def conditions_of(keys: Sequence[contract.Key], embedding: pd.DataFrame, shape: Shape, device: Any) -> Conditions:
    """Encode the distinct keys as the network takes them."""
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
    expression: torch.Tensor = net["decoder"](latent)
    return expression


def squared_error(net: torch.nn.ModuleDict, conditions: Conditions, cells: Cells, batch: np.ndarray) -> torch.Tensor:
    """Compute the loss: mean over the cells of a batch and all genes of (predicted - measured)^2, a float64 scalar.

    All n cells of a condition share one prediction p. Their sum of squared errors is n (p - mean)^2, which p moves,
    plus their spread about their own mean, which it does not: one forward pass for each condition in the batch gives
    the loss and the gradient of one for each cell.
    """
    import numpy as np
    import torch

    rows, of_cell = np.unique(cells.condition[batch], return_inverse=True)
    predicted = forward(net, conditions, rows)
    member = torch.from_numpy((np.arange(len(rows))[:, None] == of_cell).astype(np.float32)).to(predicted.device)
    n_cells = member.sum(dim=1, keepdim=True)
    measured = cells.rows(batch)
    means = (member @ measured) / n_cells
    spread = measured.square().sum(dtype=torch.float64) - (n_cells * means.square()).sum(dtype=torch.float64)
    moved = (n_cells * (predicted - means).square()).sum(dtype=torch.float64)
    return (moved + spread) / (len(batch) * predicted.shape[1])


def mean_error(net: torch.nn.ModuleDict, conditions: Conditions, cells: Cells, batch_size: int) -> float:
    """`squared_error` over all cells, without a gradient."""
    import numpy as np
    import torch

    n_cells = len(cells.condition)
    with torch.no_grad():
        of_batch = [
            float(squared_error(net, conditions, cells, batch)) * len(batch)
            for batch in neural.batches(np.arange(n_cells), batch_size)
        ]
    return sum(of_batch) / n_cells


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
