"""What decides how the cells of a data set are prepared; docs/catalog.md explains every field.

The catalog's entry of a data set (core.catalog.schema.DatasetSpec) is these settings and what only describes the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from core.entry import Count, Entry, Floor, Name, Text, Texts

COMBINATION_FOLDS = 2


class Labels(Entry):
    """How a label of the published file becomes a condition: `control`, `A` or `A+B`.

    A label in `control`, or one that contains `control_contains`, is control; cells with a label in `dropped` are left
    out. Of any other label only what comes before the first `cut_at` counts; it is split at `separator` (`+` is always
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


class PreparationSettings(Entry):
    """How the labels of a file read, which cells and genes stay, and how they are split (docs/science.md, section 1).

    `expected` is checked only: it decides nothing about the cells.
    """

    name: Name
    task: Literal["single", "combination"]
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
    expected: Shape | None = None

    @model_validator(mode="before")
    @classmethod
    def _folds_of_combinations(cls, entry: Any) -> Any:
        if isinstance(entry, Mapping) and entry.get("task") == "combination":
            return {"folds": COMBINATION_FOLDS, **entry}
        return entry

    @model_validator(mode="after")
    def _folds_fit_task(self) -> PreparationSettings:
        if self.task == "combination" and self.folds != COMBINATION_FOLDS:
            raise ValueError(f"`folds` of a combination data set is always {COMBINATION_FOLDS}: leave it out")
        return self
