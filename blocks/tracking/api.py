"""MLflow's REST interface over plain HTTP: the few requests that tracking needs, repeated where that can help.

MLflow's own client takes seconds to import and opens a connection for nearly every request. Connections are kept here,
one pool per process and server. A server that has answered once is waited for up to a minute when it restarts or its
database is locked; one that has never answered is given up after about 15 seconds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import posixpath
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from core.errors import UserError

# How long one request is repeated before it is given up, in seconds.
PATIENCE = 60.0
_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)
# After so many seconds of it a warning says what is waited for.
_SAID = 1.5
_PROBE_SECONDS = 4.0
_PROBE_PAUSES = (0.0, 1.0, 2.0)
_TIMEOUT = 30.0
_HASTE = 5.0
# The server answers only after it has handed the whole file on to where it keeps it.
_UPLOAD_TIMEOUT = 300.0
# What may pass: a locked database, a server that is starting, a proxy before one that is not there, too much at once.
_PASSING = (408, 429, 500, 502, 503, 504)
_CONNECTIONS = 8
# What MLflow takes in one request.
_MOST_METRICS = 1000
_MOST_PARAMS = 100
_MOST_TAGS = 100
_PAGE = 1000

# For MLflow's own client, which sends files to where the server does not take them itself; its telemetry starts with
# the import. Who has set them otherwise keeps his own.
CLIENT_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}

_log = logging.getLogger("calipert.tracking")
_answered: set[str] = set()


class Refused(Exception):
    """MLflow does not do what it was asked. code: its error code, such as RESOURCE_DOES_NOT_EXIST."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(code, message)

    def __str__(self) -> str:
        return f"{self.args[1]} ({self.code})"


class Point(NamedTuple):
    """One value of a metric; may be NaN. timestamp: milliseconds since 1970."""

    value: float
    timestamp: int
    step: int


class Metric(NamedTuple):
    """One value of a metric to be written."""

    name: str
    point: Point


@dataclass(frozen=True)
class Run:
    """A run as MLflow shows it. start_time, end_time: milliseconds since 1970. metrics: the latest point of each.
    has_dataset: whether a data set is among its inputs."""

    run_id: str
    name: str
    experiment: str
    status: str
    start_time: int
    end_time: int | None
    artifact_uri: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, Point]
    has_dataset: bool


