"""PRESAGE: from gene embeddings of several knowledge sources to log fold changes (Littman et al. 2025).

A gene's embedding in each source passes that source's own MLP into a latent space that all sources share; the gene's
latent is their mean under two sets of weights, one learned per source and one from graph attention; the latents of a
condition's genes are summed, with more than one covariate a learned latent of the covariate is added, and a linear head
gives the log fold change of the condition's mean profile against the covariate's control cells. README.md says what the
paper leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import contract
import neural

if not TYPE_CHECKING:
    np, pd, torch = map(contract.LateModule, ("numpy", "pandas", "torch"))
    functional = contract.LateModule("torch.nn.functional")
else:
    from collections.abc import Mapping, Sequence

    import anndata as ad
    import numpy as np
    import pandas as pd
    import torch
    from torch.nn import functional


DESCRIPTION = contract.Description(name="presage", combinations=True, embedding=True, gpu=True, input="means")
NEGATIVE_SLOPE = 0.2  # of every leaky ReLU


@dataclass(frozen=True)
class Settings:
    """The reference study's hyperparameters.

    item_hidden: width of the latent of a gene and of the item_layers hidden layers between it and the linear head;
    source_hidden: width of the source_layers hidden layers of a source's MLP; temperature of the softmax over the
    learned weights of the sources; attention: share (0 to 1) of graph attention in the pooling, the learned weights
    have the rest; learning_rate of Adam; batch_size (conditions); at most so many epochs, and fewer once the
    validation loss (1 - mean correlation) has not fallen for `patience` of them.
    """

    item_hidden: int = 512
    item_layers: int = 0
    source_hidden: int = 128
    source_layers: int = 2
    temperature: float = 0.15
    attention: float = 0.85
    learning_rate: float = 2.4e-3
    batch_size: int = 32
    epochs: int = 1000
    patience: int = 50

    def __post_init__(self) -> None:
        contract.check_numbers(self, others=("item_layers", "attention"))
        if self.item_layers < 0:
            raise ValueError("item_layers: wanted a number of layers, 0 for none")
        if not 0 <= self.attention <= 1:
            raise ValueError("attention: wanted a share from 0 to 1")


@dataclass(frozen=True)
class Shape:
    """What else the network's size hangs on; stored with the settings in model.json.

    sources: dimensions of each source; names of the measured genes; names of the covariates that are learned.
    """

    sources: dict[str, int]
    genes: list[str]
    covariates: list[str]


class Conditions(NamedTuple):
    """(covariate, condition)s as the network takes them.

    genes:      conditions x genes, 1 where the gene is perturbed.
    sources:    of each source genes x dimensions, on the device; a row of zeros where the source lacks the gene.
    is_lacking: sources x genes x 1, on the device: whether the source lacks the gene.
    covariates: the row of each condition's covariate in Shape.covariates.
    """

    genes: np.ndarray
    sources: list[torch.Tensor]
    is_lacking: torch.Tensor
    covariates: np.ndarray


def train(task: contract.TrainTask) -> None:
    """Train on the train perturbations and keep the weights of the least validation loss: weights.pt and model.json.

    The head begins as the mean of the train perturbations. Without a val condition that has an embedding, all epochs
    are trained and the last weights kept.
    """
    _, device = neural.start_torch(task.threads)
    if device.type == "cuda":
        # TF32. Half precision would cast every weight again in each step, of a few conditions only.
        torch.set_float32_matmul_precision("high")
    settings = contract.hyperparameters(task, Settings)
    sources = standardise_sources(contract.read_sources(task.embedding))
    changes, shape = usable(contract.read_means(task.cells), sources)
    conditions = conditions_of(contract.keys_of(changes.obs), sources, shape, device)
    measured = torch.from_numpy(changes.X.astype(np.float32)).to(device)
    is_train = (changes.obs["split"] == "train").to_numpy()
    train_rows, val_rows = is_train.nonzero()[0], (~is_train).nonzero()[0]

    torch.manual_seed(task.seed)  # the initial weights, drawn on the CPU: the same for every device
    net = network(shape, settings).to(device)
    head: Any = net["head"]
    head[-1].bias.data = measured[torch.from_numpy(train_rows).to(device)].mean(dim=0)

    def error(batch: np.ndarray, _: object) -> torch.Tensor:
        wanted = measured[torch.from_numpy(batch).to(device)]
        return (forward(net, settings, conditions, batch) - wanted).square().mean()

    def val_loss() -> float:
        with torch.no_grad():
            predicted = forward(net, settings, conditions, val_rows)
        return 1 - mean_correlation(predicted, measured[torch.from_numpy(val_rows).to(device)])

    neural.fit(task, net, settings, train_rows, val_rows, error, val_loss)
    contract.write_model(task, settings, shape)


def predict(task: contract.PredictTask) -> None:
    """Predict each condition whose genes have embeddings: the covariate's control mean plus its log fold change."""
    _, device = neural.start_torch(task.threads)
    settings, shape = contract.read_model(task, Settings, Shape)
    sources = standardise_sources(contract.read_sources(task.embedding))
    found = dimensions_of(sources)
    if found != shape.sources:
        raise contract.ContractError(
            f"{task.embedding}: sources and dimensions {found}; the model was trained with {shape.sources}"
        )
    net = neural.load_weights(network(shape, settings), task, device)
    keys, reasons = contract.split_keys(task, covered(sources), shape.covariates)
    conditions = conditions_of(keys, sources, shape, device)
    controls = control_means(contract.read_means(task.control))
    profiles = controls.loc[[key.covariate for key in keys], shape.genes].to_numpy()
    with torch.no_grad():
        for rows in neural.batches(np.arange(len(keys)), settings.batch_size):
            profiles[rows] += forward(net, settings, conditions, rows).cpu().numpy()
    contract.write_predictions(task, keys, profiles, shape.genes, reasons)


