"""What the neural models share.

The device, cells by the batch, layers, Adam, the best weights, and trainings that continue where they were killed.

Copied into the image of every model that uses it, beside contract.py. torch is imported when it is first used:
`describe` answers at once.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from itertools import pairwise
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import contract

if not TYPE_CHECKING:
    np, torch = map(contract.LateModule, ("numpy", "torch"))
else:
    import numpy as np
    import torch
    from scipy.sparse import csr_matrix


DENSE_BYTES = 2**30  # cells are held dense up to here: quicker, and small enough for any machine
CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
# Of Adam, as published.
ADAM: dict[str, Any] = {"fused": True, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False}
# Saving takes no more than this share of the training.
SAVING_SHARE = 0.05


Net = TypeVar("Net", bound="torch.nn.Module")


class Stateful(Protocol):
    """What a checkpoint keeps: a network, an optimizer, the best weights."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, and lists and dicts of them."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """Take up what `state_dict` gave."""


def start_torch(threads: int) -> tuple[Any, Any]:
    """torch, set to as many threads and to repeat its bits, and the device: a GPU where there is one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not repeat its bits
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # Adam's vanishing moments would slow it down
    if not torch.cuda.is_available():
        # All that the models use repeats its bits on a CPU; to demand it would import the compiler, for seconds.
        return torch, torch.device("cpu")
    torch.use_deterministic_algorithms(True)
    debugging: Any = torch.utils.deterministic
    debugging.fill_uninitialized_memory = False
    return torch, torch.device("cuda")


# ---- cells


def hold_rows(matrix: csr_matrix, device: Any) -> Callable[[np.ndarray], torch.Tensor]:
    """From numbers of rows to these rows, dense, on the device; of CSR float32, each entry once.

    They are held dense up to DENSE_BYTES, else as they are, and made dense batch by batch; on the device if they leave
    half of its free memory to the rest.
    """
    n_cells, n_genes = matrix.shape
    if 4 * n_cells * n_genes <= DENSE_BYTES:
        (dense,) = _on_device(device, matrix.toarray())
        return lambda batch: dense.index_select(0, torch.from_numpy(batch).to(dense.device)).to(device)
    gene, value = _on_device(device, matrix.indices, matrix.data)
    if gene.device.type == "cpu":
        # Of 256 cells of 2,700 of 8,300 genes in 3 ms of one core; `dense_rows`, made for a GPU, takes 17 ms there.
        return lambda batch: torch.from_numpy(matrix[batch].toarray()).to(device)
    start = matrix.indptr.astype(np.int64)
    return lambda batch: dense_rows(start, gene, value, n_genes, batch)


def _on_device(device: Any, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Move the arrays to a GPU if they leave half of its free memory to the rest; else leave them where they are."""
    tensors = [torch.from_numpy(array) for array in arrays]
    fit = device.type == "cuda" and sum(t.nbytes for t in tensors) < torch.cuda.mem_get_info(device)[0] / 2
    return [tensor.to(device) for tensor in tensors] if fit else tensors


def dense_rows(
    start: np.ndarray, gene: torch.Tensor, value: torch.Tensor, n_genes: int, batch: np.ndarray
) -> torch.Tensor:
    """Rows of CSR (start: of each row; gene, value: of each entry), dense: a few kernels for all entries of a batch."""
    length = start[batch + 1] - start[batch]
    n_entries = int(length.sum())
    # Entry i of the batch is entry i + skipped of the store, where `skipped` is one number for each cell.
    skipped = start[batch] - np.concatenate([[0], np.cumsum(length)[:-1]])
    of_cell = torch.from_numpy(np.stack([skipped, np.arange(len(batch)) * n_genes, length])).to(gene.device)
    skipped_of, first_of = of_cell[:2].repeat_interleave(of_cell[2], dim=1, output_size=n_entries)
    entry = skipped_of + torch.arange(n_entries, device=gene.device)
    dense = torch.zeros(len(batch) * n_genes, device=gene.device)
    dense[first_of + gene.index_select(0, entry)] = value.index_select(0, entry)
    return dense.view(len(batch), n_genes)


def batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive pieces of `size` rows; the last may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# ---- networks


def perceptron(*widths: int, negative_slope: float) -> torch.nn.Sequential:
    """Build linear layers between these widths, with a leaky ReLU between any two of them."""
    from torch import nn

    steps: list[nn.Module] = []
    for before, after in pairwise(widths):
        steps += [nn.Linear(before, after), nn.LeakyReLU(negative_slope)]
    return nn.Sequential(*steps[:-1])


