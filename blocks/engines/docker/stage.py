"""A model's stage as a container: its isolation, its mounts, and which limit it met."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docker.types import DeviceRequest, LogConfig, Mount, Ulimit

from blocks.engines.base import UNPRIVILEGED_ID, StageRun, model_variables
from blocks.engines.docker.limits import Limits, how_to_change
from blocks.local.gpus import VISIBLE
from core.errors import UserError

# What the engine says of its machine: processors `NCPU`, and bytes of memory `MemTotal`.
Machine = Mapping[str, Any]

# Places within the container.
INPUT, OUTPUT, CHECKPOINT, SPEC, TEMPORARY = "/input", "/output", "/checkpoint", "/spec.json", "/tmp"  # noqa: S108
# The fields of a spec that name what a model reads; everything else of the host stays out of its sight.
INPUTS = ("cells", "embedding", "pretrained", "model", "control")
# Those that name where it writes.
PLACES = {"output": OUTPUT, "checkpoint": CHECKPOINT}
# What a model prints when it meets one of its limits, and which.
MET = {
    "No space left on device": "output",
    "can't start new thread": "pids",
    "Resource temporarily unavailable": "pids",
    "Too many open files": "open_files",
    "unable to write to file </torch_": "shared_memory",
}


def find_user() -> tuple[int, int]:
    """Return the ids of a container's user and group: the caller's, who can read their files, unless that is root."""
    return (os.geteuid(), os.getegid()) if os.geteuid() != 0 else (UNPRIVILEGED_ID, UNPRIVILEGED_ID)


def write_spec(spec: Mapping[str, Any], path: Path) -> list[Mount]:
    """Write the spec with the paths that its container has, and return what of the host it sees there, read-only.

    Raises UserError for an input that the container's user may not read.
    """
    inside = dict(spec) | {name: place for name, place in PLACES.items() if spec.get(name) is not None}
    mounts = [_mount_read_only(path, SPEC)]
    for field in INPUTS:
        if spec.get(field) is None:
            continue
        source = Path(spec[field]).resolve(strict=True)
        if not _is_readable(source):
            user = find_user()[0]
            remedy = f"let all read it (chmod -R a+rX), or run calipert as its owner; the model runs as user {user}"
            raise UserError(source, field, "a file that the model's user may not read", remedy)
        inside[field] = f"{INPUT}/{field}{source.suffix if source.is_file() else ''}"
        mounts.append(_mount_read_only(source, inside[field]))
    path.write_text(json.dumps(inside), encoding="utf-8")
    path.chmod(0o444)
    return mounts


def volume_options(limits: Limits) -> dict[str, str]:
    """Return the options of each volume that a model writes to: memory with a limit of its size and number of files."""
    # Two more: the folder itself, and one too many, so that an error can say that it is too many.
    return {
        "type": "tmpfs",
        "device": "tmpfs",
        "o": f"size={int(limits.output)},nr_inodes={limits.output_files + 2},mode=1777,nosuid,nodev,noexec",
    }


def isolation_options() -> dict[str, Any]:
    """Return the options of every container here: it may do nothing but compute."""
    return {
        "user": "{}:{}".format(*find_user()),
        "read_only": True,
        "network_mode": "none",
        "ipc_mode": "private",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "init": True,
        # Nothing that it prints is kept; it goes to the process that is attached.
        "log_config": LogConfig(type="none"),
        # A model's own health check would be one more process within the limits.
        "healthcheck": {"test": ["NONE"]},
        # The user's own settings of the client may hold a proxy with its password.
        "use_config_proxy": False,
    }


def keeper_options(image: str, volumes: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of the container that keeps the volumes while the model does not run, and can only read them.

    volumes: where each lies -> its name.
    """
    return isolation_options() | {
        "image": image,
        "entrypoint": ["sleep"],
        "command": ["infinity"],
        "mounts": [Mount(at, name, type="volume", read_only=True, no_copy=True) for at, name in volumes.items()],
        "mem_limit": 2**26,
        "memswap_limit": 2**26,
        "pids_limit": 16,
        "environment": {"NVIDIA_VISIBLE_DEVICES": "void"},
    }


def model_options(
    image: str, run: StageRun, mounts: list[Mount], volumes: Mapping[str, str], limits: Limits, machine: Machine
) -> dict[str, Any]:
    """Return the options of the model's own container. volumes: as in `keeper_options`."""
    memory, environment = memory_limit(limits, machine), model_variables(TEMPORARY, run.threads)
    if run.gpu is None:
        # Images of CUDA ask for all GPUs by this variable, and get them where NVIDIA's runtime is the default one.
        environment |= {"NVIDIA_VISIBLE_DEVICES": "void", VISIBLE: ""}
    return isolation_options() | {
        "image": image,
        "command": [run.stage, SPEC],
        "hostname": "calipert",
        "working_dir": TEMPORARY,
        "environment": environment,
        "mounts": [*mounts, *(Mount(at, name, type="volume", no_copy=True) for at, name in volumes.items())],
        # Executable: compilers of GPU kernels load what they wrote there.
        "tmpfs": {TEMPORARY: f"size={int(limits.temporary)},mode=1777,nosuid,nodev,exec"},
        "shm_size": int(limits.shared_memory),
        "mem_limit": memory,
        "memswap_limit": memory,
        "nano_cpus": int(min(limits.cpus or run.threads, machine["NCPU"]) * 1e9),
        "pids_limit": limits.pids,
        "ulimits": [
            Ulimit(name="nofile", soft=limits.open_files, hard=limits.open_files),
            Ulimit(name="core", soft=0, hard=0),
        ],
        "device_requests": [] if run.gpu is None else [DeviceRequest(device_ids=[run.gpu.id], capabilities=[["gpu"]])],
    }


def memory_limit(limits: Limits, machine: Machine) -> int:
    """Return the bytes of memory that a container may use."""
    return int(limits.memory or machine["MemTotal"] // 2)


def describe_limit_met(last_lines: list[str]) -> str:
    """Say which limit a model met, by what it printed last, and where to change it; nothing if it met none."""
    text = "\n".join(last_lines)
    field = next((field for message, field in MET.items() if message in text), None)
    if field == "output":
        return f"; /output, /checkpoint and /tmp are limited{how_to_change('output')}, or `temporary`"
    return "" if field is None else f"; its {field.replace('_', ' ')} are limited{how_to_change(field)}"


def _is_readable(path: Path) -> bool:
    """Whether the modes of a file or folder let the container's user in."""
    found, (user, group) = path.stat(), find_user()
    mine = stat.S_IRUSR if found.st_uid == user else stat.S_IRGRP if found.st_gid == group else stat.S_IROTH
    return bool(found.st_mode & mine)


def _mount_read_only(source: Path, target: str) -> Mount:
    return Mount(target, str(source), type="bind", read_only=True, propagation="rprivate")
