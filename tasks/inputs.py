"""Files that the user names for data sets and embeddings, checked before any work. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import ValidationError

from blocks.config.catalog import open_catalog
from blocks.config.paths import MODEL_CONTAINERS
from blocks.config.settings import read_source, source_variable
from core.catalog.schema import (
    CONTROLS,
    NAME_PATTERN,
    DatasetSpec,
    EmbeddingSpec,
    LocalSource,
    PretrainedSpec,
    ResolvedModel,
)
from core.errors import UserError

CONTAINERS = "containers"  # in the user's folder of entries
BASELINES = ("additive", "linear")  # core computes them in every benchmark

# Which published file of a data set: the one of its authors, or its preprocessed copy.
Origin: TypeAlias = Literal["raw", "mirror"]


# What a file can be named for.
Needed: TypeAlias = DatasetSpec | EmbeddingSpec | PretrainedSpec


def named_source(spec: Needed, sources: Mapping[str, str]) -> Path | None:
    """The file that the user named for a data set or embedding, or the folder for a model's weights: in `sources`, else
    in CALIPERT_SOURCE_<NAME>."""
    name = spec.name
    given = sources.get(name) or read_source(name)
    if given is None:
        return None
    path = Path(given).expanduser().resolve()
    field = f"--source {name}=..." if name in sources else source_variable(name)
    if isinstance(spec, PretrainedSpec):
        missing = [file for file in spec.files if not (path / file).is_file()]
        if missing:
            raise UserError(path, field, f"no {missing[0]} in it", f"name the folder of {', '.join(spec.files)}")
    elif not path.is_file():
        raise UserError(path, field, "no such file", "name the file where it is")
    return path


def inputs_of(models: Iterable[ResolvedModel]) -> list[EmbeddingSpec | PretrainedSpec]:
    """What models need beside the data: what their embeddings are made of, and weights to start from; each once."""
    needed: dict[str, EmbeddingSpec | PretrainedSpec] = {}
    for model in models:
        needed |= {one.name: one for one in (inputs_of_embedding(model.embedding) if model.embedding else [])}
        needed |= {model.pretrained.name: model.pretrained} if model.pretrained else {}
    return list(needed.values())


def inputs_of_embedding(spec: EmbeddingSpec) -> list[EmbeddingSpec | PretrainedSpec]:
    """What an embedding is made of, by the names under which files are named: itself or its parts, or the published
    files of those that are made of such. What is made from the cells of a fold needs none."""
    parts = [part for part in open_catalog().parts(spec) if not part.per_fold]
    return [open_catalog().pretrained(part.pretrained) if part.pretrained else part for part in parts]


def check_sources(specs: Iterable[Needed], sources: Mapping[str, str]) -> None:
    """Raise UserError, before any work, where a needed file is not named or not there, or nothing needs it."""
    needed = list(specs)
    _check_unused(needed, sources)
    for spec in needed:
        _check_source(spec, sources)


def _check_unused(needed: Sequence[Needed], sources: Mapping[str, str]) -> None:
    unused = sorted(set(sources) - {spec.name for spec in needed})
    if unused:
        raise UserError(
            f"--source {unused[0]}=...",
            "name",
            f"{unused[0]!r} takes no part in this run",
            f"name one of: {', '.join(spec.name for spec in needed)}",
        )


def _check_source(spec: Needed, sources: Mapping[str, str]) -> None:
    if named_source(spec, sources) is not None:
        return
    if isinstance(spec, PretrainedSpec):
        field, wanted, own = "files", "FOLDER", [one for one in spec.files.values() if isinstance(one, LocalSource)]
    else:
        field, wanted, own = "source", "FILE", [spec.source] if isinstance(spec.source, LocalSource) else []
    if own:
        raise UserError(
            f"catalog entry {spec.name}",
            field,
            f"no {wanted.lower()} named; wanted: {', '.join(one.hint for one in own)}",
            f"--source {spec.name}={wanted}, or set {source_variable(spec.name)}",
        )


def chosen_dataset(
    dataset: str, folds: int | Literal["leave-one-out"] | None = None, origin: Origin = "raw"
) -> DatasetSpec:
    """The entry of a data set, with another number of folds where one is given; its `source` is the file of `origin`.

    Raises UserError for an unknown data set, a number of folds that its task does not allow, a mirror that it does not
    have, and another number of folds than a mirror comes with.
    """
    spec = open_catalog().dataset(dataset)
    if origin == "mirror":
        return _mirrored(spec, folds)
    if folds is None:
        return spec
    try:
        return DatasetSpec.model_validate(spec.model_dump() | {"folds": folds})
    except ValidationError as error:
        remedy = "combination data have 2 folds" if spec.task == "combination" else "at least 2, or leave-one-out"
        raise UserError("--folds", "folds", str(folds), remedy) from error


def _mirrored(spec: DatasetSpec, folds: int | Literal["leave-one-out"] | None) -> DatasetSpec:
    if spec.mirror is None:
        remedy = "take the raw file (origin raw), or give the entry a `mirror` (docs/catalog.md)"
        raise UserError(f"catalog entry {spec.name}", "mirror", "none, but the origin is to be mirror", remedy)
    if folds is not None:
        remedy = "leave the folds out: a mirror has its own. Or take the raw file (origin raw)"
        raise UserError("--folds", "folds", f"{folds}, with origin mirror", remedy)
    return spec.model_copy(update={"source": spec.mirror})


def study() -> list[str]:
    """The names of the study's data sets: those of the catalog that have a preprocessed mirror."""
    return [name for name in open_catalog().names("dataset") if open_catalog().dataset(name).mirror is not None]


