"""The Kubernetes engine against a stand-in of the API that really runs the containers, and moto for the bucket."""

from __future__ import annotations

import json
import logging
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from queue import SimpleQueue
from textwrap import dedent
from time import sleep
from types import SimpleNamespace
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from kubernetes.config import incluster_config

from blocks import http
from blocks.engines.base import LAST_LINES, ModelFailed, StageRun, Usage
from blocks.engines.kubernetes import api as kubernetes_api
from blocks.engines.kubernetes import engine as kubernetes_engine
from blocks.engines.kubernetes import logs as kubernetes_logs
from blocks.engines.kubernetes import status as kubernetes_status
from blocks.engines.kubernetes import transfer
from blocks.engines.kubernetes.engine import KubernetesEngine
from blocks.engines.kubernetes.job import Cluster, ModelPod, StageJob, read_cluster, translate_spec
from blocks.engines.kubernetes.status import read_ending
from blocks.engines.process import ProcessEngine
from blocks.local.cancellation import Stopped, end_models_with
from blocks.local.gpus import Gpu
from blocks.store import artifacts as store
from blocks.store import bucket as object_store
from blocks.store.artifacts import ArtifactStore, artifact_key
from blocks.store.bucket import ObjectStore
from core.errors import UserError
from flows.cli.model_panel import write_panel
from tasks import engine as selected
from tests.helpers import cluster_stand_in
from tests.helpers.cluster_stand_in import NAMESPACE, VERSION

ROOT = Path(__file__).resolve().parents[3]
BUCKET = "s3://screens/calipert"
SECRET = "planted-s3-secret"  # noqa: S105
DIGEST = "sha256:" + 64 * "0"
WORKER = f"registry.example.org/calipert@{DIGEST}"
KEYS = {name: artifact_key("test", {}, {"name": name}, "") for name in "abc"}

# A model that runs until it is killed.
SLEEPER = """
    import time
    print("asleep", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An empty bucket, which this process uses, with a data folder of its own."""
    import s3fs

    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in access(s3).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CALIPERT_STORE", BUCKET)
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    object_store._filesystem.cache_clear()
    store._shared.clear()
    httpx.post(f"{s3}/moto-api/reset", timeout=60).raise_for_status()
    s3fs.S3FileSystem(endpoint_url=s3, skip_instance_cache=True).mkdir("screens")
    yield ObjectStore(BUCKET)
    object_store._filesystem.cache_clear()
    store._shared.clear()


def access(s3: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often, and gives up what never comes at the second look."""
    monkeypatch.setattr(kubernetes_engine, "POLL_S", 0.05)
    monkeypatch.setattr(kubernetes_engine, "WAIT_S", 0.05)
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(http, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(kubernetes_logs, "PAUSE_S", 0.02)


@pytest.fixture
def cluster(bucket: ObjectStore, impatient: None, s3: str, tmp_path: Path) -> Iterator[Any]:
    made = cluster_stand_in.Cluster(tmp_path / "node", {}, {"calipert-store": access(s3)})
    yield made
    made.close()


def settings(cluster: Any, **changes: Any) -> dict[str, Any]:
    whole = {
        "namespace": NAMESPACE,
        "api": cluster.url,
        "image": WORKER,
        "store_secret": "calipert-store",
        "pending_limit_s": 3600,
        "models": {},
    }
    return whole | changes


@pytest.fixture
def model(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a model from the text of its model.py, with an image in the cluster and an entry in the settings."""

    def make(text: str, name: str = "toy", **changes: Any) -> Path:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "model.py").write_text(dedent(text))
        return install(folder, **changes)

    def install(folder: Path, **changes: Any) -> Path:
        image = f"registry.example.org/{folder.name}@{DIGEST}"
        pod = {"image": image, "cpu": 1, "memory": "2Gi", "disk": "5Gi"}
        cluster.images[image] = [sys.executable, str(folder / "model.py")]
        file = tmp_path / "cluster.yaml"
        file.write_text(yaml.safe_dump(settings(cluster, models={folder.name: pod}, **changes)))
        monkeypatch.setenv("CALIPERT_KUBERNETES", str(file))
        return folder

    make.install = install  # type: ignore[attr-defined]
    return make


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


def run(folder: Path, output: Path, spec: Mapping[str, Any] | None = None, **options: Any) -> list[Mapping[str, Any]]:
    events: list[Mapping[str, Any]] = []
    whole = {"output": str(output), **(spec or {})}
    KubernetesEngine().run("train", folder, whole, **({"on_event": events.append} | options))
    return events


def artifact(name: str, files: Mapping[str, str]) -> Path:
    """An artifact in the local store and, since CALIPERT_STORE is set, in the bucket."""

    def build(folder: Path) -> None:
        for path, text in files.items():
            (folder / path).write_text(text)

    return ArtifactStore().obtain("test", KEYS[name], build, inputs={}, parameters={"name": name}, code="")


def objects(s3: str) -> list[str]:
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=s3, skip_instance_cache=True, use_listings_cache=False)
    return [path for path in files.find("screens") if "/.jobs/" in path]


