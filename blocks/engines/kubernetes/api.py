"""What running Jobs asks of a Kubernetes API, through its official client.

Within a cluster the pod's service account identifies this process. Outside, `kubectl proxy` does: it knows every way to
log in that kubectl knows, and answers on an address of this machine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from urllib3.exceptions import HTTPError

from core.errors import UserError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, ApiException
    from urllib3 import HTTPResponse

LOG = logging.getLogger("calipert.kubernetes")

Object = dict[str, Any]

# Short: a stopped flow reaches its thread between two requests only.
ANSWER_S = 5.0
PAUSE_S = 0.5
# A restart or an upgrade of the API's servers; the Jobs go on meanwhile.
PATIENCE_S = 300.0
# A model may print nothing for long; then the connection is only opened again.
SILENCE_S = 60.0
# HTTP statuses that can pass; 0 is the client's own for a connection that TLS refuses.
TRANSIENT = (0, 429, 500, 502, 503, 504)
CHUNK = 2**16


class RequestRefused(Exception):
    """The API does not do what it was asked. status: of HTTP; request: in words; message: the API's own."""

    def __init__(self, status: int, request: str, message: str) -> None:
        self.status = status
        self.request = request
        self.message = message
        super().__init__(status, request, message)

    def __str__(self) -> str:
        """Return the message."""
        return f"{self.request}: HTTP {self.status}: {self.message}"


class OutOfReach(Exception):
    """The API gave no answer, or errors that can pass, for longer than it is waited for."""


class LogStream:
    """A container's log while it grows. `close` may be called from any thread and ends `chunks`."""

    def __init__(self, response: HTTPResponse) -> None:
        self._response = response

    def chunks(self) -> Iterator[bytes]:
        """Return the log in pieces as they come, until it ends. Raises HTTPError where the connection breaks."""
        return self._response.stream(CHUNK)

    def close(self) -> None:
        """End the connection, from whichever thread."""
        # It may be closed already.
        with suppress(OSError, RuntimeError, ValueError):
            self._response.shutdown()


