"""What models are given beside cells: embeddings of every form, and weights to start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from blocks.config.catalog import open_catalog
from blocks.config.paths import checkpoints_folder
from blocks.engines.base import ModelFailed
from core.catalog.schema import EmbeddingSpec, HttpsSource, PretrainedSpec
from core.errors import UserError
from model_containers import contract
from tasks import embed, engine, sources
from tasks.inputs import list_embedding_inputs, list_inputs, resolve_sources

GMT = "one\tR-1\tA\tB\tC\ntwo\tR-2\tB\tD\nthree\tR-3\tA\tD\tE\n"
WEIGHTS = PretrainedSpec(
    name="net",
    title="a net",
    files={
        "args.json": HttpsSource(kind="https", url="https://example.org/args.json"),
        "best.pt": HttpsSource(kind="https", url="https://example.org/best.pt"),
    },
)


@pytest.fixture(autouse=True)
def without_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A data folder of the test's own; tasks as plain functions."""
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    tasks = (
        (embed, "embed"),
        (embed, "join_embeddings"),
        (sources, "fetch_source"),
        (sources, "fetch_pretrained"),
    )
    for module, name in tasks:
        monkeypatch.setattr(module, name, getattr(module, name).fn)


@pytest.fixture
def gmt(tmp_path: Path) -> Path:
    path = tmp_path / "sets.gmt"
    path.write_text(GMT)
    return path


@pytest.fixture
def folds(tmp_path: Path) -> dict[int, Path]:
    """Two folds of cells in which A and F vary."""
    found = {}
    for fold in (0, 1):
        X = np.random.default_rng(fold).random((20, 2)).astype(np.float32)
        obs = pd.DataFrame({"split": ["train"] * 20}, index=[f"c{row}" for row in range(20)])
        found[fold] = tmp_path / f"fold{fold}"
        found[fold].mkdir()
        cells = ad.AnnData(sparse.csr_matrix(X), obs=obs, var=pd.DataFrame(index=["A", "F"]))
        cells.write_h5ad(found[fold] / "train.h5ad")
    return found


def shared(spec: EmbeddingSpec, files: dict[str, str]) -> Path:
    """The artifact of a shared embedding."""
    needed = list_embedding_inputs(spec)
    return embed.make_shared_embedding(spec, sources.fetch_inputs(needed, resolve_sources(needed, files)))


