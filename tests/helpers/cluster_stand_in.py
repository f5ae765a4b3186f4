"""A stand-in of a cluster: the part of the Kubernetes API that the engine uses, and a node that really runs the pods.

Each container is a process of this machine whose mounts are links in a folder of its own; arguments, variables and
the spec that name a mount are made to name the link. What happens to a pod in a cluster besides (it is evicted, its
image cannot be had, the API goes away) is done to it by the methods and attributes here. Every Job is checked against
the schema of the API first.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import kubernetes_validate

from blocks.engines.kubernetes import transfer

ROOT = Path(__file__).resolve().parents[2]
VERSION = "1.37"
NAMESPACE = "calipert"
CODES = {"OOMKilled": 137}


@dataclass
class Container:
    """manifest: its part of the pod's. state: as the API shows it. lines: its log, with the time of each line (s)."""

    manifest: dict[str, Any]
    state: dict[str, Any]
    lines: list[tuple[float, str, bytes]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return "terminated" in self.state


@dataclass
class Pod:
    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    containers: dict[str, Container]
    status: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None

    def shown(self) -> dict[str, Any]:
        inits = [part["name"] for part in self.spec["initContainers"]]
        states = [{"name": name, "state": one.state} for name, one in self.containers.items() if one.state]
        return {
            "metadata": {"name": self.name, "labels": self.labels, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "status": self.status
            | {
                "initContainerStatuses": [state for state in states if state["name"] in inits],
                "containerStatuses": [state for state in states if state["name"] not in inits],
            },
        }


class Cluster:
    """images: name -> command. secrets: name -> entries. What is made to go wrong: see the attributes below."""

    def __init__(self, folder: Path, images: dict[str, list[str]], secrets: dict[str, dict[str, str]]) -> None:
        self.folder = folder
        self.images = images
        self.secrets = secrets
        self.changed = threading.Condition()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, Pod] = {}
        self.created: list[dict[str, Any]] = []
        self.deleted: list[tuple[str, dict[str, Any]]] = []
        self.specs: list[dict[str, Any]] = []
        self.requests: list[str] = []
        # Run `blocks.engines.kubernetes.transfer` in this process: it takes a second to import.
        self.quick = True
        # No node takes a pod, or no pod is made.
        self.unschedulable: str | None = None
        self.without_pods = False
        # Names of containers whose start fails with a reason.
        self.troubles: dict[str, tuple[str, str]] = {}
        # What the node says of a container, whatever its exit code.
        self.reasons: dict[str, str] = {}
        # "METHOD path" (a pattern) -> what the next such requests get: a status, or "drop", or "lose" for a connection
        # that breaks before or after the request is done.
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        # After how many lines the connections that follow a log break, one after the other.
        self.breaks: list[int] = []
        self.lingering = 0
        self._threads: list[threading.Thread] = []
        cluster = self

        class Handler(_Handler):
            stand_in = cluster

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        for pod in list(self.pods.values()):
            self.end(pod, "Shutdown", "")
        for thread in self._threads:
            thread.join()
        self.server.shutdown()
        self.server.server_close()

    # ---- what a cluster does

    def create(self, job: dict[str, Any]) -> dict[str, Any]:
        kubernetes_validate.validate(job, VERSION, strict=True)
        made = deepcopy(job)
        made["metadata"]["uid"] = str(uuid4())
        made["status"] = {}
        with self.changed:
            self.created.append(job)
            self.jobs[job["metadata"]["name"]] = made
            if self.without_pods:
                return made
            template = job["spec"]["template"]
            parts = [*template["spec"]["initContainers"], *template["spec"]["containers"]]
            pod = Pod(
                name=f"{job['metadata']['name']}-{uuid4().hex[:5]}",
                labels=template["metadata"]["labels"],
                spec=template["spec"],
                containers={
                    part["name"]: Container(part, {"waiting": {"reason": "PodInitializing"}}) for part in parts
                },
                status={"phase": "Pending"},
            )
            self.pods[pod.name] = pod
        thread = threading.Thread(target=self._run, args=(pod, made), daemon=True)
        self._threads.append(thread)
        thread.start()
        return made

    def delete(self, name: str, options: dict[str, Any]) -> int:
        with self.changed:
            job = self.jobs.get(name)
            if job is None:
                return 404
            if options.get("preconditions", {}).get("uid") != job["metadata"]["uid"]:
                return 409
            self.deleted.append((name, options))
            if self.lingering:
                self.lingering -= 1
                return 200
        for pod in [pod for pod in self.pods.values() if pod.name.startswith(name)]:
            self.end(pod, "Deleted", "")
            with self.changed:
                self.pods.pop(pod.name, None)
        with self.changed:
            self.jobs.pop(name, None)
            self.changed.notify_all()
        return 200

    def end(self, pod: Pod, reason: str, message: str) -> None:
        """The node kills a pod and says why, as for a deadline or an eviction."""
        with self.changed:
            if pod.status["phase"] in ("Succeeded", "Failed"):
                return
            pod.status |= {"reason": reason, "message": message, "ended": True}
            if pod.process is not None:
                pod.process.kill()
            if not any("running" in one.state for one in pod.containers.values()):
                pod.status["phase"] = "Failed"
            self.changed.notify_all()

    def only_pod(self) -> Pod:
        (pod,) = self.pods.values()
        return pod

    def _run(self, pod: Pod, job: dict[str, Any]) -> None:
        with self.changed:
            if self.unschedulable is not None:
                condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
                pod.status["conditions"] = [condition | {"message": self.unschedulable}]
                self.changed.wait_for(lambda: self.unschedulable is None or "ended" in pod.status)
                pod.status["conditions"] = [{"type": "PodScheduled", "status": "True"}]
        for name, container in pod.containers.items():
            with self.changed:
                if name in self.troubles:
                    reason, message = self.troubles[name]
                    container.state = {"waiting": {"reason": reason, "message": message}}
                    self.changed.wait_for(lambda name=name: name not in self.troubles or "ended" in pod.status)
                if "ended" in pod.status:
                    pod.status["phase"] = "Failed"
                    return
                container.state = {"running": {"startedAt": _now()}}
            code = self._contain(pod, container)
            with self.changed:
                reason = self.reasons.get(name, "Completed" if code == 0 else "Error")
                code = CODES.get(reason, code) if code else code
                times = {"startedAt": container.state["running"]["startedAt"], "finishedAt": _now()}
                container.state = {"terminated": {"exitCode": code, "reason": reason} | times}
                self.changed.notify_all()
                if code or "ended" in pod.status:
                    pod.status["phase"] = "Failed"
                    break
        else:
            pod.status["phase"] = "Succeeded"
        with self.changed:
            condition = {"type": "Complete", "status": "True"}
            if pod.status["phase"] == "Failed":
                condition |= {"type": "Failed", "reason": "BackoffLimitExceeded"}
                condition["message"] = "Job has reached the specified backoff limit"
            job["status"] = {"conditions": [condition]}
            self.changed.notify_all()

    def _contain(self, pod: Pod, container: Container) -> int:
        """Run a container to its end; its exit code as a node tells it."""
        manifest = container.manifest
        root = self.folder / pod.name / manifest["name"]
        mounts = sorted(manifest["volumeMounts"], key=lambda mount: len(mount["mountPath"]))
        for mount in mounts:
            place = root / mount["mountPath"].lstrip("/")
            volume = self.folder / pod.name / "volumes" / mount["name"]
            volume.mkdir(parents=True, exist_ok=True)
            source = volume / mount.get("subPath", "")
            assert source.exists(), f"nothing to mount: {mount}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source)

        def here(value: str) -> str:
            inside = any(value == m["mountPath"] or value.startswith(f"{m['mountPath']}/") for m in mounts)
            return f"{root}{value}" if inside else value

        variables = {}
        for source in manifest.get("envFrom", []):
            variables |= self.secrets[source["secretRef"]["name"]]
        variables |= {variable["name"]: here(variable["value"]) for variable in manifest["env"]}
        command = [here(word) for word in manifest.get("command", [])]
        if command[:3] == ["python", "-m", "blocks.engines.kubernetes.transfer"]:
            if self.quick:
                return self._transfer(container, command[3:])
            command[0] = sys.executable
            variables["PYTHONPATH"] = str(ROOT)
        else:
            self._show_spec(root, here)
            command = [*self.images[manifest["image"]], *(here(word) for word in manifest["args"])]
            variables["PYTHONPATH"] = str(ROOT / "model_containers")
        variables["PATH"] = os.environ["PATH"]
        with self.changed:
            pod.process = subprocess.Popen(
                command,
                cwd=here(manifest["workingDir"]),
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            if "ended" in pod.status:
                pod.process.kill()
        assert pod.process.stdout is not None
        with pod.process as process:
            for line in process.stdout:
                self._write(container, line)
            code = process.wait()
        return code if code >= 0 else 128 - code

    def _show_spec(self, root: Path, here: Callable[[str], str]) -> None:
        """Put a spec with the paths of this machine in place of the one that the container mounts."""
        mount = root / "spec"
        spec = json.loads((mount / "spec.json").read_text())
        self.specs.append(spec)
        mount.unlink()
        mount.mkdir()
        shown = {name: here(value) if isinstance(value, str) else value for name, value in spec.items()}
        (mount / "spec.json").write_text(json.dumps(shown))

    def _transfer(self, container: Container, arguments: list[str]) -> int:
        errors = io.StringIO()
        try:
            transfer.main(arguments)
        except SystemExit as error:
            errors.write(str(error.code))
            for line in errors.getvalue().splitlines():
                self._write(container, f"{line}\n".encode())
            return 1
        return 0

    def _write(self, container: Container, line: bytes) -> None:
        with self.changed:
            stamp = f"2026-01-01T00:00:00.{time.monotonic_ns() % 10**9:09d}{len(container.lines):09d}Z"
            container.lines.append((time.monotonic(), stamp, line))
            self.changed.notify_all()

    def log(self, container: Container, since_s: float | None, follow: bool) -> Iterator[bytes]:
        start = 0.0 if since_s is None else time.monotonic() - since_s
        sent = 0
        while True:
            with self.changed:
                if follow:
                    self.changed.wait_for(lambda sent=sent: container.over or len(container.lines) > sent)
                new, over = container.lines[sent:], container.over or not follow
            for written, stamp, line in new:
                if written >= start:
                    yield f"{stamp} ".encode() + line
            sent += len(new)
            if over and sent == len(container.lines):
                return


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: Cluster

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        cluster = self.stand_in
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        request = f"{method} {url.path}"
        cluster.requests.append(request)
        fault: int | str | None = None
        for pattern, coming in cluster.faults.items():
            if coming and re.search(pattern, request):
                with cluster.changed:
                    fault = coming.pop(0)
                    cluster.changed.notify_all()
                break
        if fault == "drop":
            self._break()
            return
        if isinstance(fault, int):
            self._json(fault, {"kind": "Status", "message": f"made to fail with {fault}"})
            return
        jobs = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
        pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
        status, answer = 404, {"kind": "Status", "message": f"{request}: not found"}
        if method == "POST" and url.path == jobs:
            if body["metadata"]["name"] in cluster.jobs:
                status, answer = 409, {"kind": "Status", "message": "already exists"}
            else:
                status, answer = 201, cluster.create(body)
        elif method == "GET" and url.path == pods:
            wanted = dict(pair.split("=") for pair in query["labelSelector"].split(","))
            with cluster.changed:
                found = [pod.shown() for pod in cluster.pods.values() if wanted.items() <= pod.labels.items()]
            status, answer = 200, {"items": deepcopy(found)}
        elif match := re.fullmatch(f"{pods}/([^/]+)/log", url.path):
            pod = cluster.pods.get(match[1])
            if method == "GET" and pod is not None:
                self._log(pod.containers[query["container"]], query)
                return
        elif match := re.fullmatch(f"{jobs}/([^/]+)", url.path):
            if method == "GET" and match[1] in cluster.jobs:
                status, answer = 200, cluster.jobs[match[1]]
            elif method == "DELETE":
                status = cluster.delete(match[1], body)
                answer = {"kind": "Status", "message": str(status)}
        if fault == "lose":
            self._break()
            return
        self._json(status, answer)

    def _log(self, container: Container, query: dict[str, str]) -> None:
        cluster = self.stand_in
        follow = query.get("follow") == "true"
        left = cluster.breaks.pop(0) if follow and cluster.breaks else None
        since = float(query["sinceSeconds"]) if "sinceSeconds" in query else None
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        lines: Iterator[bytes] = cluster.log(container, since, follow)
        if "tailLines" in query:
            lines = iter([line for _, _, line in container.lines][-int(query["tailLines"]) :])
        # Whoever reads may go away.
        with contextlib.suppress(OSError):
            for line in lines:
                if left == 0:
                    # In the midst of a line.
                    self._chunk(line[: len(line) // 2])
                    self._break()
                    return
                self._chunk(line)
                left = None if left is None else left - 1
            self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _break(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
