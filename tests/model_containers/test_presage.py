"""PRESAGE: its pieces by hand, one condition at a time; what it learns from, when it stops, several sources."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import leaky_relu

from model_containers import contract, neural

SMALL = {"item_hidden": 16, "source_hidden": 8, "batch_size": 4}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def presage(load):
    return load("presage")


@pytest.fixture(params=[{}, {"item_layers": 2, "source_layers": 1}], ids=["linear", "item layers"])
def case(presage, request):
    """A network, conditions of one and two genes in two covariates, and two sources, each of which lacks a gene."""
    rng = np.random.default_rng(2)
    keys = [contract.Key(*name) for name in [("x", "A"), ("x", "A+B"), ("y", "B"), ("y", "C"), ("x", "B+C")]]
    sources = {
        "first": pd.DataFrame(rng.normal(size=(2, 5)), index=["A", "B"]),
        "second": pd.DataFrame(rng.normal(size=(2, 3)), index=["C", "B"]),
    }
    shape = presage.Shape({"first": 5, "second": 3}, [f"g{column}" for column in range(7)], ["x", "y"])
    settings = presage.Settings(**SMALL, **request.param)
    torch.manual_seed(0)
    net = presage.network(shape, settings)
    with torch.no_grad():  # they begin at 0, where the test would see nothing of them
        for weights in (*net["pool"], net["covariate"].weight):
            weights.normal_()
    return net, settings, keys, sources, presage.conditions_of(keys, sources, shape, CPU)


def of_sources(net, gene: str, sources) -> dict[int, torch.Tensor]:
    """The aligned latent of a gene in each source that has it, by the definition."""
    latents = {}
    for number, table in enumerate(sources.values()):
        if gene in table.index:
            latent = net["first"][number](torch.tensor(table.loc[gene].to_numpy(np.float32)))
            for weight, bias in net["later"]:
                latent = leaky_relu(latent, 0.2) @ weight[number] + bias[number, 0]
            latents[number] = latent
    return latents


def of_gene(net, settings, gene: str, sources) -> torch.Tensor:
    """The latent of a gene, by the definition."""
    latents = of_sources(net, gene, sources)
    learned = {number: torch.exp(net["pool"][0][number, 0, 0] / settings.temperature) for number in latents}
    by_weight = sum(learned[number] * latents[number] for number in latents) / sum(learned.values())
    left, right, score = net["attention"]
    attention = {n: torch.exp(score(leaky_relu(left(by_weight) + right(latents[n]), 0.2))) for n in latents}
    by_attention = sum(attention[number] * latents[number] for number in latents) / sum(attention.values())
    return settings.attention * by_attention + (1 - settings.attention) * by_weight


def one_by_one(net, settings, key, sources) -> torch.Tensor:
    """The predicted log fold change of one condition, by the definition."""
    latent = sum(of_gene(net, settings, gene, sources) for gene in contract.genes_of(key.condition))
    return net["head"](latent + net["covariate"].weight["xy".index(key.covariate)])


def test_a_prediction_is_that_of_the_definition(presage, case):
    net, settings, keys, sources, conditions = case
    rows = np.array([4, 2, 0, 3, 1, 2])
    expected = torch.stack([one_by_one(net, settings, keys[row], sources) for row in rows])
    torch.testing.assert_close(presage.forward(net, settings, conditions, rows), expected)


def test_gradient_is_that_of_the_definition(presage, case):
    net, settings, keys, sources, conditions = case
    rows = np.array([3, 1, 4])
    found = presage.forward(net, settings, conditions, rows).square().sum()
    expected = torch.stack([one_by_one(net, settings, keys[row], sources) for row in rows]).square().sum()
    gradients = (torch.autograd.grad(one, list(net.parameters())) for one in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_validation_is_by_correlation(presage):
    rng = np.random.default_rng(0)
    predicted, measured = rng.normal(size=(2, 4, 9)).astype(np.float32)
    measured[3] = 2.0
    expected = sum(np.corrcoef(predicted[row], measured[row])[0, 1] for row in range(3)) / 4
    found = presage.mean_correlation(torch.from_numpy(predicted), torch.from_numpy(measured))
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_head_begins_as_the_mean_of_the_train_perturbations(presage, panel, tmp_path):
    settings = SMALL | {"epochs": 1, "learning_rate": 1e-30}
    presage.train(panel.train_task(tmp_path, hyperparameters=settings))
    means = contract.read_means(panel.folder / "train.h5ad")
    embedding = contract.read_embedding(panel.folder / "embedding.parquet")
    changes, _ = presage.usable(means, {"one": embedding})
    bias = torch.load(tmp_path / "weights.pt", weights_only=True)["head.0.bias"]
    np.testing.assert_allclose(bias, changes.X[changes.obs["split"] == "train"].mean(axis=0), atol=1e-6)


def test_one_source_is_not_weighed(presage):
    """The latent of a gene is then the source's, whatever the weights; one covariate has no part of its own."""
    shape, settings = presage.Shape({"only": 5}, ["g"], ["x"]), presage.Settings(**SMALL)
    net = presage.network(shape, settings)
    assert "covariate" not in net
    source = {"only": pd.DataFrame(np.random.default_rng(0).normal(size=(2, 5)), index=["A", "B"])}
    conditions = presage.conditions_of([contract.Key("x", "A"), contract.Key("x", "A+B")], source, shape, CPU)
    first, both = (
        torch.stack([of_sources(net, gene, source)[0] for gene in genes]).sum(dim=0) for genes in ("A", "AB")
    )
    expected = net["head"](torch.stack([first, both]))
    torch.testing.assert_close(presage.forward(net, settings, conditions, np.array([0, 1])), expected)


