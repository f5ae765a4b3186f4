"""What a model's container may use of the machine."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from blocks.config.settings import read_settings
from blocks.engines.yaml_settings import read_yaml_settings

SETTINGS = "CALIPERT_DOCKER"

_GIB = 2**30
Size = Annotated[ByteSize, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Limits(BaseModel):
    """The limits of one container; sizes in bytes, or as `16GiB`. docs/containers.md says what each is for.

    memory: of all its processes, its /tmp, /dev/shm, output and checkpoint, without swap; None for half of the
    machine's.
    cpus: None for as many as the stage was given threads. pids: processes and threads. temporary: of /tmp.
    shared_memory: of /dev/shm. output, output_files: bytes and number of files and folders that it may write, and as
    many again as a checkpoint. printed: bytes on stdout and stderr together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: Size | None = None
    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    pids: Count = 512
    open_files: Count = 4096
    temporary: Size = ByteSize(_GIB)
    shared_memory: Size = ByteSize(_GIB)
    output: Size = ByteSize(4 * _GIB)
    output_files: Count = 10_000
    printed: Size = ByteSize(_GIB // 16)


def read_limits() -> Limits:
    """Return the limits in the YAML file that CALIPERT_DOCKER names, by default those of `Limits`.

    Raises UserError for a file that cannot be read or does not fit.
    """
    path = read_settings().docker
    return Limits() if path is None else read_yaml_settings(Limits, path, SETTINGS, "docs/containers.md", empty={})


def how_to_change(field: str) -> str:
    """Return the end of a message that names a limit: where to change it."""
    return f": to change it, set `{field}` in the file that {SETTINGS} names (docs/containers.md)"
