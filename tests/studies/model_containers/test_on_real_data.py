"""A model with knowledge beats the uninformative baseline on real cells, each gene left out in its turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from core.catalog.registry import Catalog
from core.conditions import CONTROL
from core.embeddings.gene_graph import build_gene_graph, read_gene_terms
from core.embeddings.tables import embed_pathways
from core.io.h5ad import open_h5ad
from core.prepare.splits import draw_halves
from core.prepare.training_data import write_fold
from core.reference.build import build_half_split, build_negatives
from core.reference.cell_sums import CellSums
from core.scoring.metrics import squared_error
from core.stats.differential_expression import weigh_effects
from model_containers import contract

Sums = Callable[..., CellSums]

pytestmark = pytest.mark.shared

HALF_SEEDS = range(42, 52)
Relative = Callable[..., float]
Prepare = Callable[..., ad.AnnData]


@pytest.fixture(scope="module")
def relative(sums: Sums, prepared: Prepare, shared, load, tmp_path_factory) -> Relative:
    """Trains a model with one gene left out; its wmse divided by dataset_mean's, median over the half splits."""
    folder = tmp_path_factory.mktemp("papalexi21")
    raw = shared / "data" / "papalexi21.h5ad"
    spec = Catalog().dataset("papalexi21_panel").model_copy(update={"folds": "leave-one-out"})
    cells = prepared(open_h5ad(raw), spec, str(raw))
    of_cells = sums(cells, {seed: draw_halves(cells.obs, seed) for seed in HALF_SEEDS})
    negatives = build_negatives(of_cells)
    splits = [build_half_split(of_cells, seed, negatives) for seed in HALF_SEEDS]
    embed_pathways(shared / "data" / "ReactomePathways.gmt", 128).to_parquet(folder / "embedding.parquet")

    def graph() -> Path:
        path = folder / "graph.parquet"
        if not path.exists():
            screen = sorted(set(cells.obs["condition"]) - {CONTROL})
            build_gene_graph(read_gene_terms(shared / "data" / "ReactomePathways.gmt"), 100, screen).to_parquet(path)
        return path

    def run(name: str, gene: str, hyperparameters: dict[str, object], output: Path) -> float:
        of_gene = cells.obs[cells.obs["condition"] == gene].iloc[0]
        (fold,) = (int(column[5:]) for column, split in of_gene.items() if split == "test")
        write_fold(cells, fold, output)
        model = load(name)
        embedding, control = graph() if name == "gears" else folder / "embedding.parquet", output / "control.h5ad"
        model.train(contract.TrainTask(output / "train.h5ad", embedding, hyperparameters, 42, 1, output))
        asked = (contract.Key(str(of_gene["covariate"]), gene),)
        model.predict(contract.PredictTask(output, control, asked, embedding, 42, 1, output))
        predicted = ad.read_h5ad(output / "predictions.h5ad").X
        obs = negatives.obs
        dataset_mean = negatives.X[((obs["kind"] == "dataset_mean") & (obs["fold"] == fold)).to_numpy()]
        ratios = []
        for split in splits:
            row = (split.obs["condition"] == gene).to_numpy()
            truth, weights = split.layers["truth"][row], weigh_effects(split.layers["t_first"][row])
            errors = [squared_error(profile, truth, weights)[0] for profile in (predicted, dataset_mean)]
            ratios.append(errors[0] / errors[1])
        return float(np.median(ratios))

    return run


# What an independent script found over 20 seeds (smallest and largest), a little widened: halves and cap differ.
@pytest.mark.parametrize(
    ("gene", "low", "high"),
    [("IFNGR1", 0.29, 0.40), ("IFNGR2", 0.29, 0.40), ("JAK2", 0.28, 0.39), ("STAT1", 0.74, 0.82)],
)
def test_ridge_is_as_good_as_an_independent_one(relative, tmp_path, gene, low, high):
    assert low < relative("ridge", gene, {"alphas": [1.0]}, tmp_path) < high


@pytest.mark.parametrize("gene", ["IFNGR1", "IFNGR2", "JAK2"])
def test_knn_halves_the_error_of_the_dataset_mean(relative, tmp_path, gene):
    assert relative("knn", gene, {}, tmp_path) < 0.5


@pytest.mark.parametrize("gene", ["IFNGR1", "IFNGR2", "JAK2"])
def test_fmlp_halves_the_error_of_the_dataset_mean(relative, tmp_path, gene):
    """JAK2 is the hardest of the three: none of its neighbours is nearer than a cosine of 0.75."""
    assert relative("fmlp", gene, {}, tmp_path) < 0.5


@pytest.mark.parametrize("gene", ["IFNGR1", "IFNGR2", "JAK2"])
def test_presage_halves_the_error_of_the_dataset_mean(relative, tmp_path, gene):
    assert relative("presage", gene, {}, tmp_path) < 0.5


@pytest.mark.parametrize("gene", ["IFNGR1", "IFNGR2", "JAK2"])
def test_sclambda_halves_the_error_of_the_dataset_mean(relative, tmp_path, gene):
    """Narrower and shorter than by default, and validated only once the learning rate has come down."""
    settings = {"hidden": 128, "epochs": 40, "decay_every": 15, "validate_every": 20}
    assert relative("sclambda", gene, settings, tmp_path) < 0.5


@pytest.mark.parametrize(("gene", "settings"), [("IFNGR1", {}), ("JAK2", {"go_neighbours": 5})])
def test_gears_halves_the_error_of_the_dataset_mean(relative, tmp_path, gene, settings):
    """From shared pathways. JAK2 needs few links: by default each gene of so small a panel has nearly all others."""
    assert relative("gears", gene, settings, tmp_path) < 0.5