def nothing_is_left(cluster: Any, s3: str) -> bool:
    """No Job, no pod, no process of a model, nothing of a Job in the bucket, no thread that reads a log."""
    followers = [thread for thread in threading.enumerate() if isinstance(thread, kubernetes_logs.Follower)]
    return not (cluster.jobs or cluster.pods or objects(s3) or followers)


# ---- what goes well


def test_events_and_output_come_back_and_nothing_is_left(model, cluster, output, s3):
    folder = model("""
        import json, pathlib, sys
        spec = json.loads(pathlib.Path(sys.argv[2]).read_text())
        print('{"event": "progress", "done": 1, "total": 2, "unit": "epoch"}')
        print('{"event": "metric", "name": "val_loss", "step": 1, "value": NaN}', flush=True)
        print("on stderr\\rand more", file=sys.stderr)
        (pathlib.Path(spec["output"]) / "deep").mkdir()
        (pathlib.Path(spec["output"]) / "deep" / "weights").write_text(sys.argv[1])
    """)
    (output / "training.jsonl").write_text("the caller's")
    progress, metric, *logs = run(folder, output)
    assert progress == {"event": "progress", "done": 1, "total": 2, "unit": "epoch"}
    assert metric["value"] != metric["value"]
    assert [log["message"] for log in logs] == ["on stderr", "and more"]
    assert {path.name for path in output.iterdir()} == {"training.jsonl", "deep"}
    assert (output / "deep" / "weights").read_text() == "train"
    assert nothing_is_left(cluster, s3)
    assert {options["propagationPolicy"] for _, options in cluster.deleted} == {"Foreground"}


def test_events_come_while_the_model_runs(model, output, tmp_path):
    answer = tmp_path / "answer"
    folder = model(f"""
        import pathlib, time
        print("question", flush=True)
        while not pathlib.Path({str(answer)!r}).exists():
            time.sleep(0.01)
    """)
    run(folder, output, on_event=lambda event: answer.touch())


def test_usage_is_the_time_of_the_models_container(model, output, monkeypatch):
    ended = {"exitCode": 0, "startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T01:00:05Z"}
    monkeypatch.setattr(kubernetes_status, "read_model_state", lambda pod: {"terminated": ended})
    folder = model("")
    usage = KubernetesEngine().run("train", folder, {"output": str(output)}, on_event=lambda event: None)
    assert usage == Usage(seconds=3605.0, cpu_seconds=None, peak_memory_bytes=None, device="cpu")


def test_a_model_sees_its_inputs_and_nothing_beside_them(model, cluster, output):
    folder = model("""
        import json, os, pathlib, sys
        spec = json.loads(pathlib.Path(sys.argv[2]).read_text())
        cells = pathlib.Path(spec["cells"])
        seen = {
            "cells": cells.read_text(),
            "beside": sorted(path.name for path in cells.parent.iterdir()),
            "model": sorted(path.name for path in pathlib.Path(spec["model"]).iterdir()),
            "variables": dict(os.environ),
        }
        (pathlib.Path(spec["output"]) / "seen.json").write_text(json.dumps(seen))
    """)
    cells = artifact("a", {"train.h5ad": "cells", "control.h5ad": "control"})
    trained = artifact("b", {"weights": "1"})
    spec = {"cells": str(cells / "train.h5ad"), "model": str(trained), "embedding": None, "threads": 3, "seed": 1}
    run(folder, output, spec)
    seen = json.loads((output / "seen.json").read_text())
    assert seen["cells"] == "cells"
    assert seen["beside"] == ["train.h5ad"]
    assert seen["model"] == ["manifest.json", "weights"]
    assert cluster.specs == [
        {
            "output": "/output",
            "cells": f"/input/test/{KEYS['a']}/train.h5ad",
            "model": f"/input/test/{KEYS['b']}",
            "embedding": None,
            "threads": 3,
            "seed": 1,
        }
    ]
    assert seen["variables"]["OMP_NUM_THREADS"] == "3"
    assert not [name for name in seen["variables"] if name.startswith(("AWS", "CALIPERT", "PREFECT", "MLFLOW"))]
    assert SECRET not in json.dumps([cluster.created, seen])


