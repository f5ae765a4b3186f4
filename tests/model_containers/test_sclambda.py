"""scLAMBDA: its latents, losses and steps against their definitions; what it is trained on, which weights it keeps."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch.distributions import Normal, kl_divergence

from model_containers import contract, neural

SMALL = {"hidden": 16, "latent": 4}
CPU = torch.device("cpu")
KEYS = [contract.Key(*name) for name in [("x", "control"), ("x", "A"), ("x", "A+B"), ("y", "B"), ("y", "control")]]


@pytest.fixture(scope="module")
def sclambda(load):
    return load("sclambda")


class Case:
    """Networks, conditions of none, one and two genes in two covariates, and random cells of them."""

    def __init__(self, sclambda) -> None:
        rng = np.random.default_rng(2)
        self.embedding = pd.DataFrame(rng.normal(size=(2, 5)), index=["A", "B"])
        self.settings = sclambda.Settings(**SMALL)
        shape = contract.Shape(5, [f"g{column}" for column in range(7)], ["x", "y"])
        torch.manual_seed(0)
        self.net = sclambda.networks(shape, self.settings)
        self.critic = sclambda.layers(self.settings, 8, 1)
        self.conditions = sclambda.conditions_of(KEYS, self.embedding, shape, CPU)
        self.X = sparse.random(40, 7, 0.5, format="csr", dtype=np.float32, rng=rng)
        self.of_cell = rng.integers(0, len(KEYS), 40)
        self.baseline = torch.tensor(rng.random((2, 7)), dtype=torch.float32)
        covariate = np.array([0, 0, 0, 1, 1])[self.of_cell]
        self.cells = sclambda.Cells(self.of_cell, covariate, neural.hold_rows(self.X, CPU), self.baseline)

    def embedded(self, key: contract.Key) -> torch.Tensor:
        """The definition: the sum of the genes' embeddings."""
        total = sum((self.embedding.loc[gene].to_numpy() for gene in contract.genes_of(key.condition)), np.zeros(5))
        return torch.tensor(total, dtype=torch.float32)

    def shift(self, cell: int) -> torch.Tensor:
        """The definition: the cell minus the control mean of its covariate."""
        return torch.tensor(self.X[cell].toarray()[0]) - self.baseline[["x", "y"].index(KEYS[self.of_cell[cell]][0])]

    def decode(self, z: torch.Tensor, key: contract.Key, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """The definition for one cell."""
        s = self.net["perturbation"](self.embedded(key) if embedding is None else embedding)
        return self.net["expression"](z + s + self.net["covariate"](torch.tensor(["x", "y"].index(key.covariate))))


@pytest.fixture
def case(sclambda) -> Case:
    return Case(sclambda)


def test_embeddings_of_a_combination_are_summed_and_control_has_none(case):
    expected = torch.stack([case.embedded(key) for key in KEYS])
    torch.testing.assert_close(case.conditions.embedding, expected)
    assert (case.conditions.embedding[[0, 4]] == 0).all()
    assert case.conditions.covariates.tolist() == [0, 0, 0, 1, 1]


def test_scaling_forgets_scale_and_offset_and_makes_values_of_size_one():
    table = pd.DataFrame(np.random.default_rng(1).normal(size=(20, 4)))
    found = contract.scale_embedding(table.assign(constant=7.0))
    np.testing.assert_allclose((found**2).sum(axis=1), 5)
    assert (found["constant"] == 0).all()
    other = contract.scale_embedding(table * [1e-3, 1, 10, 1e4] + [5, -3, 0, 1e3])
    np.testing.assert_allclose(found.drop(columns="constant") / 5**0.5, other / 4**0.5, atol=1e-9)


def test_means_of_groups(sclambda):
    X = sparse.random(9, 4, 0.5, format="csr", dtype=np.float32, rng=np.random.default_rng(2))
    group = np.array([1, 0, 1, 2, 2, 2, 0, 1, 1])
    expected = [X.toarray()[group == one].astype(np.float64).mean(axis=0) for one in range(3)]
    np.testing.assert_allclose(sclambda.group_means(X, group, 3), expected, rtol=1e-12)


class Gradients:
    """Stands in for an optimizer: keeps the gradients of a step, and the weights as they are."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.weights = dict(net.named_parameters())

    def step(self, loss: torch.Tensor, _: float) -> None:
        found = torch.autograd.grad(loss, list(self.weights.values()), retain_graph=True)
        self.found = dict(zip(self.weights, found, strict=True))


def test_losses_and_gradients_are_those_of_single_cells(sclambda, case):
    """The networks go down their loss and the critic goes up the information; draws are repeated here."""
    batch = np.random.default_rng(0).permutation(40)[:25]
    networks, critic = Gradients(case.net), Gradients(case.critic)
    torch.manual_seed(5)
    found = sclambda.step(
        case.net, case.critic, (networks, critic), 0.1, case.settings, case.conditions, case.cells, batch
    )
    torch.manual_seed(5)
    noise = torch.randn(25, 4)
    mean, log_variance = case.net["cell"](torch.stack([case.shift(cell) for cell in batch])).chunk(2, dim=1)
    deviation = (log_variance / 2).exp()
    z = mean + noise * deviation
    keys = [KEYS[case.of_cell[cell]] for cell in batch]

    def errors(embedding: dict[contract.Key, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of expression and embedding, the mean over the cells."""
        decoded = torch.stack([case.decode(z[row], key, embedding[key]) for row, key in enumerate(keys)])
        again = torch.stack([case.net["embedding"](case.net["perturbation"](embedding[key])) for key in keys])
        given = torch.stack([case.embedded(key) for key in keys])
        shifts = torch.stack([case.shift(cell) for cell in batch])
        return (decoded - shifts).square().sum(dim=1).mean(), (again - given).square().sum(dim=1).mean()

    # All cells of a condition are moved together.
    own = {key: case.embedded(key).requires_grad_() for key in keys}
    expression_error, embedding_error = errors(own)
    gradients = torch.autograd.grad(expression_error + embedding_error, list(own.values()), retain_graph=True)
    moved = {
        key: each.detach() + 1e-3 * 5**0.5 * one.sign() for (key, each), one in zip(own.items(), gradients, strict=True)
    }
    expression_error, embedding_error = errors(moved)
    s = torch.stack([case.net["perturbation"](moved[key]) for key in keys])
    divergence = kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).sum(dim=1).mean()
    for _ in range(case.settings.critic_steps):  # the last of which is compared
        critic_loss = -sclambda.information(case.critic, z.detach(), s.detach(), torch.randperm(25))
    information = sclambda.information(case.critic, z, s, torch.randperm(25))
    loss = expression_error + embedding_error + divergence + 200 * information
    expected = sclambda.Losses(loss, expression_error, embedding_error, divergence, information)
    for name in sclambda.Losses._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    for optimizer, total in ((networks, loss), (critic, critic_loss)):
        optimizer_found = optimizer.found
        optimizer.step(total, 0.1)
        for name, gradient in optimizer.found.items():
            torch.testing.assert_close(optimizer_found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_information_is_the_bound_of_donsker_and_varadhan(sclambda, case):
    z, s = torch.randn(6, 4), torch.randn(6, 4)
    others = torch.tensor([3, 1, 0, 5, 4, 2])
    joint = [case.critic(torch.cat([z[row], s[row]])) for row in range(6)]
    apart = [case.critic(torch.cat([z[row], s[other]])) for row, other in enumerate(others)]
    expected = torch.cat(joint).mean() - torch.cat(apart).exp().mean().log()
    torch.testing.assert_close(sclambda.information(case.critic, z, s, others), expected)


def test_a_trained_critic_finds_the_information_of_two_normals(sclambda):
    """That of two with correlation 0.9 is -log(1 - 0.81) / 2 = 0.83 nats."""
    torch.manual_seed(1)
    critic = sclambda.layers(sclambda.Settings(hidden=32), 2, 1)
    adam, found = neural.Adam(list(critic.parameters())), []
    for _ in range(600):
        z = torch.randn(500, 1)
        s = 0.9 * z + 0.19**0.5 * torch.randn(500, 1)
        bound = sclambda.information(critic, z, s, torch.randperm(500))
        adam.step(-bound, 5e-3)
        found.append(bound.item())
    assert np.mean(found[-100:]) == pytest.approx(0.83, abs=0.08)


def test_an_embedding_is_moved_to_where_it_is_decoded_worse(sclambda, case):
    settings = sclambda.Settings(**SMALL, adversarial_step=0.02)
    z, at = torch.randn(40, 4), torch.from_numpy(case.of_cell)
    shifts = case.cells.shifts(np.arange(40))
    batch = sclambda.Batch(case.conditions, at, z, shifts)
    moved = sclambda.against(case.net, settings, batch)
    distance = (moved - case.conditions.embedding).abs()
    torch.testing.assert_close(distance, torch.full((5, 5), 0.02 * 5**0.5))

    def error(embedding: torch.Tensor) -> float:
        _, *errors = sclambda.decode_latents(case.net, batch, embedding)
        return float(sum(errors).detach())

    assert error(moved) > error(case.conditions.embedding)


def test_predictions_are_means_over_the_control_cells_of_the_covariate(sclambda, case):
    controls = np.flatnonzero(np.isin(case.of_cell, [0, 4]))
    covariate = case.cells.covariate[controls]
    states = sclambda.latents(case.net, case.cells, controls, 4)
    rows = np.array([3, 2, 1])
    found = sclambda.mean_shifts(case.net, case.conditions, rows, states, covariate)
    for shift, row in zip(found, rows, strict=True):
        own = [cell for cell in controls if KEYS[case.of_cell[cell]].covariate == KEYS[row].covariate]
        cells = [case.decode(case.net["cell"](case.shift(cell))[:4], KEYS[row]) for cell in own]
        np.testing.assert_allclose(shift, torch.stack(cells).mean(dim=0).detach(), rtol=1e-4, atol=1e-6)


def test_correlation(sclambda):
    one, other = np.random.default_rng(0).normal(size=(2, 30))
    assert sclambda.pearson(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert np.isnan(sclambda.pearson(np.ones(30), other))


def test_one_covariate_has_no_latent(sclambda):
    assert "covariate" not in sclambda.networks(contract.Shape(5, ["g"], ["x"]), sclambda.Settings(**SMALL))


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


def test_a_covariate_without_control_cells_is_refused(sclambda, two_lines, tmp_path):
    cells = contract.read_cells(two_lines.folder / "train.h5ad")
    cells = cells[(cells.obs["covariate"] == "K562") | (cells.obs["condition"] != "control")]
    cells.write_h5ad(tmp_path / "train.h5ad")
    with pytest.raises(contract.ContractError, match="covariate RPE1 has no control cell in the train split"):
        sclambda.train(two_lines.train_task(tmp_path, cells=tmp_path / "train.h5ad"))


def keys_of(*conditions: str) -> tuple[contract.Key, ...]:
    return tuple(contract.Key("line", condition) for condition in conditions)


def curve(capsys, name: str) -> list[float]:
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [event["value"] for event in events if event.get("name") == name]


def test_the_weights_of_the_best_validation_correlation_are_kept(sclambda, panel, tmp_path, capsys):
    settings = SMALL | {"epochs": 30, "validate_every": 2, "learning_rate": 0.02, "batch_size": 50, "decay_every": 100}
    sclambda.train(panel.train_task(tmp_path, hyperparameters=settings))
    correlations = curve(capsys, "val_correlation")
    assert len(correlations) == 15
    assert max(correlations) > correlations[-1], "else the test says nothing"
    # What the kept weights predict for the val conditions has that correlation.
    sclambda.predict(panel.predict_task(tmp_path, tmp_path, conditions=keys_of("P07", "P04+P05")))
    means = contract.read_means(panel.folder / "train.h5ad")
    profiles = means.to_df().set_axis(means.obs["condition"].astype(str))
    predictions = ad.read_h5ad(tmp_path / "predictions.h5ad")
    shifts = predictions.X - profiles.loc["control"].to_numpy()
    measured = profiles.loc[predictions.obs["condition"]].to_numpy() - profiles.loc["control"].to_numpy()
    found = np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(shifts, measured, strict=True)])
    assert found == pytest.approx(max(correlations), rel=1e-4)


