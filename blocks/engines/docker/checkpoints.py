"""What lets a stage in a container go on after it was killed: /checkpoint, copied out now and then, and back.

The copy is one file, replaced by one rename: a death at any moment leaves the old or the new one. The
container is paused meanwhile, so that the copy holds what a death at that moment would have left, which models must
expect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic

from docker.errors import APIError
from docker.models.containers import Container

from blocks.engines.docker.limits import Limits
from blocks.engines.docker.output import read_members, repack
from blocks.engines.docker.stage import CHECKPOINT, User
from blocks.local.files import replace_file
from core.errors import UserError

LOG = logging.getLogger("calipert.engines")

# Between two copies. Where they take long it is longer: the model is paused no more than this share of the time.
EVERY_S = 60.0
SHARE = 0.05
FILE = "checkpoint.tar"
CHUNK = 2**20
CONFLICT = 409


class Checkpoint:
    """The folder /checkpoint of one container, and its copy in a folder of the host that outlives this process.

    container: created and not yet started. check: called during a copy; what it raises ends it.
    """

    def __init__(
        self, container: Container, folder: Path, limits: Limits, user: User, check: Callable[[], None]
    ) -> None:
        self._container = container
        self._file = folder / FILE
        self._limits = limits
        self._user = user
        self._check = check
        self._next = monotonic() + EVERY_S

    def restore(self) -> None:
        """Give the container what was kept of another, if anything. Raises UserError where the engine refuses it."""
        if not self._file.exists():
            return
        try:
            with self._file.open("rb") as file:
                self._container.put_archive(CHECKPOINT, file)
        except APIError as error:
            remedy = "remove the file: the stage then starts from the beginning"
            raise UserError(self._file, "checkpoint", str(error.explanation or error), remedy) from error

    def keep(self) -> None:
        """Copy the folder if it is time to. Raises RefusedOutput if it holds what an output may not hold."""
        began = monotonic()
        if began < self._next:
            return
        try:
            self._container.pause()
        except APIError as error:
            if error.status_code != CONFLICT:  # a conflict: it has just ended
                LOG.warning("no checkpoint of %s: it cannot be paused: %s", self._container.name, error)
        else:
            try:
                self._copy()
            finally:
                self._unpause()
        took = monotonic() - began
        self._next = monotonic() + max(EVERY_S, took / SHARE)

    def _unpause(self) -> None:
        try:
            self._container.unpause()
        except APIError:
            # It may have ended in the moment in which it was paused.
            self._container.reload()
            if self._container.status == "paused":
                raise

    def _copy(self) -> None:
        with (
            replace_file(self._file) as unfinished,
            closing(self._container.get_archive(CHECKPOINT, chunk_size=CHUNK)[0]) as chunks,
        ):
            limits = int(self._limits.output), self._limits.output_files
            found = read_members(self._check_between(chunks), CHECKPOINT, *limits)
            repack(found, unfinished, self._user.uid, self._user.gid)

    def _check_between(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._check()
            yield chunk
