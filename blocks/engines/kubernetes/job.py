"""A model's stage as a Kubernetes Job: the cluster's settings, and the manifest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from blocks.engines.base import UNPRIVILEGED_ID, StageRun, model_variables
from blocks.engines.kubernetes.api import Object
from blocks.engines.yaml_settings import read_yaml_settings
from core.errors import UserError

SETTINGS = "CALIPERT_KUBERNETES"
FETCH, MODEL, PUBLISH = "fetch", "model", "publish"
INPUT, OUTPUT, SPEC, TEMPORARY = "/input", "/output", "/spec", "/tmp"  # noqa: S108 - a volume of the pod
GPU_RESOURCE = "nvidia.com/gpu"
# How long a finished Job stays for a look at it, if the process that started it is not there to remove it.
KEPT_S = 3600
# Between the signal to end and the kill: what the model did not write by then is of no use.
GRACE_S = 5

ISOLATION = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "privileged": False,
    "readOnlyRootFilesystem": True,
}
_DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
# As Kubernetes writes quantities: 500m, 2, 8Gi.
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGT]|[KMGT]i)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]


class ModelPod(BaseModel):
    """What a model's container gets. image: with its digest. disk: the most that it may write to /output, and to /tmp.

    gpus: for training and prediction; whole ones, which the cluster hands out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

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
    """Return the settings in a YAML file. Raises UserError for one that cannot be read or does not fit."""
    return read_yaml_settings(Cluster, path, SETTINGS, "docs/kubernetes.md", secret=("api",))


def require_digest(image: str, where: object, field: str) -> None:
    """Raise UserError for an image's reference without a digest: a tag can be moved to other software."""
    if not _DIGEST.fullmatch(image):
        found = f"{image!r}, which names no digest: the software behind a model's results would be unknown"
        how = "`docker push` and `docker inspect --format '{{index .RepoDigests 0}}' NAME`"
        raise UserError(where, field, found, f"write it as name@sha256:..., as {how} print it")


@dataclass(frozen=True)
class Inputs:
    """A spec as the model's container sees it.

    spec: with the paths there; paths: those below /input, files or folders, as `kind/key/...`; artifacts: `kind/key`.
    """

    spec: dict[str, Any]
    paths: tuple[str, ...]
    artifacts: tuple[str, ...]


def translate_spec(spec: Mapping[str, Any], store: Path) -> Inputs:
    """Return a spec with the folder `output` and the paths of artifacts in a local store as they are within the Job.

    Raises ValueError for a path that leads elsewhere: nothing but the store's artifacts is in the bucket.
    """
    translated = dict(spec)
    paths: set[str] = set()
    for field, value in spec.items():
        if field == "output":
            translated[field] = OUTPUT
        elif isinstance(value, str) and value.startswith("/"):
            path = Path(value)
            if not path.is_relative_to(store) or len(path.relative_to(store).parts) < 2:
                raise ValueError(f"{field}: {value} is no artifact of the store {store}, nor lies in one")
            name = path.relative_to(store).as_posix()
            paths.add(name)
            translated[field] = f"{INPUT}/{name}"
    artifacts = sorted({"/".join(name.split("/")[:2]) for name in paths})
    return Inputs(translated, tuple(sorted(paths)), tuple(artifacts))


