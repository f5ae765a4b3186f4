"""MLflow tracking against a real server: every record can be repeated, cut off and found again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import psutil
import pytest
import requests

from blocks.config.child_environment import Services
from blocks.config.paths import PROJECT_ROOT
from blocks.engines.base import Usage
from blocks.local.processes import name_this_process
from blocks.tracking import curves as mlflow_curves
from blocks.tracking import tracker as module
from blocks.tracking.client import Refused
from blocks.tracking.tables import DRF_ENDINGS, QUOTED_COLUMNS, QUOTED_VARIANT, SUMMARY_COLUMNS
from blocks.tracking.tracker import MLflowTracking, ModelRun, OpenRun, read_git_commit
from core.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

METRICS = ("mse", "nir", "pearson_deltactrl")
Take = Callable[[Mapping[str, object]], None]

VARIANTS = (QUOTED_VARIANT, "drf_mean", "drf_ctrl")


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder of the test's own: what is uploaded lies there meanwhile."""
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def server(servers: Services) -> str:
    """The URL of an MLflow server."""
    return servers.mlflow


@pytest.fixture
def tracking(server: str) -> MLflowTracking:
    return MLflowTracking(tracking_uri=server)


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient(server)


@pytest.fixture
def dataset(request: pytest.FixtureRequest) -> str:
    """A data set's name that no other test uses, so that tests share the server but no experiment."""
    return request.node.name.removeprefix("test_")


def open_model(
    tracking: MLflowTracking, dataset: str, model: str = "ridge", folds: tuple[int, ...] = (), **changes: Any
) -> OpenRun:
    own: dict[str, Any] = {
        "seed": 42,
        "key": f"key-of-{model}",
        "kind": "model",
        "params": {"alpha": 0.1, "layers": [512, 512]},
        "engine": "docker sha256:1234",
    }
    shared: dict[str, Any] = {
        "benchmark_id": "b1",
        "digest": "d" * 64,
        "source": "https://example.org/raw.h5ad",
        "flow_run_id": "flow-1",
    }
    one = ModelRun(model, folds=folds, **{name: changes.pop(name, value) for name, value in own.items()})
    return tracking.open_runs(dataset, models=[one], **{**shared, **changes})[model]


def runs(client: MlflowClient, dataset: str, chosen: str = "", order: tuple[str, ...] = ()) -> list[Run]:
    experiment = client.get_experiment_by_name(f"calipert/{dataset}")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], chosen, order_by=list(order)))


def shown(client: MlflowClient, dataset: str) -> list[object]:
    """All that a search finds, with every metric's history and every artifact."""
    return [
        (
            run.to_dictionary(),
            {name: history(client, run.info.run_id, name) for name in run.data.metrics},
            sorted((a.path, a.file_size) for a in client.list_artifacts(run.info.run_id)),
        )
        for run in runs(client, dataset)
    ]


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))


def record_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of all requests of MLflow's client from now on, a list that grows."""
    asked: list[str] = []
    request: Callable[..., requests.Response] = requests.Session.request

    def remember(self: requests.Session, method: str, url: str, **more: object) -> requests.Response:
        asked.append(url.partition("/api/2.0/mlflow/")[2])
        return request(self, method, url, **more)

    monkeypatch.setattr(requests.Session, "request", remember)
    return asked


def leaderboard(models: tuple[str, ...], seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame([(model, metric) for model in models for metric in METRICS], columns=["model", "metric"])
    for column in SUMMARY_COLUMNS:
        frame[column] = rng.random(len(frame))
    frame["kind"] = "model"
    frame["calibrated"] = frame["metric"] != "mse"
    frame["in_panel"] = True
    frame.loc[~frame["calibrated"], "rank"] = np.nan
    return frame


def calibration_table() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame([(m, v) for m in METRICS for v in VARIANTS], columns=["metric", "variant"])
    numbers = [*DRF_ENDINGS, *QUOTED_COLUMNS, "positive_value", "negative_value"]
    for column in numbers:
        frame[column] = rng.random(len(frame))
    verdicts = {"mse": "miscalibrated", "nir": "calibrated", "pearson_deltactrl": "calibrated"}
    frame["verdict"] = [
        verdicts[m] if v == QUOTED_VARIANT else None for m, v in zip(frame.metric, frame.variant, strict=True)
    ]
    frame.loc[(frame.metric == "pearson_deltactrl") & (frame.variant == "drf_ctrl"), list(DRF_ENDINGS)] = np.nan
    return frame


def training_file(path: Path, values: dict[tuple[str, int], float]) -> Path:
    events: list[dict[str, object]] = [{"event": "log", "message": "begun"}]
    events += [{"event": "metric", "name": name, "step": step, "value": v} for (name, step), v in values.items()]
    events.append({"event": "progress", "done": 1, "total": 1, "unit": "epoch"})
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "mlruns", "http://"])
def test_only_servers_are_accepted(uri: str) -> None:
    with pytest.raises(UserError, match="give the http or https URL") as raised:
        MLflowTracking(tracking_uri=uri)
    assert raised.value.field == "MLFLOW_TRACKING_URI"