def test_another_seed_gives_other_weights(sclambda, panel, tmp_path):
    written = []
    for seed in (1, 2, 1):
        sclambda.train(panel.train_task(tmp_path, hyperparameters=SMALL | {"epochs": 1}, seed=seed))
        written.append((tmp_path / "weights.pt").read_bytes())
    assert written[0] == written[2] != written[1]


def test_a_training_that_was_cut_off_goes_on_to_the_same_files(sclambda, panel, tmp_path, monkeypatch):
    """Cut off in the midst of an epoch, after a checkpoint of weights, critic, both optimizers and the best weights."""
    monkeypatch.setattr(neural, "SAVING_SHARE", float("inf"))
    settings = SMALL | {"epochs": 6, "validate_every": 2, "batch_size": 50}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    sclambda.train(panel.train_task(tmp_path / "whole", hyperparameters=settings))
    task = panel.train_task(tmp_path / "broken", hyperparameters=settings, checkpoint=tmp_path)
    steps, real = 0, sclambda.step

    def dies(*given: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 15:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(sclambda, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            sclambda.train(task)
    assert (tmp_path / neural.CHECKPOINT).exists()
    sclambda.train(task)
    for name in ("weights.pt", "model.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_dimensions_than_in_training_are_refused(sclambda, panel, tmp_path):
    sclambda.train(panel.train_task(tmp_path, hyperparameters=SMALL | {"epochs": 1}))
    pd.DataFrame({"d0": [1.0, 2.0]}, index=["P03", "P08"]).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(contract.ContractError, match="1 dimensions; the model was trained with 6"):
        sclambda.predict(panel.predict_task(tmp_path, tmp_path, embedding=tmp_path / "e.parquet"))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("epochs", 0, "above 0"),
        ("learning_rate", 0, "above 0"),
        ("information_weight", -1, "of at least 0"),
        ("adversarial_step", -1, "of at least 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(sclambda, panel, tmp_path, field, value, wanted):
    with pytest.raises(contract.ContractError, match=f"hyperparameters: {field}: wanted a number {wanted}"):
        sclambda.train(panel.train_task(tmp_path, hyperparameters={field: value}))
