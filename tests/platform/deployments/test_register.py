"""Registering, against a Prefect server: once more changes nothing, and what an operator did is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import PrefectHTTPStatusError

from blocks.config.catalog import open_catalog
from deployments.register import create_work_pool, register
from deployments.table import Deployment, build_table
from tasks.train import FoldJob
from tests.helpers.entries import MINE

SOME = (
    *("benchmark/demo", "prepare/demo", "calibrate/demo", "train/demo", "prepare/norman19", "embed/reactome"),
    *("reproduce/all", "train-fold/any"),
)

pytestmark = pytest.mark.xdist_group("prefect_server")


@pytest.fixture(scope="module", autouse=True)
def pools(prefect_server: None) -> None:
    create_work_pool("cpu")
    create_work_pool("gpu", 3)


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def rows() -> list[Deployment]:
    """Of the table what these tests look at, and the user's own. All of it is registered by test_local.py."""
    return [row for row in build_table() if row.full_name in SOME or row.name in ("mine", "another")]


@pytest.fixture
def users_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The entry `mine` in a catalog of the user's."""
    path = tmp_path / "datasets" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(MINE), encoding="utf-8")
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path))
    return path


@pytest.fixture
def study(client: SyncPrefectClient) -> Iterator[Deployment]:
    """The row of the whole study, freshly registered."""
    row = next(row for row in build_table() if row.full_name == "reproduce/all")
    register([row])
    yield row
    client.delete_deployment(client.read_deployment_by_name(row.full_name).id)