def test_ridge_trains_and_predicts_as_it_does_in_a_process(model, cluster, tmp_path):
    cluster.quick = False
    panel: list[Any] = []

    def fold(folder: Path) -> None:
        panel.append(write_panel(folder, ("line",)))

    store = ArtifactStore()
    key = artifact_key("fold", {}, {}, "")
    data = store.obtain("fold", key, fold, inputs={}, parameters={}, code="")
    ridge = model.install(ROOT / "model_containers" / "ridge")
    asked = [condition._asdict() for condition in panel[0].held_out]
    common = {"embedding": str(data / "embedding.parquet"), "seed": 1, "threads": 1}
    found: dict[str, dict[str, bytes]] = {}
    for engine in (KubernetesEngine(), ProcessEngine()):
        name = type(engine).__name__
        spec = {"cells": str(data / "train.h5ad"), "hyperparameters": {}, **common}

        def train(folder: Path, engine: Any = engine, spec: dict[str, Any] = spec) -> None:
            engine.run("train", ridge, spec | {"output": str(folder)}, on_event=lambda event: None, timeout_s=600)

        trained = store.obtain(
            "model", artifact_key("model", {}, {"by": name}, ""), train, inputs={}, parameters={"by": name}, code=""
        )
        output = tmp_path / name
        output.mkdir()
        spec = {"model": str(trained), "control": str(data / "control.h5ad"), "conditions": asked, **common}
        engine.run("predict", ridge, spec | {"output": str(output)}, on_event=lambda event: None, timeout_s=600)
        found[name] = {path.name: path.read_bytes() for path in output.iterdir()}
    assert found["KubernetesEngine"].keys() == {"predictions.h5ad", "unpredicted.json"}
    assert found["KubernetesEngine"] == found["ProcessEngine"]
    assert [job["metadata"]["labels"]["calipert/stage"] for job in cluster.created] == ["train", "predict"]


def test_a_model_describes_itself(model, cluster):
    model.install(ROOT / "model_containers" / "ridge")
    description = KubernetesEngine().describe(ROOT / "model_containers" / "ridge")
    assert (description.name, description.embedding) == ("ridge", True)
    silent = model("")
    with pytest.raises(ModelFailed, match=r"toy describe did not write the describe\.json"):
        KubernetesEngine().describe(silent)
    assert not cluster.jobs


# ---- how a stage fails


def failure(folder: Path, output: Path, **options: Any) -> ModelFailed:
    with pytest.raises(ModelFailed) as caught:
        run(folder, output, **options)
    return caught.value


def test_failure_names_model_stage_exit_code_and_last_lines(model, cluster, output, s3):
    folder = model(f"""
        import sys
        for line in range({LAST_LINES + 5}):
            print("line", line, file=sys.stderr)
        print('{{"event": "log", "message": "no line of stderr"}}')
        sys.exit(3)
    """)
    error = failure(folder, output)
    assert str(error).splitlines()[0] == "toy train ended with exit code 3"
    assert error.exit_code == 3
    assert set(error.last_lines) <= {f"line {line}" for line in range(LAST_LINES + 5)}
    assert len(error.last_lines) == LAST_LINES
    assert not list(output.iterdir())
    assert nothing_is_left(cluster, s3)


@pytest.mark.parametrize("code", [1, 0])
def test_out_of_memory(model, cluster, output, code):
    cluster.reasons["model"] = "OOMKilled"
    error = failure(model(f"print('big', flush=True); raise SystemExit({code})"), output)
    assert "took more than its 2Gi of memory; `models.toy.memory`" in str(error)
    assert error.last_lines == ("big",)
    assert error.exit_code == (137 if code else 0)


