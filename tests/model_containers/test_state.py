"""STATE: what its program is told and what is made of its answers, by a stand-in; and its image, if it is there."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from model_containers import contract

MODELS = Path(contract.__file__).parent
SETTINGS = {"hidden": 16, "layers": 1, "heads": 2, "feedforward": 16, "set_size": 8, "batch_size": 4}
SMALL = SETTINGS | {"steps": 6, "validate_every": 2, "predicted_cells": 3}


@pytest.fixture(scope="module")
def state(load):
    return load("state")


class Program:
    """Stands in for `state tx`. Its only weight is the sum of the seeds of all parts so far; predicted cells of a
    condition are its vector's sum, plus 0, 1, 2, ... and the number of control cells.

    losses: of validation, by step.
    """

    def __init__(self, losses: Mapping[int, float | str]) -> None:
        self.losses = losses
        self.told: list[dict[str, str]] = []
        self.val: list[list[str]] = []
        self.asked: list[ad.AnnData] = []

    def __call__(self, work: Path, command: str, arguments: Iterable[str]) -> None:
        words = list(arguments)
        if command == "train":
            self.train(work, dict(word.split("=", 1) for word in words))
        else:
            self.infer(work, dict(zip(words[::2], words[1::2], strict=True)))

    def train(self, work: Path, told: dict[str, str]) -> None:
        self.told.append(told)
        screen = tomllib.loads((work / told["data.kwargs.toml_config_path"]).read_text())
        self.val.append([name for split in screen["fewshot"].values() for name in split["val"]])
        run, steps = work / told["name"], int(told["training.max_steps"])
        last = run / "checkpoints" / "last.ckpt"
        before = torch.load(last, weights_only=True) if last.exists() else {"state_dict": {"w": torch.zeros(1)}}
        checkpoint = {
            "pytorch-lightning_version": "2.6.6",
            "hparams_name": "kwargs",
            "hyper_parameters": {"input_dim": np.int64(30), "nested": [{"latent": np.int64(8)}]},
            "state_dict": {"w": before["state_dict"]["w"] + int(told["training.train_seed"]) % 1000},
            "optimizer_states": [torch.ones(2)],
            "callbacks": {"path": str(run)},
        }
        torch.save(checkpoint, run / "checkpoints" / "final.ckpt")
        (run / "version_0").mkdir()
        rows = [{"train_loss": 2.0, "val_loss": ""}, {"train_loss": 4.0, "val_loss": ""}]
        if self.val[-1]:
            rows.append({"train_loss": "", "val_loss": self.losses[steps]})
        with (run / "version_0" / "metrics.csv").open("w") as file:
            writer = csv.DictWriter(file, ["train_loss", "val_loss"])
            writer.writeheader()
            writer.writerows(rows)

    def infer(self, work: Path, told: dict[str, str]) -> None:
        cells = ad.read_h5ad(work / told["--adata"])
        self.asked.append(cells)
        vectors = torch.load(work / told["--model-dir"] / "pert_onehot_map.pt", weights_only=True)
        names = cells.obs[told["--pert-col"]].astype(str)
        within = names.groupby(names).cumcount() + (names == told["--control-pert"]).sum()
        values = names.map(lambda name: float(vectors[name].sum())) + within
        np.save(work / told["--output"], np.repeat(values.to_numpy(np.float32)[:, None], cells.n_vars, axis=1))


@pytest.fixture
def program(state, monkeypatch) -> Program:
    stand_in = Program({2: 3.0, 4: 1.0, 6: 2.0})
    monkeypatch.setattr(state, "run_state", stand_in)
    return stand_in


def weight(folder: Path) -> float:
    return float(torch.load(folder / "weights.ckpt", weights_only=True)["state_dict"]["w"])


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_all_hyperparameters_reach_the_program(state, program, panel, tmp_path):
    changed = SMALL | {"learning_rate": 0.5, "largest_norm": 2, "workers": 3}
    state.train(panel.train_task(tmp_path, hyperparameters=changed))
    told, backbone = program.told[0], "model.kwargs.transformer_backbone_kwargs"
    expected = {
        "model.kwargs.hidden_dim": "16",
        "model.kwargs.cell_set_len": "8",
        f"{backbone}.num_hidden_layers": "1",
        f"{backbone}.num_attention_heads": "2",
        f"{backbone}.head_dim": "8",
        f"{backbone}.intermediate_size": "16",
        "training.batch_size": "4",
        "training.lr": "0.5",
        "training.gradient_clip_val": "2",
        "training.val_freq": "2",
        "data.kwargs.num_workers": "3",
        "use_wandb": "false",
    }
    assert told.items() >= expected.items()
    assert [one["training.max_steps"] for one in program.told] == ["2", "4", "6"]
    seeds = {(one["training.train_seed"], one["+data.kwargs.random_seed"]) for one in program.told}
    assert len(seeds) == 3, "each part has draws of its own"


def test_the_screen_that_it_is_told(state, two_lines, tmp_path):
    """Train control cells, all conditions with embeddings as sums, val conditions by covariate."""
    cells = contract.read_cells(two_lines.folder / "train.h5ad")
    cells.obs.loc[(cells.obs["condition"] == "control") & (np.arange(cells.n_obs) % 2 == 0), "split"] = "val"
    cells.obs.loc[(cells.obs["covariate"] == "RPE1") & (cells.obs["condition"] == "P07"), "split"] = "train"
    embedding = contract.read_embedding(two_lines.folder / "embedding.parquet")
    kept, shape = contract.select_cells(cells, embedding)
    state.write_screen(cells[kept].copy(), embedding, shape, tmp_path)
    written = ad.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(written.X.toarray(), cells[kept].X.toarray())
    names = cells.obs["condition"][kept].to_numpy()
    code = dict(zip(names, written.obs["condition"], strict=True))
    assert sorted(code) == sorted(
        ["control", "P00", "P01", "P02", "P04", "P05", "P06", "P07", "P09", "P00+P01", "P01+P06", "P04+P05"]
    )
    assert (cells.obs["split"][kept][names == "control"] == "train").all()
    vectors = torch.load(tmp_path / "features.pt", weights_only=True)
    for name in code:
        expected = embedding.loc[list(contract.genes_of(name))].to_numpy().sum(axis=0)
        np.testing.assert_allclose(vectors[code[name]], expected, rtol=1e-6)
    screen = tomllib.loads((tmp_path / "screen.toml").read_text())
    assert screen["datasets"] == {"screen": "cells.h5ad"}
    lines = dict(zip(cells.obs["covariate"][kept], written.obs["covariate"], strict=True))
    val = {line: screen["fewshot"][f"screen.{lines[line]}"]["val"] for line in lines}
    assert val == {"K562": sorted([code["P04+P05"], code["P07"]]), "RPE1": [code["P04+P05"]]}


def test_a_covariate_without_control_cells_is_refused(state, two_lines, tmp_path):
    cells = contract.read_cells(two_lines.folder / "train.h5ad")
    cells = cells[(cells.obs["covariate"] == "K562") | (cells.obs["condition"] != "control")]
    cells.write_h5ad(tmp_path / "train.h5ad")
    with pytest.raises(contract.ContractError, match="covariate RPE1 has no control cell in the train split"):
        state.train(two_lines.train_task(tmp_path, cells=tmp_path / "train.h5ad"))


def test_the_weights_of_the_least_validation_loss_are_kept(state, program, panel, tmp_path, capsys):
    state.train(panel.train_task(tmp_path, hyperparameters=SMALL))
    seeds = [int(one["training.train_seed"]) % 1000 for one in program.told]
    assert weight(tmp_path) == sum(seeds[:2]), "of step 4"
    assert {path.name for path in tmp_path.iterdir()} == {"weights.ckpt", "model.json"}
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [(event["name"], event["step"], event["value"]) for event in events if event["event"] == "metric"]
    train_losses = [("train_loss", step, 3.0) for step in (2, 4, 6)]
    assert sorted(told) == [*train_losses, ("val_loss", 2, 3.0), ("val_loss", 4, 1.0), ("val_loss", 6, 2.0)]
    assert [event["done"] for event in events if event["event"] == "progress"] == [2, 4, 6]
    assert any("non-commercial" in event.get("message", "") for event in events)


def test_without_val_conditions_the_last_weights_are_kept(state, program, panel, tmp_path):
    cells = ad.read_h5ad(panel.folder / "train.h5ad")
    cells[(cells.obs["split"] == "train").to_numpy()].write_h5ad(tmp_path / "train.h5ad")
    (tmp_path / "model").mkdir()
    state.train(panel.train_task(tmp_path / "model", cells=tmp_path / "train.h5ad", hyperparameters=SMALL))
    assert program.val == [[], [], []]
    assert weight(tmp_path / "model") == sum(int(one["training.train_seed"]) % 1000 for one in program.told)


@pytest.mark.parametrize(("losses", "kept"), [({2: "nan", 4: "nan", 6: "nan"}, 1), ({2: "nan", 4: 5.0, 6: "nan"}, 2)])
def test_weights_are_kept_even_where_a_validation_loss_is_nan(state, program, panel, tmp_path, losses, kept):
    """The first ones, until there is a loss."""
    program.losses = losses
    for name in ("checkpoint", "model"):
        (tmp_path / name).mkdir()
    checkpoint, model = tmp_path / "checkpoint", tmp_path / "model"
    state.train(panel.train_task(model, hyperparameters=SMALL, checkpoint=checkpoint))
    seeds = [int(one["training.train_seed"]) % 1000 for one in program.told]
    assert weight(model) == sum(seeds[:kept])


@pytest.mark.parametrize("file", ["progress.json", "last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_checkpoint_is_begun_anew(state, program, panel, tmp_path, capsys, file, damage):
    checkpoint = tmp_path / "checkpoint"
    for name in ("checkpoint", "first", "again"):
        (tmp_path / name).mkdir()
    state.train(panel.train_task(tmp_path / "first", hyperparameters=SMALL, checkpoint=checkpoint))
    damage(checkpoint / "steps_000000004" / file)
    program.told.clear()
    capsys.readouterr()
    state.train(panel.train_task(tmp_path / "again", hyperparameters=SMALL, checkpoint=checkpoint))
    assert [one["training.max_steps"] for one in program.told] == ["2", "4", "6"]
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    assert "cannot be read: this one starts from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize("again", [SMALL, SMALL | {"batch_size": 5}])
def test_a_training_that_was_cut_off_goes_on_to_the_same_files(
    state, program, panel, tmp_path, monkeypatch, capsys, again
):
    """After its second part, the first that is not in its checkpoint; unless its hyperparameters are others."""
    checkpoint = tmp_path / "checkpoint"
    for name in ("checkpoint", "whole", "broken", "again"):
        (tmp_path / name).mkdir()
    state.train(panel.train_task(tmp_path / "whole", hyperparameters=again))
    whole = [line for line in capsys.readouterr().out.splitlines() if '"metric"' in line]

    def killed(work: Path, command: str, arguments: Iterable[str]) -> None:
        program(work, command, arguments)
        if program.told[-1]["training.max_steps"] == "4":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state, "run_state", killed)
        patch.setattr(contract, "_METRICS", [])  # as in the process of its own that a training has
        with pytest.raises(KeyboardInterrupt):
            state.train(panel.train_task(tmp_path / "broken", hyperparameters=SMALL, checkpoint=checkpoint))
    assert [path.name for path in checkpoint.iterdir()] == ["steps_000000002"]
    (checkpoint / "steps_000000004.partial").mkdir()  # of a kill while it was written
    capsys.readouterr()
    program.told.clear()
    monkeypatch.setattr(contract, "_METRICS", [])
    state.train(panel.train_task(tmp_path / "again", hyperparameters=again, checkpoint=checkpoint))
    assert [one["training.max_steps"] for one in program.told] == (["4", "6"] if again == SMALL else ["2", "4", "6"])
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert [line for line in capsys.readouterr().out.splitlines() if '"metric"' in line] == whole
    assert [path.name for path in checkpoint.iterdir()] == ["steps_000000004"]


def test_predictions_are_means_over_the_cells_of_each_condition(state, program, two_lines, tmp_path, monkeypatch):
    """Made for one condition at a time here, from the control cells of its covariate alone."""
    monkeypatch.setattr(state, "BLOCK_BYTES", 1)
    state.train(two_lines.train_task(tmp_path, hyperparameters=SMALL))
    (tmp_path / "output").mkdir()
    state.predict(two_lines.predict_task(tmp_path, tmp_path / "output"))
    predictions = ad.read_h5ad(tmp_path / "output" / "predictions.h5ad")
    embedding = contract.scale_embedding(contract.read_embedding(two_lines.folder / "embedding.parquet"))
    assert predictions.n_obs == 6
    for key, profile in zip(predictions.obs["condition"], predictions.X, strict=True):
        vector = embedding.loc[list(contract.genes_of(key))].to_numpy().sum()
        np.testing.assert_allclose(profile, vector + 15 + 1, rtol=1e-5)
    control = ad.read_h5ad(two_lines.folder / "control.h5ad")
    assert len(program.asked) == 6
    for row, cells in enumerate(program.asked):
        own = control[control.obs["covariate"] == ("K562" if row < 3 else "RPE1")]
        np.testing.assert_array_equal(cells.X[:15].toarray(), own.X.toarray())
        assert cells.n_obs == 15 + 3


def test_weights_that_are_another_pickle_are_not_given_to_the_program(state, program, panel, tmp_path):
    state.train(panel.train_task(tmp_path, hyperparameters=SMALL))
    torch.save({"state_dict": {}, "hyper_parameters": Path("x")}, tmp_path / "weights.ckpt")
    (tmp_path / "output").mkdir()
    with pytest.raises(Exception, match="Weights only load failed"):
        state.predict(panel.predict_task(tmp_path, tmp_path / "output"))
    assert program.asked == []


def test_a_checkpoint_is_made_plain(state, tmp_path):
    """Else PyTorch would refuse to load it where a training goes on."""
    torch.save({"a": {"b": [np.int64(3)], "w": torch.ones(2)}, "callbacks": {"path": "x"}}, tmp_path / "c.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "c.ckpt", weights_only=True)
    found = state.read_checkpoint(tmp_path / "c.ckpt")
    assert list(found) == ["a"]
    assert type(found["a"]["b"][0]) is int
    torch.save({"a": Path("x")}, tmp_path / "d.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        state.read_checkpoint(tmp_path / "d.ckpt")


def test_the_program_that_fails_is_heard(state, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(state.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "state").write_text('#!/bin/sh\necho "$@ in $HOME"\necho words >&2\nexit 3\n')
    (tmp_path / "state").chmod(0o755)
    with pytest.raises(SystemExit) as ended:
        state.run_state(tmp_path, "train", ["model=state"])
    assert ended.value.code == 1
    expected = f"tx train model=state in {tmp_path}\nwords\nstate tx train ended with exit code 3\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("steps", 0, "above 0"),
        ("steps", 7, r"a multiple of validate_every \(2\)"),
        ("heads", 3, r"a divisor of hidden \(16\)"),
        ("workers", -1, "at least 0"),
        ("learning_rate", -1.0, "above 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(state, panel, tmp_path, field, value, wanted):
    with pytest.raises(contract.ContractError, match=f"hyperparameters: {field}: wanted .*{wanted}"):
        state.train(panel.train_task(tmp_path, hyperparameters=SMALL | {field: value}))


# ---- in its image, which is built by choice