def test_standardising_forgets_scale_offset_length_and_order(presage):
    rng = np.random.default_rng(1)
    tables = {"b": pd.DataFrame(rng.normal(size=(20, 4))), "a": pd.DataFrame(rng.normal(size=(15, 2)))}
    found = presage.standardise_sources({"b": tables["b"].assign(constant=7.0), "a": tables["a"]})
    assert list(found) == ["a", "b"]
    np.testing.assert_allclose((found["b"] ** 2).sum(axis=1), 1)
    assert (found["b"]["constant"] == 0).all()
    other = presage.standardise_sources({"b": tables["b"] * [1e-3, 1, 10, 1e4] + [5, -3, 0, 1e3]})
    np.testing.assert_allclose(found["b"].drop(columns="constant"), other["b"], atol=1e-9)


def test_what_is_learned_from(presage, two_lines):
    """Log fold changes against the control cells of the train split, by hand."""
    cells = ad.read_h5ad(two_lines.folder / "train.h5ad")
    cells.obs = cells.obs.astype(str)
    cells.obs.loc[(cells.obs["condition"] == "control") & (np.arange(cells.n_obs) % 2 == 0), "split"] = "val"
    cells.obs.loc[(cells.obs["covariate"] == "RPE1") & (cells.obs["split"] == "train"), "condition"] = "P11"
    sources = {"one": contract.read_embedding(two_lines.folder / "embedding.parquet")}
    path = two_lines.folder.parent / "changed.h5ad"
    cells.obs.loc[(cells.obs["covariate"] == "RPE1") & (np.arange(cells.n_obs) % 5 == 0), "condition"] = "control"
    cells.write_h5ad(path)
    changes, shape = presage.usable(contract.read_means(path), sources)
    assert shape.covariates == ["K562"], "RPE1 has val conditions alone"
    assert set(changes.obs["condition"][changes.obs["split"] == "val"]) == {"P07", "P04+P05"}
    train = {"P00", "P01", "P02", "P04", "P05", "P06", "P09", "P00+P01", "P01+P06"}
    assert set(changes.obs["condition"][changes.obs["split"] == "train"]) == train
    table, obs = cells.to_df().astype(float), cells.obs
    here = obs["covariate"] == "K562"
    control = table[here & (obs["condition"] == "control") & (obs["split"] == "train")].mean()
    for name, values in zip(changes.obs["condition"], changes.X, strict=True):
        expected = table[here & (obs["condition"] == name)].mean() - control
        np.testing.assert_allclose(values, expected, atol=1e-6)


# ---- training


def curve(capsys, name: str) -> list[float]:
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [event["value"] for event in events if event.get("name") == name]


def test_the_weights_of_the_least_validation_loss_are_kept_and_the_training_ends(presage, panel, tmp_path, capsys):
    settings = SMALL | {"patience": 15, "learning_rate": 0.02}
    presage.train(panel.train_task(tmp_path, hyperparameters=settings))
    losses = curve(capsys, "val_loss")
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 15 < 1000
    # What the kept weights predict for the val conditions has that loss.
    val = ("P04+P05", "P07")
    keys = tuple(contract.Key("line", name) for name in val)
    presage.predict(panel.predict_task(tmp_path, tmp_path, conditions=keys))
    means = contract.read_means(panel.folder / "train.h5ad")
    control = presage.control_means(means).loc["line"].to_numpy()
    predicted = ad.read_h5ad(tmp_path / "predictions.h5ad").X - control
    measured = means[means.obs["condition"].isin(val)].X - control
    correlations = [np.corrcoef(one, other)[0, 1] for one, other in zip(predicted, measured, strict=True)]
    assert 1 - np.mean(correlations) == pytest.approx(losses[best], abs=1e-5)


def test_without_val_conditions_all_epochs_are_trained(presage, panel, tmp_path, capsys):
    cells = ad.read_h5ad(panel.folder / "train.h5ad")
    cells[cells.obs["split"] == "train"].write_h5ad(tmp_path / "train.h5ad")
    settings = SMALL | {"epochs": 120, "patience": 5}
    presage.train(panel.train_task(tmp_path, cells=tmp_path / "train.h5ad", hyperparameters=settings))
    said = capsys.readouterr().out
    assert "val_loss" not in said
    assert said.count("train_loss") == 120
    # It has learned the conditions that it saw, a combination too, better than their mean.
    keys = tuple(contract.Key("line", name) for name in ("P00", "P02", "P01+P06"))
    presage.predict(panel.predict_task(tmp_path, tmp_path, conditions=keys))
    predictions = ad.read_h5ad(tmp_path / "predictions.h5ad")
    means = contract.read_means(tmp_path / "train.h5ad")
    truth = means[means.obs["condition"].isin(predictions.obs["condition"])].X
    dataset_mean = contract.dataset_means(means).to_numpy()
    assert ((predictions.X - truth) ** 2).mean() < 0.1 * ((dataset_mean - truth) ** 2).mean()