def test_a_killed_model_is_told_from_one_that_exits(model, output):
    error = failure(model("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), output)
    assert (error.ending, error.exit_code) == ("ended with exit code 137 (SIGKILL)", 137)


def test_time_limit(model, cluster, output):
    folder = model(SLEEPER)
    error = failure(
        folder,
        output,
        on_event=lambda event: cluster.end(cluster.only_pod(), "DeadlineExceeded", "active on the node too long"),
        timeout_s=3600.2,
    )
    assert "was stopped after 3600.2 s, its limit: to change it, set `time_limits: {train: SECONDS}`" in str(error)
    assert (error.exit_code, error.last_lines) == (None, ("asleep",))
    (job,) = cluster.created
    assert job["spec"]["template"]["spec"]["activeDeadlineSeconds"] == 3601
    assert job["spec"]["activeDeadlineSeconds"] == 3601 + 3600


def test_eviction_is_told_in_the_nodes_words(model, cluster, output):
    words = 'Usage of EmptyDir volume "output" exceeds the limit "5Gi".'
    error = failure(model(SLEEPER), output, on_event=lambda event: cluster.end(cluster.only_pod(), "Evicted", words))
    assert error.ending == f"lost its pod: Evicted: {words}"


def test_image_that_cannot_be_had(model, cluster, output, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "calipert")
    monkeypatch.setattr(kubernetes_engine, "START_PROBLEM_LIMIT_S", 0)
    cluster.troubles["model"] = ("ErrImagePull", "manifest unknown")
    error = failure(model(""), output)
    assert error.ending == "could not start within 0 s: model: ErrImagePull: manifest unknown"
    assert "toy train cannot start: model: ErrImagePull: manifest unknown" in caplog.text
    assert not cluster.jobs


def test_a_registry_may_come_back(model, cluster, output, caplog):
    caplog.set_level(logging.INFO, "calipert")
    cluster.troubles["model"] = ("ImagePullBackOff", "no route to host")

    class Repaired(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "no route to host" in record.getMessage():
                with cluster.changed:
                    cluster.troubles.clear()
                    cluster.changed.notify_all()

    handler = Repaired()
    logging.getLogger("calipert").addHandler(handler)
    try:
        assert run(model("print('runs')"), output) == [{"event": "log", "message": "runs"}]
    finally:
        logging.getLogger("calipert").removeHandler(handler)


def test_no_node_takes_the_pod(model, cluster, output, caplog):
    caplog.set_level(logging.INFO, "calipert")
    cluster.unschedulable = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    error = failure(model("", pending_limit_s=0.2), output)
    why = "no node takes its pod: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    assert error.ending == f"did not start within 0.2 s: {why}"
    assert [record.getMessage() for record in caplog.records].count(f"toy train waits: {why}") == 1
    assert not cluster.jobs


def test_no_pod_is_made(model, cluster, output):
    cluster.without_pods = True
    error = failure(model("", pending_limit_s=0.01), output)
    assert error.ending == "did not start within 0.01 s: no pod was made for its Job yet"


def test_input_that_is_not_in_the_bucket(model, bucket, output):
    cells = artifact("a", {"train.h5ad": "cells"})
    bucket.remove(f"test/{KEYS['a']}")
    error = failure(model(""), output, spec={"cells": str(cells / "train.h5ad")})
    assert error.ending == "could not get its inputs: exit code 1"
    assert error.exit_code is None
    assert f"found:  not in {BUCKET}" in "\n".join(error.last_lines)


def test_damaged_input(model, bucket, output, monkeypatch):
    cells = artifact("a", {"train.h5ad": "cells"})
    monkeypatch.setattr(transfer, "file_checksum", lambda path: "")
    error = failure(model(""), output, spec={"cells": str(cells / "train.h5ad")})
    assert error.ending == "could not get its inputs: exit code 1"
    assert "is not what its checksum says" in error.last_lines[0]


def test_output_that_cannot_be_uploaded(model, cluster, output, monkeypatch):
    def full(self: ObjectStore, folder: Path, name: str) -> None:
        if name.endswith("/output"):
            raise UserError(BUCKET, "service", "QuotaExceeded", "free some space")
        put(self, folder, name)

    put = ObjectStore.put
    monkeypatch.setattr(ObjectStore, "put", full)
    error = failure(model("print('well')"), output)
    assert error.ending == "ended well, but its output could not be uploaded: exit code 1"
    assert error.last_lines[0] == "well"
    assert "  found:  QuotaExceeded" in error.last_lines


def test_output_that_vanishes_from_the_bucket(model, output, monkeypatch):
    monkeypatch.setattr(kubernetes_engine, "download", lambda *arguments: False)
    assert failure(model(""), output).ending == "ended well, but its output is not in the bucket"

    def damaged(store: ObjectStore, name: str, folder: Path) -> bool:
        monkeypatch.setattr(transfer, "file_checksum", lambda path: "")
        return transfer.download(store, name, folder)

    monkeypatch.setattr(kubernetes_engine, "download", damaged)
    folder = model("import json, sys; open(json.load(open(sys.argv[2]))['output'] + '/x', 'w').write('1')", "other")
    assert "its output in the bucket is damaged" in failure(folder, output).ending
    assert not list(output.iterdir())


def test_a_job_that_somebody_deletes(model, cluster, output):
    def delete(event: Mapping[str, Any]) -> None:
        ((name, job),) = cluster.jobs.items()
        cluster.delete(name, {"preconditions": {"uid": job["metadata"]["uid"]}})

    error = failure(model(SLEEPER), output, on_event=delete)
    assert error.ending == "lost its Job, which was deleted from outside"
    assert error.last_lines == ("asleep",)


def test_a_job_that_another_run_replaces(model, cluster, output):
    def replaced(event: Mapping[str, Any]) -> None:
        ((name, job),) = cluster.jobs.items()
        cluster.delete(name, {"preconditions": {"uid": job["metadata"]["uid"]}})
        other = json.loads(json.dumps(cluster.created[0]))
        for labels in (other["metadata"]["labels"], other["spec"]["template"]["metadata"]["labels"]):
            labels["calipert/attempt"] = "another"
        cluster.without_pods = True
        cluster.create(other)

    error = failure(model(SLEEPER), output, on_event=replaced)
    assert error.ending == "lost its Job to another flow run that does the same"
    assert list(cluster.jobs) == [cluster.created[0]["metadata"]["name"]]


def test_a_pod_that_is_lost(model, cluster, output):
    def lose(event: Mapping[str, Any]) -> None:
        pod = cluster.only_pod()
        cluster.end(pod, "Deleted", "")
        with cluster.changed:
            del cluster.pods[pod.name]

    error = failure(model(SLEEPER), output, on_event=lose)
    assert error.ending == "lost its pod: BackoffLimitExceeded: Job has reached the specified backoff limit"


@pytest.mark.parametrize(
    ("ended", "reason", "words"),
    [
        ([], "NodeLost", "lost its pod: NodeLost: gone"),
        (["fetch"], "DeadlineExceeded", "its limit before it began"),
        (["fetch", "model"], "DeadlineExceeded", "its limit while its output was uploaded"),
        (["fetch", "model"], None, "lost its pod while its output was uploaded"),
    ],
)
def test_a_pod_that_ends_between_two_containers(ended, reason, words):
    inits = [{"name": name, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}} for name in ended]
    status = {"phase": "Failed", "initContainerStatuses": inits} | (
        {"reason": reason, "message": "gone"} if reason else {}
    )
    found = read_ending({"status": status}, stage_job())
    assert found is not None
    assert words in str(found.words)
    assert found.exit_code is None


# ---- the API comes and goes


def test_errors_that_pass_are_waited_for(model, cluster, output, caplog):
    cluster.faults["POST .*/jobs"] = [500, "drop", 503, 429]
    cluster.faults["GET .*/pods$"] = ["drop", 502, 504]
    cluster.faults["DELETE .*/jobs/"] = [500]
    assert run(model("print('runs')"), output) == [{"event": "log", "message": "runs"}]
    assert "trying again" in caplog.text
    assert len(cluster.created) == 1
    assert not cluster.jobs


def test_an_answer_that_is_lost_makes_no_second_job(model, cluster, output):
    cluster.faults["POST .*/jobs"] = ["lose"]
    assert run(model("print('runs')"), output) == [{"event": "log", "message": "runs"}]
    assert len(cluster.created) == 1


def test_an_api_that_stays_away(model, cluster, output, monkeypatch, caplog):
    def away(event: Mapping[str, Any]) -> None:
        cluster.faults["(GET|DELETE) .*/(pods|jobs)"] = [503] * 10_000
        monkeypatch.setattr(kubernetes_engine, "TIDY_LIMIT_S", 0)

    monkeypatch.setattr(kubernetes_api, "PATIENCE_S", 0.1)
    error = failure(model(SLEEPER), output, on_event=away)
    assert "was given up: the Kubernetes API is lost: list pod (http://127.0.0.1" in error.ending
    assert error.last_lines == ("asleep",)
    (name,) = cluster.jobs
    assert f"toy train is over, but its Job {name} or the folder .jobs/{name} in the bucket is left" in caplog.text


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "service account"), (403, "manage Jobs"), (404, "namespace"), (422, "settings")]
)
def test_what_the_api_refuses_is_the_users_to_mend(model, cluster, output, status, remedy):
    cluster.faults["POST .*/jobs"] = [status]
    with pytest.raises(UserError, match=rf"HTTP {status}: made to fail with {status}") as caught:
        run(model(""), output)
    assert remedy in caught.value.remedy