# ---- what is learned from


def standardise_sources(sources: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Each source standardised over its own genes (README.md), by name."""
    return {name: contract.standardise_embedding(table) for name, table in sorted(sources.items())}


def dimensions_of(sources: Mapping[str, pd.DataFrame]) -> dict[str, int]:
    """How many dimensions each source has."""
    return {name: table.shape[1] for name, table in sources.items()}


def covered(sources: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """List the genes that at least one source has, as the index of a table without columns."""
    return pd.DataFrame(index=pd.Index(sorted(set().union(*(table.index for table in sources.values())))))


def control_means(means: ad.AnnData) -> pd.DataFrame:
    """Covariates x genes: the mean profile of each covariate's control cells of the train split."""
    control = means[((means.obs["condition"] == contract.CONTROL) & (means.obs["split"] == "train")).to_numpy()]
    profiles: pd.DataFrame = control.to_df()
    return profiles.set_axis(control.obs["covariate"].to_numpy())


def usable(means: ad.AnnData, sources: Mapping[str, pd.DataFrame]) -> tuple[ad.AnnData, Shape]:
    """Compute the log fold changes of perturbations with embeddings.

    Mean log1p profile minus the covariate's control mean, in the covariates that have such a perturbation in the train
    split. Raises ContractError if there is none.
    """
    kept, covariates = contract.learnable(means.obs, covered(sources))
    changes = means[kept & (means.obs["condition"] != contract.CONTROL).to_numpy()].copy()
    changes.X -= control_means(means).loc[changes.obs["covariate"]].to_numpy()
    return changes, Shape(dimensions_of(sources), means.var_names.tolist(), covariates)


def conditions_of(
    keys: Sequence[contract.Key], sources: Mapping[str, pd.DataFrame], shape: Shape, device: Any
) -> Conditions:
    """Encode the keys as the network takes them."""
    names = contract.genes_in(keys)
    marks = contract.mark_genes([key.condition for key in keys], names)
    tables = [table.reindex(names).fillna(0.0).to_numpy(np.float32) for table in sources.values()]
    is_lacking = np.array([[name not in table.index for name in names] for table in sources.values()], dtype=bool)
    return Conditions(
        marks.astype(np.float32),
        [torch.from_numpy(table).to(device) for table in tables],
        torch.from_numpy(is_lacking.reshape(len(tables), len(names), 1)).to(device),
        np.array([shape.covariates.index(key.covariate) for key in keys], dtype=np.int64),
    )


# ---- the network


def network(shape: Shape, settings: Settings) -> torch.nn.ModuleDict:
    """Its weights, by part.

    first:     of each source a layer from its dimensions.
    later:     the further layers of all sources' MLPs, stacked: one product for all of them.
    pool:      a weight for each source.
    attention: from the pooled latent and from a source's latent to the score of the source.
    covariate: with several of them, a latent for each, 0 at first.
    head:      from summed latents to log fold changes.
    """
    from torch import nn

    def stacked(before: int, after: int) -> nn.ParameterList:
        shapes = [(len(shape.sources), before, after), (len(shape.sources), 1, after)]
        bound = before**-0.5  # as of a single layer
        return nn.ParameterList([nn.Parameter(torch.empty(size).uniform_(-bound, bound)) for size in shapes])

    item, hidden = settings.item_hidden, settings.source_hidden
    widths = [hidden] * settings.source_layers + [item]
    net = nn.ModuleDict(
        {
            "first": nn.ModuleList([nn.Linear(size, widths[0]) for size in shape.sources.values()]),
            "later": nn.ModuleList([stacked(*pair) for pair in pairwise(widths)]),
            "pool": nn.ParameterList([nn.Parameter(torch.zeros(len(shape.sources), 1, 1))]),
            "attention": nn.ModuleList([nn.Linear(item, hidden), nn.Linear(item, hidden), nn.Linear(hidden, 1)]),
        }
    )
    if len(shape.covariates) > 1:
        covariate = nn.Embedding(len(shape.covariates), item)
        nn.init.zeros_(covariate.weight)
        net["covariate"] = covariate
    head = [item] * (settings.item_layers + 1)
    net["head"] = neural.perceptron(*head, len(shape.genes), negative_slope=NEGATIVE_SLOPE)
    return net


def forward(net: torch.nn.ModuleDict, settings: Settings, conditions: Conditions, rows: np.ndarray) -> torch.Tensor:
    """Predicted log fold changes of some conditions: rows x measured genes. Each of their genes is encoded once."""

    def encode(genes: torch.Tensor) -> torch.Tensor:
        latents = aligned(net, [table[genes] for table in conditions.sources])
        return pool_sources(net, settings, latents, conditions.is_lacking[:, genes])

    latent = neural.sum_latents(net, conditions.genes[rows], conditions.covariates[rows], encode)
    changes: torch.Tensor = net["head"](latent)
    return changes


def aligned(net: torch.nn.ModuleDict, sources: list[torch.Tensor]) -> torch.Tensor:
    """Map each source's embeddings (genes x dimensions) by its MLP: sources x genes x latent."""
    parts: Any = net  # torch's types do not say what a ModuleDict holds
    latent = torch.stack([layer(table) for layer, table in zip(parts["first"], sources, strict=True)])
    for weight, bias in parts["later"]:
        latent = torch.baddbmm(bias, functional.leaky_relu(latent, NEGATIVE_SLOPE), weight)
    return latent


def pool_sources(
    net: torch.nn.ModuleDict, settings: Settings, latents: torch.Tensor, is_lacking: torch.Tensor
) -> torch.Tensor:
    """Genes x latent: the mean over the sources that a gene has, by learned weights and by graph attention.

    latents: sources x genes x latent; is_lacking: sources x genes x 1. The graph is a star: the gene, which is the
    mean by learned weights, among its sources; a source's score comes from both (Brody et al. 2022).
    """

    def mean(scores: torch.Tensor) -> torch.Tensor:
        return (scores.masked_fill(is_lacking, float("-inf")).softmax(dim=0) * latents).sum(dim=0)

    parts: Any = net  # torch's types do not say what a ModuleDict holds
    by_weight = mean(parts["pool"][0] / settings.temperature)
    of_gene, of_source, score = parts["attention"]
    scores = score(functional.leaky_relu(of_gene(by_weight) + of_source(latents), NEGATIVE_SLOPE))
    by_attention = mean(scores)
    return settings.attention * by_attention + (1 - settings.attention) * by_weight


def mean_correlation(predicted: torch.Tensor, measured: torch.Tensor) -> float:
    """Average the Pearson correlation over genes of the two (both conditions x genes); 0 for a constant row."""
    a, b = (values - values.mean(dim=1, keepdim=True) for values in (predicted, measured))
    return float(functional.cosine_similarity(a, b, dim=1).mean())


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
