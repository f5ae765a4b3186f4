"""What is checked before any work of a flow: names, files, containers and secrets, all of them named at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from core.catalog.schema import DatasetSpec, EmbeddingSpec, ResolvedModel
from core.errors import UserError
from tasks.embed_texts import check_services
from tasks.engine import check_containers
from tasks.inputs import (
    Folds,
    Needed,
    Origin,
    choose_dataset,
    choose_models,
    collect_error,
    list_inputs,
    raise_collected,
    resolve_sources,
)


class Run(NamedTuple):
    """What a run works on. files: name -> what the user has for it; the rest is downloaded or computed."""

    spec: DatasetSpec
    models: list[ResolvedModel]
    files: dict[str, Path]


def check_run(dataset: str, models: Iterable[str], folds: Folds, origin: Origin, sources: Mapping[str, str]) -> Run:
    """Return what a run on one data set works on. Raises UserError for unknown names, and as `check_needs` does."""
    spec, chosen = choose_dataset(dataset, folds, origin), choose_models(models)
    return Run(spec, chosen, check_needs([spec, *list_inputs(chosen)], sources, chosen))


def check_needs(
    needed: Iterable[Needed],
    sources: Mapping[str, str],
    models: Sequence[ResolvedModel],
    embeddings: Sequence[EmbeddingSpec] = (),
    later: Iterable[Needed] = (),
) -> dict[str, Path]:
    """Return name -> path of what the user has for a run (tasks.inputs.resolve_sources).

    embeddings: beside those of the models. Raises UserError that names all that is missing: files, containers that
    the engine in use can run, and secrets; these only if all files are there, which decide what is asked of a service.
    """
    errors: list[UserError] = []
    files: dict[str, Path] = {}
    with collect_error(errors):
        files = resolve_sources(needed, sources, later)
    resolved = not errors
    with collect_error(errors):
        check_containers(models, embeddings)
    if resolved:
        with collect_error(errors):
            check_services([*embeddings, *(model.embedding for model in models if model.embedding)], files)
    raise_collected(errors)
    return files
