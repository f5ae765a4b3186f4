"""GEARS: from graphs between genes to the shift of every gene's expression (Roohani et al. 2024).

A measured gene's vector is learned and spread over the graph of co-expression, a perturbed gene's over the graph of the
Gene Ontology. A condition is an MLP of the sum of its genes' vectors; added to each measured gene's vector it gives,
through an MLP and weights of that gene alone, a first shift; a summary of all first shifts, weighed by each gene in its
own way, makes the final one. Added to a control cell it is the cell after the perturbation. README.md says what the
paper leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import contract
import neural

if not TYPE_CHECKING:
    np, pd, torch = map(contract.LateModule, ("numpy", "pandas", "torch"))
    functional = contract.LateModule("torch.nn.functional")
else:
    from collections.abc import Callable, Iterable, Sequence

    import anndata as ad
    import numpy as np
    import pandas as pd
    import torch
    from torch.nn import functional


DESCRIPTION = contract.Description(name="gears", combinations=True, embedding=True, gpu=True, input="cells")
# So few val conditions tell no epoch from another (README.md).
FEWEST_TO_CHOOSE_BY = 10
CELLS_AT_ONCE = 2048
GENES_AT_ONCE = 512
NUMBERS_AT_ONCE = 2**18  # float32: 1 MiB, which a processor's cache holds


@dataclass(frozen=True)
class Settings:
    """The reference study's hyperparameters.

    hidden: length of the vectors of genes and conditions; go_layers, coexpression_layers: graph convolutions in each
    graph; go_neighbours, coexpression_neighbours: how many genes a gene is linked to, the most similar ones, in the
    second graph only those whose correlation is above coexpression_threshold (0 to 1) in size. focus: added to the
    exponent 2 of the error; direction: weight of the error in sign. batch_size, test_batch_size: cells in a batch of
    the training, of the validation. learning_rate of Adam, multiplied by decay after each epoch; weight_decay: times
    the weight is added to its gradient.
    """

    hidden: int = 64
    go_layers: int = 1
    coexpression_layers: int = 1
    go_neighbours: int = 20
    coexpression_neighbours: int = 20
    coexpression_threshold: float = 0.4
    focus: float = 2.0
    direction: float = 0.1
    epochs: int = 10
    batch_size: int = 32
    test_batch_size: int = 512
    learning_rate: float = 1e-3
    decay: float = 0.5
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        or_zero = ("focus", "direction", "weight_decay")
        contract.check_numbers(self, others=or_zero)
        for name in or_zero:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: wanted a number above 0 or 0")


@dataclass(frozen=True)
class Shape:
    """What else the network's size hangs on; stored with the settings in model.json.

    Names of the measured genes, of the covariates of the train cells, and of the genes perturbed in training.
    """

    genes: list[str]
    covariates: list[str]
    perturbed: list[str]


class Graph(NamedTuple):
    """The part of a normalised graph that the vectors of some genes hang on, as `convolve` takes it.

    names:  genes, those wanted first, then their neighbours, then those of these: one step for each layer.
    reach:  how many names there are without neighbours, with those one step away, two steps, ...
    start:  where each gene's links begin, for all names but those that the last step added.
    to:     each link's end, as its row in names.
    weight: each link's weight, float32. Tensors, on the device.
    """

    names: list[str]
    reach: list[int]
    start: torch.Tensor
    to: torch.Tensor
    weight: torch.Tensor


class Conditions(NamedTuple):
    """Distinct (covariate, condition)s as the network takes them.

    genes:      conditions x graph.names[:graph.reach[0]], 1 where the gene is perturbed.
    graph:      of the Gene Ontology about these genes.
    measured:   of co-expression, about the measured genes.
    vector:     rows of graph.names in Shape.perturbed, and its length for a gene that is not in it.
    covariates: the row of each condition's covariate in Shape.covariates.
    """

    genes: torch.Tensor
    graph: Graph
    measured: Graph
    vector: torch.Tensor
    covariates: torch.Tensor


class Pairs(NamedTuple):
    """Perturbed cells, each with a control cell of its covariate.

    condition: the row of each pair's condition in Conditions.
    perturbed: number of the perturbed cell in the file, control: that of the control cell.
    weight:    of each pair in the loss: each condition of a batch weighs the same, whatever its number of cells; sum 1.
    """

    condition: np.ndarray
    perturbed: np.ndarray
    control: np.ndarray
    weight: np.ndarray


class Cells(NamedTuple):
    """All cells of the file.

    rows:         from numbers of cells to their expression, dense, on the device.
    condition:    the row of each cell's condition in Conditions, -1 for control and what cannot be predicted.
    covariate:    the row of each cell's covariate in Shape.covariates, -1 for one that is not in it.
    controls:     numbers of the train control cells of each covariate.
    control_mean: their mean expression, covariates x measured genes, on the device.
    """

    rows: Callable[[np.ndarray], torch.Tensor]
    condition: np.ndarray
    covariate: np.ndarray
    controls: list[np.ndarray]
    control_mean: torch.Tensor


def train(task: contract.TrainTask) -> None:
    """Train on the train cells and keep the weights of the least validation loss.

    Writes weights.pt, model.json and coexpression.parquet.

    With fewer than FEWEST_TO_CHOOSE_BY val conditions that can be predicted, the last weights are kept.
    """
    _, device = neural.start_torch(task.threads)
    settings = contract.hyperparameters(task, Settings)
    graph = contract.read_graph(task.embedding)
    file = contract.read_cells(task.cells)
    shape = shape_of(file, graph)
    links = go_links(graph, shape, settings)
    del graph
    is_train = (file.obs["split"] == "train").to_numpy()
    asked = {key for key in contract.keys_of(file.obs) if key.condition != contract.CONTROL}
    names = sorted(asked - set(unpredictable(asked, links, shape)))
    cells = cells_of(file, names, shape, device)
    measured = coexpression(cells, np.flatnonzero(is_train & (cells.covariate >= 0)), shape, settings)
    measured.to_parquet(task.output / "coexpression.parquet")
    conditions = conditions_of(names, links, measured, shape, settings, device)
    of_train, of_val = (np.flatnonzero((cells.condition >= 0) & (is_train == wanted)) for wanted in (True, False))
    val = pair_with_controls(cells, of_val, neural.generator(task.seed, 0))
    is_choosing = len(set(val.condition)) >= FEWEST_TO_CHOOSE_BY
    if not is_choosing:
        contract.log(f"fewer than {FEWEST_TO_CHOOSE_BY} val conditions: the last weights are kept")

    torch.manual_seed(task.seed)  # the initial weights, drawn on the CPU: the same for every device
    net = network(shape, settings).to(device)

    def loss(batch: np.ndarray, draws: np.random.Generator) -> torch.Tensor:
        pairs = pair_with_controls(cells, batch, draws)
        rows, of_pair = np.unique(pairs.condition, return_inverse=True)
        return error(shift(net, conditions, rows)[torch.from_numpy(of_pair).to(device)], pairs, cells, settings)

    def val_loss() -> float:
        return mean_error(net, conditions, val, cells, settings)

    neural.fit(task, net, settings, of_train, of_val, loss, val_loss, chooses=is_choosing, weigh=lambda batch: 1)
    contract.write_model(task, settings, shape)


def predict(task: contract.PredictTask) -> None:
    """Predict every condition whose genes have neighbours that were perturbed in training.

    In the covariates of the train cells; a prediction is the mean control cell, shifted.
    """
    _, device = neural.start_torch(task.threads)
    settings, shape = contract.read_model(task, Settings, Shape)
    links = go_links(contract.read_graph(task.embedding), shape, settings)
    reasons = unpredictable(task.conditions, links, shape)
    keys = sorted(set(task.conditions) - set(reasons))
    profiles = np.empty((len(keys), len(shape.genes)))
    if keys:
        net = neural.load_weights(network(shape, settings), task, device)
        measured = pd.read_parquet(task.model / "coexpression.parquet")
        conditions = conditions_of(keys, links, measured, shape, settings, device)
        means = contract.read_means(task.control)
        control = means.to_df().set_index(means.obs["covariate"].to_numpy())[shape.genes]
        profiles = control.loc[[key.covariate for key in keys]].to_numpy()
        profiles = profiles + all_shifts(net, conditions, settings).double().cpu().numpy()
    contract.write_predictions(task, keys, profiles, shape.genes, reasons)


# ---- graphs


def normalise_graph(graph: pd.DataFrame, most: int, names: Iterable[str]) -> pd.DataFrame:
    """List a graph's links as a convolution takes them: columns gene, neighbour, weight, sorted by gene.

    graph: columns gene, neighbour, weight, sorted by gene and falling weight; of each gene the first `most` rows count,
    and every gene of `names`, all there are, is linked to itself with weight 1. Each weight is divided by the root of
    the product of the sums of the weights of its two ends (Wu et al. 2019).
    """
    names = sorted(names)
    itself = pd.DataFrame({"gene": names, "neighbour": names, "weight": 1.0})
    links = pd.concat([itself, graph.groupby("gene", sort=False).head(most)], ignore_index=True)
    links = links.sort_values("gene", kind="stable", ignore_index=True)
    total = links.groupby("gene")["weight"].sum()
    ends = total[links["gene"]].to_numpy() * total[links["neighbour"]].to_numpy()
    return links.assign(weight=links["weight"] / np.sqrt(ends))


def go_links(graph: pd.DataFrame, shape: Shape, settings: Settings) -> pd.DataFrame:
    """Build the normalised graph of the Gene Ontology between all genes and those perturbed in training (README.md)."""
    is_link = graph["neighbour"].isin(set(shape.perturbed)) & (graph["neighbour"] != graph["gene"])
    return normalise_graph(graph[is_link], settings.go_neighbours, set(graph["gene"]))


def graph_of(links: pd.DataFrame, names: Sequence[str], layers: int, device: Any) -> Graph:
    """Find the part of a normalised graph on which the vectors of some genes depend."""
    within, reach = list(names), [len(names)]
    for _ in range(layers):
        known = set(within)
        ends = links["neighbour"][links["gene"].isin(known)]
        within += sorted(set(ends) - known)
        reach.append(len(within))
    row = {gene: number for number, gene in enumerate(within)}
    used = links[links["gene"].isin(set(within[: reach[-2]]))]
    origin = used["gene"].map(row).to_numpy()
    order = np.argsort(origin, kind="stable")
    start = np.searchsorted(origin[order], np.arange(reach[-2]))
    to = used["neighbour"].map(row).to_numpy(np.int64)[order]
    weight = used["weight"].to_numpy(np.float32)[order]
    return Graph(within, reach, *(torch.from_numpy(array).to(device) for array in (start, to, weight)))


def coexpression(cells: Cells, numbers: np.ndarray, shape: Shape, settings: Settings) -> pd.DataFrame:
    """Build the normalised graph of co-expression between the measured genes.

    Pearson's correlation, of either sign, over the train cells (`numbers`), each cell minus the mean of its covariate.
    A gene that does not vary has no link.
    """
    n_genes = len(shape.genes)
    products = torch.zeros(n_genes, n_genes, device=cells.control_mean.device)
    for covariate in range(len(shape.covariates)):
        own = numbers[cells.covariate[numbers] == covariate]
        mean = mean_of(cells.rows, own)
        for batch in neural.batches(own, CELLS_AT_ONCE):
            centred = cells.rows(batch) - mean
            products.addmm_(centred.T, centred)
    spread = products.diagonal().sqrt()
    spread = torch.where(spread > 0, spread, torch.inf)
    found = []
    for first in range(0, n_genes, GENES_AT_ONCE):
        size = (products[first : first + GENES_AT_ONCE] / spread[first : first + GENES_AT_ONCE, None] / spread).abs()
        gene, neighbour = (size > settings.coexpression_threshold).nonzero(as_tuple=True)
        found.append(np.column_stack([one.cpu() for one in (gene + first, neighbour, size[gene, neighbour])]))
    table = pd.DataFrame(np.concatenate(found), columns=["gene", "neighbour", "weight"])
    table = table[table["gene"] != table["neighbour"]]
    table = table.sort_values(["gene", "weight", "neighbour"], ascending=[True, False, True])
    names = np.array(shape.genes, dtype=object)
    ends = {end: names[table[end].to_numpy(np.int64)] for end in ("gene", "neighbour")}
    return normalise_graph(table.assign(**ends), settings.coexpression_neighbours, shape.genes)


# ---- cells


def mean_of(rows: Callable[[np.ndarray], torch.Tensor], numbers: np.ndarray) -> torch.Tensor:
    """Mean expression of some cells."""
    sums = [rows(batch).sum(dim=0, dtype=torch.float64) for batch in neural.batches(numbers, CELLS_AT_ONCE)]
    return (torch.stack(sums).sum(dim=0) / len(numbers)).float()


def cells_of(file: ad.AnnData, names: Iterable[contract.Key], shape: Shape, device: Any) -> Cells:
    """Read the cells of a file. names: the conditions that are learned from or validated with."""
    rows, obs = neural.hold_rows(file.X, device), file.obs
    condition = contract.rows_among(names, obs)
    covariate = pd.Index(shape.covariates).get_indexer(obs["covariate"])
    is_control = ((obs["condition"] == contract.CONTROL) & (obs["split"] == "train")).to_numpy()
    controls = [np.flatnonzero(is_control & (covariate == row)) for row in range(len(shape.covariates))]
    return Cells(rows, condition, covariate, controls, torch.stack([mean_of(rows, group) for group in controls]))


def shape_of(cells: ad.AnnData, graph: pd.DataFrame) -> Shape:
    """Select what is learned from: covariates that have train cells of control and of a perturbation in the graph.

    Raises ContractError if there is none.
    """
    obs = cells.obs[cells.obs["split"] == "train"]
    controlled = obs["covariate"][obs["condition"] == contract.CONTROL]
    is_known = contract.perturb_known(obs["condition"], graph["gene"])
    seen = set(contract.keys_of(obs[is_known & obs["covariate"].isin(controlled).to_numpy()]))
    if not seen:
        raise contract.ContractError("cells: no train perturbation has GO neighbours and control cells beside it")
    return Shape(cells.var_names.tolist(), sorted({key.covariate for key in seen}), contract.genes_in(seen))


def unpredictable(keys: Iterable[contract.Key], links: pd.DataFrame, shape: Shape) -> dict[contract.Key, str]:
    """List the keys that cannot be predicted, each with its reason. links: of `go_links`."""
    in_graph, linked = set(links["gene"]), set(links["gene"][links["gene"] != links["neighbour"]])
    near = linked | (in_graph & set(shape.perturbed))
    known = {
        "no GO neighbours for": in_graph,
        "no GO neighbours among the perturbations of the training for": near,
    }
    return contract.find_gaps(keys, known, shape.covariates, "has no training perturbation with GO neighbours")


def pair_with_controls(cells: Cells, perturbed: np.ndarray, draws: np.random.Generator) -> Pairs:
    """Perturbed cells (numbers), each with a random control cell of its covariate."""
    condition, covariate = cells.condition[perturbed], cells.covariate[perturbed]
    size = np.array([len(group) for group in cells.controls])
    control = np.concatenate(cells.controls)[(np.cumsum(size) - size)[covariate] + draws.integers(size[covariate])]
    _, of_pair, n_cells = np.unique(condition, return_inverse=True, return_counts=True)
    return Pairs(condition, perturbed, control, 1 / (n_cells[of_pair] * len(n_cells)))


# ---- the network


def network(shape: Shape, settings: Settings) -> torch.nn.ModuleDict:
    """Build the network.

    gene, perturbation, covariate: a vector each; convolutions: linear maps after each step through the graphs;
    condition: summed vectors -> vector of a condition; response: a gene's and a condition's vector -> a vector;
    first, last: weights of each gene's own; summary: first shifts -> vector.
    """
    from torch import nn

    width, n_genes = settings.hidden, len(shape.genes)

    def steps(count: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    net = nn.ModuleDict(
        {
            "gene": nn.Embedding(n_genes, width),
            "gene_convolutions": steps(settings.coexpression_layers),
            "perturbation": nn.Embedding(len(shape.perturbed), width),
            "perturbation_convolutions": steps(settings.go_layers),
            "condition": nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)),
            "response": nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)),
            "first": nn.Linear(width, n_genes),
            "summary": nn.Sequential(nn.Linear(n_genes, width), nn.ReLU(), nn.Linear(width, width)),
            "last": nn.Linear(width + 1, n_genes),
        }
    )
    if len(shape.covariates) > 1:
        net["covariate"] = nn.Embedding(len(shape.covariates), width)
    return net


def conditions_of(
    keys: Sequence[contract.Key],
    links: pd.DataFrame,
    measured: pd.DataFrame,
    shape: Shape,
    settings: Settings,
    device: Any,
) -> Conditions:
    """Encode the distinct keys as the network takes them. links, measured: the normalised graphs."""
    names = contract.genes_in(keys)
    marks = contract.mark_genes([key.condition for key in keys], names)
    graph = graph_of(links, names, settings.go_layers, device)
    row_of = {gene: row for row, gene in enumerate(shape.perturbed)}
    vector = torch.tensor([row_of.get(gene, len(row_of)) for gene in graph.names])
    covariates = torch.tensor([shape.covariates.index(key.covariate) for key in keys])
    return Conditions(
        torch.from_numpy(marks.astype(np.float32)).to(device),
        graph,
        graph_of(measured, shape.genes, settings.coexpression_layers, device),
        vector.to(device),
        covariates.to(device),
    )


def convolve(net: torch.nn.ModuleDict, part: str, vectors: torch.Tensor, graph: Graph) -> torch.Tensor:
    """Spread the vectors of graph.names over the graph and map them, layer by layer: those of the names asked for.

    A ReLU between layers.
    """
    layers = cast("torch.nn.ModuleList", net[part])
    for number, layer in enumerate(layers):
        n = graph.reach[len(layers) - 1 - number]
        if number:
            vectors = vectors.relu()
        start, n_links = graph.start[:n], len(graph.to) if n == len(graph.start) else int(graph.start[n])
        to, weight = graph.to[:n_links], graph.weight[:n_links]
        vectors = layer(functional.embedding_bag(to, vectors, start, mode="sum", per_sample_weights=weight))
    return vectors


def shift(net: torch.nn.ModuleDict, conditions: Conditions, rows: np.ndarray) -> torch.Tensor:
    """By how much some conditions move the expression of a cell: rows x measured genes."""
    parts: Any = net  # torch's types do not say what a ModuleDict holds
    of = torch.from_numpy(rows).to(conditions.genes.device)
    # One row more, of zeros: genes that no training perturbed have no vector of their own.
    vectors = functional.pad(parts["perturbation"].weight, (0, 0, 0, 1)).index_select(0, conditions.vector)
    total = conditions.genes[of] @ convolve(net, "perturbation_convolutions", vectors, conditions.graph)
    if "covariate" in net:
        total = total + net["covariate"](conditions.covariates[of])
    gene = convolve(net, "gene_convolutions", parts["gene"].weight, conditions.measured).relu()
    first = response(net, gene, net["condition"](total))
    last = parts["last"]
    own, shared = last.weight[:, 0], last.weight[:, 1:]
    moved: torch.Tensor = first * own + net["summary"](first) @ shared.T + last.bias
    return moved


def response(net: torch.nn.ModuleDict, gene: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Compute the first shift of every gene in every condition: conditions x genes.

    That of gene u and condition p is first_u . (out relu(into (gene_u + condition_p))), biases left out here. `into` is
    taken of genes and conditions apart, and first_u . out is one vector: what is left for each pair of them is an
    addition, a ReLU and a product.
    """
    layers = cast("torch.nn.Sequential", net["response"])
    into, out, first = (cast("torch.nn.Linear", layer) for layer in (layers[0], layers[2], net["first"]))
    weight = first.weight @ out.weight
    constant = first.weight @ out.bias + first.bias
    return _pairwise(gene @ into.weight.T, condition @ into.weight.T + into.bias, weight) + constant


