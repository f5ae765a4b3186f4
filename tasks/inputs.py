"""What a run works on: entries of the catalog by name, and the files that the user has for them.

All of it is checked before any work, and imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import ValidationError

from blocks.config.catalog import open_catalog
from blocks.config.paths import MODEL_CONTAINERS
from blocks.config.settings import read_source, source_variable
from core.catalog.schema import DatasetSpec, EmbeddingSpec, LocalSource, PretrainedSpec, ResolvedModel
from core.entry import NAME_PATTERN
from core.errors import UserError
from core.reference.controls import CONTROLS

CONTAINERS = "containers"  # in the user's folder of entries
# Core computes them in every benchmark.
BASELINES = tuple(control.name for control in CONTROLS if control.role == "baseline")

# Which published file of a data set: the one of its authors, or its preprocessed copy.
Origin: TypeAlias = Literal["raw", "mirror"]
Folds: TypeAlias = int | Literal["leave-one-out"] | None
# What a file can be named for.
Needed: TypeAlias = DatasetSpec | EmbeddingSpec | PretrainedSpec


@contextmanager
def collect_error(errors: list[UserError]) -> Iterator[None]:
    """Add the error that the block raises to `errors`, so that further checks can follow."""
    try:
        yield
    except UserError as error:
        errors.append(error)


def raise_collected(errors: Sequence[UserError]) -> None:
    """Raise one error that names all that were collected, with the place of the first; nothing if there are none."""
    if not errors:
        return
    first, *others = errors
    found = "; also ".join([first.found, *(f"{error.where}, {error.field}: {error.found}" for error in others)])
    remedies = "; ".join(dict.fromkeys(error.remedy for error in errors))
    raise UserError(first.where, first.field, found, remedies) from first


def list_inputs(models: Iterable[ResolvedModel]) -> list[EmbeddingSpec | PretrainedSpec]:
    """Return what models need beside the data, each once: what their embeddings are made of, and initial weights."""
    needed: list[EmbeddingSpec | PretrainedSpec] = []
    for model in models:
        needed += list_embedding_inputs(model.embedding) if model.embedding else []
        needed += [model.pretrained] if model.pretrained else []
    return list({one.name: one for one in needed}.values())


def list_embedding_inputs(spec: EmbeddingSpec) -> list[EmbeddingSpec | PretrainedSpec]:
    """Return what an embedding is made of, by the names under which the user can name files.

    That is itself or its parts, or the published files that these are made of. What is made from the cells of a fold
    needs none.
    """
    parts = [part for part in open_catalog().parts(spec) if not part.per_fold]
    return [open_catalog().pretrained(part.pretrained) if part.pretrained else part for part in parts]


def resolve_sources(
    needed: Iterable[Needed], sources: Mapping[str, str], later: Iterable[Needed] = ()
) -> dict[str, Path]:
    """Return name -> path of what the user has for a run: a file, or a folder of published files.

    needed: what the run needs. What is not in the result is downloaded, simulated or computed. sources: name -> path
    as the user wrote it; for a name that is not there, the variable CALIPERT_SOURCE_<NAME>. later: what a file
    may be named for too, and which is resolved later.
    Raises UserError, before any work, that names every file that is missing or that nothing needs.
    """
    specs, errors = list(needed), list[UserError]()
    known = [spec.name for spec in (*later, *specs)]
    unused = sorted(set(sources) - set(known))
    if unused:
        found = f"{', '.join(map(repr, unused))} {'takes' if len(unused) == 1 else 'take'} no part in this run"
        errors.append(UserError(f"--source {unused[0]}=...", "name", found, f"name one of: {', '.join(known)}"))
    paths: dict[str, Path] = {}
    for spec in specs:
        with collect_error(errors):
            path = _resolve_source(spec, sources)
            paths |= {spec.name: path} if path else {}
    raise_collected(errors)
    return paths


def _resolve_source(spec: Needed, sources: Mapping[str, str]) -> Path | None:
    given = sources.get(spec.name) or read_source(spec.name)
    if given is None:
        require_public(spec)
        return None
    path = Path(given).expanduser().resolve()
    field = f"--source {spec.name}=..." if spec.name in sources else source_variable(spec.name)
    if isinstance(spec, PretrainedSpec):
        for file in spec.files:
            if not (path / file).is_file():
                raise UserError(path, field, f"no {file} in it", f"name the folder of {', '.join(spec.files)}")
    elif not path.is_file():
        raise UserError(path, field, "no such file", "name the file where it is")
    return path


def require_public(spec: Needed) -> None:
    """Raise UserError if an entry has no public address, so that the user must name a file or folder for it."""
    field, wanted = ("files", "FOLDER") if isinstance(spec, PretrainedSpec) else ("source", "FILE")
    sources = list(spec.files.values()) if isinstance(spec, PretrainedSpec) else [spec.source]
    hints = [source.hint for source in sources if isinstance(source, LocalSource)]
    if hints:
        raise UserError(
            f"catalog entry {spec.name}",
            field,
            f"no {wanted.lower()} named; wanted: {', '.join(hints)}",
            f"--source {spec.name}={wanted}, or set {source_variable(spec.name)}",
        )


def choose_dataset(dataset: str, folds: Folds = None, origin: Origin = "raw") -> DatasetSpec:
    """Return the entry of a data set with the number of folds, if one is given; its `source` is the file of `origin`.

    Raises UserError for an unknown data set, a number of folds that its task does not allow, a mirror that it does not
    have, and another number of folds than a mirror comes with.
    """
    spec = open_catalog().dataset(dataset)
    if origin == "mirror" and spec.mirror is None:
        remedy = "take the raw file (origin raw), or give the entry a `mirror` (docs/catalog.md)"
        raise UserError(f"catalog entry {spec.name}", "mirror", "none, but the origin is to be mirror", remedy)
    if origin == "mirror" and folds is not None:
        remedy = "leave the folds out: a mirror has its own. Or take the raw file (origin raw)"
        raise UserError("--folds", "folds", f"{folds}, with origin mirror", remedy)
    if origin == "mirror":
        return spec.model_copy(update={"source": spec.mirror})
    try:
        return spec if folds is None else DatasetSpec.model_validate(spec.model_dump() | {"folds": folds})
    except ValidationError as error:
        remedy = "combination data have 2 folds" if spec.task == "combination" else "at least 2, or leave-one-out"
        raise UserError("--folds", "folds", str(folds), remedy) from error


def list_study() -> list[str]:
    """Return the names of the study's data sets: those of the catalog that have a preprocessed mirror."""
    return [name for name in open_catalog().names("dataset") if open_catalog().dataset(name).mirror is not None]


