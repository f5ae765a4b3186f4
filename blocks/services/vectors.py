"""Vectors of texts that a service was paid for, each kept in a file of its own until the folder is deleted.

A file is named by the SHA-256 of what its vector follows from, and holds the SHA-256 of its numbers before them
(float32, little-endian). It appears by one rename; one that is damaged all the same is ignored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from blocks.config.paths import vectors_folder
from blocks.local.scratch import scratch
from core.catalog.schema import TextService

Vector: TypeAlias = npt.NDArray[np.float32]

LOG = logging.getLogger("calipert.vectors")
_SCRATCH = "vectors"
_DIGEST = sha256().digest_size  # bytes
_NUMBER = np.dtype("<f4")


def build_address(service: TextService) -> str:
    """Return the address of a service. A slash at the end of its `url` makes no difference."""
    return f"{service.url.rstrip('/')}/embeddings"


def name_vector(service: TextService, dimensions: int | None, text: str) -> str:
    """SHA-256 (hex) of what a vector follows from. The service counts: two may call different models the same."""
    recipe = [build_address(service), service.model, dimensions, text]
    return sha256(json.dumps(recipe).encode()).hexdigest()


def find_fault(vector: Vector, dimensions: int | None) -> str | None:
    """Say why this is not a vector of a text, None if it is one.

    dimensions: how long it must be, None for any length.
    """
    if vector.ndim != 1 or len(vector) != (dimensions or max(1, len(vector))):
        wanted = f"{dimensions} numbers" if dimensions else "a list of numbers"
        return f"shape {vector.shape} instead of {wanted}"
    if not np.isfinite(vector).all():
        return "numbers that are not finite"
    return None if vector.any() else "nothing but zeros"


def read_vector(name: str, dimensions: int | None) -> Vector | None:
    """Read the vector of that name; None if none is kept, or, with a warning, if its file is damaged.

    Raises OSError for a file that exists and cannot be read: to ask for it again would cost.
    """
    path = _path(name)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, numbers = content[:_DIGEST], content[_DIGEST:]
    why: str | None = "its checksum does not fit"
    if sha256(numbers).digest() == digest and len(numbers) % _NUMBER.itemsize == 0:
        vector = np.frombuffer(numbers, _NUMBER).astype(np.float32)
        why = find_fault(vector, dimensions)
        if why is None:
            return vector
    LOG.warning("%s is damaged (%s): it is ignored", path, why)
    return None


def write_vectors(vectors: Mapping[str, Vector]) -> None:
    """Write vectors under their names; those that exist are replaced."""
    with scratch(vectors_folder(), _SCRATCH) as temporary:
        for name, vector in vectors.items():
            path = _path(name)
            path.parent.mkdir(exist_ok=True)
            numbers = vector.astype(_NUMBER).tobytes()
            (temporary / path.name).write_bytes(sha256(numbers).digest() + numbers)
            (temporary / path.name).replace(path)


def _path(name: str) -> Path:
    # Not tens of thousands of files in one folder.
    return vectors_folder() / name[:2] / f"{name}.vector"
