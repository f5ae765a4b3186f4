"""GEARS: its shifts and loss against the definition gene by gene, its graphs, what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from model_containers import contract, neural

SMALL = {"hidden": 4, "epochs": 3, "learning_rate": 0.01}
CPU = torch.device("cpu")
GENES = [f"g{column}" for column in range(7)]


@pytest.fixture(scope="module")
def gears(load):
    return load("gears")


def graph_table(*rows: tuple[str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["gene", "neighbour", "weight"])


GO = graph_table(
    ("A", "B", 0.9),
    ("A", "Z", 0.8),
    ("A", "C", 0.5),
    ("B", "A", 0.9),
    ("C", "A", 0.5),
    ("X", "A", 0.6),
    ("X", "B", 0.3),
    ("X", "C", 0.2),
    ("Y", "Z", 0.4),
    ("Z", "A", 0.8),
)
MEASURED = graph_table(("g0", "g1", 0.7), ("g1", "g0", 0.7), ("g1", "g5", 0.5), ("g5", "g1", 0.5))


@pytest.fixture(params=[1, 2], ids=["one layer", "two layers"])
def case(gears, request):
    """A network with vectors of A, B and C, and conditions with and without one that no training perturbed (X)."""
    layers = request.param
    settings = gears.Settings(hidden=4, go_layers=layers, coexpression_layers=layers, go_neighbours=2)
    shape = gears.Shape(GENES, ["x", "y"], ["A", "B", "C"])
    keys = [contract.Key(*name) for name in [("x", "A"), ("x", "A+X"), ("y", "B"), ("y", "X"), ("x", "B+C")]]
    links, measured = gears.go_links(GO, shape, settings), gears.normalise_graph(MEASURED, 20, GENES)
    torch.manual_seed(0)
    net = gears.network(shape, settings)
    return net, settings, keys, links, measured, gears.conditions_of(keys, links, measured, shape, settings, CPU)


def dense(links: pd.DataFrame, names: list[str]) -> torch.Tensor:
    matrix = links.pivot_table(index="gene", columns="neighbour", values="weight").reindex(index=names, columns=names)
    return torch.tensor(matrix.fillna(0).to_numpy(np.float32))


def spread(layers, vectors: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
    for number, layer in enumerate(layers):
        vectors = layer(adjacency @ (vectors.relu() if number else vectors))
    return vectors


def one_by_one(net, key, links, measured) -> torch.Tensor:
    """The shift of one condition, by the definition, gene by gene."""
    names = sorted(set(links["gene"]))
    own = torch.zeros(len(names), 4)
    own[[names.index(gene) for gene in "ABC"]] = net["perturbation"].weight
    perturbation = spread(net["perturbation_convolutions"], own, dense(links, names))
    gene = spread(net["gene_convolutions"], net["gene"].weight, dense(measured, GENES)).relu()
    total = net["covariate"](torch.tensor(["x", "y"].index(key.covariate)))
    for name in contract.genes_of(key.condition):
        total = total + perturbation[names.index(name)]
    condition = net["condition"](total)
    first = torch.stack(
        [net["first"].weight[u] @ net["response"](gene[u] + condition) + net["first"].bias[u] for u in range(7)]
    )
    summary = net["summary"](first)
    return torch.stack(
        [net["last"].weight[u] @ torch.cat([first[u, None], summary]) + net["last"].bias[u] for u in range(7)]
    )


@pytest.fixture(params=[2**18, 20], ids=["at once", "in pieces"])
def pieces(gears, request, monkeypatch) -> None:
    monkeypatch.setattr(gears, "NUMBERS_AT_ONCE", request.param)


@pytest.mark.usefixtures("pieces")
def test_shift_and_gradient_are_those_of_the_definition(gears, case):
    net, _, keys, links, measured, conditions = case
    rows = np.array([4, 1, 0, 3, 2])
    found = gears.shift(net, conditions, rows)
    expected = torch.stack([one_by_one(net, keys[row], links, measured) for row in rows])
    torch.testing.assert_close(found, expected)
    ways = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad((shifts * ways).sum(), list(net.parameters())) for shifts in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_definition(gears):
    rng = np.random.default_rng(3)
    settings = gears.Settings()
    X = sparse.random(12, 7, 0.6, format="csr", dtype=np.float32, rng=rng)
    condition = np.array([0, 0, 0, 1, 2, -1, -1, -1, -1, -1, -1, -1])
    covariate = np.array([0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0])
    controls = [np.array([5, 6, 7]), np.array([8, 9])]
    mean = torch.tensor(np.stack([X.toarray()[group].mean(axis=0) for group in controls]))
    cells = gears.Cells(neural.hold_rows(X, CPU), condition, covariate, controls, mean)
    pairs = gears.pair_with_controls(cells, np.array([3, 0, 4, 1, 2]), np.random.default_rng(0))
    assert all(number in controls[covariate[cell]] for cell, number in zip(pairs.perturbed, pairs.control, strict=True))
    shifts = torch.tensor(rng.normal(size=(5, 7)).astype(np.float32))
    terms: dict[int, list[float]] = {}
    for row, (of, cell, control) in enumerate(zip(pairs.condition, pairs.perturbed, pairs.control, strict=True)):
        y, x = X.toarray()[cell], X.toarray()[control] + shifts[row].numpy()
        c = mean[covariate[cell]].numpy()
        terms.setdefault(of, []).append((np.abs(x - y) ** 4 + 0.1 * (np.sign(y - c) - np.sign(x - c)) ** 2).mean())
    expected = np.mean([np.mean(of_cells) for of_cells in terms.values()])
    assert gears.error(shifts, pairs, cells, settings).item() == pytest.approx(expected, rel=1e-5)


def test_every_control_cell_is_drawn(gears):
    condition, covariate = np.zeros(300, dtype=int), np.zeros(300, dtype=int)
    cells = gears.Cells(None, condition, covariate, [np.array([3, 7, 8])], None)
    drawn = gears.pair_with_controls(cells, np.arange(300), np.random.default_rng(0)).control
    assert set(drawn) == {3, 7, 8}
    assert np.bincount(drawn).max() < 130


# ---- graphs


def test_links_are_normalised_by_both_ends(gears):
    links = gears.normalise_graph(GO[GO["gene"].isin(["A", "B"])], 2, ["A", "B", "Z"]).set_index(["gene", "neighbour"])
    total = {"A": 1 + 0.9 + 0.8, "B": 1 + 0.9, "Z": 1.0}
    expected = {("A", "A"): 1, ("A", "B"): 0.9, ("A", "Z"): 0.8, ("B", "A"): 0.9, ("B", "B"): 1, ("Z", "Z"): 1}
    expected = {ends: weight / np.sqrt(total[ends[0]] * total[ends[1]]) for ends, weight in expected.items()}
    assert links["weight"].to_dict() == pytest.approx(expected)


def test_genes_are_linked_to_the_most_similar_ones_perturbed_in_training(gears):
    links = gears.go_links(GO, gears.Shape(GENES, ["x"], ["A", "B", "C"]), gears.Settings(go_neighbours=2))
    found = {gene: set(rows["neighbour"]) - {gene} for gene, rows in links.groupby("gene")}
    assert found == {"A": {"B", "C"}, "B": {"A"}, "C": {"A"}, "X": {"A", "B"}, "Y": set(), "Z": {"A"}}


@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_coexpression_is_the_correlation_within_covariates_in_train_cells(gears, monkeypatch, threshold):
    monkeypatch.setattr(gears, "GENES_AT_ONCE", 3)
    monkeypatch.setattr(gears, "CELLS_AT_ONCE", 11)
    rng = np.random.default_rng(5)
    X = rng.normal(size=(60, 7)) @ (np.eye(7) + 0.5 * rng.normal(size=(7, 7)))
    X[:, 4] = 2.0
    covariate = np.repeat([0, 1, -1], [30, 20, 10])
    X[30:50] += 5
    train = np.flatnonzero((covariate >= 0) & (np.arange(60) % 5 > 0))
    rows = neural.hold_rows(sparse.csr_matrix(X.astype(np.float32)), CPU)
    cells = gears.Cells(rows, covariate, covariate, [], torch.zeros(1))
    settings = gears.Settings(coexpression_neighbours=3, coexpression_threshold=threshold)
    found = gears.coexpression(cells, train, gears.Shape(GENES, ["x", "y"], []), settings)
    centred = (
        pd.DataFrame(X, columns=GENES).loc[train].groupby(covariate[train]).transform(lambda part: part - part.mean())
    )
    size = centred.drop(columns="g4").corr().abs()
    links = [
        (gene, other, value)
        for gene in size
        for other, value in size[gene].drop(gene).sort_values(ascending=False).items()
        if value > threshold
    ]
    expected = gears.normalise_graph(graph_table(*links), 3, GENES)
    names = ["gene", "neighbour"]
    pd.testing.assert_frame_equal(
        found.sort_values(names, ignore_index=True), expected.sort_values(names, ignore_index=True), rtol=1e-4
    )


def test_what_cannot_be_predicted_has_its_reason(gears):
    shape = gears.Shape(GENES, ["x"], ["A", "B", "C"])
    links = gears.go_links(GO, shape, gears.Settings())
    keys = [contract.Key("x", name) for name in ("A", "X", "Y", "Q", "A+Q+R", "A+Y", "X+C")] + [contract.Key("z", "A")]
    assert {key.condition: reason for key, reason in gears.unpredictable(keys, links, shape).items()} == {
        "Y": "no GO neighbours among the perturbations of the training for Y",
        "A+Y": "no GO neighbours among the perturbations of the training for Y",
        "Q": "no GO neighbours for Q",
        "A+Q+R": "no GO neighbours for Q, R",
        "A": "covariate z has no training perturbation with GO neighbours",
    }


# ---- training


def told(panel) -> dict[str, Path]:
    return {"embedding": panel.folder / "graph.parquet"}


def test_what_is_learned_from(gears, two_lines):
    cells = contract.read_cells(two_lines.folder / "train.h5ad")
    graph = contract.read_graph(two_lines.folder / "graph.parquet")
    shape = gears.shape_of(cells, graph)
    assert shape.covariates == ["K562", "RPE1"]
    assert shape.perturbed == ["P00", "P01", "P02", "P04", "P05", "P06", "P09"], "P07 is val, P11 not in the graph"
    is_control = (cells.obs[["covariate", "condition"]] == ["RPE1", "control"]).all(axis=1)
    assert gears.shape_of(cells[~is_control], graph).covariates == ["K562"], "RPE1 has no control cells"
    with pytest.raises(contract.ContractError, match="no train perturbation has GO neighbours"):
        gears.shape_of(cells, graph[graph["gene"] == "P07"])


def test_a_prediction_is_the_mean_control_cell_shifted(gears, two_lines, tmp_path):
    gears.train(two_lines.train_task(tmp_path, hyperparameters=SMALL, **told(two_lines)))
    gears.predict(two_lines.predict_task(tmp_path, tmp_path, **told(two_lines)))
    predicted = ad.read_h5ad(tmp_path / "predictions.h5ad").to_df()
    stored = json.loads((tmp_path / "model.json").read_text())
    settings, shape = gears.Settings(**stored["settings"]), gears.Shape(**stored["shape"])
    net = gears.network(shape, settings)
    net.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    links = gears.go_links(contract.read_graph(told(two_lines)["embedding"]), shape, settings)
    key = contract.Key("RPE1", "P02+P03")
    measured = pd.read_parquet(tmp_path / "coexpression.parquet")
    conditions = gears.conditions_of([key], links, measured, shape, settings, CPU)
    control = ad.read_h5ad(two_lines.folder / "control.h5ad")
    mean = control[control.obs["covariate"] == "RPE1"].X.toarray().mean(axis=0)
    expected = mean + gears.shift(net, conditions, np.array([0])).detach().numpy()[0]
    np.testing.assert_allclose(predicted.loc["RPE1|P02+P03"], expected, atol=1e-5)


def losses(text: str) -> list[float]:
    events = [json.loads(line) for line in text.splitlines()]
    return [event["value"] for event in events if event.get("name") == "val_loss"]


@pytest.mark.parametrize(("fewest", "kept"), [(2, "best"), (3, "last")])
def test_which_weights_are_kept_hangs_on_the_number_of_val_conditions(
    gears, panel, tmp_path, capsys, monkeypatch, fewest, kept
):
    """The panel has two."""
    monkeypatch.setattr(gears, "FEWEST_TO_CHOOSE_BY", fewest)
    settings = SMALL | {"epochs": 12, "decay": 1.0, "learning_rate": 0.05}
    gears.train(panel.train_task(tmp_path, hyperparameters=settings, **told(panel)))
    found = losses(capsys.readouterr().out)
    best = int(np.argmin(found)) + 1
    assert best < 12, "else the test says nothing"
    weights = (tmp_path / "weights.pt").read_bytes()
    monkeypatch.setattr(gears, "FEWEST_TO_CHOOSE_BY", 3)
    again = settings | {"epochs": best if kept == "best" else 12}
    gears.train(panel.train_task(tmp_path, hyperparameters=again, **told(panel)))
    assert (tmp_path / "weights.pt").read_bytes() == weights


def test_a_training_that_was_cut_off_ends_with_the_same_files(gears, panel, tmp_path, monkeypatch):
    monkeypatch.setattr(neural, "SAVING_SHARE", float("inf"))
    (tmp_path / "checkpoint").mkdir()

    def run(name: str, checkpoint: Path | None = None) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        gears.train(panel.train_task(tmp_path / name, hyperparameters=SMALL, checkpoint=checkpoint, **told(panel)))

    run("whole")
    steps = []

    class Dies(neural.Adam):
        def step(self, loss, rate, largest_norm=None):
            steps.append(rate)
            if len(steps) == 8:
                raise KeyboardInterrupt
            super().step(loss, rate, largest_norm)

    with monkeypatch.context() as patch:
        patch.setattr(neural, "Adam", Dies)
        with pytest.raises(KeyboardInterrupt):
            run("broken", tmp_path / "checkpoint")
    assert len(set(steps)) == 2, "in the midst of the second epoch"
    run("broken", tmp_path / "checkpoint")
    for file in ("weights.pt", "model.json", "coexpression.parquet"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(("field", "value"), [("hidden", 0), ("decay", 0.0), ("direction", -0.1), ("epochs", -1)])
def test_hyperparameters_in_their_range(gears, panel, tmp_path, field, value):
    with pytest.raises(contract.ContractError, match=f"hyperparameters: {field}: wanted a number above 0"):
        gears.train(panel.train_task(tmp_path, hyperparameters={field: value}, **told(panel)))
