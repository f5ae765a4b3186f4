from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from core import catalog
from deployments.table import POOL, table

STUDY = [
    "adamson16",
    "frangieh21",
    "kaden25fibroblast",
    "kaden25rpe1",
    "nadig25hepg2",
    "nadig25jurkat",
    "norman19",
    "replogle22k562",
    "replogle22k562gwps",
    "replogle22rpe1",
    "sunshine23",
    "tian21crispra",
    "tian21crispri",
    "wessels23",
]
BESIDE = ["demo", "demo_combinations", "demo_covariates", "norman19_small", "papalexi21", "papalexi21_panel"]


def test_every_flow_has_a_deployment_for_every_data_set() -> None:
    names = [row.full_name for row in table()]
    assert len(names) == len(set(names))
    flows = ("prepare", "calibrate", "benchmark")
    assert set(names) == {f"{flow}/{name}" for flow in flows for name in [*STUDY, *BESIDE]} | {"reproduce/all"}


def test_the_whole_study_has_one_deployment() -> None:
    row = next(row for row in table() if row.full_name == "reproduce/all")
    assert row.parameters == {"datasets": STUDY}
    assert row.pool == POOL


def test_a_row_says_what_its_runs_do_with_which_data() -> None:
    row = next(row for row in table() if row.full_name == "benchmark/norman19_small")
    spec = catalog.dataset("norman19_small")
    assert row.parameters == {"dataset": "norman19_small"}
    assert row.pool == POOL
    assert row.tags == ("calipert", "combination")
    for text in (spec.title, spec.licence, spec.citation):
        assert text in row.description


def test_a_users_own_data_set_has_deployments_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {
        "name": "mine",
        "title": "my screen",
        "task": "single",
        "source": {"kind": "local", "hint": "the file on my desk"},
        "labels": {"column": "perturbation", "control": ["control"]},
    }
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "mine.yaml").write_text(yaml.safe_dump(entry), encoding="utf-8")
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path))
    assert "calibrate/mine" in {row.full_name for row in table()}


@pytest.mark.parametrize("name", ["benchmark", "prepare", "calibrate", "reproduce"])
def test_every_entrypoint_is_a_flow_that_takes_the_parameters(name: str) -> None:
    rows = [row for row in table() if row.flow == name]
    for row in rows:
        module, _, attribute = row.entrypoint.rpartition(".")
        flow = getattr(import_module(module), attribute)
        assert flow.name == name
        inspect.signature(flow.fn).bind(**row.parameters)
    assert rows


@pytest.mark.parametrize("name", ["benchmark", "prepare", "calibrate", "reproduce"])
def test_the_form_of_every_flow_offers_both_origins(name: str) -> None:
    row = next(row for row in table() if row.flow == name)
    module, _, attribute = row.entrypoint.rpartition(".")
    schema = parameter_schema(getattr(import_module(module), attribute)).model_dump_for_openapi()
    origin = schema["properties"]["origin"]
    assert (origin["enum"], origin["default"]) == (["raw", "mirror"], "raw")