def test_a_password_in_the_url_is_refused_without_repeating_it() -> None:
    with pytest.raises(UserError) as raised:
        MLflowTracking(tracking_uri="https://ada:secret@example.org")
    assert "secret" not in str(raised.value)
    assert "MLFLOW_TRACKING_PASSWORD" in raised.value.remedy


def test_the_commit_is_the_checkouts_own_or_absent(tmp_path: Path) -> None:
    assert read_git_commit(tmp_path) is None

    def git(*words: str) -> str:
        about = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        told = subprocess.run(["git", *about, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return told.stdout.strip()

    git("init")
    assert read_git_commit(tmp_path) is None
    git("commit", "--allow-empty", "-m", "first")
    assert read_git_commit(tmp_path) == git("rev-parse", "HEAD")
    inner = tmp_path / "installed"
    inner.mkdir()
    assert read_git_commit(inner) is None


def test_a_run_carries_what_it_came_from(tracking: MLflowTracking, client: MlflowClient, dataset: str) -> None:
    run = client.get_run(open_model(tracking, dataset).run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "ridge seed 42"
    expected = {"model": "ridge", "dataset": dataset, "seed": "42", "alpha": "0.1", "layers": "[512, 512]"}
    assert run.data.params == expected
    tags = {
        "calipert.key": "key-of-ridge",
        "kind": "model",
        "benchmark_id": "b1",
        "engine": "docker sha256:1234",
        "flow_run_id": "flow-1",
    }
    assert tags.items() <= run.data.tags.items()
    assert run.inputs is not None
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == (dataset, "d" * 36)
    assert json.loads(given.dataset.source) == {"url": "https://example.org/raw.h5ad"}


def test_a_control_has_no_seed_in_its_name_and_no_engine(
    tracking: MLflowTracking, client: MlflowClient, dataset: str
) -> None:
    control = ModelRun("control_mean", -1, key="k", kind="negative control", params={})
    opened = tracking.open_runs(dataset, "b1", [control], digest="d", source="panel.h5ad")
    run = client.get_run(opened["control_mean"].run_id)
    assert opened["control_mean"].folds == {}
    assert run.info.run_name == "control_mean"
    assert "engine" not in run.data.tags
    assert "flow_run_id" not in run.data.tags
    assert run.inputs is not None
    assert json.loads(run.inputs.dataset_inputs[0].dataset.source) == {"uri": "panel.h5ad"}


def test_everything_repeated_shows_the_same(
    tracking: MLflowTracking, client: MlflowClient, dataset: str, tmp_path: Path
) -> None:
    curve = {("loss", step): 1 / (step + 1) for step in range(20)}
    training = training_file(tmp_path / "training.jsonl", curve)
    report = tmp_path / "report.html"
    report.write_text("<h1>report</h1>")
    board = leaderboard(("ridge", "knn"))
    scores = tmp_path / "scores.parquet"
    board[["model", "metric", "mean"]].to_parquet(scores, index=False)

    def benchmark() -> None:
        tracking.log_calibration(
            dataset, calibration_table(), key="c", digest="d", source="s", params={"half_seeds": 5}, file=scores
        )
        opened = {model: open_model(tracking, dataset, model, (0, 1)) for model in ("ridge", "knn")}
        for run in opened.values():
            for fold_run in run.folds.values():
                tracking.log_curve(fold_run, training)
                tracking.finish(fold_run)
        ids = {model: run.run_id for model, run in opened.items()}
        tracking.log_leaderboard(board, ids)
        tracking.log_scores(scores, ids)
        tracking.log_report(report, ids.values())
        tracking.finish(*ids.values())

    benchmark()
    first = shown(client, dataset)
    assert len(first) == 1 + 2 + 4
    assert {run.info.status for run in runs(client, dataset)} == {"FINISHED"}
    benchmark()
    assert shown(client, dataset) == first


def test_children_belong_to_their_model(tracking: MLflowTracking, client: MlflowClient, dataset: str) -> None:
    parent, folds = open_model(tracking, dataset, folds=(0, 1, 2))
    assert sorted(folds) == [0, 1, 2]
    children = runs(client, dataset, f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_id for run in children} == set(folds.values())
    second = client.get_run(folds[1])
    assert second.info.run_name == "ridge seed 42 fold 1"
    assert second.data.params == {"model": "ridge", "dataset": dataset, "seed": "42", "fold": "1"}
    assert second.data.tags["benchmark_id"] == "b1"
    again = open_model(tracking, dataset, folds=(1, 3))
    assert again.run_id == parent
    assert again.folds.items() >= {(1, folds[1])}
    assert len(runs(client, dataset)) == 1 + 4


def test_a_run_killed_in_the_middle_is_found_again_and_ended(
    tracking: MLflowTracking, client: MlflowClient, dataset: str, server: str, tmp_path: Path
) -> None:
    killed = f"""
import os, signal
from pathlib import Path
from blocks.tracking import curves as mlflow_curves
from blocks.tracking import tracker as module
mlflow_curves.LIVE_SECONDS = 0.0
t = module.MLflowTracking(tracking_uri={server!r})
one = module.ModelRun("ridge", 42, key="key-of-ridge", kind="model", params={{"alpha": 0.1, "layers": [512, 512]}},
                      engine="docker sha256:1234", folds=(0, 1))
runs = t.open_runs({dataset!r}, "b1", [one], digest="{"d" * 64}", source="https://example.org/raw.h5ad",
                   flow_run_id="flow-1")
take = t.follow_curve(runs["ridge"].folds[0])
for step in range(5):
    take({{"event": "metric", "name": "loss", "step": step, "value": 1.0 / (step + 1)}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run(
        [sys.executable, "-c", killed], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = runs(client, dataset)
    assert [run.info.status for run in left] == ["RUNNING"] * 3

    parent, folds = open_model(tracking, dataset, folds=(0, 1), flow_run_id="flow-2")
    assert {parent, *folds.values()} == {run.info.run_id for run in left}
    assert history(client, folds[0], "loss") == [(step, 1 / (step + 1)) for step in range(5)]
    curve = {("loss", step): 1 / (step + 1) for step in range(10)}
    for fold in folds.values():
        tracking.log_curve(fold, training_file(tmp_path / "training.jsonl", curve))
        tracking.finish(fold)
    tracking.finish(parent)
    for fold in folds.values():
        assert history(client, fold, "loss") == [(step, 1 / (step + 1)) for step in range(10)]
    after = runs(client, dataset)
    assert [run.info.status for run in after] == ["FINISHED"] * 3
    assert {run.data.tags["flow_run_id"] for run in after} == {"flow-2"}


def test_a_failure_keeps_its_reason_until_the_run_finishes(
    tracking: MLflowTracking, client: MlflowClient, dataset: str
) -> None:
    opened = open_model(tracking, dataset, folds=(0,))
    parent, fold = opened.run_id, opened.folds[0]
    tracking.fail(parent, "out of memory " + "x" * 10_000)
    for run_id in (parent, fold):
        failed = client.get_run(run_id)
        assert failed.info.status == "FAILED"
        assert failed.data.tags["failure"].startswith("out of memory")
        assert failed.info.end_time is not None

    assert open_model(tracking, dataset, folds=(0,)) == opened
    assert client.get_run(parent).info.status == "RUNNING"
    assert client.get_run(fold).info.status == "RUNNING"
    assert "failure" in client.get_run(fold).data.tags
    failed_at = client.get_run(parent).info.end_time
    tracking.finish(parent)
    for run_id in (parent, fold):
        finished = client.get_run(run_id)
        assert finished.info.status == "FINISHED"
        assert "failure" not in finished.data.tags
    assert client.get_run(parent).info.end_time > failed_at


def test_the_late_end_of_an_earlier_training_does_not_end_the_run_of_a_later_one(
    tracking: MLflowTracking, client: MlflowClient, dataset: str
) -> None:
    fold = open_model(tracking, dataset, folds=(0,)).folds[0]
    tracking.begin_training(fold, "first")
    tracking.begin_training(fold, "second")
    tracking.kill_training(fold, "first", "killed")
    assert client.get_run(fold).info.status == "RUNNING"
    tracking.kill_training(fold, "second", "killed, too")
    assert client.get_run(fold).info.status == "KILLED"
    assert client.get_run(fold).data.tags["failure"] == "killed, too"


def test_a_fold_that_has_finished_is_not_opened_again_until_it_is_trained_again(
    tracking: MLflowTracking,
    client: MlflowClient,
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent, folds = open_model(tracking, dataset, folds=(0, 1))
    tracking.finish(folds[0])
    first_end = client.get_run(folds[0]).info.end_time
    assert open_model(tracking, dataset, folds=(0, 1), flow_run_id="flow-2") == (parent, folds)
    again = client.get_run(folds[0])
    assert (again.info.status, again.info.end_time) == ("FINISHED", first_end)
    assert again.data.tags["flow_run_id"] == "flow-2"
    assert client.get_run(folds[1]).info.status == "RUNNING"
    # Its model was not in the store any more.
    monkeypatch.setattr(mlflow_curves, "LIVE_SECONDS", 0.0)
    tracking.follow_curve(folds[0])({"event": "metric", "name": "loss", "step": 0, "value": 0.5})
    assert client.get_run(folds[0]).info.status == "RUNNING"
    tracking.log_curve(folds[0], training_file(tmp_path / "training.jsonl", {("loss", 0): 0.5}))
    tracking.finish(folds[0])
    assert client.get_run(folds[0]).info.status == "FINISHED"


@pytest.fixture
def followed(tracking: MLflowTracking, dataset: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Take]:
    """A fold's run, and what takes the events of its training and writes them at once."""
    monkeypatch.setattr(mlflow_curves, "LIVE_SECONDS", 0.0)
    fold = open_model(tracking, dataset, folds=(0,)).folds[0]
    return fold, tracking.follow_curve(fold)


def test_a_run_that_somebody_deletes_does_not_stop_its_training(
    followed: tuple[str, Take], client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    fold, take = followed
    client.delete_run(fold)
    for step in range(3):
        take({"event": "metric", "name": "loss", "step": step, "value": 0.5})
    assert "Training goes on" in caplog.text


def test_a_finished_fold_stays_finished_when_its_model_fails(
    tracking: MLflowTracking, client: MlflowClient, dataset: str
) -> None:
    parent, folds = open_model(tracking, dataset, folds=(0, 1))
    tracking.finish(folds[0])
    tracking.fail(parent, "fold 1: diverged")
    assert client.get_run(folds[0]).info.status == "FINISHED"
    assert client.get_run(folds[1]).info.status == "FAILED"


def test_runs_of_a_dead_flow_are_found_and_ended(tracking: MLflowTracking, client: MlflowClient, dataset: str) -> None:
    dead, folds = open_model(tracking, dataset, "ridge", (0,), flow_run_id="dead-flow")
    fold = folds[0]
    alive = open_model(tracking, dataset, "knn", flow_run_id="live-flow").run_id
    assert tracking.end_interrupted("dead-flow", "The flow run crashed.") == sorted([dead, fold])
    assert client.get_run(dead).info.status == "KILLED"
    assert client.get_run(fold).data.tags["failure"] == "The flow run crashed."
    assert client.get_run(alive).info.status == "RUNNING"
    assert tracking.end_interrupted("dead-flow", "once more") == []
    assert client.get_run(dead).data.tags["failure"] == "The flow run crashed."
    tracking.finish(alive)


def test_only_runs_that_nobody_goes_on_with_are_ended(
    tracking: MLflowTracking, client: MlflowClient, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    name = name_this_process().split()
    of_child = f"{name[0]} {child.pid} {psutil.Process(child.pid).create_time():.1f}"
    elsewhere = f"another-machine/1 {child.pid} 1.0"
    cases = {
        "here": (name_this_process(), "live"),
        "flow_ended": (name_this_process(), "ended"),
        "killed": (of_child, "live"),
        "elsewhere": (elsewhere, "live"),
        "elsewhere_ended": (elsewhere, "ended"),
        "unknown": (elsewhere, None),
    }
    opened = {}
    for model, (process, flow) in cases.items():
        monkeypatch.setattr(module, "name_this_process", lambda process=process: process)
        opened[model] = open_model(tracking, dataset, model, (0,), flow_run_id=flow)
    tracking.finish(opened["killed"].folds[0])
    asked = []

    def alive(ids: list[str]) -> set[str]:
        asked.append(ids)
        return {"live"}

    ended = {model for model, (_, flow) in cases.items() if flow == "ended"}
    expected = [run for model in ended for run in (opened[model].run_id, opened[model].folds[0])]
    assert tracking.end_stale(dataset, alive) == sorted(expected)
    child.kill()
    child.wait()
    assert tracking.end_stale(dataset, alive) == [opened["killed"].run_id]
    assert asked == [["ended", "live"], ["live"]]
    status = {model: client.get_run(run.run_id).info.status for model, run in opened.items()}
    assert status == {model: "KILLED" if model in {*ended, "killed"} else "RUNNING" for model in cases}
    assert client.get_run(opened["killed"].folds[0]).info.status == "FINISHED"
    assert "has ended" in client.get_run(opened["flow_ended"].run_id).data.tags["failure"]
    tracking.finish(*(run.run_id for run in opened.values()))
    assert tracking.end_stale(dataset, alive) == []
    assert len(asked) == 2


def test_a_run_that_another_flow_run_takes_over_meanwhile_is_not_ended(
    tracking: MLflowTracking, client: MlflowClient, dataset: str
) -> None:
    run_id = open_model(tracking, dataset, flow_run_id="ended").run_id

    def alive(ids: list[str]) -> set[str]:
        open_model(tracking, dataset, flow_run_id="new")
        return set()

    assert tracking.end_stale(dataset, alive) == []
    assert client.get_run(run_id).info.status == "RUNNING"
    tracking.finish(run_id)


def test_two_runs_with_one_key_become_one(tracking: MLflowTracking, client: MlflowClient, dataset: str) -> None:
    first = open_model(tracking, dataset).run_id
    experiment = client.get_run(first).info.experiment_id
    # What a request repeated after a lost answer leaves behind.
    client.create_run(experiment, tags={"calipert.key": "key-of-ridge", "benchmark_id": "b1"})
    assert len(runs(client, dataset)) == 2
    assert open_model(tracking, dataset).run_id == first
    assert [run.info.run_id for run in runs(client, dataset)] == [first]


def test_the_same_key_with_other_params_is_refused(tracking: MLflowTracking, dataset: str) -> None:
    open_model(tracking, dataset)
    with pytest.raises(Refused, match="Changing param values is not allowed"):
        open_model(tracking, dataset, params={"alpha": 10})


def test_a_deleted_experiment_is_the_users_to_restore(
    tracking: MLflowTracking, client: MlflowClient, dataset: str
) -> None:
    experiment = client.get_run(open_model(tracking, dataset).run_id).info.experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(UserError, match=f"mlflow experiments restore --experiment-id {experiment}"):
        open_model(tracking, dataset)


def test_long_params_are_whole_in_a_file(
    tracking: MLflowTracking, client: MlflowClient, dataset: str, tmp_path: Path
) -> None:
    given = {"genes": [f"GENE{i}" for i in range(3000)], "bad (name)": 1, "none": None, "short": "x"}
    run_id = open_model(tracking, dataset, params=given).run_id
    assert open_model(tracking, dataset, params=given).run_id == run_id
    params = client.get_run(run_id).data.params
    assert params["short"] == "x"
    assert params["none"] == "null"
    assert len(params["genes"]) == 500
    assert params["genes"].endswith("see params.json")
    assert any(name.startswith("bad _name_-") for name in params)
    whole = json.loads(Path(client.download_artifacts(run_id, "params.json", str(tmp_path))).read_text())
    assert json.loads(whole["genes"]) == given["genes"]
    assert whole["bad (name)"] == "1"
    assert not client.list_artifacts(open_model(tracking, dataset, "knn").run_id)


def test_a_live_curve_is_completed_from_the_file(
    tracking: MLflowTracking, client: MlflowClient, followed: tuple[str, Take], tmp_path: Path
) -> None:
    fold, take = followed
    take({"event": "progress", "done": 1, "total": 3, "unit": "epoch"})
    for step in range(3):
        take({"event": "metric", "name": "loss", "step": step, "value": 0.5})
    assert history(client, fold, "loss") == [(0, 0.5), (1, 0.5), (2, 0.5)]

    # The training was repeated and went slightly otherwise: the last value of every step is the file's.
    curve = {("loss", 0): 0.5, ("loss", 1): 0.4, ("loss", 2): 0.3, ("loss", 3): 0.2, ("val", 3): 0.25}
    training = training_file(tmp_path / "training.jsonl", curve)
    for _ in range(2):
        tracking.log_curve(fold, training)
        assert history(client, fold, "loss") == [(0, 0.5), (1, 0.4), (1, 0.5), (2, 0.3), (2, 0.5), (3, 0.2)]
        points = client.get_metric_history(fold, "loss")
        last = {p.step: p.value for p in sorted(points, key=lambda p: p.timestamp)}
        assert last == {0: 0.5, 1: 0.4, 2: 0.3, 3: 0.2}
        assert client.get_run(fold).data.metrics == {"loss": 0.2, "val": 0.25}


def test_training_outlives_the_server(
    tracking: MLflowTracking,
    followed: tuple[str, Take],
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fold, take = followed
    monkeypatch.setattr(mlflow_curves, "LOST_SECONDS", 0.0)

    def lost(*_: object, **__: object) -> None:
        raise requests.ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(requests.Session, "request", lost)
        for step in range(3):
            take({"event": "metric", "name": "loss", "step": step, "value": 0.5})
        with pytest.raises(UserError, match="no answer"):
            replace(tracking, patience=0.0).finish(fold)
    assert len(caplog.records) == 1
    assert "Training goes on" in caplog.text
    take({"event": "metric", "name": "loss", "step": 3, "value": 0.5})
    assert history(client, fold, "loss") == [(step, 0.5) for step in range(4)]


def test_a_curve_that_is_there_is_not_compared_again(
    tracking: MLflowTracking, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = open_model(tracking, dataset, folds=(0,)).folds[0]
    training = training_file(tmp_path / "training.jsonl", {("loss", step): 0.5 for step in range(5)})
    tracking.log_curve(fold, training)
    asked = record_requests(monkeypatch)
    tracking.log_curve(fold, training)
    assert asked == ["runs/get"]
    # A training that was begun once more may have written other values.
    monkeypatch.setattr(mlflow_curves, "LIVE_SECONDS", 0.0)
    tracking.follow_curve(fold)({"event": "metric", "name": "loss", "step": 2, "value": 0.75})
    asked.clear()
    tracking.log_curve(fold, training)
    assert asked == ["runs/get", "metrics/get-history", "runs/log-batch"]


def test_a_benchmark_takes_few_requests(
    tracking: MLflowTracking, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [ModelRun(f"m{i}", 42, key=f"k{i}", kind="model", params={"alpha": i}, folds=(0, 1, 2)) for i in range(4)]

    def benchmark() -> list[str]:
        opened = tracking.open_runs(dataset, "b1", wanted, digest="d", source="s", flow_run_id="flow-1")
        ids = {model: run.run_id for model, run in opened.items()}
        tracking.log_leaderboard(leaderboard(tuple(ids)), ids)
        tracking.finish(*ids.values())
        return list(ids.values())

    asked = record_requests(monkeypatch)
    first = benchmark()
    assert asked.count("runs/create") == 4 + 4 * 3
    # Before, and after models and folds were created; then what is running.
    assert asked.count("runs/search") == 3 + 1
    # Params of each, and one for all of a leaderboard's values and tags.
    assert asked.count("runs/log-batch") == 4 + 4 * 3 + 4
    asked.clear()
    assert benchmark() == first
    assert "runs/log-batch" not in asked
    assert "runs/log-inputs" not in asked
    assert asked.count("runs/search") == 1 + 1


def test_what_a_training_took(tracking: MLflowTracking, client: MlflowClient, dataset: str) -> None:
    fold = open_model(tracking, dataset, folds=(0,)).folds[0]
    tracking.log_usage(fold, Usage(seconds=12.5, cpu_seconds=20.25, peak_memory_bytes=1_500_000_000, device="GPU 3"))
    expected = {"system.seconds": 12.5, "system.cpu_seconds": 20.25, "system.peak_memory_mb": 1500.0}
    assert client.get_run(fold).data.metrics == expected
    assert client.get_run(fold).data.tags["device"] == "GPU 3"
    # Trained once more: what it took then.
    tracking.log_usage(fold, Usage(seconds=11.5, cpu_seconds=None, peak_memory_bytes=None, device="cpu"))
    assert client.get_run(fold).data.metrics == expected | {"system.seconds": 11.5}
    assert client.get_run(fold).data.tags["device"] == "cpu"


def test_each_model_keeps_its_own_scores(
    tracking: MLflowTracking, client: MlflowClient, dataset: str, tmp_path: Path
) -> None:
    models = ("ridge", "knn", "silent")
    ids = {model: open_model(tracking, dataset, model).run_id for model in models}
    table = pd.DataFrame(
        {"model": ["ridge", "knn", "ridge"], "condition": ["A", "A", "B"], "fold": [0, 0, 1], "value": [0.1, np.nan, 1]}
    )
    table.to_parquet(tmp_path / "scores.parquet", index=False)
    tracking.log_scores(tmp_path / "scores.parquet", ids)
    for model in models:
        read = pd.read_parquet(client.download_artifacts(ids[model], "scores.parquet", str(tmp_path / "..")))
        expected = table[table["model"] == model].reset_index(drop=True)
        pd.testing.assert_frame_equal(read, expected)


def test_values_that_are_not_finite_are_counted_not_written(
    tracking: MLflowTracking, client: MlflowClient, dataset: str, tmp_path: Path
) -> None:
    fold = open_model(tracking, dataset, folds=(0,)).folds[0]
    curve = {("loss", 0): 1.0, ("loss", 1): float("nan"), ("loss", 2): float("inf"), ("val", 0): float("-inf")}
    tracking.log_curve(fold, training_file(tmp_path / "training.jsonl", curve))
    run = client.get_run(fold)
    assert run.data.metrics == {"loss": 1.0}
    assert run.data.tags["not_finite"] == "loss (2), val (1)"


def test_a_bad_line_of_a_curve_is_named(tracking: MLflowTracking, dataset: str, tmp_path: Path) -> None:
    fold = open_model(tracking, dataset, folds=(0,)).folds[0]
    training = tmp_path / "training.jsonl"
    training.write_text('{"event": "log", "message": "m"}\n\n{"event": "metric", "name": "loss", "value": 1}\n')
    with pytest.raises(UserError, match="line 3"):
        tracking.log_curve(fold, training)


def test_models_can_be_compared(tracking: MLflowTracking, client: MlflowClient, dataset: str) -> None:
    models = ("ridge", "knn", "linear")
    board = leaderboard(models)
    folds = {"ridge": (0,)}
    opened = {model: open_model(tracking, dataset, model, folds.get(model, ())).run_id for model in models}
    tracking.log_leaderboard(board, opened)
    tracking.finish(*opened.values())

    chosen = "tags.benchmark_id = 'b1' and tags.`calibrated.nir` = 'true' and params.model != 'linear'"
    found = runs(client, dataset, chosen, ("metrics.`nir.mean` DESC",))
    expected = board[(board.metric == "nir") & (board.model != "linear")].sort_values("mean", ascending=False)
    assert [run.data.params["model"] for run in found] == expected["model"].tolist()
    assert [run.data.metrics["nir.mean"] for run in found] == expected["mean"].tolist()
    threshold = float(expected["headroom"].min())
    above = runs(client, dataset, f"metrics.`nir.headroom` > {threshold!r} and params.model != 'linear'")
    assert len(above) == 1


def test_the_leaderboard_in_a_run(tracking: MLflowTracking, client: MlflowClient, dataset: str) -> None:
    board = leaderboard(("ridge",))
    board.loc[board.metric == "nir", ["mean", "headroom_low"]] = [np.nan, np.inf]
    opened = {"ridge": open_model(tracking, dataset).run_id}
    tracking.log_leaderboard(board, opened)
    run = client.get_run(opened["ridge"])
    wanted = {
        f"{row.metric}.{column}": getattr(row, column)
        for row in board.itertuples()
        for column in SUMMARY_COLUMNS
        if np.isfinite(getattr(row, column))
    }
    assert run.data.metrics == wanted
    assert "mse.rank" not in wanted
    assert run.data.tags["not_finite"] == "nir.headroom_low, nir.mean"
    assert run.data.tags["calibrated"] == "nir, pearson_deltactrl"
    assert run.data.tags["calibrated.mse"] == "false"
    assert run.data.tags["calibrated.nir"] == "true"
    assert run.data.tags["in_panel"] == "true"

    # Another panel of models changes a summary, downwards too, or takes it away: the run shows the last one.
    changed = board.assign(mean=board["mean"] / 2, median=np.nan)
    tracking.log_leaderboard(changed, opened)
    metrics = client.get_run(opened["ridge"]).data.metrics
    assert metrics["mse.mean"] == wanted["mse.mean"] / 2
    assert np.isnan(metrics["mse.median"])
    assert metrics["mse.coverage"] == wanted["mse.coverage"]
    before = shown(client, dataset)
    tracking.log_leaderboard(changed, opened)
    assert str(shown(client, dataset)) == str(before)
    with pytest.raises(KeyError, match="absent"):
        tracking.log_leaderboard(board, {"absent": opened["ridge"]})


def test_a_calibration_is_one_run(tracking: MLflowTracking, client: MlflowClient, dataset: str, tmp_path: Path) -> None:
    table = calibration_table()
    file = tmp_path / "calibration.parquet"
    file.write_text("first")
    params = {"half_seeds": 5}
    given: dict[str, Any] = {"key": "c1", "digest": "d", "source": "s", "params": params, "file": file}
    run_id = tracking.log_calibration(dataset, table, **given)
    file.write_text("the second, longer")
    assert tracking.log_calibration(dataset, table, **given) == run_id
    (run,) = runs(client, dataset)
    assert run.info.status == "FINISHED"
    assert run.data.tags["kind"] == "calibration"
    assert run.data.tags["calibrated"] == "nir, pearson_deltactrl"
    assert run.data.tags["verdict.mse"] == "miscalibrated"
    assert run.data.params == {"dataset": dataset, "half_seeds": "5"}
    by_name = table.set_index(["metric", "variant"])
    assert run.data.metrics["nir.drf_interpolated"] == by_name.loc[("nir", "drf_interpolated"), "drf"]
    assert run.data.metrics["nir.drf_mean_low"] == by_name.loc[("nir", "drf_mean"), "drf_low"]
    assert run.data.metrics["nir.bds"] == by_name.loc[("nir", "drf_interpolated"), "bds"]
    assert "pearson_deltactrl.drf_ctrl" not in run.data.metrics
    assert "pearson_deltactrl.drf_ctrl_low" in run.data.tags["not_finite"]
    assert [(a.path, a.is_dir) for a in client.list_artifacts(run_id)] == [(file.name, False)]
    copy = tmp_path / "copy"
    copy.mkdir()
    assert Path(client.download_artifacts(run_id, file.name, str(copy))).read_text() == "the second, longer"


def test_a_calibration_that_fails_says_so_and_can_be_repeated(
    tracking: MLflowTracking, client: MlflowClient, dataset: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"key": "c1", "digest": "d", "source": "s", "params": {}}
    file = tmp_path / "calibration.parquet"
    with pytest.raises(FileNotFoundError):
        tracking.log_calibration(dataset, calibration_table(), file=file, **given)
    (run,) = runs(client, dataset)
    assert run.info.status == "FAILED"
    assert "FileNotFoundError" in run.data.tags["failure"]
    file.write_text("here now")
    assert tracking.log_calibration(dataset, calibration_table(), file=file, **given) == run.info.run_id
    (run,) = runs(client, dataset)
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags


def test_the_link_leads_to_the_benchmark(tracking: MLflowTracking, client: MlflowClient, dataset: str) -> None:
    run_id = open_model(tracking, dataset).run_id
    experiment = client.get_run(run_id).info.experiment_id
    page = f"{tracking.tracking_uri}/#/experiments/{experiment}/runs"
    wanted = "searchFilter=tags.benchmark_id%20%3D%20%27b1%27"
    assert (
        tracking.build_benchmark_url(dataset, "b1")
        == f"{page}?workflowType=machine_learning&compareRunsMode=CHART&{wanted}"
    )
    report = f"{page}/{run_id}/artifacts/report.html?workflowType=machine_learning"
    assert tracking.build_report_url(dataset, run_id) == report


def test_mlflow_is_imported_late_and_nothing_is_sent_elsewhere_or_printed(tracking: MLflowTracking) -> None:
    """In a fresh process, where nothing else has imported it."""
    script = f"""
import socket, sys
from blocks.tracking.tracker import MLflowTracking, ModelRun
real, elsewhere = socket.socket.connect, []
def connect(self, address):
    if address[0] not in ("127.0.0.1", "::1"):
        elsewhere.append(address)
        raise OSError("closed")
    return real(self, address)
socket.socket.connect = connect
looked_up = socket.getaddrinfo
def getaddrinfo(host, *rest, **more):
    if host not in ("127.0.0.1", "localhost", None):
        elsewhere.append(host)
        raise OSError("closed")
    return looked_up(host, *rest, **more)
socket.getaddrinfo = getaddrinfo
t = MLflowTracking(tracking_uri={tracking.tracking_uri!r})
assert "mlflow" not in sys.modules
one = ModelRun("m", 1, key="k", kind="model", params=dict(), folds=(0,))
run = t.open_runs("quiet", "b", [one], digest="d", source="s")["m"]
t.finish(run.run_id)
import atexit
atexit._run_exitfuncs()
assert not elsewhere, elsewhere
"""
    # No settings that would keep anything quiet.
    bare = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT_ROOT, env=bare, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == ""
