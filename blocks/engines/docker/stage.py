"""A model's stage as a container: its walls, its mounts, and what an end that was not good means."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker.types import DeviceRequest, LogConfig, Mount, Ulimit

from blocks.engines.docker.limits import Limits, change
from blocks.engines.process import Stage
from blocks.local.gpus import VISIBLE, Gpu
from core.errors import UserError
from model_containers.contract import THREAD_VARIABLES

# Places within the container.
INPUT, OUTPUT, CHECKPOINT, SPEC, TEMPORARY = "/input", "/output", "/checkpoint", "/spec.json", "/tmp"  # noqa: S108
NOBODY = 65534
# The fields of a spec that name what a model reads; everything else of the host stays out of its sight.
INPUTS = ("cells", "embedding", "pretrained", "model", "control")
# Those that name where it writes.
PLACES = {"output": OUTPUT, "checkpoint": CHECKPOINT}
# What a model says when it meets one of its limits, and which.
MET = {
    "No space left on device": "output",
    "can't start new thread": "pids",
    "Resource temporarily unavailable": "pids",
    "Too many open files": "open_files",
    "unable to write to file </torch_": "shared_memory",
}


@dataclass(frozen=True)
class Machine:
    """What the engine's machine has: processors, and bytes of memory."""

    cpus: int
    memory: int


@dataclass(frozen=True)
class User:
    """Who a model runs as: the caller, who can read his own files; nobody where that is root."""

    uid: int
    gid: int

    @classmethod
    def of_container(cls) -> User:
        return cls(os.geteuid(), os.getegid()) if os.geteuid() != 0 else cls(NOBODY, NOBODY)

    def can_read(self, path: Path) -> bool:
        """Whether the modes of a file or folder let this user in."""
        found = path.stat()
        owner, group, others = stat.S_IRUSR, stat.S_IRGRP, stat.S_IROTH
        mine = owner if found.st_uid == self.uid else group if found.st_gid == self.gid else others
        return bool(found.st_mode & mine)


def write_spec(spec: Mapping[str, Any], path: Path, user: User) -> list[Mount]:
    """Write the spec with the paths that its container has, and say what of the host it sees there, read-only.

    Raises UserError for an input that the container's user may not read.
    """
    inside = dict(spec) | {name: place for name, place in PLACES.items() if spec.get(name) is not None}
    mounts = [_seen(path, SPEC)]
    for field in INPUTS:
        if spec.get(field) is None:
            continue
        source = Path(spec[field]).resolve(strict=True)
        if not user.can_read(source):
            remedy = f"let all read it (chmod -R a+rX), or run calipert as its owner; the model runs as user {user.uid}"
            raise UserError(source, field, "a file that the model's user may not read", remedy)
        inside[field] = f"{INPUT}/{field}{source.suffix if source.is_file() else ''}"
        mounts.append(_seen(source, inside[field]))
    path.write_text(json.dumps(inside), encoding="utf-8")
    path.chmod(0o444)
    return mounts


def volume_options(limits: Limits) -> dict[str, str]:
    """Of each volume that a model writes to: memory, of which it gets no more than the size and number of files."""
    # Two more: the folder itself, and one too many, so that it is said to be too many.
    return {
        "type": "tmpfs",
        "device": "tmpfs",
        "o": f"size={int(limits.output)},nr_inodes={limits.output_files + 2},mode=1777,nosuid,nodev,noexec",
    }


def walls(user: User) -> dict[str, Any]:
    """What holds for every container here: it may do nothing but compute."""
    return {
        "user": f"{user.uid}:{user.gid}",
        "read_only": True,
        "network_mode": "none",
        "ipc_mode": "private",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "init": True,
        # Nothing that it prints is kept; who is attached gets it.
        "log_config": LogConfig(type="none"),
        # A model's own check of its health would be another process that nobody reckons with.
        "healthcheck": {"test": ["NONE"]},
        # The user's own settings of the client may hold a proxy with its password.
        "use_config_proxy": False,
    }


def keeper_options(image: str, volumes: Mapping[str, str], user: User) -> dict[str, Any]:
    """Of the container that keeps the volumes while the model does not run, and can only read them.

    volumes: where each lies -> its name.
    """
    return walls(user) | {
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
    image: str,
    stage: Stage,
    mounts: list[Mount],
    volumes: Mapping[str, str],
    user: User,
    limits: Limits,
    machine: Machine,
    threads: int,
    gpu: Gpu | None,
) -> dict[str, Any]:
    """Of the model's own container. volumes: as in `keeper_options`. threads: as the spec has it. gpu: the leased one,
    or None."""
    memory = memory_limit(limits, machine)
    return walls(user) | {
        "image": image,
        "command": [stage, SPEC],
        "hostname": "calipert",
        "working_dir": TEMPORARY,
        "environment": _environment(threads, gpu),
        "mounts": [*mounts, *(Mount(at, name, type="volume", no_copy=True) for at, name in volumes.items())],
        # Executable: compilers of GPU kernels load what they wrote there.
        "tmpfs": {TEMPORARY: f"size={int(limits.temporary)},mode=1777,nosuid,nodev,exec"},
        "shm_size": int(limits.shared_memory),
        "mem_limit": memory,
        "memswap_limit": memory,
        "nano_cpus": int(min(limits.cpus or threads, machine.cpus) * 1e9),
        "pids_limit": limits.pids,
        "ulimits": [
            Ulimit(name="nofile", soft=limits.open_files, hard=limits.open_files),
            Ulimit(name="core", soft=0, hard=0),
        ],
        "device_requests": [] if gpu is None else [DeviceRequest(device_ids=[gpu.id], capabilities=[["gpu"]])],
    }


def memory_limit(limits: Limits, machine: Machine) -> int:
    """Bytes."""
    return int(limits.memory or machine.memory // 2)


def met_limit(last_lines: list[str]) -> str:
    """Which limit a model met by what it said last, and where to change it; nothing if it met none."""
    text = "\n".join(last_lines)
    field = next((field for said, field in MET.items() if said in text), None)
    if field == "output":
        return f"; /output, /checkpoint and /tmp are limited{change('output')}, or `temporary`"
    return "" if field is None else f"; its {field.replace('_', ' ')} are limited{change(field)}"


def _environment(threads: int, gpu: Gpu | None) -> dict[str, str]:
    fixed = {
        "HOME": TEMPORARY,
        "TMPDIR": TEMPORARY,
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
    }
    # Images of CUDA ask for all GPUs by this variable, and get them where NVIDIA's runtime is the default one.
    return fixed if gpu is not None else fixed | {"NVIDIA_VISIBLE_DEVICES": "void", VISIBLE: ""}


def _seen(source: Path, target: str) -> Mount:
    return Mount(target, str(source), type="bind", read_only=True, propagation="rprivate")
