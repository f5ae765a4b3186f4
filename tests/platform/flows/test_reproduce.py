"""The reproduction of a study as a user sees it: what one data set lacks does not stop the others, and is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import httpx
import pytest
import yaml

from blocks.config import child_environment
from blocks.config.catalog import open_catalog
from blocks.config.child_environment import Services
from blocks.config.paths import PROJECT_ROOT
from tests.helpers.mirror_files import mirror_of

Run = Callable[..., subprocess.CompletedProcess[str]]
SEED = 12  # of these entries alone: the store holds what other tests prepared too
HOOK = """
import sys
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from flows import reproduce

reproduce.end_interrupted = lambda flow, flow_run, state: print("ENDED", flow_run.name, state)

@flow(flow_run_name="inner")
def inner(): ...

@flow(flow_run_name="other")
def other(): ...

@flow
def outer():
    from prefect import runtime
    inner()
    return runtime.flow_run.id

own = outer()
other()
reproduce.end_interrupted_subflows(outer, FlowRun(id=own, flow_id=own), "crashed")
"""


class Study(NamedTuple):
    """Entries of a user, by name, and what they call their files."""

    entries: dict[str, Path]
    files: dict[str, Path]

    def options(self, *names: str) -> list[str]:
        named = [f"{name}={self.files[name]}" for name in names if name in self.files]
        return [
            "--datasets",
            ",".join(str(self.entries[name]) for name in names),
            *(part for pair in named for part in ("--source", pair)),
        ]


@pytest.fixture
def study(entry: Path, screen: Path, tmp_path: Path) -> Study:
    """One data set that is there, one without its file, and one whose file broke off half way."""
    spec = yaml.safe_load(entry.read_text(encoding="utf-8"))
    entries = {name: tmp_path / f"{name}.yaml" for name in ("tiny", "absent", "damaged")}
    for name, path in entries.items():
        path.write_text(yaml.safe_dump({**spec, "name": name, "seed": SEED}), encoding="utf-8")
    whole = screen.read_bytes()
    (tmp_path / "damaged.h5ad").write_bytes(whole[: len(whole) // 2])
    return Study(entries, {"tiny": screen, "damaged": tmp_path / "damaged.h5ad"})


class TestWithServers:
    @pytest.fixture
    def data(self, servers: Services) -> Path:
        from blocks.config.paths import data_folder

        return data_folder()

    def test_what_one_data_set_lacks_does_not_stop_the_others(
        self, calipert: Run, data: Path, study: Study, servers: Services
    ) -> None:
        done = calipert("reproduce", *study.options("absent", "damaged", "tiny"), data=data)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "1 of 3 data sets done, 2 not" in done.stdout
        rows = {row["data set"]: row for row in table(servers)}
        assert list(rows) == ["absent", "damaged", "tiny"]
        assert {name: row["outcome"] for name, row in rows.items()} == {
            "absent": "could not be fetched",
            "damaged": "could not be prepared",
            "tiny": "done",
        }
        assert "--source absent=FILE" in rows["absent"]["reason"]
        assert "damaged.h5ad" in rows["damaged"]["reason"]
        (cells,) = stored_cells(data, "tiny")
        numbers = [rows["tiny"][head] for head in ("cells", "conditions", "genes")]
        assert numbers == [cells.n_obs, cells.obs["condition"].nunique() - 1, cells.n_vars]
        assert 0 <= rows["tiny"]["calibrated metrics"] <= 17
        # The same on the console: one row of the table per data set.
        printed = [line.split() for line in done.stdout.splitlines()]
        wanted = [
            "tiny",
            *(f"{number:,}" for number in [*numbers, rows["tiny"]["calibrated metrics"]]),
            "done",
        ]
        assert wanted in printed
        assert any(line[:5] == ["absent", "could", "not", "be", "fetched:"] for line in printed)
        assert any(line[:5] == ["damaged", "could", "not", "be", "prepared:"] for line in printed)
        assert state(servers) == "COMPLETED"

    def test_it_fails_where_nothing_was_done(self, calipert: Run, data: Path, study: Study, servers: Services) -> None:
        done = calipert("reproduce", *study.options("absent", "damaged"), data=data)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "none of 2 was done" in done.stderr
        assert "--source absent=FILE" in done.stdout.replace("\n", "")
        assert [row["data set"] for row in table(servers)] == ["absent", "damaged"]
        assert state(servers) == "FAILED"

    def test_a_second_run_goes_on_from_the_first(
        self, calipert: Run, data: Path, study: Study, servers: Services
    ) -> None:
        assert calipert("reproduce", *study.options("damaged", "tiny"), data=data).returncode == 1
        before = manifests(data)
        study.files["damaged"].write_bytes(study.files["tiny"].read_bytes())
        done = calipert("reproduce", *study.options("damaged", "tiny"), data=data)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [row["outcome"] for row in table(servers)] == ["done", "done"]
        assert before.items() <= manifests(data).items()
        assert "2 of 2 data sets done, 0 not" in done.stdout

    def test_a_mirror_is_fetched_and_benchmarked(
        self,
        calipert: Run,
        data: Path,
        study: Study,
        screen: Path,
        s3: tuple[str, Any],
        prepared: Callable[..., ad.AnnData],
        servers: Services,
    ) -> None:
        endpoint, owner = s3
        spec = open_catalog().dataset(study.entries["tiny"])
        mirror = mirror_of(prepared(ad.read_h5ad(screen), spec))
        local = study.entries["tiny"].with_name("mirror.h5ad")
        mirror.write_h5ad(local)
        owner.put_file(str(local), "screens/tiny_processed_complete.h5ad")
        owner.chmod("screens/tiny_processed_complete.h5ad", "public-read")
        place = {
            "kind": "s3",
            "url": "s3://screens/tiny_processed_complete.h5ad",
            "endpoint": endpoint,
            "anonymous": True,
        }
        entry = yaml.safe_load(study.entries["tiny"].read_text(encoding="utf-8"))
        study.entries["tiny"].write_text(yaml.safe_dump({**entry, "name": "mirrored", "mirror": place}))
        options = ["--datasets", study.entries["tiny"], "--origin", "mirror", "--models", "ridge_coexpression"]
        done = calipert("reproduce", *options, data=data)
        assert done.returncode == 0, done.stdout + done.stderr
        (row,) = table(servers)
        assert (row["data set"], row["outcome"], row["cells"]) == ("mirrored", "done", mirror.n_obs - 5)
        assert "to fetch s3://screens/tiny_processed_complete.h5ad" in " ".join(done.stdout.split())
        assert (data / "reports" / "mirrored" / "report.html").exists()
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=servers.mlflow)
        experiment = client.get_experiment_by_name("calipert/mirrored")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], "tags.kind = 'calibration'")
        inputs = [run.inputs.dataset_inputs[0] for run in runs if run.inputs]
        assert len(inputs) == len(runs)
        sources = {json.loads(one.dataset.source)["uri"] for one in inputs}
        assert sources == {"s3://screens/tiny_processed_complete.h5ad"}

    def test_an_interrupted_reproduction_ends_the_runs_of_its_subflows(self, servers: Services) -> None:
        done = subprocess.run(
            [sys.executable, "-c", HOOK],
            cwd=PROJECT_ROOT,
            env=child_environment.build_child_environment(servers),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["ENDED inner crashed"]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """Address of a local S3 server with a bucket `screens`, and a file system with its owner's credentials."""
    import s3fs
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    endpoint = "http://{}:{}".format(*running.get_host_and_port())
    owner = s3fs.S3FileSystem(
        key="test",
        secret="test",  # noqa: S106 - nobody's
        endpoint_url=endpoint,
        skip_instance_cache=True,
    )
    owner.makedirs("screens", exist_ok=True)
    yield endpoint, owner
    running.stop()


def table(servers: Services) -> list[dict[str, Any]]:
    """The rows of the latest table that a reproduction left in Prefect."""
    query = {"artifacts": {"key": {"any_": ["reproduce"]}}, "sort": "CREATED_DESC", "limit": 1}
    (latest,) = httpx.post(f"{servers.prefect_api}/artifacts/filter", json=query, timeout=60).json()
    return list(json.loads(latest["data"]))


def state(servers: Services) -> str:
    """How the latest reproduction ended."""
    query = {"flows": {"name": {"any_": ["reproduce"]}}, "sort": "START_TIME_DESC", "limit": 1}
    (latest,) = httpx.post(f"{servers.prefect_api}/flow_runs/filter", json=query, timeout=60).json()
    return str(latest["state_type"])


def stored_cells(data: Path, name: str) -> Iterator[ad.AnnData]:
    """The prepared cells of one of the entries of these tests."""
    for file in (data / "store" / "cells").glob("*/cells.h5ad"):
        cells = ad.read_h5ad(file)
        entry = json.loads(cells.uns["provenance"])["entry"]
        if (entry["name"], entry["seed"]) == (name, SEED):
            yield cells


def manifests(data: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (data / "store").glob("*/*/manifest.json")}
