"""scGPT (Cui et al. 2024): a transformer over the genes of a control cell, fine-tuned to give the perturbed cell.

Each gene of a cell is a token: its embedding, its expression and a flag where it is perturbed, summed; a stack of
transformer layers; and a decoder that scales and shifts each gene's expression. It starts from the weights of a
published checkpoint where the task has them; that checkpoint's embedding of genes is there for other models.
README.md says what is decided here that the paper leaves open.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import contract
import neural

if not TYPE_CHECKING:
    np, pd, torch = map(contract.LateModule, ("numpy", "pandas", "torch"))
else:
    from collections.abc import Callable

    import anndata as ad
    import numpy as np
    import pandas as pd
    import torch


DESCRIPTION = contract.Description(name="scgpt", combinations=True, embedding=False, gpu=True, input="cells")
# What fine-tuning takes over from a checkpoint; the decoder and the flag of perturbed genes begin at random.
TAKEN_OVER = ("encoder.", "value_encoder.", "transformer_encoder.")
EMBEDDING = "encoder.embedding.weight"
NORM = ("encoder.enc_norm.weight", "encoder.enc_norm.bias")
# Checkpoints that were trained with flash attention call torch's names otherwise.
RENAMED = {"self_attn._impl.": "self_attn.", "self_attn.Wqkv.": "self_attn.in_proj_"}
# Rows of a vocabulary that are no genes: `<pad>`, `<cls>`, `<eoc>`.
NO_GENE = "<"
# Another draw than that of any epoch, which count from 1.
VALIDATION = 0


@dataclass(frozen=True)
class Settings:
    """The reference study's hyperparameters.

    width of a token, heads, layers, hidden width of a layer (a checkpoint's own override these four); dropout;
    epochs; batch_size (cells); sequence: genes of a cell that are looked at together; learning_rate of Adam, multiplied
    by decay every decay_every epochs; largest_norm of a gradient; patience: epochs without a lower validation loss
    after which training ends; pool: control cells whose predictions are averaged.
    """

    width: int = 512
    heads: int = 8
    layers: int = 12
    hidden: int = 512
    dropout: float = 0.2
    epochs: int = 10
    batch_size: int = 32
    sequence: int = 1200
    learning_rate: float = 1e-4
    decay: float = 0.9
    decay_every: int = 15
    largest_norm: float = 1.0
    patience: int = 10
    pool: int = 300

    def __post_init__(self) -> None:
        contract.check_numbers(self, others=("dropout",))
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout: wanted a number from 0 to below 1")
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not divisible by {self.heads} heads")


@dataclass(frozen=True)
class Shape:
    """The network's size and names; stored with the settings in model.json.

    width, heads, layers, hidden: as in Settings. genes: all that are measured. tokens: those of them that the network
    knows, in the same order. covariates: those with train perturbations and train control cells.
    """

    width: int
    heads: int
    layers: int
    hidden: int
    genes: list[str]
    tokens: list[str]
    covariates: list[str]


class Pretrained(NamedTuple):
    """A checkpoint: the widths of its args.json by their names in Settings, the rows of its genes, and its tensors."""

    widths: dict[str, int]
    vocabulary: dict[str, int]
    tensors: dict[str, torch.Tensor]


class Screen(NamedTuple):
    """Cells, and what is perturbed in them.

    rows:      from numbers of cells to the expression of all measured genes, dense, on the device.
    columns:   the measured gene of each token, on the device.
    condition: the row of each cell's condition in `perturbed`.
    perturbed: conditions x tokens, bool.
    covariate: the number of each cell's covariate in Shape.covariates, -1 for another.
    controls:  the train control cells of each covariate.
    """

    rows: Callable[[np.ndarray], torch.Tensor]
    columns: torch.Tensor
    condition: np.ndarray
    perturbed: np.ndarray
    covariate: np.ndarray
    controls: list[np.ndarray]


def train(task: contract.TrainTask) -> None:
    """Fine-tune on the train perturbations and keep the weights of the least validation loss: weights.pt, model.json.

    Without a val condition all of whose genes are tokens, the last weights are kept. rest.parquet holds the dataset
    means of the measured genes that are no tokens.
    """
    _, device = neural.start_torch(task.threads)
    settings = contract.hyperparameters(task, Settings)
    pretrained = None if task.pretrained is None else read_pretrained(task.pretrained)
    cells = contract.read_cells(task.cells)
    shape = shape_of(cells, settings, pretrained)
    train_cells, val_cells = usable(cells, shape)
    screen = screen_of(cells, shape, device)
    del cells

    torch.manual_seed(task.seed)  # the initial weights, drawn on the CPU: the same for every device
    net = network(shape, settings.dropout)
    if pretrained is None:
        contract.log("no pretrained weights: it trains from random ones")
    else:
        take_over(net, pretrained, shape.tokens)
    net.to(device)

    def loss(batch: np.ndarray, draws: np.random.Generator) -> torch.Tensor:
        return squared_error(net, screen, batch, settings.sequence, draws)

    def val_loss() -> float:
        draws = neural.generator(task.seed, VALIDATION)
        return neural.mean_loss(net, lambda batch: loss(batch, draws), val_cells, settings.batch_size)

    neural.fit(task, net, settings, train_cells, val_cells, loss, val_loss)
    dataset_means(task.cells, shape).to_parquet(task.output / "rest.parquet")
    contract.write_model(task, settings, shape)


def predict(task: contract.PredictTask) -> None:
    """Predict every condition whose genes are tokens: the mean over a pool of control cells of the covariate."""
    _, device = neural.start_torch(task.threads)
    settings, shape = contract.read_model(task, Settings, Shape)
    net = neural.load_weights(network(shape, settings.dropout), task, device)
    control = contract.read_cells(task.control)
    if control.var_names.tolist() != shape.genes:
        raise contract.ContractError(f"{task.control}: other genes than the model was trained with")
    screen = screen_of(control, shape, device)
    reasons = unpredictable(task.conditions, shape, screen)
    keys = sorted(set(task.conditions) - set(reasons))
    pools = pools_of(screen, settings.pool, task.seed)
    rest = pd.read_parquet(task.model / "rest.parquet")
    others = [shape.genes.index(gene) for gene in rest.columns]
    order = neural.generator(task.seed, VALIDATION).permutation(len(shape.tokens))
    profiles = np.empty((len(keys), len(shape.genes)))
    columns = screen.columns.cpu().numpy()
    for row, key in enumerate(keys):
        covariate = shape.covariates.index(key.covariate)
        perturbed = np.array([shape.tokens.index(gene) for gene in contract.genes_of(key.condition)])
        profiles[row, columns] = profile(net, pools[covariate], perturbed, order, settings)
        profiles[row, others] = rest.loc[key.covariate].to_numpy()
        contract.progress(row + 1, len(keys), "condition")
    contract.write_predictions(task, keys, profiles, shape.genes, reasons)


# ---- the checkpoint


def read_pretrained(folder: Path) -> Pretrained:
    """Read a checkpoint as published: args.json, vocab.json and best_model.pt, of which only tensors are read.

    Raises ContractError if a file is missing or malformed, or if best_model.pt holds more than tensors.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    args, vocabulary = (contract.read_object(folder / name) for name in ("args.json", "vocab.json"))
    names = {"width": "embsize", "heads": "nheads", "layers": "nlayers", "hidden": "d_hid"}
    for name in names.values():
        if type(args.get(name)) is not int or args[name] < 1:
            raise contract.ContractError(f"{folder / 'args.json'}: {name}: wanted a whole number above 0")
    path = folder / "best_model.pt"
    try:
        unsafe = get_unsafe_globals_in_checkpoint(path)
        if unsafe:
            raise contract.ContractError(f"{path}: holds more than tensors, and is not loaded: {', '.join(unsafe)}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise contract.ContractError(f"{path}: not a checkpoint of tensors: {error}") from None
    tensors = {}
    for name, tensor in state.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        if name.startswith(TAKEN_OVER):
            tensors[name] = tensor
    n_rows = len(tensors.get(EMBEDDING, ()))
    for gene, row in vocabulary.items():
        if type(row) is not int or not 0 <= row < n_rows:
            message = f"{gene}: {row!r} is not a row of {EMBEDDING}, which has {n_rows}"
            raise contract.ContractError(f"{folder / 'vocab.json'}: {message}")
    return Pretrained({mine: args[theirs] for mine, theirs in names.items()}, vocabulary, tensors)


def take_over(net: torch.nn.ModuleDict, pretrained: Pretrained, tokens: list[str]) -> None:
    """Give the network all tensors of the checkpoint whose name and shape fit; of its embedding, the tokens' rows."""
    rows = [pretrained.vocabulary[gene] for gene in tokens]
    given = pretrained.tensors | {EMBEDDING: pretrained.tensors[EMBEDDING][rows]}
    mine = {name: tensor for name, tensor in net.state_dict().items() if name.startswith(TAKEN_OVER)}
    fitting = {name: given[name] for name in mine if name in given and given[name].shape == mine[name].shape}
    net.load_state_dict(fitting, strict=False)
    contract.log(f"{len(fitting)} of {len(mine)} tensors are the checkpoint's")
    if len(fitting) < len(mine):
        contract.log(f"at random, for the checkpoint has none that fits: {', '.join(sorted(set(mine) - set(fitting)))}")


# ---- the cells


def shape_of(cells: ad.AnnData, settings: Settings, pretrained: Pretrained | None) -> Shape:
    """Shape the network for these cells; a checkpoint decides the widths, and which genes are tokens (else all are)."""
    genes = cells.var_names.tolist()
    widths = {name: getattr(settings, name) for name in ("width", "heads", "layers", "hidden")}
    tokens = genes
    if pretrained is not None:
        for name, value in pretrained.widths.items():
            if value != widths[name]:
                contract.log(f"{name}: {value} as in the checkpoint, not {widths[name]}")
        widths = pretrained.widths
        tokens = [gene for gene in genes if gene in pretrained.vocabulary]
        contract.log(f"{len(tokens)} of {len(genes)} measured genes are in the checkpoint's vocabulary")
    obs = cells.obs[cells.obs["split"] == "train"]
    is_control = obs["condition"] == contract.CONTROL
    is_known = contract.perturb_known(obs["condition"], tokens)
    covariates = sorted(set(obs["covariate"][is_control]) & set(obs["covariate"][is_known]))
    if not covariates:
        raise contract.ContractError(
            "cells: no covariate has both train control cells and a train perturbation of a gene that is a token"
        )
    return Shape(**widths, genes=genes, tokens=tokens, covariates=covariates)


def usable(cells: ad.AnnData, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the perturbed cells to train on and of those to validate on."""
    is_known = contract.perturb_known(cells.obs["condition"], shape.tokens)
    kept = is_known & cells.obs["covariate"].isin(shape.covariates).to_numpy()
    is_train = (cells.obs["split"] == "train").to_numpy()
    return (kept & is_train).nonzero()[0], (kept & ~is_train).nonzero()[0]


def screen_of(cells: ad.AnnData, shape: Shape, device: Any) -> Screen:
    """Encode the cells as the network takes them."""
    conditions = cells.obs["condition"].astype("category")
    perturbed = contract.mark_genes(conditions.cat.categories.tolist(), shape.tokens)
    covariate = pd.Categorical(cells.obs["covariate"], categories=shape.covariates).codes
    is_control = (cells.obs[["condition", "split"]] == [contract.CONTROL, "train"]).all(axis=1).to_numpy()
    controls = [(is_control & (covariate == number)).nonzero()[0] for number in range(len(shape.covariates))]
    columns = torch.from_numpy(cells.var_names.get_indexer(shape.tokens)).to(device)
    rows = neural.hold_rows(cells.X, device)
    return Screen(rows, columns, conditions.cat.codes.to_numpy(), perturbed, covariate, controls)


def unpredictable(keys: tuple[contract.Key, ...], shape: Shape, screen: Screen) -> dict[contract.Key, str]:
    """List the keys that cannot be predicted, each with its reason."""
    known = {"not measured:": {*shape.genes}, "not in the checkpoint's vocabulary:": {*shape.tokens}}
    learned = {name for name, cells in zip(shape.covariates, screen.controls, strict=True) if len(cells)}
    return contract.find_gaps(keys, known, learned, "lacks training perturbations or control cells")


def dataset_means(path: Path, shape: Shape) -> pd.DataFrame:
    """Average what is predicted for measured genes that are no tokens, whatever is perturbed: covariates x genes."""
    tokens = {*shape.tokens}
    rest = [gene for gene in shape.genes if gene not in tokens]
    if not rest:
        return pd.DataFrame(index=shape.covariates)
    return contract.dataset_means(contract.read_means(path)).loc[shape.covariates, rest]


# ---- the network


def network(shape: Shape, dropout: float) -> torch.nn.ModuleDict:
    """Build the network, with the names of published checkpoints.

    encoder, value_encoder, pert_encoder, transformer_encoder; and a decoder of a scale and a shift for each token.
    """
    from torch import nn

    width = shape.width
    embedding = nn.Embedding(len(shape.tokens), width)
    nn.init.uniform_(embedding.weight, -0.1, 0.1)

    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(width, shape.heads, shape.hidden, dropout, batch_first=True)

    def number() -> nn.Sequential:
        return neural.perceptron(width, width, width, 1, negative_slope=0.01)

    value = {"linear1": nn.Linear(1, width), "linear2": nn.Linear(width, width), "norm": nn.LayerNorm(width)}
    return nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"embedding": embedding, "enc_norm": nn.LayerNorm(width)}),
            "value_encoder": nn.ModuleDict(value | {"dropout": nn.Dropout(dropout)}),
            "pert_encoder": nn.Linear(1, width, bias=False),
            "transformer_encoder": nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(shape.layers))}),
            "decoder": nn.ModuleDict({"scale": number(), "shift": number()}),
        }
    )


def forward(
    net: torch.nn.ModuleDict, tokens: torch.Tensor, values: torch.Tensor, perturbed: torch.Tensor
) -> torch.Tensor:
    """Predict the expression of some genes after a perturbation, cells x genes float32.

    tokens: of these genes. values: their expression before it, cells x genes. perturbed: 1 where a gene is perturbed
    in the cell, else 0, cells x genes (or 1 x genes, the same in all cells).
    """
    parts: Any = net  # torch's types do not say what a ModuleDict holds
    # In half precision where the device has it; its own kind has the range of float32, so that no loss is scaled.
    with torch.autocast(values.device.type, torch.bfloat16, enabled=is_mixed(values.device)):
        gene = parts["encoder"]["enc_norm"](parts["encoder"]["embedding"](tokens))
        encode = parts["value_encoder"]
        value = encode["norm"](encode["linear2"](encode["linear1"](values[..., None]).relu()))
        x = gene + encode["dropout"](value) + parts["pert_encoder"](perturbed[..., None])
        for layer in parts["transformer_encoder"]["layers"]:
            x = layer(x)
        scale, shift = (parts["decoder"][name](x)[..., 0] for name in ("scale", "shift"))
    expression: torch.Tensor = scale.float() * values + shift.float()
    return expression


def is_mixed(device: Any) -> bool:
    """Whether the device computes in bfloat16."""
    return bool(device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


# ---- training


def squared_error(
    net: torch.nn.ModuleDict, screen: Screen, cells: np.ndarray, sequence: int, draws: np.random.Generator
) -> torch.Tensor:
    """Compute the loss of a batch of perturbed cells: mean over cells and genes of (predicted - measured)^2.

    Each is predicted from a control cell of its covariate, at genes that all share; both are drawn.
    """
    controls = np.array([draws.choice(screen.controls[number]) for number in screen.covariate[cells]])
    perturbed = screen.perturbed[screen.condition[cells]]
    genes = drawn_genes(perturbed.any(axis=0), sequence, draws)
    device = screen.columns.device
    flags = torch.from_numpy(perturbed[:, genes].astype(np.float32)).to(device)
    tokens = torch.from_numpy(genes).to(device)
    columns = screen.columns[tokens]
    before, after = (screen.rows(numbers).index_select(1, columns) for numbers in (controls, cells))
    return torch.nn.functional.mse_loss(forward(net, tokens, before, flags), after)


def drawn_genes(perturbed: np.ndarray, sequence: int, draws: np.random.Generator) -> np.ndarray:
    """Tokens to look at together: all that are perturbed in a batch (bool for each token), filled up at random."""
    others = draws.permutation((~perturbed).nonzero()[0])
    genes = perturbed.nonzero()[0]
    return np.concatenate([genes, others[: max(0, sequence - len(genes))]])


# ---- prediction


def pools_of(screen: Screen, size: int, seed: int) -> list[torch.Tensor]:
    """Each covariate's pool of control cells, at most `size`, drawn: cells x tokens."""
    pools = []
    for number, cells in enumerate(screen.controls):
        drawn = neural.generator(seed, number).permutation(cells)[:size]
        pools.append(screen.rows(drawn).index_select(1, screen.columns))
    return pools


def profile(
    net: torch.nn.ModuleDict, pool: torch.Tensor, perturbed: np.ndarray, order: np.ndarray, settings: Settings
) -> np.ndarray:
    """Compute the mean prediction over a pool of control cells, for each token, float64.

    perturbed: tokens. More tokens than a training sequence are looked at in pieces of that length at most, each with
    all perturbed ones in it; `order` says which come together.
    """
    others = order[~np.isin(order, perturbed)]
    n_pieces = max(1, ceil(len(others) / max(1, settings.sequence - len(perturbed))))
    found = np.empty(len(order))
    for piece in np.array_split(others, n_pieces):
        genes = np.concatenate([perturbed, piece])
        tokens = torch.from_numpy(genes).to(pool.device)
        flags = torch.from_numpy(np.isin(genes, perturbed)[None].astype(np.float32)).to(pool.device)
        total = torch.zeros(len(genes), dtype=torch.float64, device=pool.device)
        with torch.no_grad():
            for cells in pool.index_select(1, tokens).split(settings.batch_size):
                total += forward(net, tokens, cells, flags).sum(dim=0, dtype=torch.float64)
        found[genes] = total.cpu().numpy() / len(pool)
    return found


def embed(task: contract.EmbedTask) -> None:
    """Encode each gene of a checkpoint's vocabulary by its gene encoder: its row, normalised."""
    contract.no_settings(task)
    pretrained = read_pretrained(task.pretrained)
    genes = sorted(gene for gene in pretrained.vocabulary if not gene.startswith(NO_GENE))
    missing = [name for name in NORM if name not in pretrained.tensors]
    if missing:
        raise contract.ContractError(f"{task.pretrained / 'best_model.pt'}: there is no {missing[0]}")
    weight, bias = (pretrained.tensors[name].to(torch.float64) for name in NORM)
    rows = pretrained.tensors[EMBEDDING][[pretrained.vocabulary[gene] for gene in genes]].to(torch.float64)
    table = torch.nn.functional.layer_norm(rows, (rows.shape[1],), weight, bias)
    contract.write_embedding(task, pd.DataFrame(table.numpy(), index=genes))
    contract.progress(1, 1, "table")


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict, embed=embed)
