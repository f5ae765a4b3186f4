"""Finds, reads and checks the catalog's YAML files.

The built-in entries lie beside this module, those of the user in the folder named by CALIPERT_CATALOG: sub-folders
datasets, embeddings, models, groups, pretrained, one file `<name>.yaml` per entry. (Beside them `containers` may lie,
the user's own folders of models; tasks.inputs finds these.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import yaml
from pydantic import ValidationError

from core.catalog.schema import (
    GENE_FILES,
    TAKES,
    DatasetSpec,
    EmbeddingSpec,
    GroupSpec,
    ModelSpec,
    PretrainedSpec,
    ResolvedModel,
)
from core.entry import Entry
from core.errors import UserError

BUILT_IN = Path(__file__).parent
VARIABLE = "CALIPERT_CATALOG"
GUIDE = "docs/catalog.md"
SUFFIXES = (".yaml", ".yml")

Kind: TypeAlias = Literal["dataset", "embedding", "model", "group", "pretrained"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FOLDERS: dict[Kind, str] = {kind: "pretrained" if kind == "pretrained" else f"{kind}s" for kind in KINDS}
Spec = TypeVar("Spec", DatasetSpec, EmbeddingSpec, ModelSpec, GroupSpec, PretrainedSpec)


class Catalog:
    """The built-in entries and those of the user.

    own: the user's folder of entries; None for the built-in ones alone. It is read at each question, so that an entry
    that is written meanwhile counts.
    """

    def __init__(self, own: Path | None = None) -> None:
        self._own = own

    def dataset(self, name_or_path: str | Path) -> DatasetSpec:
        """Return the data set of that name, or the user's own entry in the YAML file at that path.

        Parameters
        ----------
        name_or_path : str | Path
            A name of the catalog, or a YAML file of the user's.

        Returns
        -------
        DatasetSpec

        Raises
        ------
        UserError
            For an unknown name, a missing or unreadable file, an entry that does not fit the schema, and a user's own
            entry that takes the name of one in the catalog.
        """
        path = Path(name_or_path)
        if path.suffix.lower() not in SUFFIXES:
            return self._entry("dataset", str(name_or_path), DatasetSpec)
        spec = _read(path, DatasetSpec)
        taken = self._files("dataset").get(spec.name)
        if taken is not None and taken.resolve() != path.resolve():
            found = f"{spec.name!r}, a data set of the catalog ({taken})"
            raise UserError(path, "name", found, "give your entry a name of its own")
        return spec

    def embedding(self, name: str) -> EmbeddingSpec:
        """Return the embedding of that name.

        Parameters
        ----------
        name : str
            Its name.

        Returns
        -------
        EmbeddingSpec

        Raises
        ------
        UserError
            For an unknown name or an entry that does not fit the schema.
        """
        spec, file = self._entry("embedding", name, EmbeddingSpec), self._files("embedding")[name]
        if spec.source and name in self._files("pretrained"):
            found = f"{name!r}, which published files have too ({self._files('pretrained')[name]})"
            raise UserError(file, "name", found, f"rename one: --source {name}= names either")
        published = self._entry("pretrained", spec.pretrained, PretrainedSpec, file) if spec.pretrained else None
        if published and spec.kind == "text" and (missing := sorted(set(GENE_FILES) - set(published.files))):
            found = f"{spec.pretrained!r}, without {missing[0]}"
            raise UserError(file, "pretrained", found, f"name one with {' and '.join(GENE_FILES)}")
        per_fold = []
        for name_of_part in spec.parts:
            part = self._entry("embedding", name_of_part, EmbeddingSpec, file)
            if part.form != "table":
                found = f"{name_of_part!r}, which is no single table"
                raise UserError(file, "parts", found, "name embeddings that are one table each")
            per_fold.append(part.per_fold)
        if per_fold and spec.per_fold != any(per_fold):
            made = "each fold, as one of its parts is" if not spec.per_fold else "all folds, as its parts are"
            remedy = f"{str(not spec.per_fold).lower()}: it is made for {made}"
            raise UserError(file, "per_fold", str(spec.per_fold).lower(), remedy)
        return spec

    def parts(self, spec: EmbeddingSpec) -> list[EmbeddingSpec]:
        """Return the tables that an embedding of several puts side by side; any other embedding is its own only part.

        Parameters
        ----------
        spec : EmbeddingSpec
            The embedding.

        Returns
        -------
        list[EmbeddingSpec]
        """
        return [self.embedding(name) for name in spec.parts] or [spec]

    def pretrained(self, name: str) -> PretrainedSpec:
        """Return the published files of that name.

        Parameters
        ----------
        name : str
            Its name.

        Returns
        -------
        PretrainedSpec

        Raises
        ------
        UserError
            For an unknown name or an entry that does not fit the schema.
        """
        return self._entry("pretrained", name, PretrainedSpec)

    def model(self, name: str) -> ResolvedModel:
        """Return the model of that (expanded) name: `linear`, `ridge_reactome`.

        Parameters
        ----------
        name : str
            Its name.

        Returns
        -------
        ResolvedModel

        Raises
        ------
        UserError
            For an unknown name or an entry that does not fit the schema.
        """
        known = self._resolved()
        if name not in known:
            raise _unknown("model", name, list(known))
        return known[name].model_copy(deep=True)

    def group(self, name: str) -> GroupSpec:
        """Return the group of that name.

        Parameters
        ----------
        name : str
            Its name.

        Returns
        -------
        GroupSpec

        Raises
        ------
        UserError
            For an unknown name or an entry that does not fit the schema.
        """
        return self._entry("group", name, GroupSpec)

    def models(self, names: Iterable[str]) -> list[ResolvedModel]:
        """Return the models of these names, in this order, each once; a group's name stands for its models.

        Parameters
        ----------
        names : Iterable[str]
            Of models and groups.

        Returns
        -------
        list[ResolvedModel]

        Raises
        ------
        UserError
            For a name that is neither a model nor a group, also within a group.
        """
        known, groups = self._resolved(), self._files("group")
        wanted: dict[str, None] = {}
        for name in names:
            if name in groups:
                members = self.group(name).models
                for member in members:
                    if member not in known:
                        raise _unknown("model", member, list(known), where=groups[name])
                wanted.update(dict.fromkeys(members))
            elif name in known:
                wanted[name] = None
            else:
                raise _unknown("model or group", name, [*known, *groups])
        return [known[name].model_copy(deep=True) for name in wanted]

    def names(self, kind: Kind) -> list[str]:
        """Return the sorted names of one kind; models by their expanded names.

        Parameters
        ----------
        kind : Kind
            `dataset`, `embedding`, `model`, `group` or `pretrained`.

        Returns
        -------
        list[str]
        """
        return sorted(self._resolved() if kind == "model" else self._files(kind))

    def _resolved(self) -> dict[str, ResolvedModel]:
        embeddings = [self.embedding(name) for name in self.names("embedding")]
        groups = self._files("group")
        found: dict[str, ResolvedModel] = {}
        for template, path in sorted(self._files("model").items()):
            spec = self._entry("model", template, ModelSpec)
            takes = TAKES["table" if spec.embedding is True else spec.embedding] if spec.embedding else ()
            weights = self._entry("pretrained", spec.pretrained, PretrainedSpec, path) if spec.pretrained else None
            fitting = [embedding for embedding in embeddings if embedding.form in takes]
            for embedding in fitting if spec.embedding else [None]:
                name = f"{template}_{embedding.name}" if embedding else template
                if name in found or name in groups:
                    other = groups[name] if name in groups else f"model {found[name].template!r}"
                    raise UserError(path, "name", f"{name!r} is also {other}", "rename one of them")
                title = f"{spec.title}, {embedding.title}" if embedding else spec.title
                own = {"name": name, "title": title, "template": template}
                found[name] = ResolvedModel(**dict(spec) | own | {"embedding": embedding, "pretrained": weights})
        return found

    def _entry(self, kind: Kind, name: str, schema: type[Spec], where: object = "catalog") -> Spec:
        """Return the entry of that name. Raises UserError, `where` its name is, for an unknown one."""
        files = self._files(kind)
        if name not in files:
            raise _unknown(kind, name, list(files), where)
        path = files[name]
        spec = _read_built_in(path, schema) if path.is_relative_to(BUILT_IN) else _read(path, schema)
        if spec.name != name:
            remedy = f"write `name: {name}`, or rename the file to {spec.name}.yaml"
            raise UserError(path, "name", repr(spec.name), remedy)
        return spec.model_copy(deep=True)

    def _files(self, kind: Kind) -> dict[str, Path]:
        """Return entry name -> file, built-in and the user's."""
        folder = FOLDERS[kind]
        files = {path.stem: path for path in _yaml_files(BUILT_IN / folder)}
        own = self.own_folder()
        for path in _yaml_files(own / folder) if own else []:
            if path.stem in files:
                found = f"{path.stem!r}, which the catalog already has ({files[path.stem]})"
                raise UserError(path, "name", found, "give your entry a name of its own")
            files[path.stem] = path
        return files

    def own_folder(self) -> Path | None:
        """Return the user's own folder of entries, if there is one.

        Returns
        -------
        Path | None

        Raises
        ------
        UserError
            Where it has none of the sub-folders.
        """
        if self._own is not None and not any((self._own / name).is_dir() for name in FOLDERS.values()):
            found = f"{self._own}, without any of the sub-folders {', '.join(FOLDERS.values())}"
            remedy = f"point {VARIABLE} to a folder of catalog entries ({GUIDE}), or unset it"
            raise UserError(VARIABLE, "folder", found, remedy)
        return self._own


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