class TestWithServer:
    def test_a_second_time_changes_nothing(self, client: SyncPrefectClient) -> None:
        register(rows())
        before = deployments(client)
        assert {row.full_name for row in rows()} <= set(before)
        assert register(rows())[:2] == ([], [])
        after = deployments(client)
        assert {name: one.updated for name, one in after.items()} == {name: one.updated for name, one in before.items()}

    def test_only_what_differs_is_changed(self, client: SyncPrefectClient, users_catalog: Path) -> None:
        register(rows())
        before = deployments(client)
        users_catalog.write_text(yaml.safe_dump({**MINE, "title": "my better screen"}), encoding="utf-8")
        changed = ["benchmark/mine", "prepare/mine", "calibrate/mine", "train/mine"]
        assert register(rows())[:2] == ([], changed)
        after = deployments(client)
        assert {name: one.id for name, one in after.items()} == {name: one.id for name, one in before.items()}
        assert {name for name in after if after[name].updated != before[name].updated} == set(changed)
        assert "my better screen" in (after["prepare/mine"].description or "")

    def test_a_new_data_set_changes_only_forms_that_offer_it(
        self, client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        register(rows())
        (tmp_path / "datasets").mkdir()
        entry = {**MINE, "name": "another"}
        (tmp_path / "datasets" / "another.yaml").write_text(yaml.safe_dump(entry), encoding="utf-8")
        monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path))
        new, changed, _ = register(rows())
        assert new == ["benchmark/another", "prepare/another", "calibrate/another", "train/another"]
        assert changed == ["reproduce/all"]
        offered = client.read_deployment_by_name("reproduce/all").parameter_openapi_schema
        assert offered is not None
        assert "another" in offered["properties"]["datasets"]["items"]["enum"]

    def test_what_is_in_the_table_no_more_is_named_and_kept(
        self, client: SyncPrefectClient, users_catalog: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        register(rows())
        monkeypatch.delenv("CALIPERT_CATALOG")
        left = register(rows()).left
        assert {"benchmark/mine", "calibrate/mine", "prepare/mine", "train/mine"} <= set(left)
        assert client.read_deployment_by_name("benchmark/mine").parameters == {"dataset": "mine"}

    def test_a_deployment_that_somebody_made_of_a_flow_of_ours_is_not_named(self, client: SyncPrefectClient) -> None:
        (row,) = (row for row in build_table() if row.full_name == "prepare/demo")
        register([row, replace(row, name="theirs", tags=("theirs",))])
        assert "prepare/theirs" not in register([row]).left

    def test_the_example_of_a_schedule_is_off(self, client: SyncPrefectClient, study: Deployment) -> None:
        (schedule,) = client.read_deployment_by_name(study.full_name).schedules
        assert (schedule.slug, schedule.active) == ("every-sunday", False)
        assert schedule.schedule == CronSchedule(cron="0 3 * * 0", timezone="UTC")

    def test_a_schedule_that_was_switched_on_changed_or_deleted_stays_so(
        self, client: SyncPrefectClient, study: Deployment
    ) -> None:
        changed = replace(study, description="Another description.")
        known = client.read_deployment_by_name(study.full_name)
        (schedule,) = known.schedules
        daily = CronSchedule(cron="0 4 * * *", timezone="Europe/Berlin")
        client.update_deployment_schedule(known.id, schedule.id, active=True, schedule=daily)
        assert register([changed]).changed == [study.full_name]
        (kept,) = client.read_deployment_by_name(study.full_name).schedules
        assert (kept.id, kept.slug, kept.active, kept.schedule) == (schedule.id, "every-sunday", True, daily)
        client.create_deployment_schedules(known.id, [DeploymentScheduleCreate(schedule=daily, active=True)])
        register([study])
        assert len(client.read_deployment_by_name(study.full_name).schedules) == 2
        for one in client.read_deployment_schedules(known.id):
            client.delete_deployment_schedule(known.id, one.id)
        register([changed])
        assert client.read_deployment_by_name(study.full_name).schedules == []

    def test_one_whole_study_runs_at_a_time_unless_somebody_wants_it_otherwise(
        self, client: SyncPrefectClient, study: Deployment
    ) -> None:
        known = client.read_deployment_by_name(study.full_name)
        assert known.global_concurrency_limit is not None
        assert known.global_concurrency_limit.limit == 1
        assert known.concurrency_options is not None
        assert known.concurrency_options.collision_strategy == ConcurrencyLimitStrategy.ENQUEUE
        client.update_deployment(known.id, DeploymentUpdate(concurrency_limit=5))
        client.pause_deployment(known.id)
        register([replace(study, description="Another description.")])
        after = client.read_deployment_by_name(study.full_name)
        assert after.global_concurrency_limit is not None
        assert after.global_concurrency_limit.limit == 5
        assert after.paused

    def test_a_pool_keeps_the_limit_that_was_set_by_hand(self, client: SyncPrefectClient) -> None:
        assert client.read_work_pool("cpu").concurrency_limit is None
        assert client.read_work_pool("gpu").concurrency_limit == 3
        client.update_work_pool("gpu", WorkPoolUpdate(concurrency_limit=7))
        create_work_pool("gpu", 3)
        assert client.read_work_pool("gpu").concurrency_limit == 7
        client.update_work_pool("gpu", WorkPoolUpdate(concurrency_limit=3))

    @pytest.mark.parametrize(
        ("name", "parameters", "words"),
        [
            (
                "benchmark/demo",
                {"models": ["fmlp_coexpresion"]},
                "'fmlp_coexpresion' is not one of ['base', 'demo', 'simple'",
            ),
            ("benchmark/demo", {"dataset": "dmeo"}, "'dmeo' is not one of ['demo']"),
            ("prepare/norman19", {"sources": {"norman": "/a.h5ad"}}, "'norman' was unexpected"),
            ("embed/reactome", {"embedding": "coexpression"}, "'coexpression' is not one of ['reactome']"),
            ("reproduce/all", {"datasets": ["norman"]}, "'norman' is not one of"),
            ("train-fold/any", {}, "'job' is a required property"),
        ],
    )
    def test_a_wrong_parameter_is_refused_at_submission(
        self, client: SyncPrefectClient, name: str, parameters: dict[str, Any], words: str
    ) -> None:
        register(rows())
        known = client.read_deployment_by_name(name)
        with pytest.raises(PrefectHTTPStatusError) as caught:
            client.create_flow_run_from_deployment(known.id, parameters=parameters)
        assert caught.value.response.status_code == 409
        assert words in caught.value.response.json()["detail"]

    def test_right_parameters_are_taken_at_submission(self, client: SyncPrefectClient) -> None:
        register(rows())
        known = client.read_deployment_by_name("benchmark/demo")
        run = client.create_flow_run_from_deployment(known.id, parameters={"models": ["ridge_coexpression"]})
        assert run.parameters == {"dataset": "demo", "models": ["ridge_coexpression"]}
        assert set(run.tags) == {"calipert", "demo", "single"}
        (model,) = open_catalog().models(["ridge_coexpression"])
        job = FoldJob(
            dataset="demo", model=model, fold=0, seed=42, data="d", embedding="e", asked=[{}], target_sum=1e4
        ).model_dump(mode="json")
        known = client.read_deployment_by_name("train-fold/any")
        run = client.create_flow_run_from_deployment(known.id, parameters={"job": job, "expected": "k"})
        assert FoldJob.model_validate(run.parameters["job"]).model == model


def deployments(client: SyncPrefectClient) -> dict[str, DeploymentResponse]:
    """All on the server, by full name."""
    names = {flow.id: flow.name for flow in client.read_flows()}
    found = client.read_deployments(limit=200)
    assert len(found) < 200
    return {f"{names[one.flow_id]}/{one.name}": one for one in found}