def test_several_are_joined_for_each_fold_from_parts_that_are_made_once(
    gmt: Path, folds: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_catalog().model("fmlp_reactome")
    several = model.model_copy(update={"name": "m", "embedding": open_catalog().embedding("knowledge")})
    made: list[str] = []
    original = embed.embed

    def note(spec: EmbeddingSpec, *rest: Any) -> Path:
        made.append(spec.name)
        return original(spec, *rest)

    monkeypatch.setattr(embed, "embed", note)
    found = embed.make_embeddings([several, model], folds, {"reactome": gmt}, ["A", "F"])
    assert sorted(made) == ["coexpression", "coexpression", "reactome"]
    assert found["m", 0] != found["m", 1]
    assert found["fmlp_reactome", 0] == found["fmlp_reactome", 1]
    for fold in folds:
        joined = found["m", fold]
        assert joined is not None
        read = contract.read_sources(joined / "embedding.parquet")
        assert {name: set(table.index) for name, table in read.items()} == {
            "reactome": set("ABCDE"),
            "coexpression": {"A", "F"},
        }
    again = embed.make_embeddings([several], folds, {"reactome": gmt}, ["A"])
    assert again == {key: folder for key, folder in found.items() if key[0] == "m"}


def test_a_graph_is_made_of_shared_annotations(gmt: Path) -> None:
    folder = embed.embed(open_catalog().embedding("go"), gmt, ["E", "A", "B", "F"])
    graph = contract.read_graph(folder / "embedding.parquet")
    weight = {(gene, other): value for gene, other, value in graph.itertuples(index=False)}
    # Of three sets one holds A and B. C and D are not perturbed, F is in no set.
    assert weight == {("A", "B"): 1 / 3, ("B", "A"): 1 / 3, ("A", "E"): 1 / 2, ("E", "A"): 1 / 2}
    assert embed.embed(open_catalog().embedding("go"), gmt, ["A", "B", "E", "F"]) == folder
    assert embed.embed(open_catalog().embedding("go"), gmt, ["A", "B"]) != folder


@pytest.mark.parametrize("name", ["go", "reactome"])
def test_what_knows_none_of_the_genes_is_refused(gmt: Path, name: str) -> None:
    model = open_catalog().model("fmlp_reactome").model_copy(update={"embedding": open_catalog().embedding(name)})
    with pytest.raises(UserError, match=r"none of the 1 perturbed genes \(NOWHERE\)"):
        embed.make_embeddings([model], {0: gmt.parent}, {name: gmt}, ["NOWHERE"])


def test_a_models_inputs_are_its_parts_and_weights_each_once() -> None:
    model = open_catalog().model("fmlp_reactome").model_copy(update={"pretrained": WEIGHTS})
    several = model.model_copy(update={"embedding": open_catalog().embedding("knowledge")})
    # Co-expression is made of a fold's cells.
    assert [one.name for one in list_inputs([model, several, open_catalog().model("linear")])] == ["reactome", "net"]


def test_weights_come_from_the_folder_that_is_named(gmt: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "args.json").write_text("{}")
    with pytest.raises(UserError) as error:
        resolve_sources([WEIGHTS], {"net": str(mine)})
    assert error.value.found == "no best.pt in it"
    (mine / "best.pt").write_bytes(b"weights")
    (mine / "unasked").write_bytes(b"x")
    model = open_catalog().model("fmlp_reactome").model_copy(update={"pretrained": WEIGHTS})
    files = {"net": mine, "reactome": gmt}
    found = sources.fetch_inputs(list_inputs([model, open_catalog().model("linear")]), files)
    assert list(found) == ["reactome", "net"]
    assert found["reactome"] == gmt
    assert {path.name for path in found["net"].iterdir()} - {"manifest.json"} == {"args.json", "best.pt"}
    (mine / "best.pt").write_bytes(b"others")
    assert sources.fetch_inputs(list_inputs([model]), files)["net"] != found["net"]


def test_weights_are_downloaded_under_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, source: HttpsSource) -> Path:
        path = tmp_path / f"{name}.{source.url.rpartition('/')[2]}"
        path.write_text(source.url)
        return path

    monkeypatch.setattr(sources, "download_once", download)
    folder = sources.fetch_pretrained(WEIGHTS)
    assert (folder / "best.pt").read_text() == "https://example.org/best.pt"


PUBLISHED = """name: {name}
title: published files
files:
  table.json: {{kind: https, url: https://example.org/table.json}}
"""
MAKER = """name: mine
title: of published files
kind: container
container: maker
pretrained: tables
settings: {{times: {times}}}
"""
MODEL = """
import json
from dataclasses import dataclass
import contract

@dataclass(frozen=True)
class Settings:
    times: float = 1.0

def embed(task):
    import pandas as pd
    times = contract.embedding_settings(task, Settings).times
    table = pd.DataFrame.from_dict(json.loads((task.pretrained / "table.json").read_text()), orient="index")
    contract.log("a table")
    contract.write_embedding(task, table * times)

description = contract.Description("maker", False, False, False, gpu=False, input="files")
contract.main(description, embed=embed)
"""


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EmbeddingSpec]:
    """An entry of an embedding that a container of the user's makes."""
    folder = tmp_path / "catalog" / "containers" / "maker"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL)
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path / "catalog"))
    for kind in ("embeddings", "pretrained"):
        (tmp_path / "catalog" / kind).mkdir(parents=True)

    def entry(times: float = 1.0, pretrained: str = "tables") -> EmbeddingSpec:
        (tmp_path / "catalog" / "pretrained" / f"{pretrained}.yaml").write_text(PUBLISHED.format(name=pretrained))
        (tmp_path / "catalog" / "embeddings" / "mine.yaml").write_text(MAKER.format(times=times))
        return open_catalog().embedding("mine")

    return entry


