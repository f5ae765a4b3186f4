"""scGPT: its network and loss against their definitions, published checkpoints, what it trains on and leaves out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from model_containers import contract, neural

CPU = torch.device("cpu")
SMALL = {"width": 8, "heads": 2, "layers": 1, "hidden": 12, "epochs": 2, "sequence": 20, "pool": 8}


@pytest.fixture(scope="module")
def scgpt(load):
    return load("scgpt")


def shape_of(scgpt, tokens: list[str], **changes: Any):
    fields = {"width": 8, "heads": 2, "layers": 2, "hidden": 12, "genes": tokens, "covariates": ["x", "y"]}
    return scgpt.Shape(**(fields | {"tokens": tokens} | changes))


# ---- the network and its loss


def by_hand(net, heads: int, tokens: torch.Tensor, values: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    """One cell's expression after a perturbation, from the definition: genes."""
    weights = net.state_dict()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        spread = (x.var(dim=-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return (x - x.mean(dim=-1, keepdim=True)) / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    value = linear(linear(values[:, None], "value_encoder.linear1").relu(), "value_encoder.linear2")
    x = normed(weights["encoder.embedding.weight"][tokens], "encoder.enc_norm") + normed(value, "value_encoder.norm")
    x = x + perturbed[:, None] * weights["pert_encoder.weight"][:, 0]
    for number in range(len(net["transformer_encoder"]["layers"])):
        layer = f"transformer_encoder.layers.{number}"
        of_all = x @ weights[f"{layer}.self_attn.in_proj_weight"].T + weights[f"{layer}.self_attn.in_proj_bias"]
        mixed = []
        for query, key, content in zip(*(part.chunk(heads, dim=1) for part in of_all.chunk(3, dim=1)), strict=True):
            mixed.append((query @ key.T / key.shape[1] ** 0.5).softmax(dim=1) @ content)
        x = normed(x + linear(torch.cat(mixed, dim=1), f"{layer}.self_attn.out_proj"), f"{layer}.norm1")
        x = normed(x + linear(linear(x, f"{layer}.linear1").relu(), f"{layer}.linear2"), f"{layer}.norm2")

    def number_of(name: str) -> torch.Tensor:
        y = x
        for step in (0, 2):
            y = torch.nn.functional.leaky_relu(linear(y, f"decoder.{name}.{step}"), 0.01)
        return linear(y, f"decoder.{name}.4")[:, 0]

    return number_of("scale") * values + number_of("shift")


@pytest.fixture
def case(scgpt):
    """A network in which all weights count, and cells of two covariates: controls, and perturbations of 1 or 2 genes.

    Of the measured genes u is no token.
    """
    rng = np.random.default_rng(5)
    genes = ["a", "b", "c", "d", "e", "u"]
    shape = shape_of(scgpt, genes[:5], genes=genes)
    torch.manual_seed(0)
    net = scgpt.network(shape, 0.5)
    with torch.no_grad():
        for weights in net.parameters():
            weights.add_(0.3 * torch.randn_like(weights))
    names = [("x", "control")] * 4 + [("y", "control")] * 3 + [("x", "a"), ("y", "b+d"), ("x", "b"), ("y", "a")] * 2
    obs = pd.DataFrame(names, columns=["covariate", "condition"]).assign(split="train")
    obs.index = obs.index.astype(str)
    X = sparse.random(len(obs), 6, 0.7, format="csr", dtype=np.float32, rng=rng)
    cells = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=genes))
    return net, shape, cells, scgpt.screen_of(cells, shape, CPU)