def choose_study(datasets: Iterable[str], origin: Origin) -> dict[str, DatasetSpec]:
    """Return the entries of the data sets to reproduce, by what the user wrote; if that is nothing, the study's.

    Raises UserError for an unknown data set and an entry without a mirror, if the origin is the mirror.
    """
    return {dataset: choose_dataset(dataset, origin=origin) for dataset in list(datasets) or list_study()}


def choose_models(names: Iterable[str]) -> list[ResolvedModel]:
    """Return the models to train, by their names or groups, without the baselines: these need no training.

    Raises UserError for an unknown name, and for a model that neither has a container nor is a baseline.
    """
    chosen = [model for model in open_catalog().models(names) if model.container or model.name not in BASELINES]
    for model in chosen:
        where = f"catalog entry {model.template}"
        if model.container is None:
            raise UserError(where, "container", "none", "name the folder of the model under model_containers")
        find_container(model.container, where)
    return chosen


def check_request(
    dataset: str, models: Iterable[str], folds: Folds, origin: Origin, sources: Mapping[str, str]
) -> None:
    """Raise UserError for what can be refused before a server starts: unknown names, and files that are missing."""
    spec = choose_dataset(dataset, folds, origin)
    resolve_sources([spec, *list_inputs(choose_models(models))], sources)


def list_container_places() -> list[Path]:
    """Return where containers lie: model_containers, and `containers` in the user's folder of entries, if any."""
    own = open_catalog().own_folder()
    return [MODEL_CONTAINERS, *([own.resolve() / CONTAINERS] if own else [])]


def find_container(name: str, where: str) -> Path:
    """Return the folder of a container, with its model.py. Raises UserError if there is none. where: the entry."""
    folders = [place / name for place in list_container_places()]
    for folder in folders:
        if (folder / "model.py").is_file():
            return folder
    remedy = f"put it into {' or '.join(map(str, folders))}, or correct the name"
    raise UserError(where, "container", f"{name!r}, of which there is no model.py", remedy)


def check_model_name(name: str) -> None:
    """Raise UserError unless predictions made elsewhere can have this name: plain, and not that of a control."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError("--name", "name", repr(name), "lower-case letters, digits and underscores, as in my_model")
    if name in (control.name for control in CONTROLS):
        raise UserError("--name", "name", f"{name!r}, the name of a control", "call the model something else")
