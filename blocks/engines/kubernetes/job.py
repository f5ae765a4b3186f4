"""A model's stage as a Kubernetes Job: its manifest, and what the state of its pod means."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from blocks.engines.kubernetes.api import Object
from blocks.engines.process import Stage, where_to_change
from core.errors import UserError
from model_containers.contract import THREAD_VARIABLES

SETTINGS = "CALIPERT_KUBERNETES"
FETCH, MODEL, PUBLISH = "fetch", "model", "publish"
INPUT, OUTPUT, SPEC, TEMPORARY = "/input", "/output", "/spec", "/tmp"  # noqa: S108 - a volume of the pod
NOBODY = 65534
GPU_RESOURCE = "nvidia.com/gpu"
# How long a finished Job stays for a look at it, should whoever started it not be there to remove it.
KEPT_S = 3600
# The model is killed so soon after it was told to end; what it has not written by then is of no use.
GRACE_S = 5
# Of a container's start: these can pass, as a registry can come back, or stay for ever.
TROUBLE = (
    "ErrImagePull",
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImageInspectError",
    "RegistryUnavailable",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)

_DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
# As Kubernetes writes quantities: 500m, 2, 8Gi.
Quantity = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value),
    StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGT]|[KMGT]i)?$"),
]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]


class ModelPod(BaseModel):
    """What a model's container gets. image: with its digest. disk: the most that it may write to /output, and to /tmp.

    gpus: for training and prediction; whole ones, which the cluster hands out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str
    cpu: Quantity
    memory: Quantity
    disk: Quantity
    gpus: int = Field(default=0, ge=0)


class Cluster(BaseModel):
    """How Jobs are run: the settings of the file that CALIPERT_KUBERNETES names.

    namespace: of the Jobs. api: address of the API, as `kubectl proxy` offers it; None within the cluster.
    image: of calipert itself, which moves the folders. store_secret: the Secret whose entries become the environment of
    the containers that move them: credentials and endpoint of the bucket. pull_secrets: names, for private registries.
    pending_limit_s: how long a Job may wait for a node. models: folder under model_containers -> its pod.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespace: Name
    api: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$")] | None = None
    image: str
    store_secret: Name
    pull_secrets: tuple[Name, ...] = ()
    pending_limit_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    models: dict[str, ModelPod]


def read_cluster(path: Path) -> Cluster:
    """The settings in a YAML file. Raises UserError for one that cannot be read or does not fit."""
    remedy = "correct it as docs/kubernetes.md says"
    try:
        return Cluster.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(path, f"file ({SETTINGS})", str(error), remedy) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        # Neither the API's address nor what holds it is repeated, nor the cause that does: it may hold a password.
        shown = "" if field == "api" or not isinstance(first["input"], str | int | float) else f"{first['input']!r}: "
        found = f"{shown}{first['msg']}"
        raise UserError(path, field, found, remedy) from None


def digest_of(image: str, where: object, field: str) -> str:
    """`sha256:...` of an image's reference. Raises UserError for one without: a tag can be moved to other software."""
    if not _DIGEST.fullmatch(image):
        raise UserError(
            where,
            field,
            f"{image!r}, which names no digest: what a model's results come from could not be known",
            "write it as name@sha256:..., as `docker push` and"
            " `docker inspect --format '{{index .RepoDigests 0}}' NAME` print it",
        )
    return image.rpartition("@")[2]


@dataclass(frozen=True)
class Inputs:
    """A spec as the model's container sees it. spec: with the paths there; paths: those below /input, files or folders,
    as `kind/key/...`; artifacts: as `kind/key`."""

    spec: dict[str, Any]
    paths: tuple[str, ...]
    artifacts: tuple[str, ...]


