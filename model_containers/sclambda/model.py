"""scLAMBDA (Wang et al. 2024): cells and perturbations disentangled in one latent space (docs/catalog.md section 3).

A cell's expression minus the control mean -> its latent z, a normal distribution; the embedding of its condition, the
sum over the perturbed genes -> a latent s; z + s, and with more than one covariate a learned latent of the covariate
-> the expression; s -> the embedding again. A critic estimates the mutual information of z and s, which the networks
are trained to be rid of: what the perturbation did to a cell has to be encoded by s. README.md says what the paper
leaves open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import contract
import neural

if not TYPE_CHECKING:
    np, pd, torch = map(contract.LateModule, ("numpy", "pandas", "torch"))
else:
    from collections.abc import Callable, Sequence

    import numpy as np
    import pandas as pd
    import torch
    from scipy.sparse import csr_matrix


DESCRIPTION = contract.Description(name="sclambda", combinations=True, embedding=True, gpu=True, input="cells")


@dataclass(frozen=True)
class Settings:
    """The reference study's hyperparameters.

    latent and hidden widths; negative_slope of the leaky ReLU; epochs; batch_size (cells); information_weight: of the
    mutual information in the loss (lambda_MI); adversarial_step: how far an embedding is moved against the networks,
    in each dimension of an embedding of length 1 (eps); learning_rate of Adam, multiplied by decay every decay_every
    epochs; critic_weight_decay; critic_steps for each step of the networks; a validation every validate_every epochs.
    """

    latent: int = 30
    hidden: int = 512
    negative_slope: float = 0.2
    epochs: int = 200
    batch_size: int = 500
    information_weight: float = 200.0
    adversarial_step: float = 1e-3
    learning_rate: float = 5e-4
    decay: float = 0.2
    decay_every: int = 30
    critic_weight_decay: float = 1e-4
    critic_steps: int = 5
    validate_every: int = 10

    def __post_init__(self) -> None:
        contract.check_numbers(self, or_zero=("information_weight", "adversarial_step", "critic_weight_decay"))


class Conditions(NamedTuple):
    """Distinct (covariate, condition)s as the networks take them, on the device.

    embedding:  conditions x dimensions, summed over the perturbed genes; zeros for control.
    covariates: the number of each condition's covariate.
    """

    embedding: torch.Tensor
    covariates: torch.Tensor


class Cells(NamedTuple):
    """Cells, of which none lies in two splits.

    condition: the row of each cell's condition in Conditions.
    covariate: the number of each cell's covariate.
    rows:      from numbers of cells to their log1p expression, dense, on the device.
    baseline:  covariates x genes on the device, the mean over control cells that is taken off.
    """

    condition: np.ndarray
    covariate: np.ndarray
    rows: Callable[[np.ndarray], torch.Tensor]
    baseline: torch.Tensor

    def shifts(self, batch: np.ndarray) -> torch.Tensor:
        """Expression of some cells minus their covariate's control mean: cells x genes."""
        return self.rows(batch) - self.baseline[torch.from_numpy(self.covariate[batch]).to(self.baseline.device)]


