"""The images of models: their names, and whether they are here."""

from __future__ import annotations

from pathlib import Path

import docker
from docker.errors import ImageNotFound
from docker.models.images import Image

from core.errors import UserError

# On an image that calipert built: the hash of what it was built from (blocks.engines.sources_hash).
SOURCES = "calipert.sources"


def image_name(model: str) -> str:
    """The image of a model, by the name of its folder."""
    return f"calipert-{model}:latest"


def usable_image(client: docker.DockerClient, model_folder: Path, sources: str) -> Image:
    """The image of a model. sources: the hash of its folder as it is now.

    Raises UserError if there is none, if it was built from other files than the folder has now, and if it declares
    volumes, which would be places on the disk that no limit holds for.
    """
    name = image_name(model_folder.name)
    remedy = f"type `calipert model build {model_folder.name}`, or `make images` for all models"
    try:
        image = client.images.get(name)
    except ImageNotFound as error:
        raise UserError(name, "image", "no such image on this machine", remedy) from error
    if (image.labels or {}).get(SOURCES, sources) != sources:
        raise UserError(name, "image", f"it was built before {model_folder} was last changed", remedy)
    volumes = image.attrs["Config"].get("Volumes")
    if volumes:
        raise UserError(name, "VOLUME", ", ".join(volumes), "leave it out of its Dockerfile: a model writes to /output")
    return image