@dataclass(frozen=True)
class StageJob:
    """One stage of one model, to be run as a Job.

    The name of one that trains or predicts follows from the stage, the image and the spec within the Job, so that the
    Job of a killed flow is found again. attempt: unique to this one. store: address of the bucket. flow_run: its id,
    None outside of flows. owner: name and uid of the pod that starts it, None outside of the cluster; the cluster
    deletes the Job once that pod is gone, however it went.
    """

    cluster: Cluster
    run: StageRun
    inputs: Inputs
    store: str
    flow_run: str | None
    attempt: str
    owner: tuple[str, str] | None

    @property
    def pod(self) -> ModelPod:
        """What the model's container gets."""
        return self.cluster.models[self.run.model]

    @property
    def name(self) -> str:
        """The Job's name in the cluster."""
        run = self.run
        word = re.sub(r"[^a-z0-9]+", "-", run.model.lower())[:20].strip("-")
        recipe = json.dumps([run.model, run.stage, self.pod.image, self.store, self.inputs.spec], sort_keys=True)
        # Several may describe the same model at the same time, and each is over in a moment.
        last = self.attempt if run.stage == "describe" else sha256(recipe.encode()).hexdigest()
        return f"calipert-{word}-{run.stage}-{last[:16]}".replace("--", "-")

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
        """The label by which its pod is found."""
        return f"calipert/attempt={self.attempt}"

    def manifest(self) -> Object:
        """Return the Job as the API takes it."""
        labels = {
            "app.kubernetes.io/name": "calipert",
            "app.kubernetes.io/component": "model",
            "calipert/model": _label(self.run.model),
            "calipert/stage": self.run.stage,
            "calipert/attempt": self.attempt,
        }
        if self.flow_run is not None:
            labels["calipert/flow-run"] = _label(self.flow_run)
        spec: Object = {
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": KEPT_S,
            "template": {"metadata": {"labels": labels}, "spec": self._pod_spec()},
        }
        if self.run.timeout_s is not None:
            # The limit itself is the pod's, which counts from the moment a node takes it. This one ends a Job that no
            # node takes, and for which no process waits any more.
            spec["activeDeadlineSeconds"] = math.ceil(self.run.timeout_s) + math.ceil(self.cluster.pending_limit_s)
        metadata: Object = {"name": self.name, "namespace": self.cluster.namespace, "labels": labels}
        if self.owner is not None:
            name, uid = self.owner
            metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}]
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}

    def _pod_spec(self) -> Object:
        # The spec goes along as a folder of the bucket, into /input/.jobs/<name>/spec, of which the model sees /spec.
        fetch = ["fetch", INPUT, self.specification, *self.inputs.artifacts]
        publish = ["publish", OUTPUT, self.output]
        volumes = [
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
                "runAsUser": UNPRIVILEGED_ID,
                "runAsGroup": UNPRIVILEGED_ID,
                "fsGroup": UNPRIVILEGED_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumes": volumes,
            "initContainers": [self._transfer(FETCH, fetch, {"name": "input", "mountPath": INPUT}), self._model()],
            "containers": [self._transfer(PUBLISH, publish, {"name": "output", "mountPath": OUTPUT, "readOnly": True})],
        }
        if self.run.timeout_s is not None:
            pod["activeDeadlineSeconds"] = math.ceil(self.run.timeout_s)
        if self.cluster.pull_secrets:
            pod["imagePullSecrets"] = [{"name": name} for name in self.cluster.pull_secrets]
        if self._gpus:
            pod["tolerations"] = [{"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}]
        return pod

    @property
    def device(self) -> str:
        """What Usage says: the cluster chooses which GPUs these are."""
        return f"{self._gpus} GPU of the cluster" if self._gpus else "cpu"

    @property
    def _gpus(self) -> int:
        return 0 if self.run.stage == "describe" else self.pod.gpus

    def _transfer(self, name: str, command: list[str], mount: Object) -> Object:
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
            "securityContext": ISOLATION,
            "volumeMounts": [mount, {"name": "transfer-tmp", "mountPath": TEMPORARY}],
        }

    def _model(self) -> Object:
        environment = model_variables(TEMPORARY, self.run.threads)
        resources = {"cpu": self.pod.cpu, "memory": self.pod.memory}
        if self._gpus:
            resources[GPU_RESOURCE] = str(self._gpus)
        else:
            # Images of CUDA ask for all GPUs, and some nodes would give them to a pod that requested none.
            environment["NVIDIA_VISIBLE_DEVICES"] = "void"
        return {
            "name": MODEL,
            "image": self.pod.image,
            # The image's entry point runs model.py.
            "args": [self.run.stage, f"{SPEC}/spec.json"],
            "workingDir": TEMPORARY,
            "env": _variables(environment),
            "resources": {"requests": resources, "limits": resources},
            "securityContext": ISOLATION,
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


def _variables(values: Mapping[str, str]) -> list[Object]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _label(value: str) -> str:
    """Return a value as labels take it: at most 63 letters, digits, dashes, dots and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", value)[:63].strip("-._")