def train(task: contract.TrainTask) -> None:
    """Train on the train cells, keep the weights of the best validation correlation: weights.pt and model.json.

    Without a val condition that has an embedding, the last weights are kept.
    """
    _, device = neural.start_torch(task.threads)
    settings = contract.hyperparameters(task, Settings)
    embedding = contract.scale_embedding(contract.read_embedding(task.embedding))
    cells = contract.read_cells(task.cells)
    kept, shape = contract.select_cells(cells, embedding)
    contract.require_controls(cells.obs, shape.covariates)
    keys, condition = contract.number_conditions(cells.obs, kept)
    conditions = conditions_of(keys, embedding, shape, device)
    covariate = pd.Index(shape.covariates).get_indexer(cells.obs["covariate"])
    is_train = kept & (cells.obs["split"] == "train").to_numpy()
    is_control = is_train & (cells.obs["condition"] == contract.CONTROL).to_numpy()
    baseline = group_means(cells.X[is_control], covariate[is_control], len(shape.covariates))
    # The val conditions with their measured mean shifts; their cells are needed no longer.
    is_val = kept & ~is_train
    val_rows, val_of_cell = np.unique(condition[is_val], return_inverse=True)
    val_covariates = conditions.covariates[torch.from_numpy(val_rows).to(device)].cpu().numpy()
    val_shifts = group_means(cells.X[is_val], val_of_cell, len(val_rows)) - baseline[val_covariates]
    held = Cells(condition, covariate, neural.hold_rows(cells.X, device), on_device(baseline, device))
    del cells
    train_rows, controls = np.flatnonzero(is_train), np.flatnonzero(is_control)

    torch.manual_seed(task.seed)  # the initial weights, drawn on the CPU: the same for every device
    net = networks(shape, settings).to(device)
    critic = layers(settings, 2 * settings.latent, 1).to(device)
    adam = neural.Adam(list(net.parameters()))
    critic_adam = neural.Adam(list(critic.parameters()), settings.critic_weight_decay)
    best = neural.Best(net)
    parts: dict[str, neural.Stateful] = {"net": net, "critic": critic, "adam": adam, "critic_adam": critic_adam}
    for epoch in neural.epochs(task, settings.epochs, parts | {"best": best}):
        rate = settings.learning_rate * settings.decay ** ((epoch - 1) // settings.decay_every)
        total = torch.zeros(len(Losses._fields), dtype=torch.float64, device=device)
        order = neural.generator(task.seed, epoch).permutation(train_rows)
        for batch in neural.batches(order, settings.batch_size):
            losses = step(net, critic, (adam, critic_adam), rate, settings, conditions, held, batch)
            total += torch.hstack(losses).detach() * len(batch)
        for name, value in zip(Losses._fields, (total / len(order)).tolist(), strict=True):
            contract.metric(name, epoch, value)
        if len(val_rows) and epoch % settings.validate_every == 0:
            states = latents(net, held, controls, settings.batch_size)
            predicted = mean_shifts(net, conditions, val_rows, states, covariate[controls])
            correlation = float(np.mean(np.nan_to_num(list(map(pearson, predicted, val_shifts)))))
            contract.metric("val_correlation", epoch, correlation)
            best.offer(-correlation)
    torch.save(best.weights, task.output / neural.WEIGHTS)
    contract.write_model(task, settings, shape)


def predict(task: contract.PredictTask) -> None:
    """Predict every condition whose genes have an embedding, in the covariates of the train cells.

    A covariate's prediction is its control mean, plus the mean over its control cells of what the networks make of
    the cell's latent and the condition's.
    """
    _, device = neural.start_torch(task.threads)
    settings, shape = contract.read_model(task, Settings, contract.Shape)
    embedding = contract.scale_embedding(contract.read_embedding(task.embedding, shape.dimensions))
    net = neural.load_weights(networks(shape, settings), task, device)
    keys, reasons = contract.split_keys(task, embedding, shape.covariates)
    conditions = conditions_of(keys, embedding, shape, device)
    control = contract.read_cells(task.control)
    control = control[control.obs["covariate"].isin(shape.covariates), shape.genes]
    covariate = np.array([shape.covariates.index(name) for name in control.obs["covariate"]])
    baseline = group_means(control.X, covariate, len(shape.covariates))
    none = np.full(len(covariate), -1)
    cells = Cells(none, covariate, neural.hold_rows(control.X, device), on_device(baseline, device))
    states = latents(net, cells, np.arange(len(covariate)), settings.batch_size)
    profiles = mean_shifts(net, conditions, np.arange(len(keys)), states, covariate)
    profiles += baseline[conditions.covariates.cpu().numpy()]
    contract.write_predictions(task, keys, profiles, shape.genes, reasons)


# ---- what goes in


def group_means(matrix: csr_matrix, group: np.ndarray, count: int) -> np.ndarray:
    """Mean rows of `count` groups: count x columns, float64. group: the number of each row's; each group has one."""
    from scipy.sparse import csr_matrix

    share = 1 / np.bincount(group, minlength=count)
    member = csr_matrix((share[group], (group, np.arange(len(group)))), (count, len(group)))
    means: np.ndarray = (member @ matrix).toarray()
    return means


def conditions_of(
    keys: Sequence[contract.Key], embedding: pd.DataFrame, shape: contract.Shape, device: Any
) -> Conditions:
    """Encode the distinct keys as the networks take them."""
    summed = contract.sum_embeddings([key.condition for key in keys], embedding)
    covariates = np.array([shape.covariates.index(key.covariate) for key in keys], dtype=np.int64)
    return Conditions(on_device(summed, device), torch.from_numpy(covariates).to(device))


def on_device(array: np.ndarray, device: Any) -> torch.Tensor:
    """Copy the numbers as float32 to the device."""
    return torch.from_numpy(array.astype(np.float32)).to(device)


# ---- the networks


def layers(settings: Settings, before: int, after: int) -> torch.nn.Sequential:
    """Build a network with one hidden layer."""
    return neural.perceptron(before, settings.hidden, after, negative_slope=settings.negative_slope)


def networks(shape: contract.Shape, settings: Settings) -> torch.nn.ModuleDict:
    """Build the networks.

    cell: a cell's shift -> mean and log variance of z; perturbation: embedding -> s; covariate: a latent each;
    expression: z + s + covariate -> shift; embedding: s -> embedding.
    """
    from torch import nn

    latent, n_genes = settings.latent, len(shape.genes)
    net = nn.ModuleDict(
        {
            "cell": layers(settings, n_genes, 2 * latent),
            "perturbation": layers(settings, shape.dimensions, latent),
            "expression": layers(settings, latent, n_genes),
            "embedding": layers(settings, latent, shape.dimensions),
        }
    )
    if len(shape.covariates) > 1:
        net["covariate"] = nn.Embedding(len(shape.covariates), latent)
    return net


def through(net: torch.nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Apply a network: computed in bfloat16 on a GPU, weights and result in float32.

    Each call casts the weights again: between two of them an optimizer may have changed them.
    """
    with torch.autocast(given.device.type, torch.bfloat16, enabled=given.device.type == "cuda"):
        result: torch.Tensor = net(given)
    return result.float()


# ---- the losses


class Losses(NamedTuple):
    """What is minimised, and its terms, each a mean over the cells of a batch.

    train_loss:       the sum of the others, `information` times its weight.
    expression_error: sum over genes of (decoded - measured)^2, at the moved embedding.
    embedding_error:  sum over dimensions of (decoded - given)^2, likewise.
    divergence:       Kullback-Leibler divergence of z from the standard normal distribution.
    information:      the critic's estimate of the mutual information of z and s, in nats.
    """

    train_loss: torch.Tensor
    expression_error: torch.Tensor
    embedding_error: torch.Tensor
    divergence: torch.Tensor
    information: torch.Tensor


class Batch(NamedTuple):
    """A batch of cells.

    given: its conditions, whose own embeddings are to be decoded. at: the condition of each cell. z, shifts: the
    latent and the shift of each cell.
    """

    given: Conditions
    at: torch.Tensor
    z: torch.Tensor
    shifts: torch.Tensor


def step(
    net: torch.nn.ModuleDict,
    critic: torch.nn.Sequential,
    optimizers: tuple[neural.Adam, neural.Adam],
    rate: float,
    settings: Settings,
    conditions: Conditions,
    cells: Cells,
    drawn: np.ndarray,
) -> Losses:
    """Take steps of the critic up the information, then one of the networks down their loss.

    optimizers: of the networks and of the critic. drawn: numbers of the cells of the batch.
    """
    numbers, of_cell = np.unique(cells.condition[drawn], return_inverse=True)
    device = conditions.embedding.device
    rows, at = torch.from_numpy(numbers).to(device), torch.from_numpy(of_cell).to(device)
    given, shifts = Conditions(conditions.embedding[rows], conditions.covariates[rows]), cells.shifts(drawn)
    mean, log_variance = through(net["cell"], shifts).chunk(2, dim=1)
    z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    batch = Batch(given, at, z, shifts)
    moved = against(net, settings, batch._replace(z=z.detach()))
    s, expression_error, embedding_error = decode_latents(net, batch, moved)
    s = s[at]

    def shuffled() -> torch.Tensor:
        return torch.randperm(len(drawn), device=device)

    for _ in range(settings.critic_steps):
        critic_loss = -information(critic, z.detach(), s.detach(), shuffled())
        optimizers[1].step(critic_loss, rate)
    shared = information(critic, z, s, shuffled())
    divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1).mean()
    loss = expression_error + embedding_error + divergence + settings.information_weight * shared
    optimizers[0].step(loss, rate)
    return Losses(loss, expression_error, embedding_error, divergence, shared)


def against(net: torch.nn.ModuleDict, settings: Settings, batch: Batch) -> torch.Tensor:
    """Move each value of the embeddings by a step in the direction that makes both decodings worse.

    Goodfellow et al. 2015. Returns conditions x dimensions. The step is meant for an embedding of length 1, of which
    ours is a multiple.
    """
    embedding = batch.given.embedding.clone().requires_grad_()
    _, expression_error, embedding_error = decode_latents(net, batch, embedding)
    (gradient,) = torch.autograd.grad(expression_error + embedding_error, embedding)
    length = settings.adversarial_step * gradient.shape[1] ** 0.5
    moved: torch.Tensor = batch.given.embedding + length * gradient.sign()
    return moved


def decode_latents(
    net: torch.nn.ModuleDict, batch: Batch, embedding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the latents s of these embeddings (conditions x latent), and the errors of both decodings.

    embedding: of the batch's conditions, moved or not.
    """
    given, at, z, shifts = batch
    s = through(net["perturbation"], embedding)
    predicted = through(net["expression"], z + with_covariate(net, given, s)[at])
    expression_error = (predicted - shifts).square().sum(dim=1).mean()
    n_cells = torch.bincount(at, minlength=len(s))
    of_condition = (through(net["embedding"], s) - given.embedding).square().sum(dim=1)
    return s, expression_error, (n_cells * of_condition).sum() / len(at)


def with_covariate(net: torch.nn.ModuleDict, conditions: Conditions, s: torch.Tensor) -> torch.Tensor:
    """Add the latents of the covariates to those of conditions where there are several covariates."""
    return s + net["covariate"](conditions.covariates) if "covariate" in net else s


def information(critic: torch.nn.Sequential, z: torch.Tensor, s: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Compute the Donsker-Varadhan bound on the mutual information of z and s in nats (MINE, Belghazi et al. 2018).

    z, s: cells x latent. others: a permutation of the cells, which gives z the s of another.
    """
    joint = through(critic, torch.cat([z, s], dim=1)).mean()
    apart = through(critic, torch.cat([z, s[others]], dim=1))
    return joint - (torch.logsumexp(apart, dim=0)[0] - math.log(len(z)))


# ---- prediction


def latents(net: torch.nn.ModuleDict, cells: Cells, numbers: np.ndarray, batch_size: int) -> torch.Tensor:
    """Compute the mean latents z of some cells: cells x latent."""
    with torch.no_grad():
        found = [net["cell"](cells.shifts(batch)).chunk(2, dim=1)[0] for batch in neural.batches(numbers, batch_size)]
    return torch.cat(found)


def mean_shifts(
    net: torch.nn.ModuleDict, conditions: Conditions, rows: np.ndarray, states: torch.Tensor, covariate: np.ndarray
) -> np.ndarray:
    """Predicted mean shift of some conditions from control: rows x genes, float64.

    states: latents of control cells. covariate: of each of them. The last layer is linear, so that the mean over the
    cells is taken before it.
    """
    parts: Any = net  # torch's types do not say what a ModuleDict holds
    *hidden, last = parts["expression"]
    own = [states[torch.from_numpy(covariate == one).to(states.device)] for one in range(covariate.max() + 1)]
    with torch.no_grad():
        at = torch.from_numpy(rows).to(states.device)
        given = Conditions(conditions.embedding[at], conditions.covariates[at])
        s = with_covariate(net, given, net["perturbation"](given.embedding))
        means = torch.empty(len(rows), last.in_features, device=states.device)
        for row, one in enumerate(given.covariates.tolist()):
            decoding = own[one] + s[row]
            for layer in hidden:
                decoding = layer(decoding)
            means[row] = decoding.mean(dim=0)
        shifts: np.ndarray = last(means).cpu().numpy().astype(np.float64)
    return shifts


def pearson(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Correlation over genes; NaN, which counts as 0 in the mean, if either is constant."""
    one, other = predicted - predicted.mean(), measured - measured.mean()
    length = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / length) if length > 0 else float("nan")


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