class Api:
    """Jobs, pods and their logs in one namespace. Callable from any thread.

    What can pass (no connection, HTTP 429 and 5xx) is tried again for `patience_s` seconds, then OutOfReach is raised;
    other errors are RequestRefused at once. interrupt: called between two tries; what it raises ends them.
    """

    def __init__(self, address: str | None, namespace: str, interrupt: Callable[[], None]) -> None:
        """Connect to an address, or, where it is None, to the cluster in which this process runs.

        Raises UserError for None outside of a cluster, and where the client is not installed.
        """
        self.patience_s = PATIENCE_S
        self._namespace = namespace
        self._interrupt = interrupt
        self._client = _create_client(address)
        from kubernetes.client import BatchV1Api, CoreV1Api

        self._jobs = BatchV1Api(self._client)
        self._pods = CoreV1Api(self._client)

    def close(self) -> None:
        """Close the client's connections."""
        self._client.rest_client.close()

    def create_job(self, job: Object, attempt: str) -> Object:
        """Create a Job and return it as the API has it.

        attempt: the label `calipert/attempt` of the Job, unique to it: an answer may be lost after the Job was made.
        Raises RequestRefused with status 409 if another one has its name.
        """
        try:
            return self._request(self._jobs.create_namespaced_job, body=job)
        except RequestRefused as error:
            if error.status != 409:
                raise
            existing = self.job(job["metadata"]["name"])
            if existing is None or existing["metadata"].get("labels", {}).get("calipert/attempt") != attempt:
                raise
            return existing

    def job(self, name: str) -> Object | None:
        """Return the Job of this name, None if there is none."""
        try:
            return self._request(self._jobs.read_namespaced_job, name=name)
        except RequestRefused as error:
            if error.status == 404:
                return None
            raise

    def delete_job(self, name: str, uid: str) -> None:
        """Ask to delete this very Job, its pods before it; nothing happens if it is gone or another has its name."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        try:
            self._request(self._jobs.delete_namespaced_job, name=name, body=options)
        except RequestRefused as error:
            if error.status not in (404, 409):
                raise

    def pod(self, selector: str) -> Object | None:
        """Return the youngest pod with these labels, None if there is none."""
        found = self._request(self._pods.list_namespaced_pod, label_selector=selector)["items"]
        return max(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp")), default=None)

    def last_lines(self, pod: str, container: str, most: int) -> tuple[str, ...]:
        """Return the end of a container's log, for a message: nothing where there is none."""
        try:
            text = self._call(self._pods.read_namespaced_pod_log, name=pod, container=container, tail_lines=most).data
        except RequestRefused:
            return ()
        except HTTPError as error:
            return (f"(its log could not be read: {error})",)
        return tuple(text.decode("utf-8", errors="replace").splitlines())

    @contextmanager
    def log(self, pod: str, container: str, since_s: int | None) -> Iterator[LogStream]:
        """Follow a container's log from its beginning, or its last seconds, with a time before each line.

        One try: raises HTTPError where there is no connection, RequestRefused for any answer but a log.
        """
        which = {"name": pod, "container": container, "follow": True, "timestamps": True}
        if since_s is not None:
            which["since_seconds"] = since_s
        with closing(self._call(self._pods.read_namespaced_pod_log, silence_s=SILENCE_S, **which)) as response:
            yield LogStream(response)

    def _call(self, method: Callable[..., Any], silence_s: float = ANSWER_S, **arguments: Any) -> HTTPResponse:
        """Send one request. Raises HTTPError where there is no connection, RequestRefused for an error's answer."""
        from kubernetes.client import ApiException

        try:
            # The answer as it came: the client's own objects refuse what a newer or older API leaves out.
            response: HTTPResponse = method(
                namespace=self._namespace, _preload_content=False, _request_timeout=(ANSWER_S, silence_s), **arguments
            )
        except ApiException as error:
            raise RequestRefused(int(error.status or 0), _describe(method), _message(error)) from error
        return response

    def _request(self, method: Callable[..., Any], **arguments: Any) -> Object:
        """Send a request until it is answered. Raises RequestRefused and OutOfReach."""
        end = monotonic() + self.patience_s
        logged = False
        while True:
            try:
                answer: Object = json.loads(self._call(method, **arguments).data)
                return answer
            except HTTPError as error:
                problem = f"no connection ({type(error).__name__}: {error})"
            except RequestRefused as error:
                if error.status not in TRANSIENT:
                    raise
                problem = f"HTTP {error.status}: {error.message}"
            if monotonic() >= end:
                raise OutOfReach(f"{_describe(method)} ({self._client.configuration.host}): {problem}")
            if not logged:
                LOG.warning("the Kubernetes API: %s; trying again", problem)
                logged = True
            sleep(PAUSE_S)
            self._interrupt()


def _create_client(address: str | None) -> ApiClient:
    try:
        from kubernetes.client import ApiClient, Configuration
        from kubernetes.config import ConfigException, load_incluster_config
    except ModuleNotFoundError as error:
        remedy = "install it: pip install 'calipert[kubernetes]'"
        raise UserError("Kubernetes", "client", f"a package that is not installed: {error.name}", remedy) from error
    # A proxy meant for the internet does not lead to the API. `_request` tries again by itself.
    configuration = Configuration(host=address and address.rstrip("/"), proxy="", retries=False)
    if address is None:
        try:
            load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        except ConfigException as error:
            found = f"this process runs in no pod, or in one without the token of a service account ({error})"
            remedy = (
                "outside of a cluster run `kubectl proxy` and set `api: http://127.0.0.1:8001` (docs/kubernetes.md);"
                " in a pod let its service account be mounted"
            )
            raise UserError("Kubernetes", "API", found, remedy) from error
    return ApiClient(configuration)


def _describe(method: Callable[..., Any]) -> str:
    """Say in words what a method of the client asks for, as `read job`."""
    return method.__name__.replace("_namespaced_", " ").replace("_", " ")


def _message(error: ApiException) -> str:
    """Return what the API says about an error, in its own words."""
    body = (error.body or b"") if isinstance(error.body, str | bytes) else b""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        text = body if isinstance(body, str) else body.decode("utf-8", errors="replace")
        return text.strip()[:500] or str(error.reason)
