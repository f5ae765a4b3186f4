"""Removes a stage's containers and volume when its starter says so or is gone, however it died.

`python guard.py STARTER LABEL`: the starter's process id, and the label (`key=value`) of all that is to go.
stdin is a pipe whose write end only the starter holds. Each REMOVE in it removes at once, and so does END; its end
without END means that the starter died. Where a fork of the starter's still holds the pipe, this process gets another
parent. It ends when all is gone: the lock of a GPU, which it was given to hold, is free no sooner.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress

import docker
from docker.errors import APIError, DockerException, NotFound
from requests.exceptions import RequestException

REMOVE, END = b"r", b"e"
CHECK_S = 1.0
# What a dead starter had asked the engine for may still be carried out.
LATE_S = 5.0
# How long an engine that does not answer, restarted perhaps, is asked again.
PATIENCE_S = 600.0
REMOVAL_LIMIT_S = 60.0
POLL_S = 0.1
CONFLICT = 409


def main(starter: int, label: str) -> None:
    """Remove what has a label when its starter says so or is gone."""
    last = b""
    while (word := _read_word(starter)) is not None:
        last = word
        _remove_patiently(label)
    end = time.monotonic() + (0 if last == END else LATE_S)
    while time.monotonic() < end:
        _remove_patiently(label)
        time.sleep(CHECK_S)


def remove(client: docker.DockerClient, label: str) -> None:
    """Remove the containers with a label, running ones too, and the volumes, and wait until they are gone.

    Raises TimeoutError if they are still there after a minute, and the engine's errors.
    """
    api, which = client.api, {"label": label}
    end = time.monotonic() + REMOVAL_LIMIT_S
    while True:
        containers = api.containers(all=True, quiet=True, filters=which)
        volumes = api.volumes(filters=which)["Volumes"] or []
        if not containers and not volumes:
            return
        if time.monotonic() >= end:
            raise TimeoutError(f"what is labelled {label} is still there {REMOVAL_LIMIT_S:g} s after it was removed")
        for container in containers:
            _remove_one(api.remove_container, container["Id"], force=True, v=True)
        for volume in volumes:
            _remove_one(api.remove_volume, volume["Name"], force=True)
        time.sleep(POLL_S)


def _remove_one(remove_one: Callable[..., None], name: str, **options: bool) -> None:
    """Remove a container or volume unless it is gone.

    A conflict means that another process removes it too, or that what uses it is not quite gone: ask again.
    """
    try:
        with suppress(NotFound):
            remove_one(name, **options)
    except APIError as error:
        if error.status_code != CONFLICT:
            raise


def _read_word(starter: int) -> bytes | None:
    """Return what the starter says next; None once it will say nothing more."""
    while not select.select([sys.stdin], [], [], CHECK_S)[0]:
        if os.getppid() != starter:
            return None
    return os.read(sys.stdin.fileno(), 1) or None


def _remove_patiently(label: str) -> None:
    """Remove what has a label, and try again while the engine does not answer, for PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            with closing(docker.from_env(version="auto")) as client:
                remove(client, label)
            return
        except (DockerException, RequestException, OSError):
            if time.monotonic() >= end:
                raise
        time.sleep(CHECK_S)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
