"""The settings of calipert: each is one variable of the environment, read nowhere else.

Prefect, MLflow, CUDA and the clients of S3 and Docker read variables of their own (LIBRARIES).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from core.errors import UserError, hide_password

PREFIX = "CALIPERT_"
LIBRARIES = ("AWS_", "CUDA_VISIBLE_DEVICES", "DOCKER_", "MLFLOW_", "PREFECT_")
SOURCE = f"{PREFIX}SOURCE_"  # the name of a data set, embedding or set of published files follows, in capitals
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "data"

AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().resolve())]


def variable(field: str) -> str:
    """Return the variable of the environment that holds a setting."""
    return PREFIX + field.upper()


class Places(BaseSettings):
    """Where files are: any value is a right one, so these can be read whatever the other settings hold."""

    model_config = SettingsConfigDict(
        alias_generator=variable, case_sensitive=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )

    data: AbsolutePath = DEFAULT_DATA
    """Folder of everything that calipert writes."""
    catalog: AbsolutePath | None = None
    """Folder of your own catalog entries (docs/catalog.md)."""
    store: str | None = None
    """Store that machines share, as s3://bucket/prefix; without it none (docs/store.md)."""

    @field_validator("*", mode="before")
    @classmethod
    def _read_empty_as_unset(cls, value: Any, info: ValidationInfo) -> Any:
        # An empty CALIPERT_GPUS means no GPU, as an empty CUDA_VISIBLE_DEVICES does; an empty number is a mistake.
        if value == "" and info.field_name not in (None, "gpus", "memory_gb"):
            return cls.model_fields[info.field_name].get_default()
        return value


class Settings(Places):
    """One field per setting; the variable of `data` is CALIPERT_DATA, and so on. Paths are absolute."""

    engine: Literal["process", "docker", "kubernetes"] = "process"
    """What models run in (docs/containers.md, docs/kubernetes.md)."""
    docker: AbsolutePath | None = None
    """YAML file with the limits of a model's container (docs/containers.md)."""
    kubernetes: AbsolutePath | None = None
    """YAML file that says how models run in the cluster (docs/kubernetes.md)."""
    gpus: str | None = None
    """GPUs to use: numbers or UUIDs with commas between them, or `none`; without it all (docs/gpus.md)."""
    locks: AbsolutePath | None = None
    """Folder of the locks on GPUs, the same for all users of this machine (docs/gpus.md)."""
    memory_gb: Annotated[float, Field(ge=0.25, allow_inf_nan=False)] = 2.0
    """Gigabytes that the chunks of a raw matrix may take while it is prepared (docs/large-data.md)."""
    mlflow_url: str | None = None
    """Address of MLflow's pages for browsers, where it is not the one that workers use."""
    commit: str | None = None
    """Git commit of the code, if there is no checkout."""
    pod_name: str | None = None
    """Name of the pod that this process runs in; its work pool sets it."""
    pod_uid: str | None = None
    """UID of that pod; its work pool sets it."""


def read_places() -> Places:
    """Read where files are as the environment says it now."""
    return Places()


def read_settings() -> Settings:
    """Read the settings as the environment has them now. Raises UserError for a value that is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        about = next(field for key, field in Settings.model_fields.items() if variable(key) == name)
        remedy = f"{first['msg']}. {about.description} Unset it for the default, {about.default}"
        raise UserError("environment", name, hide_password(repr(first["input"])), remedy) from error


def source_variable(name: str) -> str:
    """Return the variable that names the file of a data set or embedding, or the folder of published files."""
    return SOURCE + name.upper()


def read_source(name: str) -> str | None:
    """Read that variable; None if it is not set."""
    return os.environ.get(source_variable(name))


def list_sources() -> dict[str, str]:
    """List the variables that name files of data sets, embeddings and published files, with their values."""
    return _list_variables(SOURCE)


def list_library_variables() -> dict[str, str]:
    """List the variables that Prefect, MLflow, clients of S3 and Docker, and CUDA read, with their values."""
    return _list_variables(*LIBRARIES)


def _list_variables(*prefixes: str) -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}
