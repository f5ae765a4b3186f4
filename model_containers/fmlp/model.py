"""fMLP: a multilayer perceptron from gene embeddings to expression (docs/catalog.md section 3).

embedding -> 512 -> 512 -> a latent of 128 for each gene; the latents of a condition's genes are summed, and with
more than one covariate a learned latent of the covariate is added; latent -> 512 -> 512 -> genes. The loss is the
mean squared error against the log1p expression of single cells. README.md says why embeddings are standardised and
what control cells are to the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import contract
import neural

if not TYPE_CHECKING:
    np, torch = map(contract.LateModule, ("numpy", "torch"))
else:
    from collections.abc import Sequence

    import numpy as np
    import pandas as pd
    import torch


DESCRIPTION = contract.Description(name="fmlp", combinations=True, embedding=True, gpu=True, input="cells")


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
        contract.check_numbers(self)


class Conditions(NamedTuple):
    """Distinct (covariate, condition)s as the network takes them.

    genes:      conditions x genes, 1 where the gene is perturbed.
    embedding:  genes x dimensions, on the device.
    covariates: the number of each condition's covariate.
    """

    genes: np.ndarray
    embedding: torch.Tensor
    covariates: np.ndarray


def train(task: contract.TrainTask) -> None:
    """Train on the train cells and keep the weights of the least validation loss: weights.pt and model.json.

    Without a val condition that has an embedding, the last weights are kept.
    """
    _, device = neural.start_torch(task.threads)
    settings = contract.hyperparameters(task, Settings)
    embedding = contract.standardise_embedding(contract.read_embedding(task.embedding))
    cells = contract.read_cells(task.cells)
    kept, shape = contract.select_cells(cells, embedding)
    # Control is the condition without a gene, whose latent, the sum of none, is zero.
    keys, condition = contract.number_conditions(cells.obs, kept)
    conditions = conditions_of(keys, embedding, shape, device)
    is_train = (cells.obs["split"] == "train").to_numpy()
    train_rows, val_rows = np.flatnonzero(kept & is_train), np.flatnonzero(kept & ~is_train)
    rows = neural.hold_rows(cells.X, device)
    del cells

    torch.manual_seed(task.seed)  # the initial weights, drawn on the CPU: the same for every device
    net = network(shape, settings).to(device)

    def error(batch: np.ndarray, _: object = None) -> torch.Tensor:
        return squared_error(net, conditions, condition[batch], rows(batch))

    def val_loss() -> float:
        return neural.mean_loss(net, error, val_rows, settings.batch_size)

    neural.fit(task, net, settings, train_rows, val_rows, error, val_loss)
    contract.write_model(task, settings, shape)


def predict(task: contract.PredictTask) -> None:
    """Predict every condition whose genes have an embedding, in the covariates of the train cells."""
    _, device = neural.start_torch(task.threads)
    settings, shape = contract.read_model(task, Settings, contract.Shape)
    embedding = contract.standardise_embedding(contract.read_embedding(task.embedding, shape.dimensions))
    net = neural.load_weights(network(shape, settings), task, device)
    keys, reasons = contract.split_keys(task, embedding, shape.covariates)
    profiles = np.empty((len(keys), len(shape.genes)))
    conditions = conditions_of(keys, embedding, shape, device)
    with torch.no_grad():
        for rows in neural.batches(np.arange(len(keys)), settings.batch_size):
            profiles[rows] = forward(net, conditions, rows).cpu().numpy()
    contract.write_predictions(task, keys, profiles, shape.genes, reasons)


def network(shape: contract.Shape, settings: Settings) -> torch.nn.ModuleDict:
    """Build the network.

    encoder: a gene's embedding -> its latent; covariate: a latent each; decoder: summed latents -> expression.
    """
    from torch import nn

    hidden, latent, slope = settings.hidden, settings.latent, settings.negative_slope
    encoder = neural.perceptron(shape.dimensions, hidden, hidden, latent, negative_slope=slope)
    net = nn.ModuleDict({"encoder": encoder})
    if len(shape.covariates) > 1:
        net["covariate"] = nn.Embedding(len(shape.covariates), latent)
    net["decoder"] = neural.perceptron(latent, hidden, hidden, len(shape.genes), negative_slope=slope)
    return net


def conditions_of(
    keys: Sequence[contract.Key], embedding: pd.DataFrame, shape: contract.Shape, device: Any
) -> Conditions:
    """Encode the distinct keys as the network takes them."""
    names = contract.genes_in(keys)
    marks = contract.mark_genes([key.condition for key in keys], names)
    rows = embedding.loc[names].to_numpy(np.float32)
    covariates = np.array([shape.covariates.index(key.covariate) for key in keys], dtype=np.int64)
    return Conditions(marks.astype(np.float32), torch.from_numpy(rows).to(device), covariates)


def forward(net: torch.nn.ModuleDict, conditions: Conditions, rows: np.ndarray) -> torch.Tensor:
    """Predicted expression of some conditions: rows x measured genes. Each of their genes is encoded once."""
    latent = neural.sum_latents(
        net,
        conditions.genes[rows],
        conditions.covariates[rows],
        lambda genes: net["encoder"](conditions.embedding[genes]),
    )
    expression: torch.Tensor = net["decoder"](latent)
    return expression


def squared_error(
    net: torch.nn.ModuleDict, conditions: Conditions, condition: np.ndarray, measured: torch.Tensor
) -> torch.Tensor:
    """Compute the loss: mean over the cells of a batch and all genes of (predicted - measured)^2, a float64 scalar.

    condition: the row of each cell's in `conditions`. measured: its expression, cells x genes.
    All n cells of a condition share one prediction p. Their sum of squared errors is n (p - mean)^2, which p moves,
    plus their spread about their own mean, which it does not: one forward pass for each condition in the batch gives
    the loss and the gradient of one for each cell.
    """
    rows, of_cell = np.unique(condition, return_inverse=True)
    predicted = forward(net, conditions, rows)
    member = torch.from_numpy((np.arange(len(rows))[:, None] == of_cell).astype(np.float32)).to(predicted.device)
    n_cells = member.sum(dim=1, keepdim=True)
    means = (member @ measured) / n_cells
    spread = measured.square().sum(dtype=torch.float64) - (n_cells * means.square()).sum(dtype=torch.float64)
    moved = (n_cells * (predicted - means).square()).sum(dtype=torch.float64)
    return (moved + spread) / (len(condition) * predicted.shape[1])


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
