"""One way to make anything: a recipe says what an artifact follows from; the store has it, or it is built now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blocks.store.artifacts import ArtifactStore, artifact_key
from blocks.store.checksums import file_checksum
from core.errors import UserError

LOG = logging.getLogger("calipert")
# Python's own default would keep all progress out of the logs of a flow run.
LOG.setLevel(logging.INFO)


class Recipe(NamedTuple):
    """All that the content of an artifact follows from, and so its key in the store.

    inputs: name -> an artifact (its folder), a key or a checksum. parameters: JSON values. code: identity of the code
    that the content depends on: `code_hash` of the module in core that writes it, or an engine's. label: what the log
    calls the artifact; its kind where the label is empty.
    """

    kind: str
    inputs: Mapping[str, Path | str]
    parameters: Mapping[str, Any]
    code: str
    label: str = ""

    @property
    def input_keys(self) -> dict[str, str]:
        """The key or checksum of every input."""
        return {name: key_of(value) if isinstance(value, Path) else value for name, value in self.inputs.items()}

    @property
    def key(self) -> str:
        """The artifact's name in the store."""
        return artifact_key(self.kind, self.input_keys, self.parameters, self.code)


def build_or_get(recipe: Recipe, build: Callable[[Path], None]) -> Path:
    """Return the folder of a recipe's artifact; `build` fills an empty folder if the store does not have it yet."""

    def build_and_log(folder: Path) -> None:
        LOG.info("making %s", recipe.label or recipe.kind.replace("_", " "))
        build(folder)

    return ArtifactStore().obtain(
        recipe.kind, recipe.key, build_and_log, inputs=recipe.input_keys, parameters=recipe.parameters, code=recipe.code
    )


def find_artifact(recipe: Recipe) -> Path | None:
    """Return the folder of a recipe's artifact, None if the store does not have it."""
    return ArtifactStore().find(recipe.kind, recipe.key)


def key_of(artifact: Path) -> str:
    """Return the key of an artifact: the name of its folder."""
    return artifact.name


def checksum_file(path: Path) -> str:
    """Return the SHA-256 (hex) of an input file. Raises UserError if it cannot be read."""
    try:
        return file_checksum(path)
    except OSError as error:
        remedy = "check the path, and let the user that calipert runs as read it"
        raise UserError(path, "file", error.strerror or str(error), remedy) from error