def inside(spec: Mapping[str, Any], store: Path) -> Inputs:
    """A spec with the folder `output` and the paths of artifacts in a local store as they are within the Job.

    Raises ValueError for a path that leads elsewhere: nothing but the store's artifacts is in the bucket.
    """
    translated: dict[str, Any] = {}
    paths = []
    for field, value in spec.items():
        if field == "output":
            translated[field] = OUTPUT
        elif isinstance(value, str) and value.startswith("/"):
            path = Path(value)
            if not path.is_relative_to(store) or len(path.relative_to(store).parts) < 2:
                raise ValueError(f"{field}: {value} is no artifact of the store {store}, nor lies in one")
            name = path.relative_to(store).as_posix()
            paths.append(name)
            translated[field] = f"{INPUT}/{name}"
        else:
            translated[field] = value
    artifacts = sorted({"/".join(name.split("/")[:2]) for name in paths})
    return Inputs(translated, tuple(sorted(set(paths))), tuple(artifacts))


@dataclass(frozen=True)
class StageJob:
    """One stage of one model, to be run as a Job.

    The name of one that trains or predicts follows from the stage, the image and the spec within the Job, so that the
    Job of a killed flow is found again. attempt: unique to this one. store: address of the bucket. flow_run: its id,
    None outside of flows. owner: name and uid of the pod that starts it, None outside of the cluster; the cluster
    deletes the Job once that pod is gone, however it went.
    """

    cluster: Cluster
    model: str
    stage: Stage
    inputs: Inputs
    store: str
    timeout_s: float | None
    flow_run: str | None
    attempt: str
    owner: tuple[str, str] | None

    @property
    def pod(self) -> ModelPod:
        return self.cluster.models[self.model]

    @property
    def name(self) -> str:
        if self.stage == "describe":
            # The same for all who ask, at the same time too, and over in a moment.
            return f"{self._begin}-{self.attempt[:16]}"
        recipe = [self.model, self.stage, self.pod.image, self.store, self.inputs.spec]
        fingerprint = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self._begin}-{fingerprint}"

    @property
    def _begin(self) -> str:
        word = re.sub(r"[^a-z0-9]+", "-", self.model.lower())[:20].strip("-")
        return f"calipert-{word}-{self.stage}".replace("--", "-")

    @property
    def specification(self) -> str:
        """Where spec.json lies in the bucket."""
        return f".jobs/{self.name}/spec"

    @property
    def output(self) -> str:
        """Where the Job puts what the model wrote."""
        return f".jobs/{self.name}/output"

    @property
    def selector(self) -> str:
        return f"calipert/attempt={self.attempt}"

    def manifest(self) -> Object:
        """The Job as the API takes it."""
        labels = {
            "app.kubernetes.io/name": "calipert",
            "app.kubernetes.io/component": "model",
            "calipert/model": _label(self.model),
            "calipert/stage": self.stage,
            "calipert/attempt": self.attempt,
        }
        if self.flow_run is not None:
            labels["calipert/flow-run"] = _label(self.flow_run)
        spec: Object = {
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": KEPT_S,
            "template": {"metadata": {"labels": labels}, "spec": self._pod_spec()},
        }
        if self.timeout_s is not None:
            # The limit itself is the pod's, which counts from a node's taking it. This one ends a Job that nobody
            # waits for any more, and that no node takes.
            spec["activeDeadlineSeconds"] = math.ceil(self.timeout_s) + math.ceil(self.cluster.pending_limit_s)
        metadata: Object = {"name": self.name, "namespace": self.cluster.namespace, "labels": labels}
        if self.owner is not None:
            name, uid = self.owner
            metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}]
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}

    def _pod_spec(self) -> Object:
        volumes = [
            {"name": "spec", "emptyDir": {}},
            {"name": "input", "emptyDir": {}},
            {"name": "output", "emptyDir": {"sizeLimit": self.pod.disk}},
            {"name": "model-tmp", "emptyDir": {"sizeLimit": self.pod.disk}},
            {"name": "transfer-tmp", "emptyDir": {}},
        ]
        pod: Object = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_S,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": NOBODY,
                "runAsGroup": NOBODY,
                "fsGroup": NOBODY,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumes": volumes,
            "initContainers": [self._fetch(), self._model()],
            "containers": [self._publish()],
        }
        if self.timeout_s is not None:
            pod["activeDeadlineSeconds"] = math.ceil(self.timeout_s)
        if self.cluster.pull_secrets:
            pod["imagePullSecrets"] = [{"name": name} for name in self.cluster.pull_secrets]
        if self._gpus:
            pod["tolerations"] = [{"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}]
        return pod

    @property
    def device(self) -> str:
        """What stands in Usage: the cluster chooses which GPUs these are."""
        return f"{self._gpus} GPU of the cluster" if self._gpus else "cpu"

    @property
    def _gpus(self) -> int:
        return 0 if self.stage == "describe" else self.pod.gpus

    def _fetch(self) -> Object:
        # The spec goes along as a folder of the bucket, into /input/.jobs/<name>/spec, of which the model sees /spec.
        command = ["fetch", INPUT, self.specification, *self.inputs.artifacts]
        return self._transfer(FETCH, command, [{"name": "input", "mountPath": INPUT}])

    def _publish(self) -> Object:
        mounts = [{"name": "output", "mountPath": OUTPUT, "readOnly": True}]
        return self._transfer(PUBLISH, ["publish", OUTPUT, self.output], mounts)

    def _transfer(self, name: str, command: list[str], mounts: list[Object]) -> Object:
        resources = {"cpu": "1", "memory": "1Gi"}
        return {
            "name": name,
            "image": self.cluster.image,
            "command": ["python", "-m", "blocks.engines.kubernetes.transfer", *command],
            "workingDir": TEMPORARY,
            "env": _variables(
                {
                    "CALIPERT_STORE": self.store,
                    "CALIPERT_DATA": TEMPORARY,
                    "HOME": TEMPORARY,
                    "PREFECT_HOME": f"{TEMPORARY}/prefect",
                    "TMPDIR": TEMPORARY,
                }
            ),
            "envFrom": [{"secretRef": {"name": self.cluster.store_secret}}],
            "resources": {"requests": resources, "limits": resources},
            "securityContext": _walls(),
            "volumeMounts": [*mounts, {"name": "transfer-tmp", "mountPath": TEMPORARY}],
        }

    def _model(self) -> Object:
        environment = {
            "HOME": TEMPORARY,
            "TMPDIR": TEMPORARY,
            "PYTHONHASHSEED": "0",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **dict.fromkeys(THREAD_VARIABLES, str(self.inputs.spec.get("threads", 1))),
        }
        resources = {"cpu": self.pod.cpu, "memory": self.pod.memory}
        if self._gpus:
            resources[GPU_RESOURCE] = str(self._gpus)
        else:
            # Images of CUDA ask for all GPUs, and some nodes would give them to a pod that has requested none.
            environment["NVIDIA_VISIBLE_DEVICES"] = "void"
        return {
            "name": MODEL,
            "image": self.pod.image,
            # The image's entry point runs model.py.
            "args": [self.stage, f"{SPEC}/spec.json"],
            "workingDir": TEMPORARY,
            "env": _variables(environment),
            "resources": {"requests": resources, "limits": resources},
            "securityContext": _walls(),
            "volumeMounts": [
                {"name": "input", "mountPath": SPEC, "subPath": self.specification, "readOnly": True},
                # What the spec names and nothing beside it: no other file of the same artifact.
                *(
                    {"name": "input", "mountPath": f"{INPUT}/{path}", "subPath": path, "readOnly": True}
                    for path in self.inputs.paths
                ),
                {"name": "output", "mountPath": OUTPUT},
                {"name": "model-tmp", "mountPath": TEMPORARY},
            ],
        }


@dataclass(frozen=True)
class Ending:
    """How a pod ended. words: None if well; exit_code: the model's, None where it was stopped or never ran;
    container: whose log tells why."""

    words: str | None
    exit_code: int | None
    container: str


def ending(pod: Object, job: StageJob) -> Ending | None:
    """How a pod has ended, None if it has not.

    Asked of the pod as a whole: a container that the node kills, for memory, time or disk, looks as if it had failed
    by itself until the pod says why.
    """
    status = pod.get("status", {})
    if status.get("phase") not in ("Succeeded", "Failed"):
        return None
    states = _states(pod)
    ended = {name: states[name]["terminated"] for name in states if "terminated" in states[name]}
    order = (FETCH, MODEL, PUBLISH)
    reached = next((name for name in order if name not in ended or _code(ended[name])), PUBLISH)
    doing = {FETCH: " while its inputs were fetched", MODEL: "", PUBLISH: " while its output was uploaded"}[reached]
    if reached == MODEL and MODEL not in ended:
        doing = " before it began"
    if not ended:
        doing = ""
    if ended.get(MODEL, {}).get("reason") == "OOMKilled":
        # Also where only a child of the model was killed, and the model itself ended well.
        more = f"`models.{job.model}.memory` of {SETTINGS} gives it more"
        return Ending(
            f"was killed: it took more than its {job.pod.memory} of memory; {more}", _code(ended[MODEL]), MODEL
        )
    if status["phase"] == "Succeeded":
        return Ending(None, 0, MODEL)
    if status.get("reason") == "DeadlineExceeded":
        words = f"was stopped after {job.timeout_s:g} s, its limit{doing}{where_to_change(job.stage)}"
        return Ending(words, None, reached)
    if status.get("reason"):
        # Evicted, NodeLost, Terminated: the message says for what.
        return Ending(f"lost its pod{doing}: {status['reason']}: {status.get('message', '')}".strip(), None, reached)
    code = _code(ended[reached]) if reached in ended else None
    if code is None:
        return Ending(f"lost its pod{doing}", None, reached)
    if reached == FETCH:
        return Ending(f"could not get its inputs: exit code {code}", None, FETCH)
    if reached == PUBLISH:
        return Ending(f"ended well, but its output could not be uploaded: exit code {code}", None, PUBLISH)
    killed = " (SIGKILL)" if code == 137 else ""
    return Ending(f"ended with exit code {code}{killed}", code, MODEL)


def model_state(pod: Object) -> Object:
    """`waiting`, `running` or `terminated` of the model's container, with its details; {} before there is one."""
    return _states(pod).get(MODEL, {})


def has_begun(pod: Object) -> bool:
    """Whether a node has taken a pod and started the first of its containers."""
    return not _states(pod).get(FETCH, {"waiting": {}}).keys() <= {"waiting"}


def trouble(pod: Object) -> tuple[str, str] | None:
    """The container that does not start, and why, where waiting alone may not help: an image that cannot be had, a
    Secret that is not there."""
    for name, state in _states(pod).items():
        waiting = state.get("waiting", {})
        if waiting.get("reason") in TROUBLE:
            return name, f"{name}: {waiting['reason']}: {waiting.get('message', '')}".strip(": ")
    return None


def unscheduled(pod: Object) -> str | None:
    """Why no node takes a pod, None if one does."""
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message") or condition.get("reason") or "no reason given")
    return None


def failed(job: Object) -> str | None:
    """Why a Job without a pod has failed, None if it has not."""
    for condition in job.get("status", {}).get("conditions", []):
        # FailureTarget comes first, while pods are still being removed.
        if condition["type"] in ("Failed", "FailureTarget") and condition["status"] == "True":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    return None


def _states(pod: Object) -> dict[str, Object]:
    status = pod.get("status", {})
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return {container["name"]: container.get("state", {}) for container in containers}


def _code(terminated: Object) -> int:
    return int(terminated["exitCode"])


def _variables(values: Mapping[str, str]) -> list[Object]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _walls() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
    }


def _label(value: str) -> str:
    """A value as labels take it: at most 63 letters, digits, dashes, dots and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", value)[:63].strip("-._")
