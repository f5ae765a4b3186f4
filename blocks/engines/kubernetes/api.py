"""The few requests to a Kubernetes API that running Jobs takes, over plain HTTP.

Within a cluster the pod's service account says who asks. Outside, `kubectl proxy` does: it knows every way to log in
that kubectl knows, and answers on an address of this machine. The official client would add 126 MB for six requests.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx

from core.errors import UserError

LOG = logging.getLogger("calipert.kubernetes")

Object = dict[str, Any]

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# Short: a stopped flow reaches its thread between two requests only.
ANSWER_S = 5.0
PAUSE_S = 0.5
# A restart or an upgrade of the API's servers; the Jobs go on meanwhile.
PATIENCE_S = 300.0
# A model may be quiet for long, and then the connection is only made anew.
SILENCE_S = 60.0
PASSING = (429, 500, 502, 503, 504)


class Refused(Exception):
    """The API does not do what it was asked. status: of HTTP; request: method and path; message: the API's own."""

    def __init__(self, status: int, request: str, message: str) -> None:
        self.status = status
        self.request = request
        self.message = message
        super().__init__(status, request, message)

    def __str__(self) -> str:
        return f"{self.request}: HTTP {self.status}: {self.message}"


class OutOfReach(Exception):
    """The API gave no answer, or errors that can pass, for longer than it is waited for."""


class LogStream:
    """A container's log while it grows. `close` may be called from any thread and ends `chunks`."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    def chunks(self) -> Iterator[bytes]:
        """The log in pieces as they come, until it ends. Raises httpx.TransportError where the connection breaks."""
        return self._response.iter_bytes()

    def close(self) -> None:
        connection = self._response.extensions["network_stream"].get_extra_info("socket")
        # It may be closed already.
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class Api:
    """Jobs, pods and their logs in one namespace. Callable from any thread.

    What can pass (no connection, HTTP 429 and 5xx) is tried again for `patience_s` seconds, then OutOfReach is raised;
    other errors are Refused at once. interrupt: called between two tries; what it raises ends them.
    """

    def __init__(self, address: str | None, namespace: str, interrupt: Callable[[], None]) -> None:
        """address: of the API, or None within a cluster. Raises UserError for None outside of one."""
        self.namespace = namespace
        self.patience_s = PATIENCE_S
        self._interrupt = interrupt
        self._token = None if address else SERVICE_ACCOUNT / "token"
        self._client = httpx.Client(
            base_url=address or _address_of_cluster(),
            verify=True if address else ssl.create_default_context(cafile=str(SERVICE_ACCOUNT / "ca.crt")),
            timeout=ANSWER_S,
            # A proxy meant for the internet does not lead to the API.
            trust_env=False,
        )

    def close(self) -> None:
        self._client.close()

    def create_job(self, job: Object, attempt: str) -> Object:
        """The Job as it then stands. attempt: the label `calipert/attempt` of the Job, unique to it: an answer may be
        lost after the Job was made. Raises Refused with status 409 if another one has its name."""
        name = job["metadata"]["name"]
        try:
            return self._asked("POST", self._jobs(), json=job)
        except Refused as error:
            if error.status != 409:
                raise
            standing = self.job(name)
            if standing is None or standing["metadata"].get("labels", {}).get("calipert/attempt") != attempt:
                raise
            return standing

    def job(self, name: str) -> Object | None:
        """The Job of this name, None if there is none."""
        try:
            return self._asked("GET", self._jobs(name))
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def delete_job(self, name: str, uid: str) -> None:
        """Ask to delete this very Job, its pods before it; nothing happens if it is gone or another has its name."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": uid},
        }
        try:
            self._asked("DELETE", self._jobs(name), json=options)
        except Refused as error:
            if error.status not in (404, 409):
                raise

    def pod(self, selector: str) -> Object | None:
        """The youngest pod with these labels, None if there is none."""
        found = self._asked("GET", self._pods(), params={"labelSelector": selector})["items"]
        return max(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp")), default=None)

    def last_lines(self, pod: str, container: str, most: int) -> tuple[str, ...]:
        """The end of a container's log, for a message: nothing where there is none to be had."""
        parameters = {"container": container, "tailLines": str(most)}
        try:
            response = self._client.get(f"{self._pods(pod)}/log", params=parameters, headers=self._headers())
        except httpx.TransportError as error:
            return (f"(its log could not be read: {error})",)
        return tuple(response.text.splitlines()) if response.is_success else ()

    @contextmanager
    def log(self, pod: str, container: str, since_s: int | None) -> Iterator[LogStream]:
        """A container's log from its beginning, or its last seconds, with a time before each line, while it grows.

        One try: raises httpx.TransportError where there is no connection, Refused for any answer but a log.
        """
        parameters = {"container": container, "follow": "true", "timestamps": "true"}
        if since_s is not None:
            parameters["sinceSeconds"] = str(since_s)
        path = f"{self._pods(pod)}/log"
        timeout = httpx.Timeout(ANSWER_S, read=SILENCE_S)
        with self._client.stream("GET", path, params=parameters, headers=self._headers(), timeout=timeout) as response:
            if not response.is_success:
                response.read()
                raise Refused(response.status_code, f"GET {path}", _message(response))
            yield LogStream(response)

    def _jobs(self, name: str | None = None) -> str:
        return "/".join(filter(None, ["/apis/batch/v1/namespaces", self.namespace, "jobs", name]))

    def _pods(self, name: str | None = None) -> str:
        return "/".join(filter(None, ["/api/v1/namespaces", self.namespace, "pods", name]))

    def _headers(self) -> dict[str, str]:
        # Read each time: the cluster renews it within the hour.
        return {"Authorization": f"Bearer {self._token.read_text(encoding='ascii').strip()}"} if self._token else {}

    def _asked(self, method: str, path: str, **content: Any) -> Object:
        end = monotonic() + self.patience_s
        said = False
        while True:
            try:
                response = self._client.request(method, path, headers=self._headers(), **content)
            except httpx.TransportError as error:
                problem = f"no connection ({type(error).__name__}: {error})"
            else:
                if response.is_success:
                    answer: Object = response.json()
                    return answer
                problem = f"HTTP {response.status_code}: {_message(response)}"
                if response.status_code not in PASSING:
                    raise Refused(response.status_code, f"{method} {path}", _message(response))
            if monotonic() >= end:
                raise OutOfReach(f"{method} {self._client.base_url.join(path)}: {problem}")
            if not said:
                LOG.warning("the Kubernetes API: %s; trying again", problem)
                said = True
            sleep(PAUSE_S)
            self._interrupt()


def _address_of_cluster() -> str:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if host is None or not (SERVICE_ACCOUNT / "token").exists():
        raise UserError(
            "Kubernetes",
            "API",
            "this process runs in no pod, or in one without the token of a service account",
            "outside of a cluster run `kubectl proxy` and set `api: http://127.0.0.1:8001` (docs/kubernetes.md);"
            " in a pod let its service account be mounted",
        )
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _message(response: httpx.Response) -> str:
    """What the API says about an error, in its own words."""
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip()[:500] or response.reason_phrase
