"""Files that the user names for data sets and embeddings, checked before any work. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from core import catalog
from core.catalog.schema import DatasetSpec, EmbeddingSpec, LocalSource
from core.errors import UserError

VARIABLE = "CALIPERT_SOURCE_"


def named_source(name: str, sources: Mapping[str, str]) -> Path | None:
    """The file that the user named for a data set or embedding: in `sources`, else in CALIPERT_SOURCE_<NAME>."""
    variable = VARIABLE + name.upper()
    given = sources.get(name) or os.environ.get(variable)
    if given is None:
        return None
    path = Path(given).expanduser().resolve()
    if not path.is_file():
        field = f"--source {name}=..." if name in sources else variable
        raise UserError(path, field, "no such file", "name the file where it is")
    return path


def check_sources(specs: Iterable[DatasetSpec | EmbeddingSpec], sources: Mapping[str, str]) -> None:
    """Raise UserError, before any work, where a needed file is not named or not there, or nothing needs it."""
    needed = list(specs)
    for spec in needed:
        _check_source(spec, sources)
    unused = sorted(set(sources) - {spec.name for spec in needed})
    if unused:
        raise UserError(
            f"--source {unused[0]}=...",
            "name",
            f"{unused[0]!r} takes no part in this run",
            f"name one of: {', '.join(spec.name for spec in needed)}",
        )


def _check_source(spec: DatasetSpec | EmbeddingSpec, sources: Mapping[str, str]) -> None:
    if named_source(spec.name, sources) is None and isinstance(spec.source, LocalSource):
        raise UserError(
            f"catalog entry {spec.name}",
            "source",
            f"no file named; wanted: {spec.source.hint}",
            f"--source {spec.name}=FILE, or set {VARIABLE}{spec.name.upper()}",
        )


def chosen_dataset(dataset: str, folds: int | Literal["leave-one-out"] | None) -> DatasetSpec:
    """The entry of a data set, with another number of folds where one is given.

    Raises UserError for an unknown data set, or a number of folds that its task does not allow.
    """
    spec = catalog.dataset(dataset)
    if folds is None:
        return spec
    try:
        return DatasetSpec.model_validate(spec.model_dump() | {"folds": folds})
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise UserError("--folds", "folds", str(folds), reason.removeprefix("Value error, ")) from error