@cache
def _read_built_in(path: Path, schema: type[Spec]) -> Spec:
    return _read(path, schema)


def _read(path: Path, schema: type[Spec]) -> Spec:
    try:
        entry = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(path, "file", error.strerror or str(error), "check the path and its permissions") from error
    # ValueError: text that is not UTF-8, or a date that does not exist.
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(path, "format", f"not readable as YAML: {error}", f"correct the file; see {GUIDE}") from error
    if not isinstance(entry, dict):
        found = f"{type(entry).__name__}, not a mapping"
        raise UserError(path, "format", found, f"write `field: value` lines; see {GUIDE}")
    try:
        return schema.model_validate(entry)
    except ValidationError as error:
        raise _invalid(path, entry, error) from error


def _invalid(path: Path, entry: dict[Any, Any], error: ValidationError) -> UserError:
    """Return the first fault that pydantic found, as an error that its author can correct."""
    first, *others = error.errors(include_url=False)
    field, value = _located(entry, first["loc"])
    if first["type"] == "missing":
        missing = str(first["loc"][-1])
        found, remedy = "nothing", "add it"
        field = f"{field}.{missing}" if field else missing
    elif first["type"] == "extra_forbidden":
        near = get_close_matches(str(first["loc"][-1]), _field_names(), n=1)
        found, remedy = "an unknown field", f"did you mean {near[0]!r}?" if near else "take it out"
    else:
        found, remedy = _short(value), first["msg"].removeprefix("Value error, ")
    more = f"; {len(others)} more to correct after it" if others else ""
    return UserError(path, field or "entry", found, f"{remedy}{more} (fields: {GUIDE})")


def _located(entry: Any, location: tuple[int | str, ...]) -> tuple[str, Any]:
    """Path and value in the YAML of what pydantic points at, without its tags of unions, which are not in the YAML."""
    path, value = "", entry
    for part in location:
        if isinstance(value, Mapping) and part in value:
            path, value = f"{path}.{part}" if path else str(part), value[part]
        elif isinstance(value, list) and isinstance(part, int):
            path, value = f"{path}[{part}]", value[part]
    return path, value


def _short(value: Any) -> str:
    # A password in an address must not be shown.
    text = re.sub(r"//[^/\s]*@", "//...@", repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _field_names() -> list[str]:
    return sorted({field for schema in _kinds_of(Entry) for field in schema.model_fields})


def _kinds_of(base: type[Entry]) -> list[type[Entry]]:
    return [kind for own in base.__subclasses__() for kind in (own, *_kinds_of(own))]


def _unknown(what: str, name: str, known: list[str], where: object = "catalog") -> UserError:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(where, what, f"{name!r}, which is not known", f"{remedy}known: {', '.join(sorted(known))}")
