"""What running Jobs asks of a Kubernetes API, through its official client.

Within a cluster the pod's service account identifies this process. Outside, `kubectl proxy` does: it knows every way to
log in that kubectl knows, and answers on an address of this machine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from urllib3.exceptions import HTTPError

from blocks.http import is_transient_status, retry
from core.errors import UserError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, ApiException
    from urllib3 import HTTPResponse

LOG = logging.getLogger("calipert.kubernetes")

Object = dict[str, Any]

# Short: a stopped flow reaches its thread between two requests only.
ANSWER_S = 5.0
# A restart or an upgrade of the API's servers; the Jobs go on meanwhile.
PATIENCE_S = 300.0
# A model may print nothing for long; then the connection is only opened again.
SILENCE_S = 60.0


@dataclass(eq=False)
class RequestFailed(Exception):
    """The API does not do what it was asked, or does not answer.

    status: of HTTP, 0 where there is no answer; request: in words; found: what came, with the API's own words.
    """

    status: int
    request: str
    found: str

    def __str__(self) -> str:
        """Return the message."""
        return f"{self.request}: {self.found}"


def is_lost(error: BaseException) -> bool:
    """Whether a request failed with what can pass."""
    return isinstance(error, RequestFailed) and (error.status == 0 or is_transient_status(error.status))


class Api:
    """Jobs, pods and their logs in one namespace. Callable from any thread.

    What can pass is tried again for `patience_s` seconds (blocks.http); an error that stays is RequestFailed. sleep:
    waits between two tries; what it raises ends them.
    """

    def __init__(self, address: str | None, namespace: str, sleep: Callable[[float], object]) -> None:
        """Connect to an address, or, where it is None, to the cluster in which this process runs.

        Raises UserError for None outside of a cluster, and where the client is not installed.
        """
        self.patience_s = PATIENCE_S
        self.sleep = sleep
        self.client = _create_client(address)
        self._namespace = namespace
        from kubernetes.client import BatchV1Api, CoreV1Api

        self._jobs = BatchV1Api(self.client)
        self._pods = CoreV1Api(self.client)

    def close(self) -> None:
        """Close the client's connections."""
        self.client.rest_client.close()

    def create_job(self, job: Object) -> None:
        """Create a Job, unless there is one of its name: this very one, of which the answer was lost, or another."""
        try:
            self._request(self._jobs.create_namespaced_job, body=job)
        except RequestFailed as error:
            if error.status != 409 or self.job(job["metadata"]["name"]) is None:
                raise

    def job(self, name: str) -> Object | None:
        """Return the Job of this name, None if there is none."""
        found: Object | None = self._request(self._jobs.read_namespaced_job, (404,), name=name)
        return found

    def delete_job(self, name: str, uid: str) -> None:
        """Ask to delete this very Job, its pods before it; nothing happens if it is gone or another has its name."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        self._request(self._jobs.delete_namespaced_job, (404, 409), name=name, body=options)

    def pod(self, selector: str) -> Object | None:
        """Return the youngest pod with these labels, None if there is none."""
        found = self._request(self._pods.list_namespaced_pod, label_selector=selector)["items"]
        return max(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp")), default=None)

    def last_lines(self, pod: str, container: str, most: int) -> list[str]:
        """Return the end of a container's log, for a message: nothing where there is none."""
        read = self._pods.read_namespaced_pod_log
        try:
            with self._send(read, name=pod, container=container, tail_lines=most) as answer:
                return answer.data.decode("utf-8", errors="replace").splitlines()
        except RequestFailed as error:
            return [] if error.status else [f"(its log could not be read: {error.found})"]

    @contextmanager
    def log(self, pod: str, container: str, since_s: int | None) -> Iterator[HTTPResponse]:
        """Follow a container's log from its beginning, or its last seconds, with a time before each line.

        One try. Raises RequestFailed, also where the connection breaks within the block.
        """
        which: dict[str, Any] = {"name": pod, "container": container, "follow": True, "timestamps": True}
        which |= {} if since_s is None else {"since_seconds": since_s}
        with self._send(self._pods.read_namespaced_pod_log, silence_s=SILENCE_S, **which) as answer:
            yield answer

    @contextmanager
    def _send(
        self, method: Callable[..., Any], *, silence_s: float = ANSWER_S, **arguments: Any
    ) -> Iterator[HTTPResponse]:
        """Send one request, and yield its answer, to be read within the block. Raises RequestFailed."""
        from kubernetes.client import ApiException

        request = method.__name__.replace("_namespaced_", " ").replace("_", " ")
        # The answer as it came: the client's own objects refuse what a newer or older API leaves out.
        own = {"namespace": self._namespace, "_preload_content": False, "_request_timeout": (ANSWER_S, silence_s)}
        try:
            with closing(method(**own, **arguments)) as answer:
                yield answer
        except ApiException as error:
            # Without a status where TLS refuses the connection.
            status = int(error.status or 0)
            raise RequestFailed(status, request, f"HTTP {status}: {_read_message(error)}") from error
        except HTTPError as error:
            raise RequestFailed(0, request, f"no connection ({type(error).__name__}: {error})") from error

    def _request(self, method: Callable[..., Any], passed: tuple[int, ...] = (), **arguments: Any) -> Any:
        """Return the answer to a request, None for the statuses that are passed over."""

        def ask() -> Any:
            with self._send(method, **arguments) as answer:
                return json.loads(answer.data)

        def report(error: BaseException) -> None:
            LOG.warning("the Kubernetes API: %s; trying again", getattr(error, "found", error))

        try:
            return retry(ask, self.patience_s, transient=is_lost, report=report, sleep=self.sleep)
        except RequestFailed as error:
            if error.status in passed:
                return None
            raise


def read_attempt(job: Object) -> str | None:
    """Return which attempt a Job is of; it is the label that tells two Jobs of one name apart."""
    attempt: str | None = job["metadata"].get("labels", {}).get("calipert/attempt")
    return attempt


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


def _read_message(error: ApiException) -> str:
    """Return what the API says about an error, in its own words."""
    body = (error.body or b"") if isinstance(error.body, str | bytes) else b""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        text = body if isinstance(body, str) else body.decode("utf-8", errors="replace")
        return text.strip()[:500] or str(error.reason)