@dataclass(frozen=True)
class Server:
    """An MLflow server by its URL. Every method raises UserError, naming that URL and the remedy, when it does not
    answer or asks for credentials, and Refused when it answers with another error.

    patience: for how many seconds a request is repeated; 0 for a single attempt of five seconds at most.
    """

    uri: str
    patience: float = PATIENCE

    def experiment(self, name: str) -> str:
        """The id of an experiment, created if absent. Raises UserError for one that was deleted."""
        try:
            found = self._get("experiments/get-by-name", experiment_name=name)["experiment"]
        except Refused as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            try:
                return str(self._post("experiments/create", name=name)["experiment_id"])
            except Refused as refused:
                if refused.code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # Somebody else was faster.
            return self.experiment(name)
        if found["lifecycle_stage"] != "active":
            number = found["experiment_id"]
            raise UserError(
                f"MLflow experiment {name}",
                "lifecycle_stage",
                found["lifecycle_stage"],
                f"Restore it (`mlflow experiments restore --experiment-id {number}`) or remove it for good "
                f"(`mlflow gc --experiment-ids {number}`).",
            )
        return str(found["experiment_id"])

    def experiments(self, prefix: str) -> dict[str, str]:
        """Id -> name of the experiments whose name begins so."""
        chosen = f"name LIKE '{prefix}%'"
        pages = self._pages("experiments/search", filter=chosen)
        return {str(found["experiment_id"]): found["name"] for page in pages for found in page.get("experiments", [])}

    def create_run(self, experiment: str, name: str, tags: Mapping[str, str]) -> Run:
        """A new run, RUNNING. An answer that is lost on its way makes two: look for them afterwards."""
        now = int(time.time() * 1000)
        told = self._post("runs/create", experiment_id=experiment, run_name=name, start_time=now, tags=_pairs(tags))
        return _run(told["run"])

    def run(self, run_id: str) -> Run:
        return _run(self._get("runs/get", run_id=run_id)["run"])

    def search(self, experiments: Iterable[str], chosen: str) -> list[Run]:
        """All active runs for a filter."""
        asked = list(experiments)
        if not asked:
            return []
        pages = self._pages("runs/search", experiment_ids=asked, filter=chosen)
        return [_run(found) for page in pages for found in page.get("runs", [])]

    def history(self, run_id: str, metric: str) -> list[Point]:
        """All points of a metric of a run."""
        points: list[Point] = []
        asked: dict[str, object] = {"run_id": run_id, "metric_key": metric, "max_results": 25_000}
        while True:
            page = self._get("metrics/get-history", **asked)
            points += [_point(one) for one in page.get("metrics", [])]
            if not page.get("next_page_token"):
                return points
            asked["page_token"] = page["next_page_token"]

    def log(
        self,
        run_id: str,
        metrics: Iterable[Metric] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write metrics, params and tags, the tags last, in as few requests as MLflow allows; in none where there is
        nothing."""
        written = [
            {"key": name, "value": _json_number(point.value), "timestamp": point.timestamp, "step": point.step}
            for name, point in metrics
        ]
        given, told = _pairs(params or {}), _pairs(tags or {})
        while written or given or told:
            metrics_now, written = written[:_MOST_METRICS], written[_MOST_METRICS:]
            # At most a thousand altogether, too. What a tag says holds only once all the rest is there.
            room = min(_MOST_PARAMS, _MOST_METRICS - len(metrics_now))
            params_now, given = given[:room], given[room:]
            room = min(_MOST_TAGS, _MOST_METRICS - len(metrics_now) - len(params_now)) if not (written or given) else 0
            tags_now, told = told[:room], told[room:]
            self._post("runs/log-batch", run_id=run_id, metrics=metrics_now, params=params_now, tags=tags_now)

    def log_dataset(self, run_id: str, name: str, digest: str, kind: str, source: Mapping[str, str]) -> None:
        """A data set as an input of a run."""
        dataset = {"name": name, "digest": digest, "source_type": kind, "source": json.dumps(source)}
        tags = [{"key": "mlflow.data.context", "value": "benchmark"}]
        inputs = [{"dataset": dataset, "tags": tags}]
        try:
            self._post("runs/log-inputs", run_id=run_id, datasets=inputs)
        except Refused as error:
            if "IntegrityError" not in str(error):
                raise
            # Somebody else made the same data set at the same moment: now it is there.
            self._post("runs/log-inputs", run_id=run_id, datasets=inputs)

    def set_status(self, run_id: str, status: str, end_time: int | None = None) -> None:
        """end_time: milliseconds since 1970; None keeps what stands there."""
        ended = {} if end_time is None else {"end_time": end_time}
        self._post("runs/update", run_id=run_id, status=status, **ended)

    def delete_run(self, run_id: str) -> None:
        self._post("runs/delete", run_id=run_id)

    def delete_tag(self, run_id: str, tag: str) -> None:
        """Take a tag away; one that is not there is no error."""
        try:
            self._post("runs/delete-tag", run_id=run_id, key=tag)
        except Refused as error:
            # The answer to the first of two attempts may have been lost.
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def upload(self, run: Run, file: Path) -> None:
        """Keep a file with a run; one of the same name is replaced."""
        scheme, _, place = run.artifact_uri.partition(":")
        if scheme == "mlflow-artifacts" and not place.startswith("//"):
            path = quote(posixpath.join(place.lstrip("/"), file.name))
            self._ask("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{path}", file=file)
            return
        for name, value in CLIENT_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=self.uri).log_artifact(run.run_id, str(file))

    def _get(self, path: str, **asked: object) -> Any:
        return self._ask("GET", f"/api/2.0/mlflow/{path}", params=asked)

    def _post(self, path: str, **body: object) -> Any:
        return self._ask("POST", f"/api/2.0/mlflow/{path}", json=body)

    def _pages(self, path: str, **body: object) -> Iterator[Any]:
        token = None
        while True:
            page = self._post(path, **body, max_results=_PAGE, **({"page_token": token} if token else {}))
            yield page
            token = page.get("next_page_token")
            if not token:
                return

    def _ask(self, method: str, path: str, *, file: Path | None = None, **more: Any) -> Any:
        """The JSON that the server answers. file: what is sent as the body."""
        if self.patience:
            _wait_for(self.uri)
        began = time.monotonic()
        pauses = iter(_PAUSES)
        pause, said = 0.0, False
        while True:
            try:
                with _body(file) as content:
                    timeout = _UPLOAD_TIMEOUT if file else max(_HASTE, min(_timeout(), self.patience))
                    answer = _connections(self.uri, os.getpid()).request(
                        method, f"{self.uri}{path}", content=content, auth=_credentials(), timeout=timeout, **more
                    )
            except httpx.TransportError as error:
                problem: UserError = _no_answer(self.uri, _told(error))
            else:
                if answer.status_code not in _PASSING:
                    return _result(self.uri, answer, empty=file is not None)
                problem = _trouble(self.uri, answer)
            pause = next(pauses, pause)
            if time.monotonic() + pause > began + self.patience:
                raise problem
            if time.monotonic() - began > _SAID and not said:
                said = True
                _log.warning("MLflow at %s is waited for, a minute at most: %s", self.uri, problem.found)
            time.sleep(pause)


@cache
def _connections(uri: str, process: int) -> httpx.Client:
    """Connections to one server. process: this one's id, for connections do not survive a fork."""
    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    return httpx.Client(verify=_trusted(uri), limits=limits)


def _trusted(uri: str) -> bool | Any:
    """Whose certificates to trust. Reading the usual ones takes longer than ten requests: not where none are shown."""
    if uri.startswith("http:") or os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return False
    own = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or os.environ.get("REQUESTS_CA_BUNDLE")
    if own is None:
        return True
    import ssl

    return ssl.create_default_context(cafile=own)


def _credentials() -> httpx.Auth | None:
    """What the environment holds for MLflow's own client, too: user name and password, or a token."""
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return httpx.BasicAuth(user, password)
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return _Bearer(token) if token else None


class _Bearer(httpx.Auth):
    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


def _timeout() -> float:
    return float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", _TIMEOUT))


@contextmanager
def _body(file: Path | None) -> Iterator[Any]:
    if file is None:
        yield None
        return
    # Opened for every attempt: what has been sent once is read.
    with file.open("rb") as content:
        yield content


def _wait_for(uri: str) -> None:
    """Return once the server has answered anything at all, which is asked once per process; raise UserError when it
    does not within about 15 seconds."""
    if uri in _answered:
        return
    problem = ""
    for pause in _PROBE_PAUSES:
        time.sleep(pause)
        try:
            _connections(uri, os.getpid()).get(f"{uri}/health", timeout=_PROBE_SECONDS)
        except httpx.TransportError as error:
            problem = _told(error)
        else:
            _answered.add(uri)
            return
    raise _no_answer(uri, problem)


def _told(error: httpx.TransportError) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _no_answer(uri: str, problem: str) -> UserError:
    return UserError(
        uri,
        "MLflow server",
        f"no answer ({problem})",
        "Start the MLflow server (`make up` does), or correct MLFLOW_TRACKING_URI; then run this again: finished "
        "artifacts are not recomputed.",
    )


def _trouble(uri: str, answer: httpx.Response) -> UserError:
    """The error for an answer that did not get better."""
    found = f"HTTP {answer.status_code}, again and again: {_message(answer)}"
    if "locked" in found:
        remedy = "Another program writes to MLflow's database all the time: end it. Several writers need Postgres."
    else:
        remedy = "Look for the cause in the log of the MLflow server, or start it again; then run this again."
    return UserError(uri, "MLflow server", found, remedy)


def _result(uri: str, answer: httpx.Response, *, empty: bool) -> Any:
    """The JSON of an answer. empty: whether nothing is an answer, too.

    Raises UserError where it is none of MLflow's, or about credentials; Refused where MLflow refuses.
    """
    if answer.status_code in (401, 403):
        raise UserError(
            uri,
            "access to the MLflow server",
            f"HTTP {answer.status_code}: {_message(answer)}",
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD if the server asks for them; where it is "
            "reached by another name than localhost, start it with --allowed-hosts naming it.",
        )
    try:
        told = answer.json()
    except ValueError:
        told = None
    if answer.status_code == 200 and (empty or told is not None):
        return told
    if isinstance(told, dict) and "error_code" in told:
        raise Refused(str(told["error_code"]), str(told.get("message", "")))
    found = f"HTTP {answer.status_code}: {_message(answer)}"
    raise UserError(uri, "MLflow server", found, "Check that this is the URL of an MLflow server, and its log.")


def _message(answer: httpx.Response) -> str:
    """What the server says, in one line."""
    try:
        told = answer.json()
    except ValueError:
        told = answer.text
    text = str(told.get("message", told)) if isinstance(told, dict) else str(told)
    # What SQL it was comes after the cause, and is long.
    return " ".join(text.partition("[SQL:")[0].split())[:500] or "nothing"


def _run(told: Mapping[str, Any]) -> Run:
    info, data = told["info"], told.get("data", {})
    return Run(
        run_id=info["run_id"],
        name=info.get("run_name", ""),
        experiment=str(info["experiment_id"]),
        status=info["status"],
        start_time=int(info["start_time"]),
        end_time=int(info["end_time"]) if info.get("end_time") else None,
        artifact_uri=info.get("artifact_uri", ""),
        tags={tag["key"]: tag.get("value", "") for tag in data.get("tags", [])},
        params={param["key"]: param.get("value", "") for param in data.get("params", [])},
        metrics={metric["key"]: _point(metric) for metric in data.get("metrics", [])},
        has_dataset=bool(told.get("inputs", {}).get("dataset_inputs")),
    )


def _point(told: Mapping[str, Any]) -> Point:
    return Point(float(told.get("value", 0.0)), int(told["timestamp"]), int(told.get("step", 0)))


def _pairs(named: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": name, "value": value} for name, value in named.items()]


def _json_number(value: float) -> float | str:
    """JSON has no NaN: the text stands for it. Infinite values are not to be written."""
    return "NaN" if math.isnan(value) else value