def test_forward_is_the_networks_definition(scgpt, case):
    net, shape, _, _ = case
    net.eval()
    values = torch.rand(3, 4) * 5
    tokens = torch.tensor([3, 0, 4, 1])
    perturbed = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    found = scgpt.forward(net, tokens, values, perturbed)
    expected = torch.stack([by_hand(net, shape.heads, tokens, *cell) for cell in zip(values, perturbed, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(scgpt.forward(net, tokens, values, perturbed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_loss_is_that_of_perturbed_cells_from_control_cells_of_their_covariate(scgpt, case, monkeypatch, form):
    net, shape, cells, screen = case
    if form == "compressed":
        monkeypatch.setattr(neural, "DENSE_BYTES", 0)
        screen = scgpt.screen_of(cells, shape, CPU)
    net.eval()
    batch = np.array([8, 9, 7, 14, 12])
    controls: list[int] = []
    genes: list[int] = []

    def noted(numbers):
        controls.extend(numbers if not controls else [])  # the control cells are looked up first
        return screen.rows(numbers)

    def drawn(*given):
        genes.extend(scgpt_drawn(*given))
        return np.array(genes)

    scgpt_drawn = scgpt.drawn_genes
    monkeypatch.setattr(scgpt, "drawn_genes", drawn)
    found = scgpt.squared_error(net, screen._replace(rows=noted), batch, 4, neural.generator(1, 1))
    obs, X = cells.obs, torch.from_numpy(cells.X.toarray())
    assert (obs["condition"].iloc[controls] == "control").all()
    assert (obs["covariate"].iloc[controls].to_numpy() == obs["covariate"].iloc[batch].to_numpy()).all()
    assert set(genes) >= {0, 1, 3}, "a, b and d are perturbed"
    assert len(genes) == len(set(genes)) == 4
    errors = []
    for cell, control in zip(batch, controls, strict=True):
        perturbed = contract.genes_of(obs["condition"].iloc[cell])
        flags = torch.tensor([float(shape.tokens[gene] in perturbed) for gene in genes])
        predicted = by_hand(net, shape.heads, torch.tensor(genes), X[control, genes], flags)
        errors.append((predicted - X[cell, genes]).square().mean())
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


def test_drawn_genes_are_the_perturbed_and_others_at_random(scgpt):
    perturbed = np.isin(np.arange(20), [4, 11])
    draws = neural.generator(1, 1)
    drawn = [scgpt.drawn_genes(perturbed, 6, draws) for _ in range(200)]
    assert {len(set(genes)) for genes in drawn} == {6}
    assert all({4, 11} <= set(genes) for genes in drawn)
    assert set(np.concatenate(drawn)) == set(range(20))
    assert set(scgpt.drawn_genes(perturbed, 1, draws)) == {4, 11}
    assert set(scgpt.drawn_genes(perturbed, 50, draws)) == set(range(20))


def test_a_profile_is_the_mean_over_the_pool_of_pieces_that_hold_the_perturbed_genes(scgpt, case):
    net, shape, _, screen = case
    net.eval()
    pool = scgpt.pools_of(screen, 3, seed=1)[0]
    assert pool.shape == (3, 5)
    perturbed, order = np.array([3]), np.array([2, 3, 0, 4, 1])
    for sequence, pieces in ((3, [[3, 2, 0], [3, 4, 1]]), (20, [[3, 2, 0, 4, 1]])):
        settings = scgpt.Settings(**SMALL | {"batch_size": 2, "sequence": sequence})
        found = scgpt.profile(net, pool, perturbed, order, settings)
        for piece in pieces:
            flags = torch.tensor([float(token == 3) for token in piece])
            of_cells = [by_hand(net, shape.heads, torch.tensor(piece), cell[piece], flags) for cell in pool]
            expected = torch.stack(of_cells).mean(dim=0).double().numpy()
            np.testing.assert_allclose(found[piece[1:]], expected[1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[3], expected[0], rtol=1e-4, atol=1e-5)


def test_pools_are_control_cells_of_their_covariate(scgpt, case):
    _, shape, cells, screen = case
    tokens = cells[:, shape.tokens].X.toarray()
    for rows, pool in zip(([0, 1, 2, 3], [4, 5, 6]), scgpt.pools_of(screen, 100, seed=1), strict=True):
        assert {tuple(row) for row in pool.numpy()} == {tuple(row) for row in tokens[rows]}


# ---- checkpoints as they are published


class Published(NamedTuple):
    """A checkpoint's folder, and its tensors under torch's names."""

    folder: Path
    tensors: dict[str, torch.Tensor]


def publish(folder: Path, genes: list[str], spelling: str = "torch", **changes: torch.Tensor) -> Published:
    """A small checkpoint: 16 wide, 2 heads, 2 layers, hidden 24, and special tokens, as the published ones have."""
    torch.manual_seed(9)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24)
    parts = {
        "encoder.embedding": torch.nn.Embedding(len(genes) + 3, 16),
        "encoder.enc_norm": torch.nn.LayerNorm(16),
        "value_encoder.linear1": torch.nn.Linear(1, 16),
        "value_encoder.linear2": torch.nn.Linear(16, 16),
        "value_encoder.norm": torch.nn.LayerNorm(16),
        "transformer_encoder": torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        "decoder.fc.0": torch.nn.Linear(16, 16),
        "cls_decoder.out_layer": torch.nn.Linear(16, 1),
    }
    tensors = {f"{part}.{name}": w for part, net in parts.items() for name, w in net.state_dict().items()}
    tensors = {name: torch.randn_like(tensor) for name, tensor in tensors.items()} | changes
    spelt = {
        "torch": {},
        "flash": {"self_attn.in_proj_": "self_attn.Wqkv."},
        "wrapped": {"self_attn.in_proj_": "self_attn._impl.Wqkv.", "self_attn.out": "self_attn._impl.out"},
    }
    saved = {}
    for name, tensor in tensors.items():
        for ours, theirs in spelt[spelling].items():
            name = name.replace(ours, theirs)
        saved[name] = tensor
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / "best_model.pt")
    args = {"embsize": 16, "nheads": 2, "d_hid": 24, "nlayers": 2, "n_layers_cls": 3, "dropout": 0.2}
    (folder / "args.json").write_text(json.dumps(args | {"pad_token": "<pad>", "pad_value": -2, "fast": True}))
    tokens = ["<pad>", *reversed(genes), "<cls>", "<eoc>"]
    (folder / "vocab.json").write_text(json.dumps({gene: row for row, gene in enumerate(tokens)}))
    return Published(folder, tensors)


@pytest.mark.parametrize("spelling", ["torch", "flash", "wrapped"])
def test_a_published_checkpoint_is_taken_over(scgpt, tmp_path, spelling, capsys):
    published = publish(tmp_path, ["a", "b", "c", "d"], spelling)
    pretrained = scgpt.read_pretrained(published.folder)
    shape = shape_of(scgpt, ["b", "d"], **pretrained.widths)
    assert (shape.width, shape.heads, shape.layers, shape.hidden) == (16, 2, 2, 24)
    net = scgpt.network(shape, 0.0)
    drawn = neural.copy_of(net)
    scgpt.take_over(net, pretrained, shape.tokens)
    found = net.state_dict()
    taken = {name for name in found if not torch.equal(found[name], drawn[name])}
    assert taken == {name for name in found if not name.startswith(("decoder", "pert_encoder"))}
    rows = published.tensors["encoder.embedding.weight"]
    torch.testing.assert_close(found["encoder.embedding.weight"], rows[[3, 1]], rtol=0, atol=0)
    for name in taken - {"encoder.embedding.weight"}:
        torch.testing.assert_close(found[name], published.tensors[name], rtol=0, atol=0)
    assert f"{len(taken)} of {len(taken)} tensors are the checkpoint's" in capsys.readouterr().out


def test_a_tensor_that_does_not_fit_stays_random_and_is_named(scgpt, tmp_path, capsys):
    changes: dict[str, Any] = {"value_encoder.linear1.weight": torch.zeros(16, 3)}
    published = publish(tmp_path, ["a", "b"], **changes)
    pretrained = scgpt.read_pretrained(published.folder)
    net = scgpt.network(shape_of(scgpt, ["b"], **pretrained.widths), 0.0)
    drawn = neural.copy_of(net)["value_encoder.linear1.weight"]
    scgpt.take_over(net, pretrained, ["b"])
    torch.testing.assert_close(net.state_dict()["value_encoder.linear1.weight"], drawn)
    said = capsys.readouterr().out
    assert "at random, for the checkpoint has none that fits: value_encoder.linear1.weight" in said


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_that_holds_code_is_not_loaded(scgpt, tmp_path, monkeypatch):
    publish(tmp_path, ["a"])
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.embedding.weight": torch.zeros(4, 16), "more": Evil()}, tmp_path / "best_model.pt")
    with pytest.raises(contract.ContractError, match=r"holds more than tensors, and is not loaded: \w+\.mkdir"):
        scgpt.read_pretrained(tmp_path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("best_model.pt", b"no checkpoint", "best_model.pt: not a checkpoint of tensors"),
        ("best_model.pt", None, "best_model.pt: not a checkpoint of tensors"),
        ("args.json", b"{", "args.json: not a JSON file"),
        ("args.json", b"[]", "args.json: wanted an object"),
        ("args.json", b'{"embsize": 16}', "args.json: nheads: wanted a whole number above 0"),
        ("args.json", b'{"embsize": "16"}', "args.json: embsize: wanted a whole number above 0"),
        ("vocab.json", None, "vocab.json: not a JSON file"),
        ("vocab.json", b'{"a": 1, "b": 4}', "vocab.json: b: 4 is not a row of encoder.embedding.weight, which has 4"),
        ("vocab.json", b'{"a": "1"}', "vocab.json: a: '1' is not a row"),
    ],
)
def test_a_malformed_checkpoint_is_refused(scgpt, tmp_path, file, content, message):
    publish(tmp_path, ["a"])
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(contract.ContractError, match=message):
        scgpt.read_pretrained(tmp_path)


def test_genes_beyond_the_vocabulary(scgpt, two_lines, tmp_path, capsys):
    """They are predicted by the dataset mean, and no perturbation of them is learned or predicted."""
    cells = ad.read_h5ad(two_lines.folder / "train.h5ad")
    beyond = ["G03", "P03", "P04"]
    published = publish(tmp_path / "weights", [gene for gene in cells.var_names if gene not in beyond])
    task = two_lines.train_task(tmp_path, hyperparameters=SMALL, pretrained=published.folder)
    scgpt.train(task)
    said = capsys.readouterr().out
    assert "27 of 30 measured genes are in the checkpoint's vocabulary" in said
    assert "width: 16 as in the checkpoint, not 8" in said
    conditions = tuple(contract.Key("K562", name) for name in ("P03", "P08", "P02+P04", "P08+MARCH8"))
    scgpt.predict(two_lines.predict_task(tmp_path, tmp_path, conditions=conditions))
    reasons = {row["condition"]: row["reason"] for row in json.loads((tmp_path / "unpredicted.json").read_text())}
    assert reasons == {
        "P03": "not in the checkpoint's vocabulary: P03",
        "P02+P04": "not in the checkpoint's vocabulary: P04",
        "P08+MARCH8": "not measured: MARCH8",
    }
    predicted = ad.read_h5ad(tmp_path / "predictions.h5ad").to_df().loc["K562|P08"]
    means = contract.dataset_means(contract.read_means(two_lines.folder / "train.h5ad")).loc["K562"]
    np.testing.assert_allclose(predicted[beyond], means[beyond], rtol=1e-12)
    assert (predicted.drop(beyond) != means.drop(beyond)).all()


# ---- trainings


def test_what_is_trained_on(scgpt, two_lines):
    cells = contract.read_cells(two_lines.folder / "train.h5ad")
    cells.obs.loc[(cells.obs["covariate"] == "RPE1") & (cells.obs["condition"] == "control"), "split"] = "val"
    settings = scgpt.Settings(**SMALL)
    shape = scgpt.shape_of(cells, settings, None)
    assert shape.covariates == ["K562"], "RPE1 has no train control cell"
    assert shape.genes == shape.tokens == cells.var_names.tolist()
    train, val = (cells.obs.iloc[rows] for rows in scgpt.usable(cells, shape))
    assert set(train["covariate"]) == set(val["covariate"]) == {"K562"}
    assert set(val["condition"]) == {"P07", "P04+P05"}
    assert set(train["condition"]) == {"P00", "P01", "P02", "P04", "P05", "P06", "P09", "P11", "P00+P01", "P01+P06"}


def test_cells_without_a_perturbation_of_a_token_are_refused(scgpt, panel, tmp_path):
    published = publish(tmp_path / "weights", ["G00", "G01"])
    task = panel.train_task(tmp_path, hyperparameters=SMALL, pretrained=published.folder)
    with pytest.raises(contract.ContractError, match="cells: no covariate has both train control cells and a train"):
        scgpt.train(task)


def test_covariates_are_told_apart_by_their_control_cells(scgpt, two_lines, tmp_path):
    scgpt.train(two_lines.train_task(tmp_path, hyperparameters=SMALL))
    scgpt.predict(two_lines.predict_task(tmp_path, tmp_path))
    predicted = ad.read_h5ad(tmp_path / "predictions.h5ad").to_df()
    assert (predicted.loc["K562|P03"] != predicted.loc["RPE1|P03"]).all()
    (reason,) = json.loads((tmp_path / "unpredicted.json").read_text())
    assert reason["reason"] == "covariate unseen lacks training perturbations or control cells"


def test_other_genes_than_in_training_are_refused(scgpt, panel, tmp_path):
    scgpt.train(panel.train_task(tmp_path, hyperparameters=SMALL | {"epochs": 1}))
    ad.read_h5ad(panel.folder / "control.h5ad")[:, ::-1].write_h5ad(tmp_path / "control.h5ad")
    with pytest.raises(contract.ContractError, match="other genes than the model was trained with"):
        scgpt.predict(panel.predict_task(tmp_path, tmp_path, control=tmp_path / "control.h5ad"))


def events_of(capsys) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def curve(events: list[dict[str, Any]], name: str) -> list[float]:
    return [event["value"] for event in events if event.get("name") == name]


def test_the_weights_of_the_least_validation_loss_are_kept_and_training_ends_early(scgpt, panel, tmp_path, capsys):
    settings = SMALL | {"epochs": 60, "learning_rate": 0.02, "patience": 3, "dropout": 0.0}
    scgpt.train(panel.train_task(tmp_path, hyperparameters=settings))
    events = events_of(capsys)
    losses = curve(events, "val_loss")
    assert len(losses) < 60
    assert min(losses) == losses[-4] < losses[-1]
    # The kept weights have that loss.
    stored = json.loads((tmp_path / "model.json").read_text())
    settings, shape = scgpt.Settings(**stored["settings"]), scgpt.Shape(**stored["shape"])
    net = scgpt.network(shape, 0.0)
    net.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    cells = contract.read_cells(panel.folder / "train.h5ad")
    _, val = scgpt.usable(cells, shape)
    draws = neural.generator(1, 0)
    screen = scgpt.screen_of(cells, shape, CPU)

    def loss(batch: np.ndarray) -> torch.Tensor:
        return scgpt.squared_error(net, screen, batch, settings.sequence, draws)

    found = neural.mean_loss(net, loss, val, settings.batch_size)
    assert found == pytest.approx(min(losses), rel=1e-5)


def test_without_val_conditions_the_last_weights_are_kept(scgpt, panel, tmp_path, capsys):
    cells = ad.read_h5ad(panel.folder / "train.h5ad")
    cells[cells.obs["split"] == "train"].write_h5ad(tmp_path / "train.h5ad")
    scgpt.train(panel.train_task(tmp_path, cells=tmp_path / "train.h5ad", hyperparameters=SMALL))
    events = events_of(capsys)
    assert curve(events, "val_loss") == []
    assert len(curve(events, "train_loss")) == SMALL["epochs"]
    assert {"event": "log", "message": "no pretrained weights: it trains from random ones"} in events
    assert (tmp_path / "weights.pt").exists()


def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(scgpt, panel, tmp_path, monkeypatch):
    monkeypatch.setattr(neural, "SAVING_SHARE", float("inf"))
    settings = SMALL | {"epochs": 4}
    (tmp_path / "checkpoint").mkdir()
    scgpt.train(panel.train_task(tmp_path, hyperparameters=settings))
    whole = (tmp_path / "weights.pt").read_bytes()
    (tmp_path / "weights.pt").unlink()
    task = panel.train_task(tmp_path, hyperparameters=settings, checkpoint=tmp_path / "checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(contract, "metric", cut_at(3, contract.metric))
        with pytest.raises(KeyboardInterrupt):
            scgpt.train(task)
    seen: list[Any] = []
    monkeypatch.setattr(neural, "generator", noted(seen, neural.generator))
    scgpt.train(task)
    assert {epoch for _, epoch in seen} == {0, 3, 4}, "the first two epochs are not computed again"
    assert (tmp_path / "weights.pt").read_bytes() == whole


def cut_at(step: int, metric):
    def cut(name: str, at: int, value: float) -> None:
        if at == step:
            raise KeyboardInterrupt
        metric(name, at, value)

    return cut


def noted(seen: list[Any], function):
    def call(*given: Any) -> Any:
        seen.append(given)
        return function(*given)

    return call


def test_dropout_is_for_the_steps_of_training_alone(scgpt, panel, tmp_path, monkeypatch):
    seen = set()
    forward = scgpt.forward

    def noting(net, *given):
        seen.add((torch.is_grad_enabled(), net.training))
        return forward(net, *given)

    monkeypatch.setattr(scgpt, "forward", noting)
    scgpt.train(panel.train_task(tmp_path, hyperparameters=SMALL))
    assert seen == {(True, True), (False, False)}
    seen.clear()
    scgpt.predict(panel.predict_task(tmp_path, tmp_path))
    assert seen == {(False, False)}


def test_another_seed_gives_other_weights(scgpt, panel, tmp_path):
    written = []
    for seed in (1, 2, 1):
        scgpt.train(panel.train_task(tmp_path, hyperparameters=SMALL | {"epochs": 1}, seed=seed))
        written.append((tmp_path / "weights.pt").read_bytes())
    assert written[0] == written[2] != written[1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "wanted a number above 0"),
        ("learning_rate", 0.0, "wanted a number above 0"),
        ("dropout", 1.0, "wanted a number from 0 to below 1"),
        ("width", 9, "9 is not divisible by 8 heads"),
    ],
)
def test_hyperparameters_must_make_sense(scgpt, panel, tmp_path, field, value, message):
    with pytest.raises(contract.ContractError, match=f"hyperparameters: {field}: {message}"):
        scgpt.train(panel.train_task(tmp_path, hyperparameters={field: value}))


# ---- what it learns without a checkpoint


def test_it_learns_combinations_from_single_genes_and_other_combinations(scgpt, tmp_path):
    """Each third of 48 genes, perturbed, raises another third; cells of 10 genes and of half of their pairs."""
    rng = np.random.default_rng(3)
    genes = [f"g{number:02d}" for number in range(48)]
    of_cause, of_target = np.arange(48) % 3, rng.permutation(np.arange(48) % 3)
    raised = pd.DataFrame(1.5 * (of_cause[:, None] == of_target), index=genes, columns=genes)
    pairs = rng.permutation([f"{a}+{b}" for a in genes[:10] for b in genes[:10] if a < b]).tolist()
    test, val = pairs[:20], pairs[20:25]
    base = rng.uniform(1, 3, size=48)
    names = [contract.CONTROL, *genes[:10], *pairs]
    truth = pd.DataFrame({name: base + raised.loc[list(contract.genes_of(name))].sum() for name in names}).T
    rows = [(name, "val" if name in val else "train") for name in names if name not in test for _ in range(20)]
    rows += [(contract.CONTROL, "train")] * 60
    obs = pd.DataFrame(rows, columns=["condition", "split"], index=[f"c{row}" for row in range(len(rows))])
    X = np.clip(rng.normal(truth.loc[obs["condition"]], 0.4), 0, None).astype(np.float32)
    cells = ad.AnnData(sparse.csr_matrix(X), obs=obs.assign(covariate="x"), var=pd.DataFrame(index=genes))
    cells.write_h5ad(tmp_path / "train.h5ad")
    cells[cells.obs["condition"] == contract.CONTROL].write_h5ad(tmp_path / "control.h5ad")
    settings: dict[str, Any] = {"width": 16, "heads": 2, "layers": 2, "hidden": 16, "epochs": 12, "batch_size": 16}
    settings |= {"learning_rate": 0.002, "sequence": 24, "pool": 16, "dropout": 0.0}
    scgpt.train(contract.TrainTask(tmp_path / "train.h5ad", None, settings, 1, 1, tmp_path))
    keys = tuple(contract.Key("x", name) for name in test)
    scgpt.predict(contract.PredictTask(tmp_path, tmp_path / "control.h5ad", keys, None, 1, 1, tmp_path))
    predicted = ad.read_h5ad(tmp_path / "predictions.h5ad").to_df().loc[[f"x|{name}" for name in test]]
    mean = contract.dataset_means(contract.read_means(tmp_path / "train.h5ad")).loc["x"]
    error, error_of_mean = (((x - truth.loc[test]) ** 2).to_numpy().mean() for x in (predicted.to_numpy(), mean))
    assert error < 0.5 * error_of_mean


# ---- its embedding of genes


def test_the_embedding_is_the_checkpoints_rows_normalised(scgpt, tmp_path):
    published = publish(tmp_path / "published", ["GENE2", "GENE1", "GENE3"])
    output = tmp_path / "output"
    output.mkdir()
    scgpt.embed(contract.EmbedTask(published.folder, {}, 1, output))
    table = contract.read_embedding(output / "embedding.parquet")
    assert table.index.tolist() == ["GENE1", "GENE2", "GENE3"]
    # Behind the padding, genes stand in the vocabulary in reverse order.
    rows = published.tensors["encoder.embedding.weight"].double().numpy()[[2, 3, 1]]
    weight, bias = (published.tensors[f"encoder.enc_norm.{name}"].double().numpy() for name in ("weight", "bias"))
    spread = np.sqrt(rows.var(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(table, (rows - rows.mean(axis=1, keepdims=True)) / spread * weight + bias, rtol=1e-10)
    with pytest.raises(contract.ContractError, match="settings: pooling: unknown; there are none"):
        scgpt.embed(contract.EmbedTask(published.folder, {"pooling": "mean"}, 1, output))


def test_without_the_layer_behind_the_rows_there_is_no_embedding(scgpt, tmp_path):
    published = publish(tmp_path, ["a"])
    saved = torch.load(tmp_path / "best_model.pt", weights_only=True)
    del saved["encoder.enc_norm.bias"]
    torch.save(saved, tmp_path / "best_model.pt")
    with pytest.raises(contract.ContractError, match=r"best_model.pt: there is no encoder\.enc_norm\.bias"):
        scgpt.embed(contract.EmbedTask(published.folder, {}, 1, tmp_path))
