from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, is_valid_schema, validate

from blocks.config.catalog import open_catalog
from deployments.forms import build_form
from deployments.table import Deployment, build_table
from tasks.train import FoldJob
from tests.helpers.entries import MINE, STUDY

BESIDE = ["demo", "demo_combinations", "demo_covariates", "norman19_small", "papalexi21", "papalexi21_panel"]


FLOWS = ["benchmark", "calibrate", "embed", "prepare", "reproduce", "train", "train-fold"]
OF_DATASETS = ["benchmark", "calibrate", "prepare", "train"]


@cache
def table() -> list[Deployment]:
    """The deployments of the project's own catalog."""
    return build_table()


def row(full_name: str) -> Deployment:
    return next(one for one in table() if one.full_name == full_name)


def flow(one: Deployment) -> Flow[..., Any]:
    module, _, attribute = one.entrypoint.rpartition(".")
    return getattr(import_module(module), attribute)


def schema(full_name: str) -> dict[str, Any]:
    one = row(full_name)
    return build_form(flow(one), one)


def refusal(full_name: str, **parameters: object) -> str:
    """Why Prefect's server does not take these parameters; empty if it does."""
    try:
        validate(row(full_name).parameters | parameters, schema(full_name), raise_on_error=True)
    except ValidationError as error:
        return str(error)
    return ""


# The table


def test_every_flow_has_a_deployment_for_every_data_set_and_every_shared_embedding_has_one() -> None:
    names = [one.full_name for one in table()]
    assert len(names) == len(set(names))
    assert set(names) == {f"{flow}/{name}" for flow in OF_DATASETS for name in [*STUDY, *BESIDE]} | {
        "embed/genept",
        "embed/esm2",
        "embed/esm2_3b",
        "embed/geneformer",
        "embed/reactome",
        "embed/scgpt",
        "reproduce/all",
        "train-fold/any",
    }


def test_trainings_have_a_pool_of_their_own() -> None:
    pools = {one.full_name: one.pool for one in table()}
    assert pools.pop("train-fold/any") == "gpu"
    assert set(pools.values()) == {"cpu"}


def test_the_whole_study_has_one_deployment_with_an_example_of_a_schedule() -> None:
    one = row("reproduce/all")
    assert one.parameters == {"datasets": STUDY}
    assert one.at_once == 1
    assert [other.full_name for other in table() if other.schedule] == ["reproduce/all"]


def test_a_row_says_what_its_runs_do_with_which_data() -> None:
    one = row("benchmark/norman19_small")
    spec = open_catalog().dataset("norman19_small")
    assert one.parameters == {"dataset": "norman19_small"}
    assert one.tags == ("calipert", "norman19_small", "combination")
    for text in (spec.title, spec.licence, spec.citation):
        assert text in one.description


def test_a_users_own_data_set_has_deployments_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "mine.yaml").write_text(yaml.safe_dump(MINE), encoding="utf-8")
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path))
    mine = {one.full_name: one for one in build_table() if one.name == "mine"}
    assert "calibrate/mine" in mine
    found = build_form(flow(mine["benchmark/mine"]), mine["benchmark/mine"])
    assert found["properties"]["dataset"]["enum"] == ["mine"]


@pytest.mark.parametrize("name", FLOWS)
def test_every_entrypoint_is_a_flow_that_takes_the_parameters(name: str) -> None:
    rows = [one for one in table() if one.flow == name]
    for one in rows:
        assert flow(one).name == name
        inspect.signature(flow(one).fn).bind_partial(**one.parameters)
    assert rows


# The forms


@pytest.mark.parametrize("name", FLOWS)
def test_a_form_is_a_schema_that_takes_the_rows_own_parameters(name: str) -> None:
    for one in (one for one in table() if one.flow == name):
        found = build_form(flow(one), one)
        is_valid_schema(found)
        assert validate(one.parameters, found, ignore_required=True) == []
        for parameter, value in one.parameters.items():
            assert found["properties"][parameter]["default"] == value


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "train-fold"])
def test_every_parameter_of_a_form_has_a_title_and_an_explanation(name: str) -> None:
    one = next(one for one in table() if one.flow == name)
    found = build_form(flow(one), one)["properties"]
    for parameter, property_ in found.items():
        assert property_["title"] != parameter, parameter
        assert property_["description"].endswith("."), parameter
    assert [property_["position"] for property_ in found.values()] == list(range(len(found)))


