"""Small screens laid out as the contract hands them to a model, one of planted truth, and the models' modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from core.scoring.metrics import squared_error
from core.simulate import SimulationSettings, compute_planted_profiles, simulate
from core.stats.differential_expression import compare_with_rest, weigh_effects
from core.stats.moments import sum_groups
from flows.cli.model_panel import Panel, write_panel
from model_containers import contract

# What models share they import by the names that it has in their containers.
sys.modules["contract"] = contract
from model_containers import neural  # noqa: E402

sys.modules["neural"] = neural

MODELS = Path(contract.__file__).parent


LINE = "line_1"


class TaskPanel(Panel):
    """A panel that makes the tasks which a container hands to its model's functions."""

    def train_task(self, output: Path, **changes: Any) -> contract.TrainTask:
        """The task of a training."""
        fields: dict[str, Any] = {"cells": self.folder / "train.h5ad", "hyperparameters": {}}
        return contract.TrainTask(**(fields | self._shared(output) | changes))

    def predict_task(self, model: Path, output: Path, **changes: Any) -> contract.PredictTask:
        """The task of a prediction."""
        fields: dict[str, Any] = {"model": model, "control": self.folder / "control.h5ad"}
        return contract.PredictTask(**(fields | self._shared(output) | {"conditions": tuple(self.held_out)} | changes))

    def _shared(self, output: Path) -> dict[str, Any]:
        return {"embedding": self.folder / "embedding.parquet", "seed": 1, "threads": 1, "output": output}


@pytest.fixture(scope="session")
def panel(tmp_path_factory: pytest.TempPathFactory) -> TaskPanel:
    """A screen in one covariate."""
    return TaskPanel(*write_panel(tmp_path_factory.mktemp("panel"), ("line",)))


@pytest.fixture(scope="session")
def two_lines(tmp_path_factory: pytest.TempPathFactory) -> TaskPanel:
    """A screen in two covariates."""
    return TaskPanel(*write_panel(tmp_path_factory.mktemp("two_lines"), ("K562", "RPE1")))


@dataclass(frozen=True)
class Planted:
    """A simulated screen of which a third of the single genes and half of the pairs are held out.

    folder: train.h5ad and control.h5ad. programs: measured genes x programs, along which the perturbation of a gene
    acts and which other genes it moves. perturbed: the genes that are perturbed, alone or in pairs. truth: held-out
    conditions x genes, X the planted profiles, layer `weights` those of the DEGs among all perturbed cells.
    """

    folder: Path
    programs: pd.DataFrame
    perturbed: list[str]
    truth: ad.AnnData

    def errors(
        self,
        model: ModuleType,
        output: Path,
        hyperparameters: dict[str, object],
        embedding: Path | None = None,
        pretrained: Path | None = None,
    ) -> pd.DataFrame:
        """Train and predict; wmse of each held-out condition (index) by `model` and by `dataset_mean` (columns)."""
        common: dict[str, Any] = {
            "embedding": embedding,
            "seed": 1,
            "threads": 1,
            "output": output,
            "pretrained": pretrained,
        }
        cells = self.folder / "train.h5ad"
        model.train(contract.TrainTask(cells=cells, hyperparameters=hyperparameters, **common))
        names = self.truth.obs["condition"].tolist()
        keys = tuple(contract.Key(LINE, name) for name in names)
        model.predict(
            contract.PredictTask(model=output, control=self.folder / "control.h5ad", conditions=keys, **common)
        )
        predicted = ad.read_h5ad(output / "predictions.h5ad").to_df().loc[[f"{LINE}|{name}" for name in names]]
        mean = contract.dataset_means(contract.read_means(cells)).to_numpy()
        truth, weights = self.truth.X, self.truth.layers["weights"]
        profiles = {"model": predicted.to_numpy(), "dataset_mean": np.broadcast_to(mean, truth.shape)}
        return pd.DataFrame({name: squared_error(x, truth, weights) for name, x in profiles.items()}, index=names)


def plant(folder: Path, combinations: int) -> Planted:
    """A screen of 80 single genes, and of pairs of them, whose effects can be known from four programs.

    Unlike in the simulator's defaults nothing is private or null, strengths are much alike, and a perturbed gene itself
    changes as little as others: else a model that knows which gene was perturbed, and nothing about it, would beat the
    mean. Counts are deep, for there are few cells.
    """
    screen = simulate(
        SimulationSettings(
            seed=3,
            genes=250,
            singles=80,
            combinations=combinations,
            programs=4,
            program_share=0.3,
            private_share=0,
            null_share=0,
            interaction_share=0,
            effect_sharing=1,
            strength_sd=0.2,
            target_fold_change=0.8,
            cells_per_condition=25,
            control_cells=150,
            counts_per_gene=5,
        )
    )
    obs = screen.cells.obs.astype(str).rename(columns={"cell_line": "covariate", "perturbation": "condition"})
    names = sorted(set(obs["condition"]) - {contract.CONTROL})
    singles, pairs = ([name for name in names if ("+" in name) == both] for both in (False, True))
    held_out, val = [*singles[::3], *pairs[::2]], singles[1::10]
    obs["split"] = np.where(obs["condition"].isin(val), "val", "train")
    counts = screen.cells.X.toarray().astype(np.float64)
    X = sparse.csr_matrix(np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32))
    cells = ad.AnnData(X, obs=obs, var=screen.cells.var[[]])
    cells[~obs["condition"].isin(held_out).to_numpy()].copy().write_h5ad(folder / "train.h5ad")
    cells[(obs["condition"] == contract.CONTROL).to_numpy()].copy().write_h5ad(folder / "control.h5ad")
    t, _ = compare_with_rest(sum_groups(X, pd.Index(names).get_indexer(obs["condition"]), len(names)))
    truth = compute_planted_profiles(screen)
    truth = truth[(truth.obs["condition"] != contract.CONTROL).to_numpy()].copy()
    assert truth.obs["condition"].tolist() == names
    truth.layers["weights"] = weigh_effects(t)
    programs = screen.truth.varm[LINE].drop(columns="general").rename_axis("gene")
    return Planted(folder, programs, singles, truth[truth.obs["condition"].isin(held_out)].copy())


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A screen of single genes with planted truth."""
    return plant(tmp_path_factory.mktemp("planted"), 0)


@pytest.fixture(scope="session")
def planted_pairs(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """The same with pairs."""
    return plant(tmp_path_factory.mktemp("planted_pairs"), 40)


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """Imports the model.py of a folder of model_containers, as its own process would."""

    def module(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_model", MODELS / name / "model.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded  # dataclasses look their module up
        spec.loader.exec_module(loaded)
        return loaded

    return module


@pytest.fixture(autouse=True)
def _processor_as_found() -> Iterator[None]:
    """A model that trains within the tests' process may have told the processor to flush the smallest numbers to 0."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