def sum_latents(
    net: torch.nn.ModuleDict,
    genes: np.ndarray,
    covariates: np.ndarray,
    encode: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum the latents of each condition's genes and, where the network has one, that of its covariate.

    genes: conditions x genes, float32, 1 where a gene is perturbed. covariates: the number of each condition's.
    encode: from numbers of genes to their latents, asked once for those that occur.
    """
    device = next(net.parameters()).device
    used = np.flatnonzero(genes.any(axis=0))
    latent = torch.from_numpy(genes[:, used]).to(device) @ encode(torch.from_numpy(used).to(device))
    if "covariate" in net:
        latent = latent + net["covariate"](torch.from_numpy(covariates).to(device))
    return latent


def load_weights(net: Net, task: contract.PredictTask, device: Any) -> Net:
    """Give a network the weights that training kept, and move it to the device."""
    net.load_state_dict(torch.load(task.model / WEIGHTS, weights_only=True))
    return net.to(device).eval()


# ---- training


class Adam:
    """Adam (Kingma and Ba 2015) on some weights, fused. torch.optim.Adam would import torch's compiler, for seconds.

    weight_decay: times the weight is added to its gradient (L2 penalty, as in torch.optim.Adam).
    """

    def __init__(self, weights: list[torch.nn.Parameter], weight_decay: float = 0.0) -> None:
        self._weights = weights
        self._weight_decay = weight_decay
        self._averages = [torch.zeros_like(weight) for weight in weights]
        self._squares = [torch.zeros_like(weight) for weight in weights]
        self._steps = [torch.zeros((), device=weight.device) for weight in weights]

    def step(self, loss: torch.Tensor, rate: float, largest_norm: float | None = None) -> None:
        """One step down the gradient of the loss, at this learning rate. Weights that the loss does not hang on stay.

        largest_norm: a longer gradient (over all weights together) is scaled down to it.
        """
        from torch.optim.adam import adam

        gradients = torch.autograd.grad(loss, self._weights, allow_unused=True)
        used = [index for index, gradient in enumerate(gradients) if gradient is not None]
        lists = (self._weights, gradients, self._averages, self._squares, self._steps)
        weights, given, averages, squares, steps = ([one[index] for index in used] for one in lists)
        with torch.no_grad():
            if largest_norm is not None:
                scale = (largest_norm / (torch.nn.utils.get_total_norm(given) + 1e-6)).clamp(max=1.0)
                given = [one * scale for one in given]
            adam(weights, given, averages, squares, [], steps, lr=rate, weight_decay=self._weight_decay, **ADAM)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments of every weight."""
        return {"averages": self._averages, "squares": self._squares, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the moments that `state_dict` gave."""
        mine = self.state_dict()
        for name, tensors in mine.items():
            for tensor, saved in zip(tensors, state[name], strict=True):
                tensor.copy_(saved)


class Best:
    """The weights of a network at the least validation loss so far.

    least: that loss, infinite before the first. stale: how many times `offer` has found none lower since.
    """

    def __init__(self, net: torch.nn.Module) -> None:
        self._net = net
        self._weights: dict[str, torch.Tensor] | None = None
        self.least = float("inf")
        self.stale = 0

    def offer(self, loss: float) -> None:
        """Keep the present weights if the loss is the lowest so far (NaN never is)."""
        self.stale += 1
        if loss < self.least:
            self.least, self.stale, self._weights = loss, 0, copy_of(self._net)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The best weights, on the CPU; the present ones where no loss was ever the lowest."""
        return self._weights or copy_of(self._net)

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"weights": self._weights, "least": self.least, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._weights, self.least, self.stale = state["weights"], state["least"], state["stale"]


def mean_loss(
    net: torch.nn.Module, loss_of: Callable[[np.ndarray], torch.Tensor], rows: np.ndarray, batch_size: int
) -> float:
    """Compute the mean over some rows of a loss that is one over a batch, without dropout or a gradient."""
    net.eval()
    with torch.no_grad():
        of_batch = [loss_of(batch).double() * len(batch) for batch in batches(rows, batch_size)]
    return float(sum(of_batch)) / len(rows)


def fit(
    task: contract.TrainTask,
    net: torch.nn.Module,
    settings: Any,
    train_rows: np.ndarray,
    val_rows: np.ndarray,
    loss_of: Callable[[np.ndarray, np.random.Generator], torch.Tensor],
    val_loss: Callable[[], float],
    *,
    chooses: bool = True,
    weigh: Callable[[np.ndarray], int] = len,
) -> None:
    """Train a network by Adam, and write its weights at the least validation loss, else the last: WEIGHTS.

    settings: of the model: `epochs`, `batch_size`, `learning_rate`; where it has them, `decay` and `decay_every`
    (epochs) of the rate, `weight_decay`, `largest_norm` of a gradient, `validate_every` (epochs), and `patience`:
    epochs without a lower validation loss after which training ends.
    loss_of: the loss of a batch of train rows, which may draw from the epoch's generator. val_loss: asked only if
    there are val rows. chooses: whether it decides on the weights. weigh: the weight of a batch in the reported loss.
    """
    option = vars(settings).get
    adam, best = Adam(list(net.parameters()), option("weight_decay", 0.0)), Best(net)
    parts: dict[str, Stateful] = {"net": net, "adam": adam, "best": best}
    for epoch in epochs(task, settings.epochs, parts, lambda: best.stale >= option("patience", inf)):
        rate = settings.learning_rate * option("decay", 1.0) ** ((epoch - 1) // option("decay_every", 1))
        draws = generator(task.seed, epoch)
        total = torch.zeros((), dtype=torch.float64, device=next(net.parameters()).device)
        all_batches = batches(draws.permutation(train_rows), settings.batch_size)
        net.train()
        for batch in all_batches:
            loss = loss_of(batch, draws)
            adam.step(loss, rate, option("largest_norm"))
            total += loss.detach() * weigh(batch)
        contract.metric("train_loss", epoch, float(total) / sum(map(weigh, all_batches)))
        if len(val_rows) and epoch % option("validate_every", 1) == 0:
            loss_now = val_loss()
            contract.metric("val_loss", epoch, loss_now)
            if chooses:
                best.offer(loss_now)
    torch.save(best.weights, task.output / WEIGHTS)


def copy_of(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy the present weights to the CPU."""
    return {name: weights.detach().cpu().clone() for name, weights in net.state_dict().items()}


def generator(seed: int, epoch: int) -> np.random.Generator:
    """Make the generator of one epoch: its draws depend on no other epoch, so that a training can continue at any."""
    return np.random.default_rng((seed, epoch))


def epochs(
    task: contract.TrainTask,
    count: int,
    parts: Mapping[str, Stateful],
    is_enough: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield the epochs 1, 2, ... `count` of a training, without those that a killed one has finished.

    parts: all that an epoch changes; they are kept in `task.checkpoint` now and then, and taken up from there.
    is_enough: asked before each epoch, it ends the training. torch is seeded again for each epoch (dropout, draws on
    the device); other draws have to come from `generator(seed, epoch)`. So a training that
    continues ends with the same bits.
    """
    done = _restored(task, parts)
    saved, took = monotonic(), 0.0
    for epoch in range(done + 1, count + 1):
        if is_enough():
            contract.progress(epoch - 1, epoch - 1, "epoch")
            return
        torch.manual_seed(int(generator(task.seed, epoch).integers(2**63)))
        yield epoch
        contract.progress(epoch, count, "epoch")
        if task.checkpoint is not None and monotonic() - saved >= took / SAVING_SHARE:
            began = monotonic()
            _save(task, task.checkpoint, epoch, parts)
            saved = monotonic()
            took = saved - began


def _save(task: contract.TrainTask, folder: Path, epoch: int, parts: Mapping[str, Stateful]) -> None:
    state = {
        "task": identity(task),
        "epoch": epoch,
        "metrics": contract.metrics(),
        "parts": {name: part.state_dict() for name, part in parts.items()},
    }
    unfinished = folder / f"{CHECKPOINT}.partial"
    torch.save(state, unfinished)
    unfinished.replace(folder / CHECKPOINT)


def _restored(task: contract.TrainTask, parts: Mapping[str, Stateful]) -> int:
    """Restore the parts of a killed training; its metrics are printed again. Returns the number of its epochs."""
    path = task.checkpoint / CHECKPOINT if task.checkpoint else None
    if path is None or not path.exists():
        return 0
    state = accept_checkpoint(task, lambda: torch.load(path, map_location="cpu", weights_only=True))
    if state is None:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    contract.log(f"goes on after epoch {state['epoch']}, where an earlier training was cut off")
    return int(state["epoch"])


def accept_checkpoint(task: contract.TrainTask, read: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Read what a killed training kept, with its identity as `task` and its `metrics`, which are printed again.

    None where it cannot be read or is of another training; the log says so.
    """
    try:
        state = read()
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        contract.log(
            f"the checkpoint of an earlier training cannot be read: this one starts from the beginning: {error}"
        )
        return None
    if state["task"] != identity(task):
        other = "another seed, other hyperparameters or another kind of device"
        contract.log(f"the checkpoint is of a training with {other}: this one starts from the beginning")
        return None
    for name, step, value in state["metrics"]:
        contract.metric(name, step, value)
    return state


def identity(task: contract.TrainTask) -> str:
    """Identify the training and its device: a GPU computes other bits than a CPU, so no training is half of each."""
    text = json.dumps([task.seed, task.hyperparameters, torch.cuda.is_available()], sort_keys=True)
    return sha256(text.encode()).hexdigest()