def test_the_form_of_a_benchmark_offers_what_the_catalog_has() -> None:
    found = schema("benchmark/norman19")["properties"]
    assert found["dataset"]["enum"] == ["norman19"]
    offered = found["models"]["items"]["enum"]
    assert offered == [*open_catalog().names("group"), *open_catalog().names("model")]
    assert {"demo", "simple", "fmlp_reactome", "ridge_reactome"} <= set(offered)
    assert "demo (fmlp_coexpression, ridge_coexpression)" in found["models"]["description"]
    assert "The catalog says 2." in found["folds"]["description"]
    assert found["origin"]["enum"] == ["raw", "mirror"]
    assert set(found["sources"]["properties"]) >= {"norman19", "reactome"}


def test_the_defaults_of_a_form_are_those_of_the_flow() -> None:
    found = schema("benchmark/demo")["properties"]
    defaults = {name: property_["default"] for name, property_ in found.items()}
    assert defaults == {
        "dataset": "demo",
        "models": ["demo"],
        "folds": None,
        "seed": 42,
        "origin": "raw",
        "sources": {},
    }


def test_a_mirror_is_offered_where_there_is_one() -> None:
    for name in [*STUDY, *BESIDE]:
        origin = schema(f"prepare/{name}")["properties"]["origin"]
        assert ("mirror" in origin["enum"]) == (name in STUDY)
        assert ("no mirror" in origin["description"]) == (name in BESIDE)


def test_a_flow_without_models_offers_no_embeddings_file() -> None:
    assert set(schema("calibrate/norman19")["properties"]["sources"]["properties"]) == {"norman19"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"models": ["fmlp_reactome", "ridge_reactome"]},
        {"models": ["simple", "fmlp_coexpression"]},
        {"models": []},
        {"folds": None},
        {"folds": 3},
        {"folds": "leave-one-out"},
        {"seed": 0},
        {"sources": {"demo": "/a.h5ad", "reactome": "/b.gmt"}},
    ],
)
def test_right_parameters_are_taken(parameters: dict[str, object]) -> None:
    assert refusal("benchmark/demo", **parameters) == ""


@pytest.mark.parametrize(
    ("parameters", "field", "words"),
    [
        ({"models": ["demo", "fmlp_reactom"]}, "models[1]", "'fmlp_reactom' is not one of ['base', 'demo', 'simple'"),
        ({"models": "demo"}, "models", "is not of type 'array'"),
        ({"dataset": "norman19"}, "dataset", "'norman19' is not one of ['demo']"),
        ({"folds": 1}, "folds", "1 is less than the minimum of 2"),
        ({"folds": "leave-two-out"}, "folds", "'leave-one-out' was expected"),
        ({"seed": -1}, "seed", "-1 is less than the minimum of 0"),
        ({"origin": "mirror"}, "origin", "'mirror' is not one of ['raw']"),
        ({"sources": {"norman19": "/a.h5ad"}}, "sources", "'norman19' was unexpected"),
    ],
)
def test_wrong_parameters_are_refused_with_what_would_be_right(
    parameters: dict[str, object], field: str, words: str
) -> None:
    found = refusal("benchmark/demo", **parameters)
    assert repr(field) in found
    assert words in found


def test_names_are_checked_where_there_are_too_many_for_fields() -> None:
    assert refusal("reproduce/all", sources={"norman19": "/a.h5ad", "reactome": "/b.gmt"}) == ""
    assert "'norman' is not one of" in refusal("reproduce/all", sources={"norman": "/a.h5ad"})
    assert "is not of type 'string'" in refusal("reproduce/all", sources={"norman19": 1})
    assert "'norman' is not one of" in refusal("reproduce/all", datasets=["norman"])
    assert refusal("reproduce/all", datasets=["demo"], models=["demo"]) == ""


def test_a_trainings_job_is_taken() -> None:
    for model in open_catalog().models(["simple", "fmlp_reactome"]):
        job = FoldJob(
            dataset="demo",
            model=model,
            fold=0,
            seed=42,
            data="0" * 64,
            embedding=None,
            asked=[{"covariate": "all", "condition": "A+B"}],
            target_sum=1e4,
        )
        assert refusal("train-fold/any", job=job.model_dump(mode="json"), expected="0" * 64) == ""
    assert "'job' is a required property" in refusal("train-fold/any", expected="0" * 64)


def test_a_row_that_speaks_of_what_its_flow_does_not_take_is_an_error() -> None:
    one = row("prepare/demo")
    wrong = Deployment(one.flow, one.name, {}, (), "", choices={"models": ("demo",)})
    with pytest.raises(ValueError, match="prepare/demo: the flow does not take models"):
        build_form(flow(one), wrong)


@pytest.mark.parametrize("name", ["benchmark", "prepare", "calibrate", "reproduce", "train"])
def test_every_flow_takes_both_origins(name: str) -> None:
    one = next(one for one in table() if one.flow == name)
    origin = parameter_schema(flow(one)).model_dump_for_openapi()["properties"]["origin"]
    assert (origin["enum"], origin["default"]) == (["raw", "mirror"], "raw")
