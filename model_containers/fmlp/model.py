"""fMLP: a multilayer perceptron from gene embeddings to expression (docs/catalog.md section 3).

embedding -> 512 -> 512 -> a latent of 128 for each gene; the latents of a condition's genes are summed, and with
more than one covariate a learned latent of the covariate is added; latent -> 512 -> 512 -> genes. The loss is the
mean squared error against the log1p expression of single perturbed cells. Control cells are left out: they have no
gene, hence nothing to encode.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import contract

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

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

    epochs, batch_size (cells), learning_rate (Adam; times step_decay every step_epochs), a validation every
    validate_every epochs, widths of the hidden layers and the latent, negative_slope of the leaky ReLU.
    """

    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 1e-3
    step_epochs: int = 30
    step_decay: float = 0.2
    validate_every: int = 10
    hidden: int = 512
    latent: int = 128
    negative_slope: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name}: wanted a number above 0")


class Conditions(NamedTuple):
    """Distinct (covariate, condition)s as the network takes them.

    genes:      conditions x genes, how often each gene is perturbed (0 or 1).
    embedding:  genes x dimensions.
    covariates: conditions, the row of each one's covariate.
    """

    genes: torch.Tensor
    embedding: torch.Tensor
    covariates: torch.Tensor


class Cells(NamedTuple):
    """Cells of one split in compressed rows, and the condition of each.

    start:     cells + 1, where each cell's entries begin (host memory).
    gene, value: the entries (on the device where they fit).
    condition: cells, the row of each one's condition in Conditions (host memory).
    """

    start: np.ndarray
    gene: torch.Tensor
    value: torch.Tensor
    condition: np.ndarray
    n_genes: int


def train(task: contract.TrainTask) -> None:
    """Train on the train cells, keep the weights of the least validation loss: weights.pt and model.json.

    Without val cells that have an embedding, the last weights are kept.
    """
    import numpy as np

    settings = contract.hyperparameters(task, Settings)
    embedding = contract.read_embedding(task.embedding)
    cells = contract.read_cells(task.cells)
    cells = cells[embedded_cells(cells, embedding)]
    keys = sorted({contract.Key(*pair) for pair in zip(cells.obs["covariate"], cells.obs["condition"], strict=True)})
    covariates = sorted({key.covariate for key in keys})
    shape = Shape(embedding.shape[1], cells.n_vars, covariates...)
