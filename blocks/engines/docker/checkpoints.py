"""What lets a stage in a container go on after it was killed: /checkpoint, copied out now and then, and back.

The copy is one file, replaced by one rename: a death at any moment leaves the old or the new one. The
container is paused meanwhile, so that the copy holds what a death at that moment would have left, which models must
expect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from docker.errors import APIError
from docker.models.containers import Container

from blocks.engines.docker.limits import Limits
from blocks.engines.docker.output import open_folder, repack
from blocks.engines.docker.stage import CHECKPOINT, find_user
from blocks.local.files import replace_file
from core.errors import UserError

LOG = logging.getLogger("calipert.engines")

# Between two copies. Where they take long it is longer: the model is paused no more than this share of the time.
EVERY_S = 60.0
SHARE = 0.05
FILE = "checkpoint.tar"
CONFLICT = 409


@dataclass
class Checkpoint:
    """The folder /checkpoint of one container, and its copy in a file of the host that outlives this process.

    container: created and not yet started. check: called during a copy; what it raises ends it. due: when the next copy
    is, on the monotonic clock.
    """

    container: Container
    file: Path
    limits: Limits
    check: Callable[[], None]
    due: float = field(default_factory=lambda: monotonic() + EVERY_S)

    def restore(self) -> None:
        """Give the container what was kept of another, if anything. Raises UserError where the engine refuses it."""
        if not self.file.exists():
            return
        try:
            with self.file.open("rb") as file:
                self.container.put_archive(CHECKPOINT, file)
        except APIError as error:
            remedy = "remove the file: the stage then starts from the beginning"
            raise UserError(self.file, "checkpoint", str(error.explanation or error), remedy) from error

    def keep(self) -> None:
        """Copy the folder if it is time to. Raises RefusedOutput if it holds what an output may not hold."""
        began = monotonic()
        if began < self.due:
            return
        try:
            self.container.pause()
        except APIError as error:
            if error.status_code != CONFLICT:  # a conflict: it has just ended
                LOG.warning("no checkpoint of %s: it cannot be paused: %s", self.container.name, error)
        else:
            try:
                folder = open_folder(self.container, CHECKPOINT, self.limits, self.check)
                with replace_file(self.file) as unfinished, folder as found:
                    repack(found, unfinished, *find_user())
            finally:
                self._unpause()
        self.due = monotonic() + max(EVERY_S, (monotonic() - began) / SHARE)

    def _unpause(self) -> None:
        try:
            self.container.unpause()
        except APIError:
            # It may have ended in the moment in which it was paused.
            self.container.reload()
            if self.container.status == "paused":
                raise
