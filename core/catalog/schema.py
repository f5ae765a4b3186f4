"""What an entry of the catalog may say. docs/catalog.md explains every field.

Entries come from YAML that people write by hand: types are strict (`seed: true` and `seed: "42"` are refused), an
unknown field is an error, and what was read cannot be changed.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from core.entry import Count, Entry, Name, Text
from core.prepare.settings import PreparationSettings
from core.reference.controls import CONTROLS

# Rows of a leaderboard that are not models. (The baselines are rows of it and models of the catalog.)
NO_MODELS = frozenset(control.name for control in CONTROLS if control.role != "baseline")


def _numbers_as_numbers(settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
    for key, value in settings.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and _reads_as_number(item):
                raise ValueError(f"`{key}: {item}` is text to YAML: write a number with a decimal point, as in 1.0e-3")
    return settings


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _address(url: str) -> str:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("take the user name and password out: addresses are logged and reported (docs/secrets.md)")
    if not parts.hostname:
        raise ValueError("an address has a host, as in https://example.org/file")
    _ = parts.port  # a ValueError that says what is wrong, unless it is a number
    return url


PublicUrl: TypeAlias = Annotated[str, Field(pattern=r"^https://\S+$"), AfterValidator(_address)]
# A key goes there with every request: in the clear to this machine alone.
KeyedUrl: TypeAlias = Annotated[
    str,
    Field(pattern=r"^(https://|http://(127\.0\.0\.1|localhost)(:[0-9]+)?(/|$))\S*$"),
    AfterValidator(_address),
]
Endpoint: TypeAlias = Annotated[str, Field(pattern=r"^https?://\S+$"), AfterValidator(_address)]

# Free settings have no type that would catch YAML's trap: `1e-3` without a point is text.
Settings: TypeAlias = Annotated[dict[str, JsonValue], AfterValidator(_numbers_as_numbers)]


class HttpsSource(Entry):
    """A public file. `sha256` is checked after the download where the publisher keeps the file unchanged."""

    kind: Literal["https"]
    url: PublicUrl
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class S3Source(Entry):
    """A file in an S3 bucket, `url` being s3://bucket/key; read with the machine's AWS credentials unless `anonymous`.

    endpoint: address of the S3 service where it is not Amazon's.
    """

    kind: Literal["s3"]
    url: Annotated[str, Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/\S+$")]
    anonymous: bool = False
    endpoint: Endpoint | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class LocalSource(Entry):
    """A file that the user has. `hint` says which file is wanted and where it comes from."""

    kind: Literal["local"]
    hint: Text


class SimulatedSource(Entry):
    """A simulated screen; `settings` are the fields of core.simulate.SimulationSettings that differ from its own."""

    kind: Literal["simulated"]
    settings: Settings = Field(default_factory=dict)


class DatasetSpec(PreparationSettings):
    """A data set: its file, and how its cells are prepared (docs/science.md, section 1)."""

    title: Text
    source: Annotated[HttpsSource | S3Source | LocalSource | SimulatedSource, Field(discriminator="kind")]
    mirror: Annotated[HttpsSource | S3Source, Field(discriminator="kind")] | None = None
    half_seeds: Count = 5
    licence: Text = "not stated"
    citation: Text = "not stated"


# What a model is told of genes: one table of genes x dimensions, several of them, or a graph between genes.
Form: TypeAlias = Literal["table", "tables", "graph"]
FORMS: dict[str, Form] = {
    "gmt": "table",
    "coexpression": "table",
    "container": "table",
    "text": "table",
    "graph": "graph",
    "several": "tables",
}
# The published files that the kind `text` reads: summaries of genes, and the genes' names.
GENE_FILES = ("gene_summary.gz", "Homo_sapiens.gene_info.gz")
# What a model can be given, by the form that it takes: several tables may be one.
TAKES: dict[Form, tuple[Form, ...]] = {"table": ("table",), "tables": ("table", "tables"), "graph": ("graph",)}


class PretrainedSpec(Entry):
    """Published files that a model starts from or an embedding is made of, by the names that it looks for."""

    name: Name
    title: Text
    files: Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")],
            Annotated[HttpsSource | S3Source | LocalSource, Field(discriminator="kind")],
        ],
        Field(min_length=1),
    ]
    licence: Text = "not stated"
    citation: Text = "not stated"


class TextService(Entry):
    """A service that makes vectors of texts by the API of OpenAI: `POST <url>/embeddings`.

    secret: the Secret block with its key.
    """

    url: KeyedUrl
    model: Text
    secret: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]


class EmbeddingSpec(Entry):
    """What a model is told of genes.

    dimensions: of a table, genes x at most so many (fewer where what is behind it has a lower rank); of a graph, the
    most neighbours of a gene. parts: the embeddings that `several` puts side by side. container: the folder under
    model_containers that makes it, of the published files `pretrained`, with `settings`, within `time_limit` seconds.
    service: makes it of what the published files `pretrained` say about the genes; dimensions: so many that it is asked
    for, None for as many as it gives.
    """

    name: Name
    title: Text
    kind: Literal["gmt", "coexpression", "graph", "several", "container", "text"]
    source: Annotated[HttpsSource | S3Source | LocalSource, Field(discriminator="kind")] | None = None
    dimensions: Count | None = None
    parts: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    container: Name | None = None
    pretrained: Name | None = None
    service: TextService | None = None
    settings: Settings = Field(default_factory=dict)
    time_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    per_fold: bool = False
    licence: Text = "not stated"
    citation: Text = "not stated"

    @property
    def form(self) -> Form:
        """Return what the file holds.

        Returns
        -------
        Form
        """
        return FORMS[self.kind]

    @property
    def is_shared(self) -> bool:
        """Tell whether it is the same for all data sets.

        Returns
        -------
        bool
        """
        return not self.per_fold and self.form != "graph"

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> EmbeddingSpec:
        needed = NEEDED[self.kind]
        # `per_fold` of `several` is that of its parts, which the registry knows.
        given = {field for field in OF_A_KIND if getattr(self, field) and (self.kind, field) != ("several", "per_fold")}
        if missing := sorted(needed - given):
            raise ValueError(f"`kind: {self.kind}` needs `{missing[0]}`")
        if others := sorted(given - needed - OPTIONAL.get(self.kind, set())):
            raise ValueError(f"`kind: {self.kind}` has no `{others[0]}`")
        if self.kind == "several" and len(set(self.parts)) < max(2, len(self.parts)):
            raise ValueError("`kind: several` has two or more `parts`, each once")
        return self


# The fields of an embedding that each kind must have, and may have; all other kinds have them not.
NEEDED: dict[str, set[str]] = {
    "gmt": {"source", "dimensions"},
    "coexpression": {"dimensions", "per_fold"},
    "graph": {"source", "dimensions"},
    "several": {"parts"},
    "container": {"container", "pretrained"},
    "text": {"service", "pretrained"},
}
OPTIONAL = {"container": {"settings", "time_limit"}, "text": {"dimensions"}}
OF_A_KIND = set().union(*NEEDED.values(), *OPTIONAL.values())


class TimeLimits(Entry):
    """The longest time, in seconds, that a stage of a model may take on one fold; then it is stopped."""

    train: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 24 * 3600
    predict: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3600


class ModelSpec(Entry):
    """A model; with an `embedding` a template that gives one model per embedding that fits, `<name>_<embedding>`.

    container: the folder under model_containers, None for what core computes itself. embedding: the form that it takes,
    true for a table. pretrained: the published files that it starts from.
    """

    name: Name
    title: Text
    container: Name | None = None
    embedding: bool | Literal["tables", "graph"] = False
    pretrained: Name | None = None
    hyperparameters: Settings = Field(default_factory=dict)
    time_limits: TimeLimits = TimeLimits()
    citation: Text = "not stated"

    @field_validator("name")
    @classmethod
    def _not_a_control(cls, name: str) -> str:
        if name in NO_MODELS:
            raise ValueError(f"`{name}` is the name of a control")
        return name


class GroupSpec(Entry):
    """Models that are run together, by their expanded names."""

    name: Name
    title: Text
    models: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)]


class ResolvedModel(Entry):
    """One model to run: a template joined with its embedding, or a model without one (template == name)."""

    name: Text
    title: Text
    template: Name
    embedding: EmbeddingSpec | None
    pretrained: PretrainedSpec | None = None
    hyperparameters: dict[str, JsonValue]
    container: Name | None
    time_limits: TimeLimits = TimeLimits()
    citation: Text