def chosen_study(
    datasets: Iterable[str], models: Iterable[str], origin: Origin, sources: Mapping[str, str]
) -> dict[str, DatasetSpec]:
    """The entries of the data sets to reproduce, by what they are asked for with; none asked for: the study's.

    Raises UserError where the request itself is at fault: an unknown data set or model, an entry without a mirror, an
    embedding without its file, a file for nothing. A data set whose own file is missing is no such fault.
    """
    specs = {dataset: chosen_dataset(dataset, origin=origin) for dataset in list(datasets) or study()}
    needed = inputs_of(chosen_models(models))
    for one in needed:
        _check_source(one, sources)
    _check_unused([*specs.values(), *needed], sources)
    return specs


def chosen_models(names: Iterable[str]) -> list[ResolvedModel]:
    """The models to train, by their names or groups; baselines that always take part need no training.

    Raises UserError for an unknown name, and for a model that neither has a container nor is such a baseline.
    """
    chosen = []
    for model in open_catalog().models(names):
        where = f"catalog entry {model.template}"
        if model.container is None:
            if model.name not in BASELINES:
                raise UserError(where, "container", "none", "name the folder of the model under model_containers")
        else:
            container_folder(model.container, where)
            chosen.append(model)
    return chosen


def container_places() -> list[Path]:
    """Where containers lie: model_containers, and `containers` in the user's folder of entries, if there is one."""
    own = open_catalog().own_folder()
    return [MODEL_CONTAINERS, *([own.resolve() / CONTAINERS] if own else [])]


def container_folder(name: str, where: str) -> Path:
    """The folder of a container, with its model.py. where: who names it. Raises UserError if there is none."""
    places = container_places()
    for place in places:
        if (place / name / "model.py").is_file():
            return place / name
    remedy = f"put it into {' or '.join(str(place / name) for place in places)}, or mend the name"
    raise UserError(where, "container", f"{name!r}, of which there is no model.py", remedy)


def check_model_name(name: str) -> None:
    """Raise UserError unless predictions made elsewhere can have this name: plain, and not that of a control."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError("--name", "name", repr(name), "lower-case letters, digits and underscores, as in my_model")
    if name in (*CONTROLS, *BASELINES):
        raise UserError("--name", "name", f"{name!r}, the name of a control", "call the model something else")