def test_each_line_of_the_log_once_however_often_the_connection_breaks(model, cluster, output):
    cluster.breaks = [3, 0, 7, 1]
    folder = model("""
        import time
        for line in range(20):
            print("same", flush=True)
            print("line", line, flush=True)
            time.sleep(0.01)
    """)
    events = run(folder, output)
    assert cluster.breaks == []
    assert [event["message"] for event in events] == [text for line in range(20) for text in ("same", f"line {line}")]


def test_a_log_that_cannot_be_read_is_missed_and_said(model, cluster, output, monkeypatch, caplog):
    monkeypatch.setattr(kubernetes_api, "PATIENCE_S", 0.1)
    cluster.faults["/log"] = [500] * 10_000
    assert run(model("print('unheard')"), output) == []
    assert "toy train: the end of its log is lost: read pod log: HTTP 500" in caplog.text


def test_lines_of_any_length(monkeypatch):
    monkeypatch.setattr(kubernetes_logs, "LONGEST_LINE", 10)
    log = b"T1 abc\nT2 " + b"x" * 30 + b"\nT3 \nT4 end"
    chunks = [log[start : start + 7] for start in range(0, len(log), 7)]
    for over in (True, False):
        pieces = list(kubernetes_logs._read_pieces(chunks, over))
        text: dict[bytes, bytes] = {}
        for piece in pieces:
            text[piece.stamp] = text.get(piece.stamp, b"") + piece.text
        last = {b"T4": b"end"} if over else {}
        assert text == {b"T1": b"abc", b"T2": b"x" * 30, b"T3": b""} | last
        assert len(set(pieces)) == len(pieces)


def test_what_came_is_remembered_for_a_while_only(monkeypatch):
    monkeypatch.setattr(kubernetes_logs, "REMEMBERED", 5)
    follower = kubernetes_logs.Follower(None, "pod", "model", SimpleQueue())  # type: ignore[arg-type]
    for number in range(20):
        follower._take(kubernetes_logs._Piece(b"%d" % number, 0, b"text"))
    assert len(follower._known) == 5


# ---- whatever ends the call ends the Job


def test_an_exception_in_the_caller_deletes_the_job(model, cluster, output, s3):
    processes: list[subprocess.Popen[bytes]] = []

    def refuse(event: Mapping[str, Any]) -> None:
        processes.append(cluster.only_pod().process)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model(SLEEPER), output, on_event=refuse)
    assert nothing_is_left(cluster, s3)
    assert processes[0].wait() == -signal.SIGKILL


