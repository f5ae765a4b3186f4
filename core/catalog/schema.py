"""What an entry of the catalog may say. docs/catalog.md explains every field.

Entries come from YAML that people write by hand: types are strict (`seed: true` and `seed: "42"` are refused), an
unknown field is an error, and what was read cannot be changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

NAME_PATTERN = r"^[a-z0-9][a-z0-9_]*$"
COMBINATION_FOLDS = 2
# Rows of a leaderboard that are not models; a model of that name could not be told from them.
CONTROLS = ("technical_duplicate", "interpolated_duplicate", "dataset_mean", "control_mean", "sparse_mean")

# A name becomes a folder, a deployment and a column of results: one safe spelling everywhere.
Name: TypeAlias = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Floor: TypeAlias = Annotated[int, Field(ge=0)]
# YAML has lists only; they become tuples, so that nobody changes a shared entry.
Texts: TypeAlias = Annotated[tuple[Text, ...], Field(strict=False)]


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


class Entry(BaseModel):
    """Base of everything in the catalog: strict, frozen, without unknown fields."""

    # Pydantic would repeat what it refuses in tracebacks, a password in an address too.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


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
    settings: Settings = {}


class Labels(Entry):
    """How a label of the published file becomes a condition: `control`, `A` or `A+B`.

    A label in `control`, or one that contains `control_contains`, is control; cells with a label in `dropped` are left
    out. Of any other label only what stands before the first `cut_at` counts; it is split at `separator` (`+` is always
    understood).
    """

    column: Text
    separator: Text | None = None
    control: Texts = ("control",)
    control_contains: Text | None = None
    cut_at: Text | None = None
    dropped: Texts = ()


class Filter(Entry):
    """Keep the cells for which `column op value` holds; a missing value never does."""

    column: Text
    op: Literal["==", ">=", "<=", "in"]
    value: str | int | float | bool | Annotated[tuple[str | int | float | bool, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _value_fits_op(self) -> Filter:
        if isinstance(self.value, tuple) != (self.op == "in"):
            raise ValueError("`op: in` takes a list of values, every other op a single value")
        if self.op in (">=", "<=") and (isinstance(self.value, str | bool)):
            raise ValueError(f"`op: {self.op!r}` takes a number")
        return self


class Sampling(Entry):
    """Keep `conditions` perturbed conditions: those named in `priority` if present, the rest drawn with the seed.

    Before any filter of cells.
    """

    conditions: Count
    priority: Texts = ()


class Shape(Entry):
    """The published file's size: cells, genes, and distinct perturbed conditions, before any filter."""

    cells: Count
    genes: Count
    conditions: Count


class DatasetSpec(Entry):
    """A data set: its file, how its labels read, and how it is prepared (docs/science.md, section 1)."""

    name: Name
    title: Text
    task: Literal["single", "combination"]
    source: Annotated[HttpsSource | S3Source | LocalSource | SimulatedSource, Field(discriminator="kind")]
    mirror: Annotated[HttpsSource | S3Source, Field(discriminator="kind")] | None = None
    labels: Labels
    filters: Annotated[tuple[Filter, ...], Field(strict=False)] = ()
    sample: Sampling | None = None
    covariate_column: Text | None = None
    covariate: Annotated[str, Field(pattern=r"^[^|]+$")] = "all"
    symbol_column: Text | None = None
    counts_layer: Text | None = None
    library_size: Text | None = None
    min_genes_per_cell: Floor = 200
    min_cells_per_gene: Floor = 3
    min_cells_per_condition: Count = 12
    max_control_cells: Count = 8192
    target_sum: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10_000
    n_variable_genes: Count = 8192
    folds: Annotated[int, Field(ge=2)] | Literal["leave-one-out"] = 5
    seed: Floor = 42
    half_seeds: Count = 5
    licence: Text = "not stated"
    citation: Text = "not stated"
    expected: Shape | None = None

    @model_validator(mode="before")
    @classmethod
    def _folds_of_combinations(cls, entry: Any) -> Any:
        if isinstance(entry, Mapping) and entry.get("task") == "combination":
            return {"folds": COMBINATION_FOLDS, **entry}
        return entry

    @model_validator(mode="after")
    def _folds_fit_task(self) -> DatasetSpec:
        if self.task == "combination" and self.folds != COMBINATION_FOLDS:
            raise ValueError(f"`folds` of a combination data set is always {COMBINATION_FOLDS}: leave it out")
        return self


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
    settings: Settings = {}
    time_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    per_fold: bool = False
    licence: Text = "not stated"
    citation: Text = "not stated"

    @property
    def form(self) -> Form:
        """What the file holds."""
        return FORMS[self.kind]

    @property
    def is_shared(self) -> bool:
        """Whether it is the same for all data sets."""
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
    hyperparameters: Settings = {}
    time_limits: TimeLimits = TimeLimits()
    citation: Text = "not stated"

    @field_validator("name")
    @classmethod
    def _not_a_control(cls, name: str) -> str:
        if name in CONTROLS:
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
