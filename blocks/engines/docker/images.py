"""The images of models: their names, whether they are here, and how they are built."""

from __future__ import annotations

import tarfile
from collections import deque
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import docker
from docker.errors import ImageNotFound
from docker.models.images import Image

from blocks.engines.base import LAST_LINES
from blocks.engines.sources import find_sources, hash_sources
from core.errors import UserError

# On an image that calipert built: the hash of what it was built from (blocks.engines.sources.hash_sources).
SOURCES = "calipert.sources"


def image_name(model: str) -> str:
    """Return the name of a model's image, by the name of its folder."""
    return f"calipert-{model}:latest"


def find_image(client: docker.DockerClient, model_folder: Path) -> Image:
    """Return the usable image of a model.

    Raises UserError if there is none, if it was built from other files than the folder has now, and if it declares
    volumes, which would be places on the disk that no limit holds for.
    """
    name = image_name(model_folder.name)
    remedy = f"type `calipert model build {model_folder.name}`, or `make images` for all of the project's licence"
    try:
        image = client.images.get(name)
    except ImageNotFound as error:
        raise UserError(name, "image", "no such image on this machine", remedy) from error
    built_from = (image.labels or {}).get(SOURCES)
    if built_from not in (None, hash_sources(model_folder)):
        raise UserError(name, "image", f"it was built before {model_folder} was last changed", remedy)
    volumes = image.attrs["Config"].get("Volumes")
    if volumes:
        raise UserError(name, "VOLUME", ", ".join(volumes), "leave it out of its Dockerfile: a model writes to /output")
    return image


def build_image(
    client: docker.DockerClient, model_folder: Path, arguments: dict[str, str], on_line: Callable[[str], None]
) -> str:
    """Build the image of a model from its folder and what models share, and return its id.

    arguments: of the Dockerfile (`ARG`), such as BASE_IMAGE. on_line: gets each line of the build's log.
    Raises UserError, with the end of the log, if it cannot be built.
    """
    dockerfile = f"{model_folder.name}/Dockerfile"
    last: deque[str] = deque(maxlen=LAST_LINES)
    steps = client.api.build(
        fileobj=_create_context(model_folder),
        custom_context=True,
        dockerfile=dockerfile,
        buildargs=arguments,
        labels={SOURCES: hash_sources(model_folder)},
        tag=image_name(model_folder.name),
        # As the machine reaches the package index, so does the build.
        network_mode="host",
        rm=True,
        forcerm=True,
        decode=True,
    )
    for step in steps:
        for line in str(step.get("stream", "")).splitlines():
            last.append(line)
            on_line(line)
        if "error" in step:
            found = "\n".join([*last, str(step["error"])])
            remedy = "correct it, or its arguments (docs/containers.md)"
            raise UserError(model_folder / "Dockerfile", "build", found, remedy)
    return str(client.images.get(image_name(model_folder.name)).id)


def _create_context(model_folder: Path) -> BytesIO:
    """Return what a Dockerfile can copy, as a tar: the model's folder and, beside it, what models share."""
    context = BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name, path in find_sources(model_folder).items():
            archive.add(path, name.removeprefix("../") if name.startswith("../") else f"{model_folder.name}/{name}")
    context.seek(0)
    return context
