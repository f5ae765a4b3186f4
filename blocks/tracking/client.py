"""MLflow's own client with the project's patience and errors; imported at the first request, as that takes seconds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from json import JSONDecodeError
from pathlib import Path
from threading import Lock, Thread
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from blocks.http import is_transient, open_client, retry
from core.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

# Seconds for which a request is repeated: to a server that never answered, and to one that was lost.
FIRST_PATIENCE = 15.0
PATIENCE = 60.0
# How long the server may take to say that it is there, in seconds.
PROBE_SECONDS = 4.0
# For one request to a server without patience, in seconds.
HASTE_SECONDS = 5.0
# What MLflow takes in one request: of all together, and of params or tags.
MOST_AT_ONCE = 1000
MOST_NAMED = 100
PAGE = 1000

# Read by MLflow's client, which retries by itself, prints links and sends telemetry unless it is told not to. It has
# one time limit for all requests, in seconds, which an upload needs most of. Values that a user has set stay.
CLIENT_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "300",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

T = TypeVar("T")

_log = logging.getLogger("calipert.tracking")
_import_lock = Lock()
_answered: set[str] = set()


class ServerLost(UserError):
    """MLflow gives no answer, or only errors, although it was waited for."""


class Refused(UserError):
    """MLflow does not do what it was asked. code: its error code, such as RESOURCE_DOES_NOT_EXIST."""

    code = ""


@dataclass(frozen=True)
class Server:
    """An MLflow server by its URL.

    Every method raises ServerLost where it does not answer, Refused where it does not do what it is asked, and
    UserError where it asks for credentials or is another kind of server; each names the URL and the remedy.
    patience: for how many seconds a request is repeated; 0 for one try of at most HASTE_SECONDS.
    """

    tracking_uri: str
    patience: float = PATIENCE

    def ask(self, work: Callable[[MlflowClient], T]) -> T:
        """Return what `work` returns: it is given MLflow's client, and repeated as long as the server may come back."""
        self._require_answer()
        client = _connect(self.tracking_uri)

        def report(error: BaseException) -> None:
            found = _no_answer(self.tracking_uri, error).found
            _log.warning("waiting for MLflow at %s, at most %.0f s: %s", self.tracking_uri, self.patience, found)

        try:
            if not self.patience:
                return _run_at_most(HASTE_SECONDS, lambda: work(client))
            return retry(lambda: work(client), self.patience, transient=_is_transient, report=report)
        except Exception as error:
            explained = _explain_error(self.tracking_uri, error)
            if explained is None:
                raise
            raise explained from error

    def find_experiments(self, prefix: str) -> list[str]:
        """Return the ids of the experiments whose name begins so."""
        found = self._read_pages(
            lambda client, **page: client.search_experiments(filter_string=f"name LIKE '{prefix}%'", **page)
        )
        return [experiment.experiment_id for experiment in found]

    def find_runs(self, experiments: list[str], chosen: str) -> list[Run]:
        """Return all active runs of some experiments for a filter."""
        if not experiments:
            return []
        return self._read_pages(lambda client, **page: client.search_runs(experiments, chosen, **page))

    def get_run(self, run_id: str) -> Run:
        """Return a run as it is now."""
        return self.ask(lambda client: client.get_run(run_id))

    def log(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write metrics, params and tags, the tags last: what they say is true only once all the rest is written."""
        entities = load_mlflow().entities
        param_list = [entities.Param(*item) for item in (params or {}).items()]
        tag_list = [entities.RunTag(*item) for item in (tags or {}).items()]
        counts = len(metrics), len(param_list), len(tag_list)
        if sum(counts) > MOST_AT_ONCE or max(counts[1:]) > MOST_NAMED:
            self.ask(lambda client: client.log_batch(run_id, metrics, param_list))
            self.ask(lambda client: client.log_batch(run_id, tags=tag_list))
        elif any(counts):
            self.ask(lambda client: client.log_batch(run_id, metrics, param_list, tag_list))

    def log_file(self, run_id: str, file: Path) -> None:
        """Keep a file with a run; one of the same name is replaced."""
        self.ask(lambda client: client.log_artifact(run_id, str(file)))

    def _read_pages(self, read: Callable[..., Any]) -> list[Any]:
        """Return all that a search finds. read: takes the client, and which page by `max_results` and `page_token`."""
        found: list[Any] = []
        token = None
        while True:
            page = self.ask(partial(read, max_results=PAGE, page_token=token))
            found += page
            if not (token := page.token):
                return found

    def _require_answer(self) -> None:
        """Raise ServerLost unless the server answers; asked once per process, and each time without patience."""
        if self.patience and self.tracking_uri in _answered:
            return
        try:
            # Nothing is sent with it and no answer is believed: it needs no certificates, which take long to read.
            with open_client(self.tracking_uri, timeout=PROBE_SECONDS, verify=False) as client:
                retry(lambda: client.get("/health"), min(self.patience, FIRST_PATIENCE))
        except httpx.TransportError as error:
            raise _no_answer(self.tracking_uri, error) from error
        _answered.add(self.tracking_uri)


@cache
def load_mlflow() -> ModuleType:
    """Import MLflow so that it sends nothing elsewhere."""
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Two threads that import it at once may each find half of it.
    with _import_lock:
        import mlflow

        return mlflow


@cache
def _connect(uri: str) -> MlflowClient:
    """Create MLflow's client of a server, which keeps its connections; any thread may use it."""
    client: MlflowClient = load_mlflow().MlflowClient(tracking_uri=uri)
    return client


def _run_at_most(seconds: float, work: Callable[[], T]) -> T:
    """Return the result of some work. Raises TimeoutError after some seconds; the work may still end later."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where the result is waited for
            future.set_exception(error)

    # MLflow's client takes no time limit for a single request. No executor: the end of the process would wait for it.
    Thread(target=run, daemon=True).start()
    return future.result(seconds)


def _is_transient(error: BaseException) -> bool:
    """Whether a request of MLflow's client failed at the connection, or with a status that may pass."""
    from requests import RequestException

    failed = isinstance(error, load_mlflow().MlflowException) and isinstance(error.__context__, RequestException)
    return failed or is_transient(error)


def _explain_error(uri: str, error: Exception) -> UserError | None:
    """Return what an error of MLflow's client means for the user; None for an error that comes from elsewhere."""
    from mlflow.exceptions import MlflowException, RestException
    from requests import RequestException

    if _is_transient(error):
        return _no_answer(uri, error)
    # It reads an answer that is no JSON as if it were.
    if not isinstance(error, MlflowException | RequestException | JSONDecodeError):
        return None
    # The statement in SQL comes after its cause, and is long.
    text = " ".join(str(error).partition("[SQL:")[0].split())[:500]
    if isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403):  # type: ignore[no-untyped-call]
        remedy = (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD if the server asks for them; where it is "
            "reached by another name than localhost, start it with --allowed-hosts naming it"
        )
        return UserError(uri, "access to the MLflow server", text, remedy)
    if isinstance(error, RestException):
        refused = Refused(uri, "request to MLflow", text, "look for the cause in the log of the MLflow server")
        refused.code = str(error.error_code)
        return refused
    return UserError(uri, "MLflow server", text, "check that this is the URL of an MLflow server, and its log")


def _no_answer(uri: str, error: BaseException) -> ServerLost:
    """Return the error for a server that is out of reach, or stays busy."""
    from requests import RequestException
    from requests.exceptions import RetryError

    # MLflow's client describes at length an error of `requests`, which holds what urllib3 found.
    cause = error.__context__ if isinstance(error.__context__, RequestException) else error
    reason = getattr(cause.args[0] if cause.args else None, "reason", cause)
    text = f"{type(cause).__name__}: {reason}".rstrip(": ")
    return ServerLost(
        uri,
        "MLflow server",
        f"{'only errors' if isinstance(cause, RetryError) else 'no answer'} ({text})",
        "start the MLflow server (`make up` does), or correct MLFLOW_TRACKING_URI. If it runs, look at its log: where "
        "its database is locked, another program writes to it all the time, and several writers need PostgreSQL. Then "
        "run this again: finished artifacts are not recomputed",
    )
