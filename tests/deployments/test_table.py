from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from core import catalog
from deployments.table import FLOWS, POOL, table


def test_every_flow_has_a_deployment_for_every_data_set() -> None:
    names = [row.full_name for row in table()]
    assert len(names) == len(set(names))
    assert set(names) == {f"{flow}/{dataset}" for flow, _, _ in FLOWS for dataset in catalog.names("dataset")}
    assert {"benchmark/demo", "prepare/demo", "calibrate/demo"} <= set(names)


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


@pytest.mark.parametrize(("name", "entrypoint"), [(name, entrypoint) for name, entrypoint, _ in FLOWS])
def test_every_entrypoint_is_a_flow_that_takes_the_parameters(name: str, entrypoint: str) -> None:
    module, _, attribute = entrypoint.rpartition(".")
    flow = getattr(import_module(module), attribute)
    assert flow.name == name
    inspect.signature(flow.fn).bind(**table()[0].parameters)
