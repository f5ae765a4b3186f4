"""fMLP: its loss and gradient against one pass per cell, its sums of latents, what it is trained on."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from model_containers import contract, neural

SMALL = {"hidden": 16, "latent": 4}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fmlp(load):
    return load("fmlp")


@pytest.fixture
def case(fmlp):
    """A network, conditions of none, one and two genes in two covariates, and random cells of them."""
    rng = np.random.default_rng(2)
    names = [("x", "control"), ("x", "A"), ("x", "A+B"), ("y", "B"), ("y", "C")]
    keys = [contract.Key(*name) for name in names]
    embedding = pd.DataFrame(rng.normal(size=(3, 5)), index=["A", "B", "C"])
    shape = contract.Shape(5, [f"g{column}" for column in range(7)], ["x", "y"])
    torch.manual_seed(0)
    net = fmlp.network(shape, fmlp.Settings(**SMALL))
    conditions = fmlp.conditions_of(keys, embedding, shape, CPU)
    X = sparse.random(40, 7, 0.5, format="csr", dtype=np.float32, rng=rng)
    of_cell = rng.integers(0, len(keys), 40)
    return net, keys, embedding, conditions, X, of_cell


def one_by_one(net, key, embedding) -> torch.Tensor:
    """The network's definition for one condition."""
    latent = net["covariate"](torch.tensor(["x", "y"].index(key.covariate)))
    for gene in contract.genes_of(key.condition):
        latent = latent + net["encoder"](torch.tensor(embedding.loc[gene].to_numpy(np.float32)))
    return net["decoder"](latent)


def test_latents_of_genes_and_covariate_are_summed(fmlp, case):
    net, keys, embedding, conditions, _, _ = case
    rows = np.array([4, 2, 0, 2])
    found = fmlp.forward(net, conditions, rows)
    expected = torch.stack([one_by_one(net, keys[row], embedding) for row in rows])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(fmlp.forward(net, conditions, np.array([0])), expected[2:3], msg="control alone")


@pytest.fixture(params=["dense", "compressed"])
def form(request, monkeypatch) -> str:
    """How the cells are held."""
    if request.param == "compressed":
        monkeypatch.setattr(neural, "DENSE_BYTES", 0)
    return request.param


def test_loss_and_gradient_are_those_of_single_cells(fmlp, case, form):
    net, keys, embedding, conditions, X, of_cell = case
    batch = np.random.default_rng(0).permutation(40)[:25]
    loss = fmlp.squared_error(net, conditions, of_cell[batch], neural.hold_rows(X, CPU)(batch))
    loss.backward()
    found = {name: weights.grad.clone() for name, weights in net.named_parameters()}
    net.zero_grad()
    predicted = torch.stack([one_by_one(net, keys[of_cell[cell]], embedding) for cell in batch])
    expected = torch.nn.functional.mse_loss(predicted, torch.tensor(X.toarray()[batch]))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, weights in net.named_parameters():
        torch.testing.assert_close(found[name], weights.grad, rtol=1e-4, atol=1e-7)


def test_mean_error_is_that_of_all_cells(fmlp, case):
    net, keys, embedding, conditions, X, of_cell = case
    predicted = torch.stack([one_by_one(net, keys[row], embedding) for row in of_cell]).detach().numpy()
    rows = neural.hold_rows(X, CPU)

    def loss(batch: np.ndarray) -> torch.Tensor:
        return fmlp.squared_error(net, conditions, of_cell[batch], rows(batch))

    found = neural.mean_loss(net, loss, np.arange(40), 16)
    assert found == pytest.approx(((predicted - X.toarray()) ** 2).mean(), rel=1e-5)


def test_one_covariate_has_no_latent(fmlp):
    assert "covariate" not in fmlp.network(contract.Shape(5, ["g"], ["x"]), fmlp.Settings(**SMALL))


def test_standardising_forgets_scale_offset_and_length():
    rng = np.random.default_rng(1)
    table = pd.DataFrame(rng.normal(size=(20, 4)))
    # Of ten copies of 0.1 rounding leaves a spread above zero.
    found = contract.standardise_embedding(table.assign(constant=0.1))
    np.testing.assert_allclose((found**2).sum(axis=1), 1)
    assert (found["constant"] == 0).all()
    other = contract.standardise_embedding(table * [1e-3, 1, 10, 1e4] + [5, -3, 0, 1e3])
    np.testing.assert_allclose(found.drop(columns="constant"), other, atol=1e-9)


