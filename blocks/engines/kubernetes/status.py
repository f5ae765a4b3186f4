"""What the state of a Job and its pod means."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.engines.kubernetes.api import Object
from blocks.engines.kubernetes.job import FETCH, MODEL, PUBLISH, SETTINGS, StageJob

# Of a container's start: these can pass, as a registry can come back, or stay for ever.
START_PROBLEMS = (
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
# What a pod does, one after the other, and how it fails to do what is not the model's.
DOING = {FETCH: " while its inputs were fetched", MODEL: "", PUBLISH: " while its output was uploaded"}
FAILED = {FETCH: "could not get its inputs", PUBLISH: "ended well, but its output could not be uploaded"}


@dataclass(frozen=True)
class Ending:
    """How a pod ended.

    words: None if well; exit_code: the model's, None where it was stopped or never ran; container: whose log tells why.
    """

    words: str | None
    exit_code: int | None
    container: str


def read_ending(pod: Object, job: StageJob) -> Ending | None:
    """Return how a pod ended, None if it runs.

    Read from the pod as a whole: a container that the node kills, for memory, time or disk, looks as if it had failed
    by itself until the pod says why.
    """
    status = pod.get("status", {})
    if status.get("phase") not in ("Succeeded", "Failed"):
        return None
    ended = {name: state["terminated"] for name, state in _read_states(pod).items() if "terminated" in state}
    codes = {name: int(state["exitCode"]) for name, state in ended.items()}
    reached = next((name for name in DOING if codes.get(name) != 0), PUBLISH)
    doing = " before it began" if reached == MODEL and MODEL not in codes else DOING[reached]
    if not ended:
        doing = ""
    if ended.get(MODEL, {}).get("reason") == "OOMKilled":
        # Also where only a child of the model was killed, and the model itself ended well.
        more = f"`models.{job.run.model}.memory` of {SETTINGS} gives it more"
        words = f"was killed: it took more than its {job.pod.memory} of memory; {more}"
        return Ending(words, codes[MODEL], MODEL)
    if status["phase"] == "Succeeded":
        return Ending(None, 0, MODEL)
    if status.get("reason") == "DeadlineExceeded":
        return Ending(job.run.describe_time_limit(doing), None, reached)
    if status.get("reason") or reached not in codes:
        # Evicted, NodeLost, Terminated: the message says why.
        why = [status[name] for name in ("reason", "message") if status.get(name)]
        return Ending(": ".join([f"lost its pod{doing}", *why]), None, reached)
    code = codes[reached]
    if reached != MODEL:
        return Ending(f"{FAILED[reached]}: exit code {code}", None, reached)
    killed = " (SIGKILL)" if code == 137 else ""
    return Ending(f"ended with exit code {code}{killed}", code, MODEL)


def read_model_state(pod: Object) -> Object:
    """Return the state of the model's container (`waiting`, `running`, `terminated`); {} before there is one."""
    return _read_states(pod).get(MODEL, {})


def has_begun(pod: Object) -> bool:
    """Whether a node has taken a pod and started the first of its containers."""
    return not _read_states(pod).get(FETCH, {"waiting": {}}).keys() <= {"waiting"}


def find_start_problem(pod: Object) -> tuple[str, str] | None:
    """Return the container that does not start, and why, where waiting alone may not help.

    Such as an image that cannot be pulled, or a Secret that is not there.
    """
    for name, state in _read_states(pod).items():
        waiting = state.get("waiting", {})
        if waiting.get("reason") in START_PROBLEMS:
            return name, f"{name}: {waiting['reason']}: {waiting.get('message', '')}".strip(": ")
    return None


def find_scheduling_problem(pod: Object) -> str | None:
    """Return why no node takes a pod, None if one does."""
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message") or condition.get("reason") or "no reason given")
    return None


def find_job_failure(job: Object) -> str | None:
    """Return why a Job without a pod failed, None if it did not."""
    for condition in job.get("status", {}).get("conditions", []):
        # FailureTarget comes first, while pods are still being removed.
        if condition["type"] in ("Failed", "FailureTarget") and condition["status"] == "True":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    return None


def _read_states(pod: Object) -> dict[str, Object]:
    status = pod.get("status", {})
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return {container["name"]: container.get("state", {}) for container in containers}