def _pairwise(genes: torch.Tensor, conditions: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight_u . relu(genes_u + conditions_p) for every condition p and gene u.

    With a gradient of its own, which repeats the sums instead of keeping them: conditions x genes x width numbers would
    not fit a processor's cache, and on a GPU most of its memory. So many genes at a time that they do; on a GPU all, in
    bfloat16, added up in float32.
    """
    on_gpu = genes.device.type == "cuda"
    n_genes, width = genes.shape
    half = torch.bfloat16 if on_gpu else torch.float32
    at_once = n_genes if on_gpu else max(1, NUMBERS_AT_ONCE // (width * len(conditions)))
    spans = [slice(first, first + at_once) for first in range(0, n_genes, at_once)]

    class Pairwise(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, genes: torch.Tensor, conditions: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            genes, conditions, weight = genes.to(half), conditions.to(half), weight.to(half)
            ctx.save_for_backward(genes, conditions, weight)
            sums = [(conditions[:, None] + genes[span]).relu_().mul_(weight[span]) for span in spans]
            return torch.cat([one.sum(dim=2, dtype=torch.float32) for one in sums], dim=1)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            genes, conditions, weight = ctx.saved_tensors
            of_genes, of_weight = (torch.empty(genes.shape, device=genes.device) for _ in range(2))
            of_conditions = torch.zeros(conditions.shape, device=genes.device)
            for span in spans:
                hidden = (conditions[:, None] + genes[span]).relu_()
                above = gradient[:, span, None].to(half)
                of_weight[span] = (hidden * above).sum(dim=0, dtype=torch.float32)
                active = hidden.sign_().mul_(weight[span]).mul_(above)
                of_genes[span] = active.sum(dim=0, dtype=torch.float32)
                of_conditions += active.sum(dim=1, dtype=torch.float32)
            return of_genes, of_conditions, of_weight

    sums: torch.Tensor = Pairwise.apply(genes, conditions, weight)
    return sums


def all_shifts(net: torch.nn.ModuleDict, conditions: Conditions, settings: Settings) -> torch.Tensor:
    """`shift` of all conditions, without a gradient."""
    with torch.no_grad():
        parts = neural.batches(np.arange(len(conditions.genes)), settings.batch_size)
        return torch.cat([shift(net, conditions, part) for part in parts])


def error(shifts: torch.Tensor, pairs: Pairs, cells: Cells, settings: Settings) -> torch.Tensor:
    """Compute the loss, a float64 scalar.

    The weighted sum over pairs of the mean over genes of |error|^(2 + focus) + direction times the squared
    difference in sign, signs being those of the difference from the mean control cell.

    shifts: pairs x measured genes. A sign has no gradient: the second term counts in the validation alone.
    """
    device = shifts.device
    measured, predicted = cells.rows(pairs.perturbed), cells.rows(pairs.control) + shifts
    distance = (predicted - measured).square().pow(1 + settings.focus / 2).mean(dim=1)
    with torch.no_grad():
        mean = cells.control_mean[torch.from_numpy(cells.covariate[pairs.perturbed]).to(device)]
        in_sign = ((predicted - mean).sign() - (measured - mean).sign()).square().mean(dim=1)
    return torch.from_numpy(pairs.weight).to(device) @ (distance + settings.direction * in_sign).double()


def mean_error(
    net: torch.nn.ModuleDict, conditions: Conditions, pairs: Pairs, cells: Cells, settings: Settings
) -> float:
    """`error` of many pairs, without a gradient."""
    with torch.no_grad():
        shifts = all_shifts(net, conditions, settings)
        total = 0.0
        for part in neural.batches(np.arange(len(pairs.condition)), settings.test_batch_size):
            some = Pairs(*(field[part] for field in pairs))
            total += float(error(shifts[torch.from_numpy(some.condition).to(shifts.device)], some, cells, settings))
    return total


if __name__ == "__main__":
    contract.main(DESCRIPTION, train, predict)