@contextmanager
def training(
    folder: Path, output: Path, on_event: Callable[[Mapping[str, Any]], None]
) -> Iterator[list[BaseException]]:
    """Trains in a thread of a flow, which the end of the block cancels; then the thread's errors are there."""
    errors: list[BaseException] = []

    def train() -> None:
        try:
            run(folder, output, on_event=on_event)
        except Stopped as error:
            errors.append(error)

    with suppress(InterruptedError), end_models_with("benchmark"):
        thread = threading.Thread(target=copy_context().run, args=(train,))
        thread.start()
        yield errors
        raise InterruptedError
    thread.join()


def test_a_flow_that_ends_deletes_the_jobs_of_its_threads(model, cluster, output, s3):
    begun = threading.Event()
    with training(model(SLEEPER), output, lambda event: begun.set()) as errors:
        begun.wait()
    assert str(errors[0]) == "toy train was stopped: benchmark ended with InterruptedError"
    assert nothing_is_left(cluster, s3)


def test_a_stop_is_heard_while_the_api_is_away(model, cluster, output):
    cluster.faults["POST .*/jobs"] = [503] * 10_000
    with training(model(""), output, lambda event: None) as errors, cluster.changed:
        assert cluster.changed.wait_for(lambda: len(cluster.faults["POST .*/jobs"]) < 9_998, 60)
    assert errors
    assert not cluster.created


def leave_a_job(cluster: Any, folder: Path, output: Path) -> str:
    """What a killed run of the same stage leaves: a Job whose model runs, and its folders in the bucket."""
    job = KubernetesEngine()._cluster(folder.name)
    left = replace(stage_job(), cluster=job, inputs=translate_spec({"output": str(output)}, output), attempt="killed")
    bucket = ObjectStore(BUCKET)
    (output / "spec.json").write_text(json.dumps(left.inputs.spec))
    bucket.put(output, left.specification)
    bucket.put(output, left.output)
    (output / "spec.json").unlink()
    cluster.create(left.manifest())
    return left.name


def test_the_job_of_a_killed_run_goes_before_the_new_one_comes(model, cluster, output, s3, caplog):
    folder = model("print('runs')")
    name = leave_a_job(cluster, folder, output)
    cluster.lingering = 2
    assert run(folder, output) == [{"event": "log", "message": "runs"}]
    assert f"removing the Job {name}, which an earlier run left" in caplog.text
    attempts = [job["metadata"]["labels"]["calipert/attempt"] for job in cluster.created]
    assert [job["metadata"]["name"] for job in cluster.created] == [name, name]
    assert attempts[0] == "killed" != attempts[1]
    assert not list(output.iterdir())
    assert nothing_is_left(cluster, s3)


def test_a_job_of_a_killed_run_that_does_not_go(model, cluster, output, monkeypatch):
    monkeypatch.setattr(kubernetes_engine, "GONE_LIMIT_S", 0)
    folder = model("")
    name = leave_a_job(cluster, folder, output)
    cluster.lingering = 10_000
    assert (
        f"its Job of an earlier run, {name}, was deleted 0 s ago and is still there" in failure(folder, output).ending
    )
    assert list(cluster.jobs) == [name]
    cluster.lingering = 0


def test_tidying_hides_no_other_error(model, cluster, output, monkeypatch, caplog):
    def refuse(event: Mapping[str, Any]) -> None:
        cluster.faults["DELETE"] = [403]
        raise ValueError("the caller's own")

    with pytest.raises(ValueError, match="the caller's own"):
        run(model(SLEEPER), output, on_event=refuse)
    assert "HTTP 403" in caplog.text


# ---- what is asked of the cluster


def stage_job(**changes: Any) -> StageJob:
    pod = ModelPod(image=f"registry.example.org/toy@{DIGEST}", cpu="2", memory="8Gi", disk="20Gi", gpus=1)
    given: dict[str, Any] = {
        "namespace": NAMESPACE,
        "image": WORKER,
        "store_secret": "calipert-store",
        "pending_limit_s": 60,
        "models": {"toy": pod},
    }
    store = Path("/data/store")
    spec = {"cells": f"/data/store/fold/{KEYS['a']}/train.h5ad", "embedding": None, "output": "/data/store/x"}
    cluster = Cluster.model_validate(given | changes.pop("cluster", {}))
    folder = Path(changes.pop("model", "toy"))
    stage, timeout_s = changes.pop("stage", "train"), changes.pop("timeout_s", 5.5)
    spec |= changes.pop("spec", {})
    run = StageRun(stage, folder, spec, lambda event: None, timeout_s, None, 0.0)
    whole: dict[str, Any] = {"store": BUCKET, "flow_run": "f" * 36, "attempt": "1", "owner": None}
    return StageJob(cluster=cluster, run=run, inputs=translate_spec(spec, store), **(whole | changes))


def containers(job: StageJob) -> dict[str, dict[str, Any]]:
    pod = job.manifest()["spec"]["template"]["spec"]
    return {part["name"]: part for part in [*pod["initContainers"], *pod["containers"]]}