def test_what_is_trained_on(two_lines):
    cells = contract.read_cells(two_lines.folder / "train.h5ad")
    cells.obs.loc[(cells.obs["condition"] == "control") & (np.arange(cells.n_obs) % 2 == 0), "split"] = "val"
    cells.obs.loc[(cells.obs["covariate"] == "RPE1") & (cells.obs["split"] == "train"), "condition"] = "P11"
    kept, shape = contract.select_cells(cells, contract.read_embedding(two_lines.folder / "embedding.parquet"))
    used = cells.obs[kept]
    assert shape.covariates == ["K562"], "RPE1 has val conditions alone"
    assert set(used["covariate"]) == {"K562"}
    assert set(used["condition"][used["split"] == "val"]) == {"P07", "P04+P05"}
    train = {"control", "P00", "P01", "P02", "P04", "P05", "P06", "P09", "P00+P01", "P01+P06"}
    assert set(used["condition"][used["split"] == "train"]) == train
    n_controls = (cells.obs[["covariate", "condition", "split"]] == ["K562", "control", "train"]).all(axis=1).sum()
    assert (used["condition"] == "control").sum() == n_controls > 0


def curve(capsys, name: str) -> list[float]:
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [event["value"] for event in events if event.get("name") == name]


def test_the_weights_of_the_least_validation_loss_are_kept(fmlp, panel, tmp_path, capsys):
    """A high learning rate, so that the network soon knows the train conditions by heart."""
    settings = SMALL | {"epochs": 40, "validate_every": 2, "learning_rate": 0.02, "decay_every": 100}
    fmlp.train(panel.train_task(tmp_path, hyperparameters=settings))
    losses = curve(capsys, "val_loss")
    assert min(losses) < losses[-1], "else the test says nothing"
    # What the kept weights predict for the val cells has that loss.
    fmlp.predict(panel.predict_task(tmp_path, tmp_path, conditions=keys_of("P07", "P04+P05")))
    cells = ad.read_h5ad(panel.folder / "train.h5ad")
    predictions = ad.read_h5ad(tmp_path / "predictions.h5ad").to_df()
    val = cells[cells.obs["split"] == "val"]
    errors = val.X.toarray() - predictions.loc["line|" + val.obs["condition"].astype(str)].to_numpy()
    assert (errors**2).mean() == pytest.approx(min(losses), rel=1e-5)


def keys_of(*conditions: str) -> tuple[contract.Key, ...]:
    return tuple(contract.Key("line", condition) for condition in conditions)


def test_without_val_conditions_the_last_weights_are_kept(fmlp, panel, tmp_path, capsys):
    cells = ad.read_h5ad(panel.folder / "train.h5ad")
    cells[cells.obs["split"] == "train"].write_h5ad(tmp_path / "train.h5ad")
    settings = SMALL | {"epochs": 40, "batch_size": 32, "learning_rate": 0.01, "decay_every": 100}
    fmlp.train(panel.train_task(tmp_path, cells=tmp_path / "train.h5ad", hyperparameters=settings))
    lines = capsys.readouterr()
    assert "val_loss" not in lines.out
    fmlp.predict(panel.predict_task(tmp_path, tmp_path, conditions=keys_of("P00", "P02", "P01+P06")))
    predictions = ad.read_h5ad(tmp_path / "predictions.h5ad")
    # It has learned the conditions that it saw, combinations too, better than their mean.
    means = contract.read_means(tmp_path / "train.h5ad")
    truth = means[means.obs["condition"].isin(predictions.obs["condition"])].X
    dataset_mean = contract.dataset_means(means).to_numpy()
    assert ((predictions.X - truth) ** 2).mean() < 0.3 * ((dataset_mean - truth) ** 2).mean()


def test_another_seed_gives_other_weights(fmlp, panel, tmp_path):
    settings = SMALL | {"epochs": 1}
    written = []
    for seed in (1, 2, 1):
        fmlp.train(panel.train_task(tmp_path, hyperparameters=settings, seed=seed))
        written.append((tmp_path / "weights.pt").read_bytes())
    assert written[0] == written[2] != written[1]


def test_other_dimensions_than_in_training_are_refused(fmlp, panel, tmp_path):
    fmlp.train(panel.train_task(tmp_path, hyperparameters=SMALL | {"epochs": 1}))
    pd.DataFrame({"d0": [1.0, 2.0]}, index=["P03", "P08"]).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(contract.ContractError, match="1 dimensions; the model was trained with 6"):
        fmlp.predict(panel.predict_task(tmp_path, tmp_path, embedding=tmp_path / "e.parquet"))


@pytest.mark.parametrize("field", ["epochs", "batch_size", "learning_rate", "latent"])
def test_hyperparameters_must_be_positive(fmlp, panel, tmp_path, field):
    with pytest.raises(contract.ContractError, match=f"hyperparameters: {field}: wanted a number above 0"):
        fmlp.train(panel.train_task(tmp_path, hyperparameters={field: 0}))
