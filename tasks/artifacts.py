"""One way to make anything: ask the store for the artifact of a recipe, and build it only if it is not there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blocks.store.artifacts import ArtifactStore, artifact_key
from blocks.store.checksums import file_checksum
from core.errors import UserError

LOG = logging.getLogger("calipert")
# Python's own default would keep all progress out of the logs of a flow run.
LOG.setLevel(logging.INFO)


def made(
    kind: str,
    build: Callable[[Path], None],
    *,
    inputs: Mapping[str, Path | str],
    parameters: Mapping[str, Any],
    code: str,
    label: str | None = None,
) -> Path:
    """The folder of the artifact that this recipe gives; `build` fills an empty folder where there is none yet.

    inputs: artifacts (their folders) or checksums. parameters: JSON values. code: identity of the code that the
    result depends on: `code_hash` of the module in core that writes it, or an engine's. label: what the log calls it,
    by default its kind.
    """
    keys = {name: key_of(value) if isinstance(value, Path) else value for name, value in inputs.items()}
    key = artifact_key(kind, keys, parameters, code)

    def build_and_say(folder: Path) -> None:
        LOG.info("making %s", label or kind.replace("_", " "))
        build(folder)

    return ArtifactStore().obtain(kind, key, build_and_say, inputs=keys, parameters=parameters, code=code)


def key_of(artifact: Path) -> str:
    """The key of an artifact: the name of its folder."""
    return artifact.name


def checksum(path: Path) -> str:
    """SHA-256 (hex) of a file that goes in. Raises UserError for one that cannot be read."""
    try:
        return file_checksum(path)
    except OSError as error:
        remedy = "check the path, and let the user that calipert runs as read it"
        raise UserError(path, "file", error.strerror or str(error), remedy) from error