def test_a_container_makes_an_embedding_of_published_files(maker, tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    (published / "table.json").write_text(json.dumps({"B": [1.0, 2.0], "A": [3.0, 4.0]}))
    files = {"tables": str(published)}
    folder = shared(maker(), files)
    table = contract.read_embedding(folder / "embedding.parquet")
    assert table.to_dict() == {"d0": {"A": 3.0, "B": 1.0}, "d1": {"A": 4.0, "B": 2.0}}
    assert shared(maker(), files) == folder
    twice = shared(maker(times=2.0), files)
    assert contract.read_embedding(twice / "embedding.parquet").loc["A"].tolist() == [6.0, 8.0]
    model = open_catalog().model("ridge_mine")
    inputs = sources.fetch_inputs(list_inputs([model]), {"tables": published})
    assert list(inputs) == ["tables"]
    assert embed.make_embeddings([model], {0: tmp_path}, inputs, ["A"])["ridge_mine", 0] == twice
    (published / "table.json").write_text(json.dumps({"A": [0.0, 0.0]}))
    with pytest.raises(ModelFailed, match="gene A has only zeros"):
        shared(maker(), files)


def test_a_maker_that_was_killed_finds_what_it_kept(maker, tmp_path: Path) -> None:
    spec = maker()
    program = tmp_path / "catalog" / "containers" / "maker" / "model.py"
    dies = """
    (task.checkpoint / str(len(list(task.checkpoint.iterdir())))).write_text("")
    if not (task.checkpoint / "2").exists():
        raise RuntimeError("killed")
"""
    program.write_text(MODEL.replace("    import pandas as pd\n", "    import pandas as pd\n" + dies))
    published = tmp_path / "published"
    published.mkdir()
    (published / "table.json").write_text(json.dumps({"A": [3.0]}))
    for _ in range(2):
        with pytest.raises(ModelFailed, match="RuntimeError: killed"):
            shared(spec, {"tables": str(published)})
    assert shared(spec, {"tables": str(published)}).is_dir()
    assert not list(checkpoints_folder().iterdir())


def test_published_files_that_the_catalog_lacks_are_named(maker) -> None:
    with pytest.raises(UserError, match="'tables', which is not known") as error:
        maker(pretrained="others")
    assert "mine.yaml" in str(error.value)


def test_a_maker_that_cannot_run_is_refused_before_any_work(maker, tmp_path: Path) -> None:
    spec = maker()
    engine.check_containers([open_catalog().model("ridge_mine")])
    folder = tmp_path / "catalog" / "containers" / "maker"
    (folder / "requirements.txt").write_text("no-such-package==1.0\n")
    engine.identify_container.cache_clear()
    with pytest.raises(UserError, match=r"(?s)lacks a package: no-such-package\n.*calipert model build maker"):
        engine.check_containers([open_catalog().model("ridge_mine")])
    (folder / "model.py").unlink()
    with pytest.raises(UserError, match="'maker', of which there is no model"):
        engine.check_containers([], [spec])


def test_published_files_of_ones_own_have_to_be_named(maker, tmp_path: Path) -> None:
    spec = maker()
    own = "name: tables\ntitle: mine\nfiles:\n  table.json: {kind: local, hint: my table}\n"
    (tmp_path / "catalog" / "pretrained" / "tables.yaml").write_text(own)
    with pytest.raises(UserError, match="no folder named; wanted: my table") as error:
        resolve_sources(list_inputs([open_catalog().model("ridge_mine")]), {})
    assert "--source tables=FOLDER" in error.value.remedy
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.json").write_text(json.dumps({"A": [1.0]}))
    folder = shared(spec, {"tables": str(tmp_path / "mine")})
    assert contract.read_embedding(folder / "embedding.parquet").index.tolist() == ["A"]