def test_a_job_is_walled_off():
    job = stage_job()
    manifest = job.manifest()
    kubernetes_validate.validate(manifest, VERSION, strict=True)
    pod = manifest["spec"]["template"]["spec"]
    assert [part["name"] for part in pod["initContainers"]] == ["fetch", "model"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65534
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {volume["name"]: volume["emptyDir"].get("sizeLimit") for volume in pod["volumes"]}["output"] == "20Gi"
    for part in containers(job).values():
        assert part["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
        }
        assert part["resources"]["limits"] == part["resources"]["requests"]
    model = containers(job)["model"]
    assert "envFrom" not in model
    assert model["args"] == ["train", "/spec/spec.json"]
    assert {mount["mountPath"] for mount in model["volumeMounts"] if not mount.get("readOnly")} == {"/output", "/tmp"}  # noqa: S108
    assert model["resources"]["limits"] == {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "1"}


def test_a_job_is_tried_once_and_does_not_stay():
    spec = stage_job().manifest()["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["activeDeadlineSeconds"] == 6 + 60
    assert spec["template"]["spec"]["activeDeadlineSeconds"] == 6
    endless = stage_job(timeout_s=None).manifest()["spec"]
    assert "activeDeadlineSeconds" not in endless
    assert "activeDeadlineSeconds" not in endless["template"]["spec"]


def test_labels_say_whose_a_job_is():
    labels = stage_job(flow_run="a b/" + "c" * 80).manifest()["metadata"]["labels"]
    assert labels["calipert/model"] == "toy"
    assert labels["calipert/stage"] == "train"
    assert labels["calipert/flow-run"] == "a-b-" + "c" * 59
    assert "calipert/flow-run" not in stage_job(flow_run=None).manifest()["metadata"]["labels"]


def test_a_job_goes_with_the_pod_of_its_flow_run(model, cluster, output, monkeypatch):
    folder = model("")
    run(folder, output)
    monkeypatch.setenv("CALIPERT_POD_NAME", "flow-run-x")
    monkeypatch.setenv("CALIPERT_POD_UID", "1-2-3")
    run(folder, output)
    outside, inside = [job["metadata"] for job in cluster.created]
    assert "ownerReferences" not in outside
    assert inside["ownerReferences"] == [{"apiVersion": "v1", "kind": "Pod", "name": "flow-run-x", "uid": "1-2-3"}]


def test_gpus_are_for_training_and_prediction_alone():
    assert "nvidia.com/gpu" not in containers(stage_job(stage="describe"))["model"]["resources"]["limits"]
    without = {"models": {"toy": stage_job().pod.model_copy(update={"gpus": 0})}}
    for job in (stage_job(stage="describe"), stage_job(cluster=without)):
        assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in containers(job)["model"]["env"]
        assert "tolerations" not in job.manifest()["spec"]["template"]["spec"]
    pod = stage_job().manifest()["spec"]["template"]["spec"]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert "NVIDIA_VISIBLE_DEVICES" not in [variable["name"] for variable in containers(stage_job())["model"]["env"]]


def test_private_registries():
    pod = stage_job(cluster={"pull_secrets": ["registry"]}).manifest()["spec"]["template"]["spec"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]


def test_a_name_follows_from_the_work():
    job = stage_job()
    same = stage_job(spec={"output": "/data/store/elsewhere"}, attempt="2", flow_run=None, timeout_s=None)
    assert job.name == same.name
    others = [stage_job(spec={"seed": 2}), stage_job(stage="predict"), stage_job(store="s3://other/place")]
    assert len({job.name, *(other.name for other in others)}) == 4
    assert stage_job(stage="describe").name != stage_job(stage="describe", attempt="2").name
    pod = job.pod
    long = stage_job(model="Über_" + "x" * 70, cluster={"models": {"Über_" + "x" * 70: pod}})
    for one in (job, long, stage_job(stage="describe", model="_", cluster={"models": {"_": pod}})):
        assert len(one.name) <= 57  # a pod's name adds six
        kubernetes_validate.validate(one.manifest(), VERSION, strict=True)
        assert one.name.replace("-", "").isalnum()
        assert one.name.isascii()
        assert one.name == one.name.lower()


def test_paths_that_are_in_no_artifact_are_refused():
    for path in ("/etc/passwd", "/data/store", "/data/store/fold"):
        with pytest.raises(ValueError, match="is no artifact of the store"):
            translate_spec({"cells": path}, Path("/data/store"))


# ---- settings


def test_the_identity_is_the_images_digest(model):
    folder = model("")
    assert KubernetesEngine().identity(folder) == DIGEST


def changed(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_an_image_without_a_digest_is_refused(model, tmp_path, output):
    folder = model("")
    pod = {"image": "registry.example.org/toy:latest", "cpu": 1, "memory": "2Gi", "disk": "5Gi"}
    changed(tmp_path / "cluster.yaml", models={"toy": pod})
    with pytest.raises(UserError, match=r"models\.toy\.image") as caught:
        KubernetesEngine().identity(folder)
    assert "name@sha256:" in caught.value.remedy
    with pytest.raises(UserError, match=r"models\.toy\.image"):
        run(folder, output)


def test_settings_that_do_not_fit_are_refused(model, tmp_path, monkeypatch):
    folder = model("")
    file = tmp_path / "cluster.yaml"
    whole = yaml.safe_load(file.read_text())
    pod = whole["models"]["toy"]
    for field, changes in {
        "models.toy": {"models": {}},
        "models.toy.memory": {"models": {"toy": pod | {"memory": "8 GB"}}},
        "models.toy.gpus": {"models": {"toy": pod | {"gpus": -1}}},
        "api": {"api": "http://user:password@host"},
        "namespace": {"namespace": "no_name"},
        "pending_limit_s": {"pending_limit_s": 0},
        "unknown": {"unknown": 1},
    }.items():
        file.write_text(yaml.safe_dump(whole | changes))
        with pytest.raises(UserError) as caught:
            KubernetesEngine().identity(folder)
        assert (caught.value.where, caught.value.field) == (str(file), field)
    for text in ("{", ""):
        file.write_text(text)
        with pytest.raises(UserError, match="file"):
            read_cluster(file)
    with pytest.raises(UserError, match="No such file"):
        read_cluster(tmp_path / "nowhere.yaml")
    monkeypatch.delenv("CALIPERT_KUBERNETES")
    with pytest.raises(UserError, match="CALIPERT_KUBERNETES"):
        KubernetesEngine().identity(folder)


def test_a_password_in_the_settings_is_not_repeated(model, tmp_path):
    folder = model("")
    changed(tmp_path / "cluster.yaml", api="http://user:planted@host")
    with pytest.raises(UserError) as caught:
        KubernetesEngine().identity(folder)
    assert "planted" not in str(caught.value)


def test_without_a_bucket_no_job_starts(model, cluster, output, monkeypatch):
    folder = model("")
    monkeypatch.delenv("CALIPERT_STORE")
    with pytest.raises(UserError, match="CALIPERT_STORE"):
        run(folder, output)
    assert not cluster.created


def test_a_gpu_of_this_machine_is_of_no_use(model, output):
    with pytest.raises(ValueError, match="from the cluster"):
        run(model(""), output, gpu=Gpu("0", 0))


def test_the_engine_is_chosen_by_the_environment(monkeypatch):
    monkeypatch.delenv("CALIPERT_ENGINE", raising=False)
    assert isinstance(selected.choose_engine(), ProcessEngine)
    assert not selected.runs_elsewhere()
    monkeypatch.setenv("CALIPERT_ENGINE", "kubernetes")
    assert isinstance(selected.choose_engine(), KubernetesEngine)
    assert selected.runs_elsewhere()
    with selected.open_checkpoint("key") as folder:
        assert folder is None, "what a Job leaves is on no disk of this machine"
    monkeypatch.setenv("CALIPERT_ENGINE", "slurm")
    for ask in (selected.choose_engine, selected.runs_elsewhere):
        with pytest.raises(UserError, match="CALIPERT_ENGINE\n  found:  'slurm'\n  remedy: Input should be 'process'"):
            ask()


def test_transfer_says_how_it_is_called():
    with pytest.raises(SystemExit, match="fetch INTO NAME"):
        transfer.main(["fetch", "/input"])


# ---- within a cluster


def test_outside_of_a_cluster_the_api_must_be_named(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match="kubectl proxy"):
        kubernetes_api.Api(None, NAMESPACE, sleep)


def test_an_address_may_end_in_a_slash():
    with closing(kubernetes_api.Api("http://127.0.0.1:1/", NAMESPACE, sleep)) as api:
        assert api.client.configuration.host == "http://127.0.0.1:1"


def test_without_the_client_the_error_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "kubernetes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError) as caught:
        kubernetes_api.Api("http://127.0.0.1:1", NAMESPACE, sleep)
    assert "pip install 'calipert[kubernetes]'" in caught.value.remedy


def certificate(folder: Path) -> None:
    """ca.crt and key.pem of a server on 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand-in")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))


def test_within_a_cluster_the_service_account_asks(tmp_path, monkeypatch, impatient):
    certificate(tmp_path)
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Nothing on stderr."""

        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"items": []}')

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_address[1]))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    passed = timedelta()

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 1, 1) + passed

    monkeypatch.setattr(incluster_config, "datetime", SimpleNamespace(datetime=Clock, timedelta=timedelta))
    try:
        (tmp_path / "token").write_text("first")
        api = kubernetes_api.Api(None, NAMESPACE, sleep)
        assert api.pod("a=b") is None
        (tmp_path / "token").write_text("renewed")
        passed = timedelta(minutes=2)
        assert api.pod("a=b") is None
        api.close()
    finally:
        server.shutdown()
        server.server_close()
    path = f"/api/v1/namespaces/{NAMESPACE}/pods?labelSelector=a%3Db"
    assert asked == [(path, "bearer first"), (path, "bearer renewed")]