def test_a_training_that_was_cut_off_goes_on_to_the_same_bytes(presage, two_lines, tmp_path, monkeypatch):
    monkeypatch.setattr(neural, "SAVING_SHARE", float("inf"))  # a checkpoint after every epoch
    monkeypatch.setattr(contract, "_METRICS", [])  # those of other tests' trainings
    settings = SMALL | {"epochs": 12}
    told: list[tuple[str, int, float]] = []

    def train(output: Path, dies_in: int | None = None, **changes: object) -> list[tuple[str, int, float]]:
        def metric(name: str, step: int, value: float) -> None:
            if step == dies_in:
                raise KeyboardInterrupt
            told.append((name, step, value))

        monkeypatch.setattr(contract, "metric", metric)
        told.clear()
        presage.train(two_lines.train_task(output, hyperparameters=settings, **changes))
        return list(told)

    whole = train(new(tmp_path / "whole"))
    broken, checkpoint = new(tmp_path / "broken"), new(tmp_path / "checkpoint")
    with pytest.raises(KeyboardInterrupt):
        train(broken, dies_in=7, checkpoint=checkpoint)
    assert train(broken, checkpoint=checkpoint) == [one for one in whole if one[1] >= 7]
    for name in ("weights.pt", "model.json"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_another_seed_gives_other_weights(presage, panel, tmp_path):
    written = []
    for seed in (1, 2, 1):
        presage.train(panel.train_task(tmp_path, hyperparameters=SMALL | {"epochs": 1}, seed=seed))
        written.append((tmp_path / "weights.pt").read_bytes())
    assert written[0] == written[2] != written[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs: wanted a number above 0"),
        ({"patience": 0}, "patience: wanted a number above 0"),
        ({"temperature": 0.0}, "temperature: wanted a number above 0"),
        ({"item_layers": -1}, "item_layers: wanted a number of layers, 0 for none"),
        ({"attention": 1.5}, "attention: wanted a share from 0 to 1"),
    ],
)
def test_wrong_hyperparameters_are_refused(presage, panel, tmp_path, given, message):
    with pytest.raises(contract.ContractError, match=f"hyperparameters: {message}"):
        presage.train(panel.train_task(tmp_path, hyperparameters=given))


# ---- several sources


@pytest.fixture
def two_sources(panel, tmp_path) -> Path:
    """The panel's embedding as source `a` without P03, and source `b`, which has P03 but not P08."""
    table = contract.read_embedding(panel.folder / "embedding.parquet")
    parts = [table.drop("P03").add_prefix("a/"), (2 * table.drop("P08")).iloc[:, :4].add_prefix("b/")]
    pd.concat(parts, axis=1).to_parquet(tmp_path / "sources.parquet")
    return tmp_path / "sources.parquet"


def test_a_gene_that_one_of_the_sources_has_is_predicted(presage, panel, two_sources, tmp_path):
    settings = SMALL | {"epochs": 60}
    presage.train(panel.train_task(tmp_path, hyperparameters=settings, embedding=two_sources))
    presage.predict(panel.predict_task(tmp_path, tmp_path, embedding=two_sources))
    predictions = ad.read_h5ad(tmp_path / "predictions.h5ad")
    assert set(predictions.obs["condition"]) == {"P03", "P08", "P02+P03"}
    reasons = {row["condition"]: row["reason"] for row in json.loads((tmp_path / "unpredicted.json").read_text())}
    assert reasons["P10"] == "no embedding for P10"


def test_other_sources_than_in_training_are_refused(presage, panel, two_sources, tmp_path):
    presage.train(panel.train_task(tmp_path, hyperparameters=SMALL | {"epochs": 1}, embedding=two_sources))
    with pytest.raises(contract.ContractError, match=r"the model was trained with {'a': 6, 'b': 4}"):
        presage.predict(panel.predict_task(tmp_path, tmp_path))


# ---- what it learns


def test_it_learns_from_two_sources_with_half_of_the_knowledge_each(presage, planted, tmp_path):
    """Better than from one of them."""
    programs = planted.programs.loc[planted.perturbed]
    # Turned, so that each half has something to say about every gene.
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    programs = programs @ pd.DataFrame(turn, index=programs.columns).add_prefix("d")
    halves = [programs.iloc[:, :2].add_prefix("a/"), programs.iloc[:, 2:].add_prefix("b/")]

    def error(table: pd.DataFrame, output: Path) -> float:
        table.to_parquet(output / "embedding.parquet")
        means = planted.errors(presage, output, {}, output / "embedding.parquet").mean()
        return means["model"] / means["dataset_mean"]

    both = pd.concat(halves, axis=1)
    assert error(both, new(tmp_path / "both")) < error(halves[0], new(tmp_path / "one")) - 0.05
